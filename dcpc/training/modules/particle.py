"""A Lightning module around `DCPC`: particles per datum, local learning of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.func import functional_call

from dcpc.conquer import Move, Preconditioner
from dcpc.divide.handlers import quiet
from dcpc.errors import ModelError, OptionError, require_at_least
from dcpc.inference import DCPC
from dcpc.parts import Adaptation
from dcpc.presets import PRESETS, lookup
from dcpc.problem import Problem
from dcpc.recombine.correction import Correction
from dcpc.sweep import SweepInfo, SweepState
from dcpc.training.data import Batch
from dcpc.training.modules.base import STATE_KEY, LearningRateSchedule
from dcpc.training.modules.generative import GenerativeModule
from dcpc.training.store import ParticleStore, datum_axes, gather, spread

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
    once: `warm_up_epochs` lets model and guide begin as a variational autoencoder. The guide then
    stays as it is, or, where particles start from it at every visit, goes on to ascend its bound,
    while the model learns from the particles: Hoffman, "Learning deep latent Gaussian models with
    Markov chain Monte Carlo" (2017).

    A run resumed from a checkpoint continues exactly: beside the seed it holds, as plain tensors,
    the particles and what the proposals have learned.

    Args:
        model: The Pyro program, a torch module; called with a batch of data, with all latents in
            one plate over the batch.
        guide: A Pyro program, a torch module, that draws the same latents from a batch of data;
            null for none.
        num_particles: K, particles per datum.
        algorithm: Preset of `DCPC`: dcpc, dcpc-smc, dcpc-paper, pgd, lpc, mcpc, pc or ipc.
        sweeps_per_step: Sweeps per batch and step of the parameters.
        first_visit_sweeps: Further sweeps where a batch holds data that have no particles yet.
        warm_up_epochs: Epochs at the start in which model and guide descend minus the evidence
            lower bound, as with `AmortisedModule`, and there are no particles yet.
        restart: Whether particles start from the guide at every visit, instead of where the last
            visit left them; null for what the algorithm does: `lpc` restarts.
        step_size: Step size of the sweeps; null adapts it where the algorithm can.
        move: Proposal, by name or class path; null for the algorithm's own. `dcpc.conquer.Langevin`
            with several `leapfrog_steps`, each at the price of a gradient, mixes faster than as
            many sweeps.
        correction: Correction of the proposal, likewise.
        preconditioner: Scale of the proposal, likewise.
        blocks: Lists of latents to move jointly, as one unit each; null for one unit per latent.
        bound_samples: Samples of the guide per held-out datum of the importance-weighted bound.
        learning_rate: Adam learning rate; ignored when `--optimizer` is given.
        learning_rate_schedule: `cosine` lowers the rate to zero over the run, by
            `trainer.max_epochs`, `trainer.max_steps` or `trainer.max_time`, whichever is nearest;
            null keeps it.
        evaluation_particles: Particles per held-out datum.
        num_temperatures: Length of the annealing ladder on held-out data while training.
        test_temperatures: Its length for `test` and `predict`. A short ladder overstates the
            evidence NLL, by Jensen's inequality; lengthen it until the figure stands still.
        test_completion: Whether `test` also completes the upper half of images from the lower one,
            which takes as long again.
        store_folder: Where the particles' memory-mapped files live during the run; null for the
            run's own folder.

    Raises:
        OptionError: A number out of range, or an unknown algorithm.
    """

    def __init__(
        self,
        model: nn.Module,
        guide: nn.Module | None = None,
        num_particles: int = 4,
        algorithm: str = "dcpc",
        sweeps_per_step: int = 1,
        first_visit_sweeps: int = 0,
        warm_up_epochs: int = 0,
        restart: bool | None = None,
        step_size: float | None = None,
        move: Move | str | None = None,
        correction: Correction | str | None = None,
        preconditioner: Preconditioner | str | None = None,
        blocks: list[list[str]] | None = None,
        bound_samples: int = 100,
        learning_rate: float = 1e-3,
        learning_rate_schedule: LearningRateSchedule | None = None,
        evaluation_particles: int = 16,
        num_temperatures: int = 100,
        test_temperatures: int = 400,
        test_completion: bool = False,
        store_folder: str | None = None,
    ) -> None:
        super().__init__(
            model,
            guide,
            bound_samples,
            learning_rate,
            learning_rate_schedule,
            evaluation_particles,
            num_temperatures,
            test_temperatures,
            test_completion,
        )
        require_at_least("model.sweeps_per_step", sweeps_per_step, 1)
        require_at_least("model.first_visit_sweeps", first_visit_sweeps, 0)
        require_at_least("model.warm_up_epochs", warm_up_epochs, 0)
        if warm_up_epochs and guide is None:
            raise OptionError(
                f"model.warm_up_epochs={warm_up_epochs} needs a guide to warm up with: give "
                "model.guide, an encoder that draws the model's latents, or leave the epochs at 0"
            )
        if restart and guide is None:
            raise OptionError(
                "model.restart=True needs a guide to start particles from: give model.guide, an "
                "encoder that draws the model's latents, or leave restart at null"
            )
        self.sweeps_per_step = sweeps_per_step
        self.first_visit_sweeps = first_visit_sweeps
        self.warm_up_epochs = warm_up_epochs
        self.store_folder = store_folder
        preset = lookup("algorithm", algorithm, PRESETS)
        self.restart = preset.warm_starts_every_visit if restart is None else restart
        self.inference = DCPC(
            model,
            guide,
            num_particles=num_particles,
            algorithm=algorithm,
            move=move,
            correction=correction,
            preconditioner=preconditioner,
            step_size=step_size,
            blocks=blocks or (),
        )
        self.automatic_optimization = not preset.step_parameters_every_sweep

        self.store: ParticleStore | None = None
        self.adaptation: Mapping[str, Adaptation] = {}
        self.last_sweep: SweepInfo | None = None
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
        assert self.store is not None
        x, _, index = batch
        if self.is_warming_up:
            return self._warm_up(x)
        with self.stream(self._num_steps):
            problem = self.inference.bind(x)
            axes = datum_axes(problem.division, len(x))
            tied = self._are_tied(problem, len(x))
            state = replace(self._recall(problem, index, axes, tied), adaptation=self.adaptation)
            is_first_visit = not bool(self.store.visited(index).all())
            for _ in range(self.first_visit_sweeps if is_first_visit else 0):
                state, _ = problem.sweep(state)
            for _ in range(self.sweeps_per_step):
                state, info = problem.sweep(state)
                if not self.automatic_optimization:
                    losses = self._losses(problem, state, x)
                    self._step_parameters(_total(losses))
            if self.automatic_optimization:
                losses = self._losses(problem, state, x)
        self.store.write(index, spread(state, len(x)) if tied else state, axes)
        self.adaptation = state.adaptation
        self.last_sweep = info
        self._num_steps += 1
        ess = 100.0 * info.ess.mean() / state.num_particles
        for name, loss in losses.items():
            self.log(f"train/{name}", loss, prog_bar=True, batch_size=len(x))
        self.log("train/ess_percent", ess, prog_bar=True, batch_size=len(x))
        return _total(losses)

    @property
    def is_warming_up(self) -> bool:
        """Whether this epoch is one of the `warm_up_epochs`."""
        return self.current_epoch < self.warm_up_epochs

    def _warm_up(self, x: Tensor) -> Tensor:
        """Returns minus the evidence lower bound of a batch per datum, in nats."""
        with self.stream(self._num_steps):
            loss = self._negative_elbo(self.model, x)
        if not self.automatic_optimization:
            self._step_parameters(loss)
        self._num_steps += 1
        self.log("train/negative_elbo", loss, prog_bar=True, batch_size=len(x))
        return loss

    def _negative_elbo(self, model: Callable[..., Any], x: Tensor) -> Tensor:
        """Minus the evidence lower bound of a batch per datum, in nats."""
        return Trace_ELBO().differentiable_loss(model, self.guide, x) / len(x)

    def _recall(
        self, problem: Problem, index: Tensor, axes: Mapping[str, int], tied: bool
    ) -> SweepState:
        """The stored particles; fresh ones at a first visit, or where the encoder starts all."""
        assert self.store is not None
        if self.guide is not None and self.restart:
            return self._draw(problem)
        if tied:
            fresh = self.store.read(index, lambda: spread(self._draw(problem), len(index)), axes)
            return gather(fresh)
        return self.store.read(index, lambda: self._draw(problem), axes)

    def _are_tied(self, problem: Problem, num_data: int) -> bool:
        """Whether the data of a batch share one density, as under batch normalisation."""
        tied = not problem.division.population
        if tied and self.inference.parts.correction.is_exact:
            raise ModelError(
                f"the {num_data} data of a batch are not independent given the parameters (is a "
                "layer normalised over the batch?), so that algorithm "
                f"{self.inference.algorithm.name!r} would weigh whole batches, and particles per "
                "datum have no weights of their own. Normalise otherwise (norm='group'), or train "
                "with an algorithm that does not weigh: pgd, lpc, mcpc, pc or ipc"
            )
        return tied

    def _draw(self, problem: Problem) -> SweepState:
        """Fresh particles; from a stream of its own, since resuming may draw once more."""
        with self.stream(self._num_steps, 1):
            return problem.init()

    def _losses(self, problem: Problem, state: SweepState, x: Tensor) -> dict[str, Tensor]:
        """The model's loss per datum, and the guide's if it learns from the particles."""
        losses = {"loss": problem.loss(state) / len(x)}
        if self.guide is not None and not self.warm_up_epochs:
            losses["guide_loss"] = problem.guide_loss(state) / len(x)
        elif self.guide is not None and self.restart:
            # Single particles are noisy teachers: what has learned by the bound goes on by it.
            frozen = {name: value.detach() for name, value in self.model.named_parameters()}
            with quiet():  # Pyro's warning of parameters that do not learn
                losses["negative_elbo"] = self._negative_elbo(
                    partial(functional_call, self.model, frozen), x
                )
        return losses

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
