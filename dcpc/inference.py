"""`DCPC`, the class that users meet."""

from __future__ import annotations

import html
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from dcpc.algorithms import build_algorithm
from dcpc.annealing import Annealed, spaced_ladder
from dcpc.conquer import Move, Preconditioner
from dcpc.convergence import ConvergenceWarning, format_problems
from dcpc.divide import Arguments, Division, Unit, constrained_particles, divide, read_sites
from dcpc.divide.division import DataIdentity
from dcpc.divide.graph import Schedule
from dcpc.divide.model import Model, observation_means
from dcpc.divide.program import map_particles
from dcpc.divide.sites import Sites
from dcpc.divide.watch import Snapshot
from dcpc.errors import DataError, EvidenceError, OptionError
from dcpc.habits import check_model_arguments, refuse
from dcpc.initial import guide_loss
from dcpc.posterior import Posterior, Samples
from dcpc.progress import ProgressBar
from dcpc.recombine.correction import Correction
from dcpc.run import Run
from dcpc.seeding import random_state_kept, seeded
from dcpc.sweep import SweepInfo, SweepState, loss, sweep
from dcpc.tables import html_table

MAX_DIVISIONS = 16
"""Divisions kept for different argument shapes; the least recently used one goes first."""


class Units(list[Unit]):
    """The units of a model; prints as a table."""

    HEADER = ("unit", "parents", "children", "blanket", "plates", "size", "support")

    def __str__(self) -> str:
        rows = [self.HEADER, *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.HEADER))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self.HEADER, self._rows())

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                unit.name,
                *(
                    ", ".join(sorted(names))
                    for names in (unit.parents, unit.children, unit.blanket)
                ),
                ", ".join(f"{plate.name}({plate.size})" for plate in unit.plates),
                str(unit.size),
                unit.support,
            )
            for unit in self
        ]


class DCPC:
    """Divide-and-conquer predictive coding for a static-structure Pyro model.

    The model is divided into complete conditionals, one per latent; each is moved by Langevin
    proposals along its prediction error; importance weights recombine the units into weighted
    particles and an evidence estimate. Sennesh, Wu & Salvatori (2024).

    Example:
        >>> posterior = DCPC(model, num_particles=256).run(y, num_sweeps=500)
        >>> posterior.summary()

    Args:
        model: A Pyro program with continuous latents and a fixed set of sites.
        guide: A Pyro program (encoder, autoguide) over the same latents that the particles are
            drawn from, with proper weights, instead of annealing from the prior.
        num_particles: K.
        algorithm: A preset: `dcpc`, `dcpc-smc`, `dcpc-paper`, `pgd`, `lpc`, `mcpc`, `pc`, `ipc`.
        schedule: `sequential`, `coloured` or `joint`; None for the preset's.
        move: `langevin` or `gradient`, or a `Move`, as in `Langevin(leapfrog_steps=4)`.
        correction: `metropolis`, `weight`, `resample` or `none`, or a `Correction`.
        preconditioner: `adapted`, `dense`, `second_moment`, `identity` or `particle_variance`, or
            a `Preconditioner`.
        step_size: Fixed step size; None adapts it by dual averaging where the correction has a
            target statistic, and is 0.01 elsewhere.
        blocks: Latents to move jointly, as in `[("alpha", "beta")]`.
        resampling: `systematic`, `stratified`, `multinomial` or `residual`.
        resample_threshold: Whole particles are resampled where ESS / K is below it.
        backend: `auto`, `graph`, `vmap` or `loop`.
        certify: Whether divided programs are compared with plain runs of the model.

    Raises:
        OptionError: An unknown name, a value out of range, or parts that do not go together.
    """

    def __init__(
        self,
        model: Model,
        guide: Model | None = None,
        *,
        num_particles: int,
        algorithm: str = "dcpc",
        schedule: str | Schedule | None = None,
        move: str | Move | None = None,
        correction: str | Correction | None = None,
        preconditioner: str | Preconditioner | None = None,
        step_size: float | None = None,
        blocks: Sequence[Sequence[str]] = (),
        resampling: str = "systematic",
        resample_threshold: float = 0.5,
        backend: str = "auto",
        certify: bool = True,
        **unknown: Any,
    ) -> None:
        refuse(unknown, "DCPC")
        if not callable(model):
            raise OptionError(f"model must be a Pyro program (a callable), got {model!r}")
        if isinstance(num_particles, bool) or not isinstance(num_particles, int):
            raise OptionError(f"num_particles must be an integer, got {num_particles!r}")
        if num_particles < 1:
            raise OptionError(f"num_particles must be at least 1, got {num_particles}")
        self.model = model
        self.guide = guide
        self.num_particles = num_particles
        self.algorithm = build_algorithm(
            algorithm,
            schedule=schedule,
            move=move,
            correction=correction,
            preconditioner=preconditioner,
            resampling=resampling,
            resample_threshold=resample_threshold,
            step_size=step_size,
            one_block=len(blocks) == 1,
        )
        if self.algorithm.preset.single_particle and num_particles != 1:
            raise OptionError(
                f"algorithm {algorithm!r} has one particle per datum, got num_particles="
                f"{num_particles}; use num_particles=1, or algorithm='pgd' for a cloud"
            )
        self.parts = self.algorithm.parts
        self.blocks = tuple(tuple(block) for block in blocks)
        self.backend = backend
        self.certify = certify
        self._divisions: OrderedDict[tuple, _Captured] = OrderedDict()
        self._posterior: Posterior | None = None

    # -- what users call ---------------------------------------------------------------------

    def units(self, *args: Any, **kwargs: Any) -> Units:
        """The units of the model for these arguments; prints as a table."""
        return Units(self.division(*args, **kwargs).units)

    def run(
        self,
        *args: Any,
        num_sweeps: int = 1000,
        num_warmup: int | None = None,
        keep_every: int | None = None,
        initial_values: Mapping[str, Tensor] | None = None,
        evidence: bool = True,
        conditional_ess: float = 0.9,
        seed: int | None = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> Posterior:
        """Infers the posterior of the latents given the arguments.

        The exact algorithms anneal from the prior to the posterior twice: a pilot chooses the
        temperatures, and how many sweeps the particles need at each to decorrelate, and adapts the
        proposals; a second run with all of it fixed gives an unbiased evidence estimate and the
        particles to go on with. `num_sweeps` sweeps at the posterior
        follow, the first `num_warmup` of which still adapt.

        Args:
            *args: Arguments of the model.
            num_sweeps: Sweeps at the posterior.
            num_warmup: How many of them adapt; by default half.
            keep_every: Keep every n-th of the other sweeps in `posterior.history`; 0 for none. By
                default some 100 of them, at most 64 MiB in all.
            initial_values: Constrained values to start latents from instead of their prior.
            evidence: Whether to spend the second annealing run on an evidence estimate.
            conditional_ess: Conditional ESS, over K, that each temperature step keeps; closer to
                one means more temperatures.
            seed: Seeds this run only; the global random state is left as it was.
            progress: Whether to show a progress bar.
            **kwargs: Keyword arguments of the model.

        Raises:
            ModelError, DataError, CertificationError: The model or data cannot be handled.
            DegenerateWeightsError: No particle has positive density.
            OptionError: An option out of range.

        Warns:
            ConvergenceWarning: The posterior may be off; `posterior.warnings` says why, and what to
                do.
        """
        num_warmup = num_sweeps // 2 if num_warmup is None else num_warmup
        if num_sweeps < 0 or not 0 <= num_warmup <= num_sweeps:
            raise OptionError(
                f"num_sweeps must be at least 0 and num_warmup between 0 and num_sweeps, got "
                f"num_sweeps={num_sweeps}, num_warmup={num_warmup}"
            )
        if keep_every is not None and keep_every < 0:
            raise OptionError(f"keep_every must be at least 0, got {keep_every}")
        _check_conditional_ess(conditional_ess)
        check_model_arguments(self.model, kwargs, "DCPC.run")
        arguments = Arguments(args, kwargs)
        with seeded(seed), ProgressBar(progress) as bar:
            run = self._run(arguments, bar, initial_values or {}, conditional_ess)
            refusal = self._evidence_refusal(run.division, arguments.tensors)
            start = run.approach(refusal, evidence)
            posterior = run.sample(start, num_sweeps, num_warmup, keep_every)
        self._posterior = posterior
        if posterior.warnings:
            message = format_problems(posterior.warnings)
            warnings.warn(message, ConvergenceWarning, stacklevel=2)
        return posterior

    def anneal(
        self,
        *args: Any,
        num_temperatures: int | None = None,
        conditional_ess: float = 0.9,
        seed: int | None = None,
        progress: bool = False,
        **kwargs: Any,
    ) -> Annealed:
        """Evidence of the arguments by annealing from the prior, and particles at the posterior.

        A pilot adapts the proposals (and chooses the temperatures, unless their number is given);
        the second run, with everything fixed, is the estimate. An adaptive ladder repeats the
        sweeps at each temperature until the particles have decorrelated; with `num_temperatures`
        there is one sweep per temperature. The standard error is infinite where too few of the
        initial particles have descendants to tell.

        Args:
            num_temperatures: Length of a fixed ladder `(t / T)^3`; None to adapt it.
            conditional_ess: Of an adaptive ladder.

        Raises:
            EvidenceError: The correction is not exact, or a prior is improper.
            OptionError: An option out of range.
        """
        if num_temperatures is not None and num_temperatures < 1:
            raise OptionError(f"num_temperatures must be at least 1, got {num_temperatures}")
        _check_conditional_ess(conditional_ess)
        arguments = Arguments(args, kwargs)
        refusal = self._evidence_refusal(self._divide(arguments), arguments.tensors)
        if refusal:
            raise EvidenceError(refusal)
        ladder = None if num_temperatures is None else spaced_ladder(num_temperatures)
        with seeded(seed), ProgressBar(progress) as bar:
            return self._run(arguments, bar, {}, conditional_ess).anneal_twice(ladder)

    def get_samples(self) -> Samples:
        """Equally weighted constrained samples of the last run, `(K, *batch, *event)`."""
        return self._last().resample()

    def summary(self, prob: float = 0.9) -> None:
        """Prints a table of the last run's posterior."""
        self._last().summary(prob)

    def diagnostics(self) -> dict[str, dict[str, Any]]:
        """Diagnostics of the last run, by site."""
        return self._last().diagnostics()

    def statistics(self, prob: float = 0.9) -> dict[str, dict[str, Tensor]]:
        """Statistics of the last run, by site: the numbers of its table."""
        return self._last().statistics(prob)

    def __repr__(self) -> str:
        model = getattr(self.model, "__qualname__", type(self.model).__name__)
        guide = "" if self.guide is None else ", guide"
        blocks = f", blocks={list(self.blocks)}" if self.blocks else ""
        return (
            f"DCPC({model}{guide}, num_particles={self.num_particles}, "
            f"algorithm={self.algorithm.name!r}{blocks})"
        )

    def _repr_html_(self) -> str:
        parts = [(f.name, str(getattr(self.parts, f.name))) for f in fields(self.parts)]
        return f"<code>{html.escape(repr(self))}</code>{html_table(['part', ''], parts)}"

    # -- the functional level, for training --------------------------------------------------

    def division(self, *args: Any, **kwargs: Any) -> Division:
        """The divided model for arguments of this shape, from a cache."""
        return self._divide(Arguments(args, kwargs))

    def init(self, *args: Any, **kwargs: Any) -> SweepState:
        """Particles from the guide, or else the prior, whose weights refer to it."""
        with ProgressBar(False) as bar:
            return self._run(Arguments(args, kwargs), bar).start()

    def sweep(
        self, state: SweepState, *args: Any, adapt: bool = True, **kwargs: Any
    ) -> tuple[SweepState, SweepInfo]:
        """Reweights the particles to the present parameters, then moves every unit once.

        Args:
            state: Particles and weights.
            *args: Arguments of the model.
            adapt: Whether step sizes and preconditioners learn from the sweep.

        Raises:
            DataError: The state's particles do not fit these arguments.
            DegenerateWeightsError: No particle of a population cell has positive density.
        """
        arguments = Arguments(args, kwargs)
        division = self._divide(arguments)
        self._check_state(division, state)
        return sweep(
            division,
            state,
            self.parts,
            arguments.tensors,
            adapt=adapt,
            retargets=self.parts.correction.is_exact,
        )

    def loss(self, state: SweepState, *args: Any, **kwargs: Any) -> Tensor:
        """`- sum_cells sum_k W_k log p(x, z_k)`: its gradient trains the model's parameters."""
        arguments = Arguments(args, kwargs)
        division = self._divide(arguments)
        self._check_state(division, state)
        return loss(division, state, arguments.tensors)

    def guide_loss(self, state: SweepState, *args: Any, **kwargs: Any) -> Tensor:
        """`- sum_k W_k log q(z_k | x)`: its gradient trains the guide on the particles.

        Raises:
            OptionError: There is no guide.
        """
        if self.guide is None:
            raise OptionError("there is no guide to train; give one: DCPC(model, guide, ...)")
        arguments = Arguments(args, kwargs)
        division = self._divide(arguments)
        self._check_state(division, state)
        values = self.constrain(state.latents, *args, **kwargs)
        return guide_loss(self.guide, division, arguments, state, values)

    def constrain(self, latents: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Samples:
        """Constrained values of unconstrained latents `(K, *batch, *event)`."""
        return constrained_particles(self.model, Arguments(args, kwargs), latents)

    def observation_means(self, state: SweepState, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior mean of every observed site's mean: the reconstruction of the data.

        The distributions' means (`fn.mean`) are averaged over the particles by their weights.

        Returns:
            By observed site, `(*batch, *event)`.
        """
        arguments = Arguments(args, kwargs)
        division = self._divide(arguments)
        self._check_state(division, state)
        means = map_particles(
            lambda latents: observation_means(self.model, latents, args, kwargs),
            dict(state.latents),
        )
        weights = state.log_weight.normalized()
        result = {}
        for name, mean in means.items():
            batch_dims = len(division.sites[name].batch_shape)
            shape = [mean.shape[0]] + [1] * (mean.dim() - 1)
            for plate in division.population:
                shape[1 + batch_dims + plate.dim] = plate.size
            result[name] = (weights.reshape(shape) * mean).sum(0)
        return result

    # -- internals ---------------------------------------------------------------------------

    def _divide(self, arguments: Arguments, sites: Sites | None = None) -> Division:
        """The divided model for these arguments: as captured before, where that still holds.

        Args:
            arguments: The model's arguments.
            sites: Its sites for these very arguments, where they were read anew; then what was
                captured is compared with a plain run, whatever seems to be unchanged.
        """
        snapshot = Snapshot(self.model, arguments.objects)
        key = (arguments.key, snapshot.modes)
        captured = self._divisions.get(key)
        with random_state_kept():
            if captured is not None and captured.holds(snapshot, arguments, sites):
                self._divisions.move_to_end(key)
                return captured.division
            args, kwargs = arguments.rebuild(arguments.tensors)
            division = divide(
                self.model,
                arguments,
                sites or read_sites(self.model, args, kwargs),
                self.num_particles,
                schedule=self.algorithm.schedule,
                blocks=self.blocks,
                backend=self.backend,
                certify=self.certify,
            )
        # The first run may have created parameters.
        snapshot = Snapshot(self.model, arguments.objects)
        data = DataIdentity((*arguments.tensors, *snapshot.tensors))
        self._divisions[key] = _Captured(division, snapshot, data)
        if len(self._divisions) > MAX_DIVISIONS:
            self._divisions.popitem(last=False)
        return division

    def _run(
        self,
        arguments: Arguments,
        bar: ProgressBar,
        initial_values: Mapping[str, Tensor] | None = None,
        conditional_ess: float = 0.9,
    ) -> Run:
        with random_state_kept():
            sites = read_sites(self.model, *arguments.rebuild(arguments.tensors))
        division = self._divide(arguments, sites)
        self._check_subsampling(division)
        return Run(
            self.model,
            self.guide,
            division,
            arguments,
            self.parts,
            self.num_particles,
            bar,
            initial_values or {},
            conditional_ess,
        )

    def _check_subsampling(self, division: Division) -> None:
        """Refuses exact corrections where a plate subsamples latents next to global ones."""
        scaled = [name for name in division.latents if division.sites[name].scale != 1.0]
        others = {site.scale for site in division.sites.values()}
        if self.parts.correction.is_exact and scaled and len(others) > 1:
            plates = sorted({p.name for name in scaled for p in division.sites[name].plates})
            rest = [name for name in division.latents if name not in scaled]
            raise OptionError(
                f"site(s) {scaled} are latents in a plate that subsamples (one of {plates}), "
                f"beside others outside of it ({rest or 'observed sites'}): their scaled "
                "conditionals belong to no joint density, so that no correction is exact; pass "
                "all the data (no subsample_size), or use an algorithm that is not exact, such as "
                "algorithm='pgd'"
            )

    def _evidence_refusal(self, division: Division, tensors: Sequence[Tensor]) -> str:
        """Why there is no evidence estimate; empty if there is one."""
        flat = division.without_prior(tensors)
        if flat:
            return (
                f"the prior of site(s) {flat} is flat (improper), or a handler masks or scales it, "
                "so that the evidence is defined only up to an arbitrary factor; give them a "
                "proper prior to compare models"
            )
        if not self.parts.correction.is_exact:
            return (
                f"algorithm {self.algorithm.name!r} does not leave the posterior invariant, so it "
                "has no evidence estimate; use DCPC(model, num_particles=...).anneal(...) on the "
                "same model"
            )
        return ""

    def _check_state(self, division: Division, state: SweepState) -> None:
        for name in division.latents:
            expected = (self.num_particles, *division.sites[name].unconstrained_shape)
            got = tuple(state.latents[name].shape) if name in state.latents else None
            if got != expected:
                raise DataError(
                    f"the particles of site '{name}' have shape {got}, but the model's arguments "
                    f"ask for {expected}; a state belongs to the data it was initialised with: "
                    "call init(...) again for data of another shape"
                )

    def _last(self) -> Posterior:
        if self._posterior is None:
            raise OptionError("there is no posterior yet; call run(...) first")
        return self._posterior


@dataclass
class _Captured:
    """A division in the cache, and what has to be the same for it to be used again."""

    division: Division
    snapshot: Snapshot
    data: DataIdentity

    def holds(self, snapshot: Snapshot, arguments: Arguments, sites: Sites | None) -> bool:
        """Whether the division is that of the model as it is now, for these arguments."""
        if snapshot != self.snapshot or (sites is not None and sites != self.division.sites):
            return False
        unsure = not snapshot.is_complete or sites is not None
        if self.division.program.reads_data:
            data = DataIdentity((*arguments.tensors, *snapshot.tensors))
            unsure = unsure or data != self.data
            self.data = data
        return not unsure or self.division.matches(arguments)


def _check_conditional_ess(value: float) -> None:
    if not 0.0 < value < 1.0:
        raise OptionError(f"conditional_ess must lie in (0, 1), got {value!r}")


__all__ = ["DCPC", "Units"]
