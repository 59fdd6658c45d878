"""A Lightning module around `DCPC`: particles per datum, local learning of the parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcpc.conquer import Move, Preconditioner
from dcpc.errors import ModelError, OptionError, require_at_least
from dcpc.inference import DCPC
from dcpc.parts import Adaptation
from dcpc.presets import PRESETS, lookup
from dcpc.problem import Problem
from dcpc.recombine.correction import Correction
from dcpc.sweep import SweepInfo, SweepState
from dcpc.training.data import Batch
from dcpc.training.modules.base import STATE_KEY, LearningRateSchedule
from dcpc.training.modules.generative import GenerativeModule, Guide, HeldOut
from dcpc.training.modules.warm_start import Start, guide_objective
from dcpc.training.paths import local_path
from dcpc.training.store import ParticleStore
from dcpc.training.visits import TiedVisit, visit

__all__ = ["ParticleModule"]


class ParticleModule(GenerativeModule):
    """Trains a Pyro model on particles that every datum keeps from epoch to epoch.

    A step recalls the particles of its batch, reweights them to the present parameters and sweeps
    them, and descends `- sum_k W_k log p(x, z_k)` per datum. Held-out data are inferred from
    scratch, by annealing, and never enter the store.

    With a guide, an encoder, particles start from its samples instead of the prior's: at a
    datum's first visit, or at every visit. The guide learns from the swept particles, by descending
    `- sum_k W_k log q(z_k | x)`. Particles learn slowly as long as they are far from their
    posteriors, at each of which they arrive on their own, while an encoder learns for all data at
    once: `start.warm_up_epochs` lets model and guide begin as a variational autoencoder. The guide
    then stays as it is, or, where particles start from it at every visit, goes on to ascend its
    bound, while the model learns from the particles: Hoffman, "Learning deep latent Gaussian models
    with Markov chain Monte Carlo" (2017).

    A run resumed from a checkpoint continues exactly: beside the seed it holds, as plain tensors,
    the particles and what the proposals have learned.

    Args:
        model: The Pyro program, a torch module; called with a batch of data, with all latents in
            one plate over the batch.
        guide: A Pyro program, a torch module, that draws the same latents from a batch of data;
            `encoder` for the one that `model.encoder()` makes, null for none.
        num_particles: K, particles per datum.
        algorithm: Preset of `DCPC`: dcpc, dcpc-smc, dcpc-paper, pgd, lpc, mcpc, pc or ipc.
        sweeps_per_step: Sweeps per batch and step of the parameters.
        step_size: Step size of the sweeps, or step sizes by algorithm; null, like an algorithm
            that is not among them, adapts it where the algorithm can.
        move: Proposal, by name or class path; null for the algorithm's own. `dcpc.conquer.Langevin`
            with several `leapfrog_steps`, each at the price of a gradient, mixes faster than as
            many sweeps.
        correction: Correction of the proposal, likewise.
        preconditioner: Scale of the proposal, likewise.
        blocks: Lists of latents to move jointly, as one unit each; null for one unit per latent.
        start: Where particles start.
        held_out: How held-out data are measured.
        learning_rate: Adam learning rate; ignored when `--optimizer` is given.
        learning_rate_schedule: `cosine` lowers the rate to zero over the run, by
            `trainer.max_epochs`, `trainer.max_steps` or `trainer.max_time`, whichever is nearest;
            null keeps it.
        store_folder: Where the particles' memory-mapped files live during the run; null for the
            run's own folder.

    Raises:
        OptionError: A number out of range, an unknown algorithm, or a start that needs a guide.
    """

    def __init__(
        self,
        model: nn.Module,
        guide: Guide = None,
        num_particles: int = 4,
        algorithm: str = "dcpc",
        sweeps_per_step: int = 1,
        step_size: float | dict[str, float] | None = None,
        move: Move | str | None = None,
        correction: Correction | str | None = None,
        preconditioner: Preconditioner | str | None = None,
        blocks: list[list[str]] | None = None,
        start: Start = Start(),
        held_out: HeldOut = HeldOut(),
        learning_rate: float = 1e-3,
        learning_rate_schedule: LearningRateSchedule | None = None,
        store_folder: str | None = None,
    ) -> None:
        super().__init__(model, guide, held_out, learning_rate, learning_rate_schedule)
        require_at_least("model.sweeps_per_step", sweeps_per_step, 1)
        if self.guide is None:
            start.check_guide()
        preset = lookup("algorithm", algorithm, PRESETS)
        restart = preset.warm_starts_every_visit if start.restart is None else start.restart
        self.sweeps_per_step = sweeps_per_step
        self.start = start
        self.restarts = self.guide is not None and restart
        self.store_folder = store_folder and str(local_path("model.store_folder", store_folder))
        self.inference = DCPC(
            model,
            self.guide,
            num_particles=num_particles,
            algorithm=algorithm,
            move=move,
            correction=correction,
            preconditioner=preconditioner,
            step_size=_step_size(step_size, algorithm),
            blocks=blocks or (),
        )
        self.automatic_optimization = not preset.step_parameters_every_sweep

        self.store: ParticleStore | None = None
        self.adaptation: Mapping[str, Adaptation] = {}
        self.last_sweep: SweepInfo | None = None
        self._guide_losses = guide_objective(start, self.guide is not None, self.restarts)
        self._saved_particles: Mapping[str, Any] | None = None

    def on_train_start(self) -> None:
        """Opens the particle store, with the checkpoint's particles if there are any."""
        super().on_train_start()
        folder = self.store_folder or self.trainer.log_dir or self.trainer.default_root_dir
        loader = self.trainer.train_dataloader
        assert loader is not None
        self.store = ParticleStore(Path(folder), len(loader.dataset))
        if self._saved_particles is not None:
            self.store.load_state_dict(self._saved_particles)
            self._saved_particles = None

    def on_fit_end(self) -> None:
        """Removes the store's files: the checkpoint has the particles."""
        if self.store is not None:
            self.store.close()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sweeps a batch's particles, stores them, and returns the loss per datum, in nats.

        With a guide, the sum of the model's loss and the guide's, which are logged apart.
        """
        x, _, index = batch
        with self.stream(self._num_steps):
            losses = self._warm_up(x) if self.is_warming_up else self._visit(x, index)
        self._num_steps += 1
        for name, loss in losses.items():
            self.log(f"train/{name}", loss, prog_bar=True, batch_size=len(x))
        return _total(losses)

    @property
    def is_warming_up(self) -> bool:
        """Whether this epoch is one of the `warm_up_epochs`."""
        return self.current_epoch < self.start.warm_up_epochs

    def _warm_up(self, x: Tensor) -> dict[str, Tensor]:
        losses = {"negative_elbo": self.negative_elbo(x)}
        self._step_parameters(losses)
        return losses

    def _visit(self, x: Tensor, index: Tensor) -> dict[str, Tensor]:
        """Sweeps the particles of a batch; the losses after the last sweep."""
        assert self.store is not None
        problem = self.inference.bind(x)
        here = visit(problem, self.store, index)
        if isinstance(here, TiedVisit):
            self._check_tied(len(x))
        num_sweeps = self.sweeps_per_step + (self.start.first_sweeps if here.is_first else 0)
        draw = partial(self._draw, problem)
        state = draw() if self.restarts else here.recall(draw)
        state = replace(state, adaptation=self.adaptation)
        for remaining in reversed(range(num_sweeps)):
            state, info = problem.sweep(state)
            if remaining == 0 or self._steps_after(remaining):
                losses = self._losses(problem, state, x)
                self._step_parameters(losses)
        here.keep(state)
        self.adaptation = state.adaptation
        self.last_sweep = info
        ess = 100.0 * info.ess.mean() / state.num_particles
        self.log("train/ess_percent", ess, prog_bar=True, batch_size=len(x))
        return losses

    def _losses(self, problem: Problem, state: SweepState, x: Tensor) -> dict[str, Tensor]:
        """The model's loss per datum, in nats, and the guide's."""
        loss = {"loss": problem.loss(state) / len(x)}
        return loss | self._guide_losses(self, problem, state, x)

    def _steps_after(self, remaining: int) -> bool:
        """Whether the parameters step when so many sweeps of this visit remain."""
        return not self.automatic_optimization and remaining < self.sweeps_per_step

    def _step_parameters(self, losses: Mapping[str, Tensor]) -> None:
        """Steps them, unless Lightning does, by the loss that is returned."""
        if self.automatic_optimization:
            return
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.zero_grad()
        self.manual_backward(_total(losses))
        optimizer.step()

    def _draw(self, problem: Problem) -> SweepState:
        """Fresh particles; from a stream of its own, since resuming may draw once more."""
        with self.stream(self._num_steps, 1):
            return problem.init()

    def _check_tied(self, num_data: int) -> None:
        if self.inference.parts.correction.is_exact:
            raise ModelError(
                f"the {num_data} data of a batch are not independent given the parameters (is a "
                "layer normalised over the batch?), so that algorithm "
                f"{self.inference.algorithm.name!r} would weigh whole batches, and particles per "
                "datum have no weights of their own. Normalise otherwise (norm='group'), or train "
                "with an algorithm that does not weigh: pgd, lpc, mcpc, pc or ipc"
            )

    def on_train_epoch_end(self) -> None:
        """Steps the learning rate's schedule where Lightning leaves it to the module."""
        schedulers = self.lr_schedulers()
        if self.automatic_optimization or schedulers is None:
            return
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            scheduler.step()  # type: ignore[call-arg]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the particles and what the proposals have learned."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[STATE_KEY] |= {
            "adaptation": {name: asdict(learned) for name, learned in self.adaptation.items()},
            "particles": self.store.state_dict() if self.store is not None else None,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores them; the particles follow when training starts."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint[STATE_KEY]
        self.adaptation = {
            name: Adaptation(**fields) for name, fields in saved["adaptation"].items()
        }
        self._saved_particles = saved["particles"]


def _total(losses: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def _step_size(given: float | dict[str, float] | None, algorithm: str) -> float | None:
    if not isinstance(given, dict):
        return given
    for name, step_size in given.items():
        lookup("algorithm of model.step_size", name, PRESETS)
        if not 0.0 < step_size < math.inf:
            raise OptionError(
                f"model.step_size.{name}: step_size must be a positive number, got {step_size}"
            )
    return given.get(algorithm)
