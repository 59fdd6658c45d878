"""A Lightning module around `DCPC`: particles per datum, local learning of the parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from dcpc.conquer import Move, Preconditioner
from dcpc.coordinates import transported
from dcpc.divide.cache import Blocks
from dcpc.errors import ModelError, OptionError, require_at_least
from dcpc.graphs.tiers import Mode
from dcpc.independence import jump_to_guide
from dcpc.observed import Observed, num_data
from dcpc.parts import Adaptation
from dcpc.presets import PRESETS, lookup
from dcpc.problem import Problem
from dcpc.recombine.correction import Correction
from dcpc.sweep import SweepInfo, SweepState
from dcpc.training.checkpoint import CheckpointError
from dcpc.training.contents import describe_difference
from dcpc.training.data import Batch, EpochBatches, check_finite
from dcpc.training.divergence import failures_told
from dcpc.training.modules.base import STATE_KEY, LearningRateSchedule
from dcpc.training.modules.bounds import rising_share
from dcpc.training.modules.generative import GenerativeModule, Guide, HeldOut
from dcpc.training.modules.parameterization import Parameterization, Views
from dcpc.training.modules.warm_start import Start, annealed, guide_objective
from dcpc.training.observations import check_observed
from dcpc.training.paths import local_path
from dcpc.training.processes import average, share
from dcpc.training.store import ParticleStore
from dcpc.training.visits import TiedVisit, Visit, visit

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
            `encoder` for the one that `model.encoder()` makes, `top_down_encoder` for that of
            `model.encoder(top_down=True)`, null for none.
        num_particles: K, particles per datum.
        particle_batch_size: Particles of a datum that the model is evaluated for at once, here and
            on held-out data; null for all of them. The model's activations then take the memory of
            so many particles, and the loss is evaluated once more in the backward pass; the draws
            are the same, and the results up to rounding.
        algorithm: Preset of `DCPC`: dcpc, dcpc-smc, dcpc-paper, pgd, mpgd, lpc, mcpc, pc or ipc.
        sweeps_per_step: Sweeps per batch and step of the parameters.
        step_size: Step size of the sweeps, or step sizes by algorithm; null, like an algorithm
            that is not among them, adapts it where the algorithm can.
        schedule: Order in which units move, by name: coloured, sequential (from the data up to the
            first latents) or joint; null for the algorithm's own.
        move: Proposal, by name or class path; null for the algorithm's own. `dcpc.conquer.Langevin`
            with several `leapfrog_steps`, each at the price of a gradient, mixes faster than as
            many sweeps.
        correction: Correction of the proposal, likewise.
        preconditioner: Scale of the proposal, likewise.
        blocks: Lists of latents to move jointly, as one unit each, or `all` for the continuous
            ones; null for one unit per latent.
        parameterization: Whether particles are kept, moved and learned from by the values of
            latents, or by their standardised prediction errors.
        compile: Whether sweeps and the gradient of the loss run as compiled code: `auto` where the
            steps of the whole run, by `trainer.max_epochs` and `trainer.max_steps`, make up for
            the time that compiling takes.
        start: Where particles start.
        held_out: How held-out data are measured.
        learning_rate: Adam learning rate; ignored when `--optimizer` is given.
        learning_rate_schedule: `cosine` lowers the rate to zero over the run, by
            `trainer.max_epochs`, `trainer.max_steps` or `trainer.max_time`, whichever is nearest;
            null keeps it.
        store_folder: Where the particles' memory-mapped files live during the run; null for the
            run's own folder.
        label_site: Site of the model that is a datum's label, as in
            `pyro.sample("label", ..., obs=label, obs_mask=seen)`: predicted for held-out data, and
            compared with their labels. null for none.

    Attributes:
        store: Every datum's particles, during training; empty where they start `afresh`.
        adaptation: What the proposals have learned.
        last_sweep: Diagnostics of the last sweep.
        last_state: Particles of the last batch.

    Raises:
        OptionError: A number out of range, an unknown algorithm, or a start that needs a guide.
    """

    def __init__(
        self,
        model: nn.Module,
        guide: Guide = None,
        num_particles: int = 4,
        particle_batch_size: int | None = None,
        algorithm: str = "dcpc",
        sweeps_per_step: int = 1,
        step_size: float | dict[str, float] | None = None,
        schedule: str | None = None,
        move: Move | str | None = None,
        correction: Correction | str | None = None,
        preconditioner: Preconditioner | str | None = None,
        blocks: list[list[str]] | Literal["all"] | None = None,
        parameterization: Parameterization = Parameterization(),
        compile: Mode = "auto",
        start: Start = Start(),
        held_out: HeldOut = HeldOut(),
        learning_rate: float = 1e-3,
        learning_rate_schedule: LearningRateSchedule | None = None,
        store_folder: str | None = None,
        label_site: str | None = None,
    ) -> None:
        super().__init__(
            model,
            guide,
            held_out,
            learning_rate,
            learning_rate_schedule,
            particle_batch_size,
            label_site,
        )
        require_at_least("model.sweeps_per_step", sweeps_per_step, 1)
        preset = lookup("algorithm", algorithm, PRESETS)
        restart = preset.warm_starts_every_visit if start.restart is None else start.restart
        self.sweeps_per_step = sweeps_per_step
        self.start = start
        self.restarts = self.guide is not None and restart
        self.store_folder = store_folder and str(local_path("model.store_folder", store_folder))
        self.parameterization = parameterization
        self._engines = parameterization.engines(
            model,
            guide=self.guide,
            num_particles=num_particles,
            particle_batch_size=particle_batch_size,
            algorithm=algorithm,
            schedule=schedule,
            move=move,
            correction=correction,
            preconditioner=preconditioner,
            step_size=_step_size(step_size, algorithm),
            blocks=blocks or (),
            compile=compile,
        )
        self.inference = self._engines[parameterization.move]
        start.check(self.guide is not None, self.inference.parts.correction.is_exact)
        self.automatic_optimization = not preset.step_parameters_every_sweep

        self.store: ParticleStore | None = None
        self.adaptation: Mapping[str, Adaptation] = {}
        self.last_sweep: SweepInfo | None = None
        self.last_state: SweepState | None = None
        self._is_resuming = False
        self._noncentred: list[str] = []
        self._num_sweeps: dict[int, int] = {}
        self._guide_losses = guide_objective(start, self.guide is not None, self.restarts)
        self._saved_particles: Mapping[str, Any] | None = None

    def settings(self) -> dict[str, str]:
        algorithm = self.inference.algorithm
        return super().settings() | {
            "model.algorithm": algorithm.name,
            "model.num_particles": str(self.inference.num_particles),
            "model.schedule": _in_words(algorithm.schedule),
            "model.move": _in_words(algorithm.parts.move),
            "model.correction": _in_words(algorithm.parts.correction),
            "model.preconditioner": _in_words(algorithm.parts.preconditioner),
            "model.blocks": _blocks_in_words(self.inference.blocks),
            "model.parameterization": str(self.parameterization),
        }

    def advice_with_initial_weights(self) -> str:
        start, is_exact = self.start, self.inference.parts.correction.is_exact
        if self.guide is not None or start.afresh or start.temperatures or start.first_sweeps:
            return ""
        key = "model.start.temperatures" if is_exact else "model.start.first_sweeps"
        return (
            "particles start from the prior, far from the posteriors of trained weights, and the "
            f"weights follow them: --{key} 50 moves those of every datum there first"
        )

    @property
    def charts(self) -> dict[str, str]:
        return super().charts | {
            "acceptance rate of every unit": "sweep/acceptance/.*",
            "step size of every unit": "sweep/step_size/.*",
            "ESS of the particles, in percent": "train/ess_percent$",
        }

    def on_train_start(self) -> None:
        """Opens the particle store, with the checkpoint's particles if there are any."""
        super().on_train_start()
        # Checkpoints are read on the CPU.
        self.adaptation = {name: kept.to(self.device) for name, kept in self.adaptation.items()}
        self.store = self._open_store()
        for is_turn in (self.trainer.is_global_zero, not self.trainer.is_global_zero):
            if is_turn and self._saved_particles is not None:
                is_filled = not self.trainer.is_global_zero
                self.store.load_state_dict(self._saved_particles, is_filled=is_filled)
            self.trainer.strategy.barrier("particles")
        self._saved_particles = None
        self._num_sweeps = self._count_sweeps()
        self._reserve()

    def _reserve(self) -> None:
        """Captures the model for the first batch, and takes the particles' space on the disk.

        What the model or the disk cannot do is then an error before anything is learned.
        """
        loader = self.trainer.train_dataloader
        batches = getattr(loader, "batch_sampler", None)
        if loader is None or not isinstance(batches, EpochBatches):
            return
        batch = loader.dataset.__getitems__(next(iter(batches)))
        precision = self.trainer.precision_plugin
        batch = self.trainer.strategy.batch_to_device(precision.convert_input(batch), self.device)
        check_finite(batch)
        x, _, index = batch
        told = failures_told(self._num_steps)
        with precision.train_step_context(), self.stream(self._num_steps, 3), told:
            problem = self._views(x).keep
            self._visit_of(problem, index).reserve(problem.blank())

    def _views(self, x: Observed) -> Views:
        return self.parameterization.views(self._engines, x)

    def _visit_of(self, problem: Problem, index: Tensor) -> Visit:
        assert self.store is not None
        sites = problem.division.sites
        self._noncentred = [name for name, site in sites.items() if site.is_standardised]
        here = visit(problem, self.store, index, keeps=self.start.afresh is None)
        if isinstance(here, TiedVisit):
            self._check_tied(len(index))
        return here

    def _open_store(self) -> ParticleStore:
        """The store, of which the first process makes the files."""
        folder = Path(self.store_folder or self.trainer.default_root_dir)
        loader = self.trainer.train_dataloader
        assert loader is not None
        num_data = len(loader.dataset)
        root = self.trainer.default_root_dir
        is_first = self.trainer.is_global_zero
        own = ParticleStore(folder, num_data, checkpoints=root) if is_first else None
        shared = self.trainer.strategy.broadcast(None if own is None else str(own.folder))
        return ParticleStore(folder, num_data, shared, root) if own is None else own

    def configure_callbacks(self) -> list[Callback]:
        """Removes the store's files when training ends, however it does."""
        return [_Closing()]

    def learn(self, batch: Batch) -> Tensor:
        """Sweeps a batch's particles, stores them, and returns the loss per datum, in nats.

        With a guide, the sum of the model's loss and the guide's, which are logged apart.
        """
        x, _, index = batch
        losses = self._warm_up(x) if self.is_warming_up else self._visit(x, index)
        for name, loss in losses.items():
            self.log(f"train/{name}", loss, prog_bar=True, batch_size=num_data(x), sync_dist=True)
        return _total(losses)

    @property
    def is_warming_up(self) -> bool:
        """Whether this epoch is one of the `warm_up_epochs`."""
        return self.current_epoch < self.start.warm_up_epochs

    def _warm_up(self, x: Observed) -> dict[str, Tensor]:
        share_of_kl = rising_share(self.current_epoch, self.start.kl_warm_up_epochs)
        losses = {"negative_elbo": share(x) * self.negative_elbo(x, kl_weight=share_of_kl)}
        self._step_parameters(losses)
        return losses

    def _visit(self, x: Observed, index: Tensor) -> dict[str, Tensor]:
        """Sweeps the particles of a batch; the losses after the last sweep."""
        views = self._views(x)
        keep, move, learn = views.keep, views.move, views.learn
        here = self._visit_of(keep, index)
        if here.is_first and keep.division.population:
            check_observed(self.model, x, index, keep.division.population[0].dim)
        weight = share(x)
        num_sweeps = self.sweeps_per_step + (self.start.first_sweeps if here.is_first else 0)
        draw = partial(self._draw, keep)
        if self._is_resuming:
            self._check_adaptation(move)
        recalled = draw() if self.restarts else here.recall(draw)
        state = replace(transported(recalled, keep, move), adaptation=self.adaptation)
        if self.start.proposals:
            state, accepted = jump_to_guide(move, state)
            self.log("sweep/jumps_to_guide", accepted, batch_size=num_data(x), sync_dist=True)
        for remaining in reversed(range(num_sweeps)):
            with self.inference.expecting(self._num_sweeps.get(num_data(x), 0), self.print):
                state, info = move.sweep(state, learns=learn is move)
            kept = transported(state, move, keep)
            if remaining == 0 or self._steps_after(remaining):
                taught = transported(state, move, learn)
                losses = {
                    name: weight * loss for name, loss in self._losses(learn, taught, x).items()
                }
                self._step_parameters(losses)
        here.keep(kept)
        self.adaptation = average(state.adaptation, weight)
        self.last_sweep, self.last_state = info, state
        ess = 100.0 * info.ess.mean() / state.num_particles
        self.log("train/ess_percent", ess, batch_size=num_data(x), sync_dist=True)
        return losses

    def _count_sweeps(self) -> dict[int, int]:
        """Sweeps of the whole run, by the number of data in a batch; none if that is not known."""
        batches = getattr(self.trainer.train_dataloader, "batch_sampler", None)
        if not isinstance(batches, EpochBatches):
            return {}
        epochs, steps = self.trainer.max_epochs or 0, self.trainer.max_steps
        bounds = [epochs * len(batches)] * (epochs > 0) + [steps] * (steps > 0)
        most = min(bounds, default=0) * self.sweeps_per_step
        return {size: most * count // len(batches) for size, count in batches.sizes.items()}

    def _losses(self, problem: Problem, state: SweepState, x: Observed) -> dict[str, Tensor]:
        """The model's loss per datum, in nats, and the guide's."""
        loss = {"loss": problem.loss(state) / num_data(x)}
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
        total = _total(losses)
        self._loss = total.detach()
        self.manual_backward(total)
        optimizer.step()

    def _draw(self, problem: Problem) -> SweepState:
        """Fresh particles; from a stream of its own, since resuming may draw once more."""
        with self.stream(self._num_steps, 1):
            if self.start.temperatures:
                return annealed(problem, self.start.temperatures)
            return problem.init_at_means() if self.start.afresh == "means" else problem.init()

    def _check_tied(self, num_data: int) -> None:
        if self.inference.parts.correction.is_exact:
            raise ModelError(
                f"the {num_data} data of a batch are not independent given the parameters (is a "
                "layer normalised over the batch?), so that algorithm "
                f"{self.inference.algorithm.name!r} would weigh whole batches, and particles per "
                "datum have no weights of their own. Normalise otherwise (norm='group'), or train "
                "with an algorithm that does not weigh: pgd, mpgd, lpc, mcpc, pc or ipc"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the particles and what the proposals have learned."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[STATE_KEY] |= {
            "adaptation": {name: asdict(learned) for name, learned in self.adaptation.items()},
            "particles": self._particles(),
        }

    def _particles(self) -> dict[str, Any] | None:
        """The particles of all processes, for the one that writes checkpoints."""
        self.trainer.strategy.barrier("particles")
        if self.store is None or not self.trainer.is_global_zero:
            return None
        return self.store.state_dict() | {"noncentred": list(self._noncentred)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores them; the particles follow when training starts.

        Raises:
            CheckpointError: `dcpc fit` has not written it, or has for another run.
        """
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint[STATE_KEY]
        self.adaptation = {name: Adaptation(**kept) for name, kept in saved["adaptation"].items()}
        self._is_resuming = bool(self.adaptation)
        self._saved_particles = saved["particles"]

    def _check_adaptation(self, problem: Problem) -> None:
        """Compares what the proposals had learned with what they learn here."""
        self._is_resuming = False
        with self.stream(self._num_steps, 2):
            state, _ = problem.sweep(problem.init())
        found = describe_difference(
            {name: asdict(kept) for name, kept in self.adaptation.items()},
            {name: asdict(learned) for name, learned in state.adaptation.items()},
            f"{STATE_KEY}.adaptation",
        )
        if found is not None:
            raise CheckpointError(
                f"the checkpoint cannot be used here: {found}; resume with the settings of the "
                "first run, or start afresh without --ckpt_path"
            )


class _Closing(Callback):
    """Closes the store: the checkpoint has the particles."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, ParticleModule) and pl_module.store is not None:
            pl_module.store.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.on_fit_end(trainer, pl_module)


def _blocks_in_words(blocks: Blocks) -> str:
    return blocks if isinstance(blocks, str) else str([list(block) for block in blocks])


def _in_words(part: object) -> str:
    """A part with its settings, or its class alone where it does not show them."""
    shows = type(part).__repr__ is not object.__repr__
    return repr(part) if shows else type(part).__name__


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
