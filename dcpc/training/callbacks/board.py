"""TensorBoard entries with captions, and the writer that takes them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
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
    "captioned",
    "log_folder",
    "tensorboard",
    "tested_run",
]

CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints, in the folder of its log."""

WIDTH, HEIGHT = 384, 768
"""Largest magnified picture, in pixels: TensorBoard shows pictures some 350 wide."""

DPI, FONT_SIZE, LINE_HEIGHT, LETTER_WIDTH = 100, 8, 15, 6.2
"""Font of captions: dots per inch, points, pixels of a line and of a letter."""


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
    """Adds a picture `(channels, height, width)` in [0, 1], magnified, below its caption.

    TensorBoard shows no descriptions of pictures, so that a caption is a part of the picture.
    """
    writer.add_image(tag, captioned(grid, caption), step)


def add_figure(writer: SummaryWriter, tag: str, figure: Figure, step: int) -> None:
    """Adds a figure of matplotlib."""
    writer.add_image(tag, _pixels(figure), step)


def captioned(grid: Tensor, caption: str) -> Tensor:
    """A picture below its caption, every pixel as a square of pixels.

    Args:
        grid: `(channels, height, width)` in [0, 1].
        caption: The text; it is broken into lines.

    Returns:
        `(channels, caption + factor * height, factor * width)`.
    """
    channels, height, width = grid.shape
    factor = max(1, min(WIDTH // width, HEIGHT // height))
    large = grid.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    wide = large.shape[2]
    lines = textwrap.wrap(caption, max(1, int(wide / LETTER_WIDTH)))
    size = (wide / DPI, (LINE_HEIGHT * len(lines) + 6) / DPI)
    figure = Figure(figsize=size, dpi=DPI, facecolor="white")
    figure.text(4 / wide, 0.5, "\n".join(lines), fontsize=FONT_SIZE, verticalalignment="center")
    return torch.cat((_pixels(figure)[:channels, :, :wide], large), 1)


def add_text(writer: SummaryWriter, tag: str, text: str, step: int) -> None:
    """Adds Markdown under the tag as it is, where `SummaryWriter.add_text` would lengthen it."""
    entry = summary.text(tag, text)
    entry.value[0].tag = tag
    writer._get_file_writer().add_summary(entry, step)


def _pixels(figure: Figure) -> Tensor:
    """A figure of matplotlib as a picture `(3, height, width)` in [0, 1]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = np.asarray(canvas.buffer_rgba())[..., :3] / np.float32(255)
    return torch.from_numpy(picture).permute(2, 0, 1)
