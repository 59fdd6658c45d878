"""A Lightning module around `DCPC`: particles per datum, local learning of the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from dcpc.errors import OptionError
from dcpc.evaluation import Evaluation, evaluate, prior_samples, summarise
from dcpc.inference import DCPC
from dcpc.sweep import Adaptation, SweepInfo, SweepState
from dcpc.training.checkpoint import CheckpointError
from dcpc.training.particles import ParticleStore, datum_axes

__all__ = ["ParticleModule"]

Batch = tuple[Tensor, Tensor, Tensor]
STATE_KEY = "dcpc"


class ParticleModule(LightningModule):
    """Trains a Pyro model on particles that every datum keeps from epoch to epoch.

    A step recalls the particles of its batch, reweights them to the present parameters and sweeps
    them, and descends `- sum_k W_k log p(x, z_k)` per datum. Held-out data are inferred from
    scratch, by annealing, and never enter the store.

    A run resumed from a checkpoint continues exactly. The checkpoint holds, as plain tensors, the
    particles, what the proposals have learned, and a seed and a step count, of which alone the
    randomness of every training step is a function; evaluations have random streams of their own.

    Args:
        model: The Pyro program, a torch module; called with a batch of data, with all latents in
            one plate over the batch.
        num_particles: K, particles per datum.
        algorithm: Preset of `DCPC`: dcpc, dcpc-smc, dcpc-paper, pgd, lpc, mcpc, pc or ipc.
        sweeps_per_step: Sweeps per batch and step of the parameters.
        first_visit_sweeps: Further sweeps where a batch holds data that have no particles yet.
        step_size: Step size of the sweeps; null adapts it where the algorithm can.
        learning_rate: Of Adam; `--optimizer` replaces it altogether.
        evaluation_particles: Particles per held-out datum.
        num_temperatures: Length of the annealing ladder on held-out data while training.
        test_temperatures: Its length for `test` and `predict`. A short ladder overstates the
            evidence NLL, by Jensen's inequality; lengthen it until the figure stands still.
        store_folder: Where the particles' memory-mapped files live during the run; null for the
            run's own folder.

    Raises:
        OptionError: A number out of range, or an unknown algorithm.
    """

    def __init__(
        self,
        model: nn.Module,
        num_particles: int = 4,
        algorithm: str = "dcpc",
        sweeps_per_step: int = 1,
        first_visit_sweeps: int = 0,
        step_size: float | None = None,
        learning_rate: float = 1e-3,
        evaluation_particles: int = 16,
        num_temperatures: int = 100,
        test_temperatures: int = 400,
        store_folder: str | None = None,
    ) -> None:
        super().__init__()
        _require("sweeps_per_step", sweeps_per_step, at_least=1)
        _require("first_visit_sweeps", first_visit_sweeps, at_least=0)
        _require("evaluation_particles", evaluation_particles, at_least=2)
        _require("num_temperatures", num_temperatures, at_least=1)
        _require("test_temperatures", test_temperatures, at_least=1)
        if not 0.0 < learning_rate < float("inf"):
            raise OptionError(f"model.learning_rate must be positive, got {learning_rate}")
        self.model = model
        self.sweeps_per_step = sweeps_per_step
        self.first_visit_sweeps = first_visit_sweeps
        self.learning_rate = learning_rate
        self.num_temperatures = num_temperatures
        self.test_temperatures = test_temperatures
        self.store_folder = store_folder
        self.inference = DCPC(
            model, num_particles=num_particles, algorithm=algorithm, step_size=step_size
        )
        # Evidence needs an exact algorithm, whichever one trains.
        self.held_out_inference = DCPC(model, num_particles=evaluation_particles)
        preset = self.inference.algorithm.preset
        self.automatic_optimization = not preset.step_parameters_every_sweep

        self.store: ParticleStore | None = None
        self.adaptation: Mapping[str, Adaptation] = {}
        self.last_sweep: SweepInfo | None = None
        self.evaluations: list[Evaluation] = []
        self._seed: int | None = None
        self._num_steps = 0
        self._saved_particles: Mapping[str, Any] | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)

    # -- training ----------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Opens the particle store, with the checkpoint's particles if there are any."""
        folder = self.store_folder or self.trainer.log_dir or self.trainer.default_root_dir
        loader = self.trainer.train_dataloader
        assert loader is not None
        self.store = ParticleStore(Path(folder), len(loader.dataset))
        if self._saved_particles is not None:
            self.store.load_state_dict(self._saved_particles)
            self._saved_particles = None
        if self._seed is None:
            self._seed = torch.initial_seed()

    def on_fit_end(self) -> None:
        """Removes the store's files: the checkpoint has the particles."""
        if self.store is not None:
            self.store.close()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sweeps a batch's particles, stores them, and returns the loss per datum, in nats."""
        assert self.store is not None
        x, _, index = batch
        with self._stream(self._num_steps):
            axes = datum_axes(self.inference.division(x), len(x))
            is_first_visit = not bool(self.store.visited(index).all())
            state = self.store.read(index, lambda: self._draw(x), axes)
            state = replace(state, adaptation=self.adaptation)
            for _ in range(self.first_visit_sweeps if is_first_visit else 0):
                state, _ = self.inference.sweep(state, x)
            for _ in range(self.sweeps_per_step):
                state, info = self.inference.sweep(state, x)
                if not self.automatic_optimization:
                    self._step_parameters(self.inference.loss(state, x) / len(x))
            loss = self.inference.loss(state, x) / len(x)
        self.store.write(index, state, axes)
        self.adaptation = state.adaptation
        self.last_sweep = info
        self._num_steps += 1
        ess = 100.0 * info.ess.mean() / state.num_particles
        self.log("train/loss", loss, prog_bar=True, batch_size=len(x))
        self.log("train/ess_percent", ess, prog_bar=True, batch_size=len(x))
        return loss

    def _draw(self, x: Tensor) -> SweepState:
        """Particles of the prior; from a stream of its own, since resuming may draw once more."""
        with self._stream(self._num_steps, 1):
            return self.inference.init(x)

    def _step_parameters(self, loss: Tensor) -> None:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def on_train_epoch_end(self) -> None:
        """Steps the learning rate's schedule where Lightning leaves it to the module."""
        schedulers = self.lr_schedulers()
        if self.automatic_optimization or schedulers is None:
            return
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            scheduler.step()  # type: ignore[call-arg]

    # -- held-out data -----------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, self.num_temperatures)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, self.test_temperatures)

    def on_validation_epoch_start(self) -> None:
        self.evaluations = []

    def on_test_epoch_start(self) -> None:
        self.evaluations = []

    def on_validation_epoch_end(self) -> None:
        self._log_evaluations()

    def on_test_epoch_end(self) -> None:
        self._log_evaluations()

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Reconstructions of a batch, and as many samples of the model's prior."""
        x, labels, index = batch
        measured = self._measure(x, batch_idx, self.test_temperatures)
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

    def _evaluate(self, batch: Batch, batch_idx: int, num_temperatures: int) -> None:
        self.evaluations.append(self._measure(batch[0], batch_idx, num_temperatures))

    def _measure(self, x: Tensor, batch_idx: int, num_temperatures: int) -> Evaluation:
        # The same seed at every evaluation: differences come from the parameters.
        return evaluate(self.held_out_inference, x, num_temperatures, seed=batch_idx)

    def _log_evaluations(self) -> None:
        for name, value in summarise(self.evaluations).items():
            on_bar = name == "evidence_nll"
            if name != "num_data":
                self.log(f"held_out/{name}", value, prog_bar=on_bar, batch_size=1)

    # -- checkpoints -------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what an exact continuation needs, as plain tensors and numbers."""
        checkpoint[STATE_KEY] = {
            "seed": self._seed,
            "num_steps": self._num_steps,
            "adaptation": {name: asdict(learned) for name, learned in self.adaptation.items()},
            "particles": self.store.state_dict() if self.store is not None else None,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores it; the particles follow when training starts."""
        if STATE_KEY not in checkpoint:
            raise CheckpointError(
                f"the checkpoint has no entry {STATE_KEY!r}, so it was not written by dcpc fit"
            )
        saved = checkpoint[STATE_KEY]
        self._seed = saved["seed"]
        self._num_steps = saved["num_steps"]
        self.adaptation = {
            name: Adaptation(**fields) for name, fields in saved["adaptation"].items()
        }
        self._saved_particles = saved["particles"]

    @contextmanager
    def _stream(self, *key: int) -> Iterator[None]:
        """Random numbers that depend on the seed and the key only; leaves the global ones be."""
        assert self._seed is not None
        seed = int(np.random.SeedSequence([self._seed, *key]).generate_state(1)[0])
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            yield


def _require(name: str, value: int, at_least: int) -> None:
    if value < at_least:
        raise OptionError(f"model.{name} must be at least {at_least}, got {value}")
