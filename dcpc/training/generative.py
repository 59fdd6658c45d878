"""What all trained models share: the optimiser, held-out evaluation, resumable randomness."""

from __future__ import annotations

import math
from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import Timer
from torch import Tensor, nn

from dcpc.errors import OptionError
from dcpc.evaluation import (
    Evaluation,
    evaluate,
    held_out_inference,
    prior_samples,
    summarise,
)
from dcpc.seeding import derived_seed, seeded
from dcpc.training.checkpoint import CheckpointError
from dcpc.training.data import Batch

__all__ = ["GenerativeModule", "Schedule"]

Schedule = Literal["cosine"]
STATE_KEY = "dcpc"


class GenerativeModule(LightningModule):
    """Base class: a Pyro program of images, and what is measured on data it never saw.

    Held-out data are inferred from scratch, by annealing, whatever the algorithm that trains: the
    evidence is a property of the model alone.

    A checkpoint holds a seed and a step count, of which alone the randomness of every training
    step is a function; evaluations have random streams of their own.

    Args:
        model: The Pyro program, a torch module; called with a batch of data, with all latents in
            one plate over the batch.
        learning_rate: Of Adam; `--optimizer` replaces it altogether.
        learning_rate_schedule: `cosine` lowers the rate to zero over the run, by
            `trainer.max_epochs`, `trainer.max_steps` or `trainer.max_time`, whichever is nearest;
            null keeps it.
        evaluation_particles: Particles per held-out datum.
        num_temperatures: Length of the annealing ladder on held-out data while training.
        test_temperatures: Its length for `test` and `predict`. A short ladder overstates the
            evidence NLL, by Jensen's inequality; lengthen it until the figure stands still.

    Attributes:
        evaluations: Of the last round over the held-out data.
        intensity_range: Intensities of black and of white in the data.

    Raises:
        OptionError: A number out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float = 1e-3,
        learning_rate_schedule: Schedule | None = None,
        evaluation_particles: int = 16,
        num_temperatures: int = 100,
        test_temperatures: int = 400,
    ) -> None:
        super().__init__()
        require("evaluation_particles", evaluation_particles, at_least=2)
        require("num_temperatures", num_temperatures, at_least=1)
        require("test_temperatures", test_temperatures, at_least=1)
        if not 0.0 < learning_rate < math.inf:
            raise OptionError(f"model.learning_rate must be positive, got {learning_rate}")
        if learning_rate_schedule not in (None, "cosine"):
            raise OptionError(
                "model.learning_rate_schedule must be null or 'cosine', got "
                f"{learning_rate_schedule!r}"
            )
        self.model = model
        self.learning_rate = learning_rate
        self.learning_rate_schedule = learning_rate_schedule
        self.num_temperatures = num_temperatures
        self.test_temperatures = test_temperatures
        self.held_out_inference = held_out_inference(model, evaluation_particles)
        self.intensity_range = (0.0, 1.0)
        self.evaluations: list[Evaluation] = []
        self._seed: int | None = None
        self._num_steps = 0

    @abstractmethod
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the loss per datum, in nats."""

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        self.intensity_range = getattr(data, "intensity_range", self.intensity_range)

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
        self.measure(batch[0], batch_idx, self.num_temperatures)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.measure(batch[0], batch_idx, self.test_temperatures)

    def on_validation_epoch_start(self) -> None:
        self.evaluations = []

    def on_test_epoch_start(self) -> None:
        self.evaluations = []

    def on_validation_epoch_end(self) -> None:
        self._log_measurements()

    def on_test_epoch_end(self) -> None:
        self._log_measurements()

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Reconstructions of a batch, and as many samples of the model's prior."""
        x, labels, index = batch
        measured = self._evaluate(x, batch_idx, self.test_temperatures)
        samples, means = prior_samples(self.model, x, seed=batch_idx)
        return {
            "index": index,
            "labels": labels,
            "originals": x,
            "reconstructions": measured.reconstructions,
            "evidence_nll": measured.evidence_nll,
            "prior_samples": samples,
            "prior_sample_means": means,
        }

    def measure(self, x: Tensor, batch_idx: int, num_temperatures: int) -> None:
        """Measures a batch of held-out data."""
        self.evaluations.append(self._evaluate(x, batch_idx, num_temperatures))

    def measurements(self) -> dict[str, float]:
        """What was measured in this round over the held-out data, by name."""
        return summarise(self.evaluations)

    def _evaluate(self, x: Tensor, batch_idx: int, num_temperatures: int) -> Evaluation:
        # The same seed at every evaluation: differences come from the parameters.
        return evaluate(
            self.held_out_inference, x, num_temperatures, batch_idx, self.intensity_range
        )

    def _log_measurements(self) -> None:
        for name, value in self.measurements().items():
            on_bar = name == "evidence_nll"
            if name != "num_data":
                self.log(f"held_out/{name}", value, prog_bar=on_bar, batch_size=1)

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


def require(name: str, value: int, at_least: int) -> None:
    """Checks an integer argument of a module."""
    if value < at_least:
        raise OptionError(f"model.{name} must be at least {at_least}, got {value}")
