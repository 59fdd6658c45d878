"""Reports of a run: progress in words, files of predictions, the place of the checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import BasePredictionWriter
from torch import Tensor

from dcpc.io import write_tensors
from dcpc.training.callbacks.checkpoints import RunCheckpoint
from dcpc.training.callbacks.grids import NUM_SEQUENCES, film_strips, image_grid, save_png
from dcpc.training.modules import GenerativeModule, MeasuredModule

__all__ = ["PredictionWriter", "RunReport"]


class PredictionWriter(BasePredictionWriter):
    """Writes `predictions.pt`, plain tensors by name, and `predictions.png`.

    Args:
        folder: Where to; null for the run's folder, `trainer.default_root_dir`.
        num_images: Images of each kind in the picture; of sequences, at most eight.
    """

    def __init__(self, folder: str | None = None, num_images: int = 20) -> None:
        super().__init__(write_interval="epoch")
        self.folder = folder
        self.num_images = num_images

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[dict[str, Tensor]],
        batch_indices: Sequence[Any],
    ) -> None:
        if not trainer.is_global_zero:  # all have the same
            return
        folder = Path(self.folder or trainer.default_root_dir)
        names = predictions[0]
        merged = {name: torch.cat([batch[name] for batch in predictions]) for name in names}
        write_tensors(merged, folder / "predictions.pt")
        print(f"predictions of {len(merged['index'])} data: {folder / 'predictions.pt'}")
        if not isinstance(pl_module, GenerativeModule):
            return
        if merged["originals"].dim() == 5:
            self._draw_film_strips(folder / "predictions.png", merged, pl_module)
        elif merged["originals"].dim() == 4:
            self._draw_images(folder / "predictions.png", merged, pl_module)

    def _draw_images(
        self, path: Path, merged: Mapping[str, Tensor], module: GenerativeModule
    ) -> None:
        rows = ("originals", "reconstructions", "prior_sample_means", "prior_samples")
        count = min(self.num_images, len(merged["index"]))
        pictures = torch.cat([merged[name][:count] for name in rows])
        save_png(path, image_grid(pictures, count, module.intensity_range))
        print(f"picture, from top to bottom {', '.join(rows).replace('_', ' ')}: {path}")

    def _draw_film_strips(
        self, path: Path, merged: Mapping[str, Tensor], module: GenerativeModule
    ) -> None:
        kinds = ("originals", "reconstructions", "forecasts", "prior_sample_means")
        rows = [name for name in kinds if name in merged]
        count = min(self.num_images, NUM_SEQUENCES)
        strips = [merged[name][:count] for name in rows]
        save_png(path, film_strips(strips, module.intensity_range))
        print(f"picture, of every sequence {', '.join(rows).replace('_', ' ')}: {path}")


class RunReport(Callback):
    """Says what `dcpc fit` learns and where the checkpoint is.

    Attributes:
        before: The measurements before training, in words.
        after: The last ones; those before training, where none followed.
        is_outdated: Whether the parameters have moved since.
    """

    def __init__(self) -> None:
        self.before: str | None = None
        self.after: str | None = None
        self.is_outdated = False

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        self.is_outdated = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, MeasuredModule)
        if trainer.sanity_checking or trainer.state.fn not in ("fit", "validate"):
            return
        measured = pl_module.describe(pl_module.measurements())
        epoch = trainer.current_epoch + (trainer.state.fn == "fit")
        trainer.print(f"epoch {epoch:>3}: held-out {measured}")
        if trainer.global_step == 0:
            self.before = measured
        self.after = measured
        self.is_outdated = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checkpoint = trainer.checkpoint_callback
        if isinstance(checkpoint, RunCheckpoint) and checkpoint.path is not None:
            link = checkpoint.link(trainer)
            trainer.print(f"checkpoint: {link} (now {os.readlink(link)})")

    def compare(self, trainer: Trainer) -> None:
        """Prints the measurements before and after training, if there are both."""
        if self.before is not None and self.after is not None and self.after is not self.before:
            trainer.print(f"held-out {self.before} before training, {self.after} after")
