"""TensorBoard entries with captions, and the writer that takes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter, summary

__all__ = [
    "CHECKPOINTS",
    "add_figure",
    "add_grid",
    "add_text",
    "log_folder",
    "tensorboard",
    "tested_run",
]

CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints, in the folder of its log."""

PICTURE_SIZE = 512
"""Longer side of a magnified picture in pixels, at most."""


def tensorboard(trainer: Trainer) -> SummaryWriter | None:
    """The writer of the first logger that is TensorBoard's."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            return logger.experiment
    return None


def log_folder(checkpoint: str | Path) -> Path | None:
    """The folder of the log that a checkpoint lies beside; None where there is no log."""
    folder = Path(checkpoint).resolve().parent
    is_beside = folder.name == CHECKPOINTS and any(folder.parent.glob("events.out.tfevents.*"))
    return folder.parent if is_beside else None


@contextmanager
def tested_run(trainer: Trainer) -> Iterator[SummaryWriter | None]:
    """A writer to the log of the checkpoint that is tested; None where it has none."""
    folder = None if trainer.ckpt_path is None else log_folder(trainer.ckpt_path)
    if folder is None:
        yield None
        return
    with SummaryWriter(str(folder)) as writer:
        yield writer


def add_grid(writer: SummaryWriter, tag: str, grid: Tensor, step: int, caption: str) -> None:
    """Adds a picture `(channels, height, width)` in [0, 1], every pixel as a square of pixels."""
    factor = max(1, PICTURE_SIZE // max(grid.shape[1:]))
    large = grid.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    _add_image(writer, summary.image(tag, large, dataformats="CHW"), step, caption)


def add_figure(writer: SummaryWriter, tag: str, figure: Figure, step: int, caption: str) -> None:
    """Adds a figure of matplotlib."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = np.asarray(canvas.buffer_rgba())[..., :3]
    _add_image(writer, summary.image(tag, picture, dataformats="HWC"), step, caption)


def add_text(writer: SummaryWriter, tag: str, text: str, step: int) -> None:
    """Adds Markdown under the tag as it is, where `SummaryWriter.add_text` would lengthen it."""
    entry = summary.text(tag, text)
    entry.value[0].tag = tag
    writer._get_file_writer().add_summary(entry, step)


def _add_image(writer: SummaryWriter, entry: summary.Summary, step: int, caption: str) -> None:
    entry.value[0].metadata.summary_description = caption
    writer._get_file_writer().add_summary(entry, step)
