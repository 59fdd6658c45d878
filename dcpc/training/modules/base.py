"""Base of the trained modules: the optimiser, held-out measurements, resumable randomness."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import Timer

from dcpc.errors import OptionError
from dcpc.seeding import derived_seed, seeded
from dcpc.training.checkpoint import CheckpointError
from dcpc.training.data import Batch

__all__ = ["LearningRateSchedule", "MeasuredModule"]

LearningRateSchedule = Literal["cosine"]
STATE_KEY = "dcpc"


class MeasuredModule(LightningModule, ABC):
    """Base class: something that learns, and is measured on data that it never saw.

    A checkpoint holds a seed and a step count, of which alone the randomness of every training
    step is a function; measurements have random streams of their own.

    Args:
        learning_rate: Adam learning rate; ignored when `--optimizer` is given.
        learning_rate_schedule: `cosine` lowers the rate to zero over the run, by
            `trainer.max_epochs`, `trainer.max_steps` or `trainer.max_time`, whichever is nearest;
            null keeps it.

    Attributes:
        headline: The measurement that the progress bar shows.

    Raises:
        OptionError: A number out of range.
    """

    headline: ClassVar[str]

    def __init__(
        self,
        learning_rate: float = 1e-3,
        learning_rate_schedule: LearningRateSchedule | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 < learning_rate < math.inf:
            raise OptionError(f"model.learning_rate must be positive, got {learning_rate}")
        if learning_rate_schedule not in (None, "cosine"):
            raise OptionError(
                "model.learning_rate_schedule must be null or 'cosine', got "
                f"{learning_rate_schedule!r}"
            )
        self.learning_rate = learning_rate
        self.learning_rate_schedule = learning_rate_schedule
        self._seed: int | None = None
        self._num_steps = 0

    # -- to define ---------------------------------------------------------------------------

    @abstractmethod
    def start_measurements(self) -> None:
        """Begins a round over the held-out data."""

    @abstractmethod
    def measure(self, batch: Batch, batch_idx: int, is_test: bool) -> None:
        """Measures a batch of held-out data, more closely for `dcpc test`."""

    @abstractmethod
    def measurements(self) -> dict[str, float]:
        """Measurements of this round over the held-out data, by name."""

    @abstractmethod
    def describe(self, measurements: Mapping[str, float]) -> str:
        """Measurements in a few words."""

    @abstractmethod
    def table(self, is_test: bool) -> str:
        """The measurements of this round in full."""

    # -- training ----------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)

    def on_train_start(self) -> None:
        if self._seed is None:
            self._seed = torch.initial_seed()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Sets the learning rate, which is a function of how much of the run is done."""
        if self.learning_rate_schedule is None:
            return
        factor = 0.5 * (1.0 + math.cos(math.pi * min(self._progress(), 1.0)))
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group.setdefault("initial_lr", group["lr"])

    def _progress(self) -> float:
        """Fraction of the run that is done, by steps or by time."""
        done = [0.0]
        total = self.trainer.num_training_batches * (self.trainer.max_epochs or 0)
        if 0 < total < math.inf:
            done.append(self._num_steps / total)
        if self.trainer.max_steps > 0:
            done.append(self.trainer.global_step / self.trainer.max_steps)
        for timer in (c for c in self.trainer.callbacks if isinstance(c, Timer)):  # type: ignore[attr-defined]
            remaining, elapsed = timer.time_remaining(), timer.time_elapsed()
            if remaining is not None and elapsed + remaining > 0:
                done.append(elapsed / (elapsed + remaining))
        return max(done)

    # -- held-out data -----------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.measure(batch, batch_idx, is_test=False)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.measure(batch, batch_idx, is_test=True)

    def on_validation_epoch_start(self) -> None:
        self.start_measurements()

    def on_test_epoch_start(self) -> None:
        self.start_measurements()

    def on_validation_epoch_end(self) -> None:
        self._log_measurements()

    def on_test_epoch_end(self) -> None:
        self._log_measurements()

    def _log_measurements(self) -> None:
        for name, value in self.measurements().items():
            if name != "num_data":
                self.log(f"held_out/{name}", value, prog_bar=name == self.headline, batch_size=1)

    # -- checkpoints -------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what an exact continuation needs, as plain tensors and numbers."""
        checkpoint[STATE_KEY] = {"seed": self._seed, "num_steps": self._num_steps}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if STATE_KEY not in checkpoint:
            raise CheckpointError(
                f"the checkpoint has no entry {STATE_KEY!r}, so it was not written by dcpc fit"
            )
        saved = checkpoint[STATE_KEY]
        self._seed = saved["seed"]
        self._num_steps = saved["num_steps"]

    def stream(self, *key: int) -> AbstractContextManager[None]:
        """Random numbers that depend on the seed and the key only; leaves the global ones be."""
        assert self._seed is not None
        return seeded(derived_seed(self._seed, *key))
