"""What a run shows: TensorBoard scalars and images, files of predictions, tables."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import BasePredictionWriter
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dcpc.evaluation import prior_samples
from dcpc.sweep import SweepInfo
from dcpc.training.generative import GenerativeModule
from dcpc.training.images import image_grid, save_png
from dcpc.training.measured import MeasuredModule
from dcpc.training.module import ParticleModule

__all__ = [
    "EvaluationTable",
    "ImageGrids",
    "PredictionWriter",
    "RunReport",
    "SweepMonitor",
    "num_batches",
    "tensorboard",
]


class SweepMonitor(Callback):
    """Logs what the sweeps of a training step did; idle for modules that do not sweep.

    As scalars, by unit: acceptance (or conditional ESS, see `SweepInfo.statistic`) and step size;
    and the number of bad log-densities. As histograms over the batch's data, in TensorBoard:
    every latent's unconstrained values, the particles' log-weights (of mean weight one), and the
    ESS in percent before resampling.

    Args:
        every_n_steps: Every so many batches; the trainer's `log_every_n_steps`, since it drops
            what is logged in between.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = num_batches(trainer) - 1
        if not isinstance(pl_module, ParticleModule) or (step + 1) % self.every_n_steps:
            return
        info = pl_module.last_sweep
        if info is None:  # the encoder is still warming up
            return
        division = pl_module.inference.division(batch[0])
        for kind, values in (("acceptance", info.statistic), ("step_size", info.step_size)):
            for unit, value in division.by_unit(values).items():
                pl_module.log(f"sweep/{kind}/{unit}", value, batch_size=1)
        pl_module.log("sweep/num_bad", float(info.num_bad), batch_size=1)
        writer = tensorboard(trainer)
        if writer is not None:
            for tag, numbers in _histograms(pl_module, info, batch[2]).items():
                writer.add_histogram(tag, numbers, step)


class ImageGrids(Callback):
    """Logs grids of held-out originals, their reconstructions, and samples of the prior.

    Args:
        num_images: Images per grid; a square number fills it.
    """

    def __init__(self, num_images: int = 64) -> None:
        self.num_images = num_images

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        writer = tensorboard(trainer)
        if (
            writer is None
            or not isinstance(pl_module, GenerativeModule)
            or not pl_module.evaluations
        ):
            return
        first = pl_module.evaluations[0]
        originals = first.originals[: self.num_images]
        if originals.dim() != 4:
            return
        _, means = prior_samples(pl_module.model, originals, seed=0)
        columns = math.isqrt(max(len(originals) - 1, 0)) + 1
        for name, pictures in (
            ("originals", originals),
            ("reconstructions", first.reconstructions[: self.num_images]),
            ("prior_samples", means),
        ):
            grid = image_grid(pictures, columns, pl_module.intensity_range)
            writer.add_image(f"images/{name}", grid, num_batches(trainer))


class EvaluationTable(Callback):
    """Prints the measurements of `dcpc test` and `dcpc validate`."""

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, MeasuredModule)
        print("\n" + pl_module.table(is_test=True))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, MeasuredModule)
        print("\n" + pl_module.table(is_test=False))


class PredictionWriter(BasePredictionWriter):
    """Writes `predictions.pt`, plain tensors by name, and `predictions.png`.

    Args:
        folder: Where to; null for the run's folder, `trainer.default_root_dir`.
        num_images: Images of each kind in the picture.
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
        folder = Path(self.folder or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        names = predictions[0]
        merged = {name: torch.cat([batch[name] for batch in predictions]) for name in names}
        torch.save(merged, folder / "predictions.pt")
        print(f"predictions of {len(merged['index'])} data: {folder / 'predictions.pt'}")
        if not isinstance(pl_module, GenerativeModule) or merged["originals"].dim() != 4:
            return
        rows = ("originals", "reconstructions", "prior_sample_means", "prior_samples")
        count = min(self.num_images, len(merged["index"]))
        pictures = torch.cat([merged[name][:count] for name in rows])
        grid = image_grid(pictures, count, pl_module.intensity_range)
        save_png(folder / "predictions.png", grid)
        print(
            f"picture, from top to bottom {', '.join(rows).replace('_', ' ')}: "
            f"{folder / 'predictions.png'}"
        )


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

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _link_latest(trainer)  # at every epoch, so that an interrupted run can be resumed

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        link = _link_latest(trainer)
        if link is not None:
            print(f"checkpoint: {link} (now {os.readlink(link)})")

    def compare(self) -> None:
        """Prints the measurements before and after training, if there are both."""
        if self.before is not None and self.after is not None and self.after is not self.before:
            print(f"held-out {self.before} before training, {self.after} after")


def num_batches(trainer: Trainer) -> int:
    """Batches trained on: what TensorBoard calls a step.

    Not the optimiser's steps, of which `ipc` and the incremental rules take several per batch.
    """
    return trainer.fit_loop.total_batch_idx + 1


def tensorboard(trainer: Trainer) -> SummaryWriter | None:
    """The writer of the first logger that is TensorBoard's."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            return logger.experiment
    return None


def _histograms(module: ParticleModule, info: SweepInfo, index: Tensor) -> dict[str, Tensor]:
    """By tag, the numbers of a batch's data that are finite."""
    assert module.store is not None
    stored = module.store.state_dict()
    rows = index.cpu()
    numbers = {f"sweep/latents/{name}": u[rows] for name, u in stored["latents"].items()}
    numbers["sweep/log_weight"] = stored["log_weight"][rows]
    numbers["sweep/ess_percent"] = 100.0 * info.ess / module.inference.num_particles
    finite = {tag: values[values.isfinite()] for tag, values in numbers.items()}
    return {tag: values for tag, values in finite.items() if values.numel()}


def _link_latest(trainer: Trainer) -> Path | None:
    """Makes `last.ckpt` in the run's folder point to its checkpoint, if there is one yet."""
    checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if not checkpoint:
        return None
    folder = Path(trainer.default_root_dir)
    link = folder / "last.ckpt"
    if link.exists() and link.samefile(checkpoint):
        return link
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(checkpoint, folder))
    return link
