"""Base of the trained modules: the optimiser, held-out measurements, resumable randomness."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

import torch
from pytorch_lightning import LightningModule
from torch import Tensor

from dcpc.errors import OptionError
from dcpc.evaluation import Result, format_results, held_out_tag, results
from dcpc.seeding import derived_seed, seeded
from dcpc.training.checkpoint import CheckpointError
from dcpc.training.data import Batch, LabelledData, check_finite, check_sets
from dcpc.training.divergence import Watch, failures_told
from dcpc.training.processes import check_strategy
from dcpc.training.run_length import fractions_done

__all__ = ["LearningRateSchedule", "MeasuredModule"]

LearningRateSchedule = Literal["cosine"]
STATE_KEY = "dcpc"
PROCESS = 1_000_003
"""Keeps streams of other processes apart from those of other keys."""

DOUBLE = "64-true"
PRECISIONS = ("32-true", DOUBLE)


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
        averages_gradients: Whether Lightning computes the gradients, and averages them over
            processes.

    Raises:
        OptionError: A number out of range.
    """

    headline: ClassVar[str]
    averages_gradients: ClassVar[bool] = True

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
        self.watch = Watch()
        self._seed: int | None = None
        self._num_steps = 0
        self._loss: Tensor | None = None

    # -- to define ---------------------------------------------------------------------------

    @abstractmethod
    def learn(self, batch: Batch) -> Tensor | None:
        """Learns from a batch.

        Returns:
            The loss per datum, in nats, for Lightning to descend; None if that was done here.
        """

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
    def standard_errors(self) -> dict[str, float]:
        """Standard errors of the measurements by name, where they are known."""

    @abstractmethod
    def conditions(self, is_test: bool) -> dict[str, int]:
        """Number of data of this round, as `num_data`, and the settings that it was measured by."""

    @property
    def charts(self) -> dict[str, str]:
        """By title, regular expressions of the tags in charts of TensorBoard's overview."""
        return {"training loss": "train/loss$"}

    def settings(self) -> dict[str, str]:
        """Settings that a resumed run shares with the first one, in words, by their keys."""
        return {"model.class_path": type(self).__name__}

    # -- training ----------------------------------------------------------------------------

    @property
    def seed(self) -> int | None:
        """Seed of the training; None before it."""
        return self._seed

    @property
    def is_trained(self) -> bool:
        """Whether it has learned from a batch."""
        return self._num_steps > 0

    @property
    def last_step(self) -> int:
        """Index of the last batch that was learned from: what TensorBoard calls a step.

        Not the optimiser's steps, of which `ipc` and the incremental rules take several per batch.
        """
        return max(self._num_steps - 1, 0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)

    def setup(self, stage: str) -> None:
        """Refuses unusable data, and precisions that captured programs are not certified in.

        Lightning would apply double precision only after it has loaded the weights of a checkpoint,
        and round these to the model's precision before.

        Raises:
            DataError: There are no data to train on, or to measure by.
            OptionError: `trainer.precision` is neither single nor double.
        """
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, LabelledData):
            check_sets(data)
        precision = str(self.trainer.precision)
        if precision not in PRECISIONS:
            raise OptionError(
                f"trainer.precision must be one of {', '.join(PRECISIONS)}, got "
                f"{precision!r}: log-densities cancel in half precision"
            )
        if precision == DOUBLE:
            self.double()

    def on_train_start(self) -> None:
        """Refuses to go on with the state of another optimiser.

        Raises:
            CheckpointError: The checkpoint has that of another kind.
        """
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:  # those of the checkpoint, if there is one
                lacking = sorted(optimizer.defaults.keys() - group.keys())
                if lacking:
                    raise CheckpointError(
                        "optimizer: the checkpoint was trained with another one than "
                        f"{type(optimizer).__name__}, without '{lacking[0]}'; resume with that of "
                        "the first run, or start from its weights alone, with --init_from in the "
                        "place of --ckpt_path"
                    )
        has_guide = getattr(self, "guide", None) is not None
        check_strategy(self.trainer, has_guide, self.averages_gradients)
        if self._seed is None:
            self._seed = torch.initial_seed()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Takes a step of learning, and returns the loss per datum where Lightning descends it.

        Raises:
            DataError: A datum holds a number that is not finite.
            DivergenceError: The model can no longer be run.
        """
        check_finite(batch)
        with self.stream(self._num_steps), failures_told(self._num_steps):
            loss = self.learn(batch)
        self._num_steps += 1
        if self.automatic_optimization:
            self._loss = None if loss is None else loss.detach()
            return loss
        if self.trainer.is_last_batch:  # of the epoch; Lightning leaves it to the module
            for scheduler in self._schedulers():
                scheduler.step()
        return None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leaves a step out that would spoil the parameters.

        Raises:
            DivergenceError: The last steps were bad, all of them.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not self.watch.usable(self._loss, gradients):
            for parameter in parameters:
                parameter.grad = None

    def _schedulers(self) -> list[Any]:
        schedulers = self.lr_schedulers()
        if schedulers is None:
            return []
        return schedulers if isinstance(schedulers, list) else [schedulers]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Sets the learning rate, which is a function of how much of the run is done."""
        if self.learning_rate_schedule is None:
            return
        done = max(fractions_done(self.trainer, self._num_steps), default=0.0)
        factor = 0.5 * (1.0 + math.cos(math.pi * done))
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group.setdefault("initial_lr", group["lr"])

    # -- held-out data -----------------------------------------------------------------------

    def results(self) -> dict[str, Result]:
        """The measurements of this round with standard errors, units and meanings, by name."""
        return results(self.measurements(), self.standard_errors())

    def table(self, is_test: bool, style: Literal["plain", "github"] = "plain") -> str:
        """The measurements of this round in full, for a terminal or as Markdown."""
        return format_results(self.results(), self.conditions(is_test), style)

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
            if name == "num_data":
                continue
            self.log(
                held_out_tag(name),
                value,
                prog_bar=name == self.headline,
                batch_size=1,
                # Every process measures all held-out data, so that all have the same value.
                sync_dist=True,
            )

    # -- checkpoints -------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what an exact continuation needs, as plain tensors and numbers."""
        checkpoint[STATE_KEY] = {
            "seed": self._seed,
            "num_steps": self._num_steps,
            "watch": self.watch.state_dict(),
            "settings": self.settings(),
        }

    def check_settings(self, checkpoint: Mapping[str, Any]) -> None:
        """Checks that this run may go on from a checkpoint.

        Raises:
            CheckpointError: It was trained with other settings.
        """
        saved = checkpoint.get(STATE_KEY, {}).get("settings", {})  # early checkpoints have none
        for key, here in self.settings().items():
            there = saved.get(key, here)
            if there != here:
                raise CheckpointError(
                    f"--ckpt_path: the checkpoint was trained with {key} {there}, and this run has "
                    f"{here}; resume with the settings of the first run, or start from its weights "
                    "alone, with --init_from in the place of --ckpt_path"
                )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores it.

        Raises:
            CheckpointError: `dcpc fit` has not written it, or has for another run.
        """
        if STATE_KEY not in checkpoint:
            raise CheckpointError(
                f"the checkpoint has no entry {STATE_KEY!r}, so it was not written by dcpc fit"
            )
        if self.trainer.state.fn == "fit":
            self.check_settings(checkpoint)
        saved = checkpoint[STATE_KEY]
        self._seed = saved["seed"]
        self._num_steps = saved["num_steps"]
        self.watch.load_state_dict(saved.get("watch", {"first": []}))

    def stream(self, *key: int) -> AbstractContextManager[None]:
        """Random numbers that depend on the seed, the key and the process only.

        Leaves the global ones be.
        """
        assert self._seed is not None
        rank = self.global_rank  # of the first process, as if there were no other
        return seeded(derived_seed(self._seed, *key, *([PROCESS, rank] if rank else [])))
