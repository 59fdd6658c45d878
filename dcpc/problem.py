"""A model bound to its data: the problem that is solved."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from dcpc.annealing import MAX_SWEEPS, Annealed, Rung, anneal, spaced_ladder
from dcpc.completion import complete
from dcpc.conquer import Langevin
from dcpc.divide import (
    Arguments,
    Density,
    Division,
    Tempering,
    UnitGroup,
    constrained_particles,
)
from dcpc.divide.batches import in_batches
from dcpc.divide.cache import Divisions
from dcpc.divide.model import Latents, Model, observation_means
from dcpc.divide.program import map_particles
from dcpc.errors import DataError, EvidenceError, OptionError
from dcpc.parts import Parts
from dcpc.presets import JOINT_MOVE, Algorithm
from dcpc.progress import ProgressBar
from dcpc.recombine import LogWeights
from dcpc.start import (
    draw_from_guide,
    draw_from_prior,
    guide_loss,
    guide_refusal,
    place_at_means,
    starting_references,
)
from dcpc.sweep import PLAIN, Runner, SweepInfo, SweepState, sweep
from dcpc.threads import exclusive


class Problem:
    """A divided model bound to the arguments of a call; made by `DCPC.bind`.

    It holds as long as the arguments and the model's Python state do; parameters may change in
    place, as optimisers change them (bind again where one is replaced). Bind again for every batch:
    where the shapes are known, that costs some 50 microseconds.

    Args:
        divisions: The model's divisions.
        arguments: The model's arguments.
        algorithm: Algorithm, with the parts of its sweeps.
        guide: A Pyro program that particles may start from.
        thorough: Whether the sites and the data are looked at anew, and what was captured before
            is compared with a plain run of the model.
        runner: What evaluates and moves the particles of a sweep.

    Attributes:
        arguments: The model's arguments.
        algorithm: Algorithm, with the parts of its sweeps.
        guide: A Pyro program that particles may start from.
        density: The posterior, up to the evidence.
        joined: By unit of several latents that were found to be correlated, why they are one.
        tuned_steps: Leapfrog steps, where they were tuned; 0 where they are the algorithm's.
        moved: Names of the groups that sweeps move; None for all.

    Raises:
        ModelError, DataError, CertificationError: The model or data cannot be handled.
        OptionError: The data are a subsample that exact corrections cannot handle.
    """

    def __init__(
        self,
        divisions: Divisions,
        arguments: Arguments,
        algorithm: Algorithm,
        guide: Model | None = None,
        *,
        thorough: bool = False,
        runner: Runner = PLAIN,
    ) -> None:
        self._runner = runner
        self.joined: Mapping[str, str] = {}
        self.tuned_steps = 0
        self.moved: Collection[str] | None = None
        self._divisions = divisions
        self.arguments = arguments
        self.algorithm = algorithm
        self.guide = guide
        self.density = self._find(thorough)
        self._is_checked = thorough

    @property
    def model(self) -> Model:
        """The Pyro program."""
        return self._divisions.model

    @property
    def parts(self) -> Parts:
        """Parts of the sweeps."""
        return self.algorithm.parts

    @property
    def groups(self) -> list[UnitGroup]:
        """The groups that sweeps move."""
        groups = self.division.groups
        return [group for group in groups if self.moved is None or group.name in self.moved]

    @property
    def division(self) -> Division:
        """The divided model."""
        return self.density.division

    @property
    def num_particles(self) -> int:
        """K."""
        return self._divisions.num_particles

    @exclusive("Problem.init")
    def init(self) -> SweepState:
        """Particles from the guide, or else the prior, whose weights refer to it."""
        self.check()
        if self.guide is None:
            return self.draw_from_prior(self.starting_density({}))
        return self._at_rest(
            draw_from_guide(self.guide, self.division, self.arguments, self.num_particles)
        )

    @exclusive("Problem.init_at_means")
    def init_at_means(self) -> SweepState:
        """Particles at the latents' conditional means, top down: a forward pass of the model.

        The start of classical predictive coding. Such particles have no density, so that no
        algorithm that weighs can start from them.

        Raises:
            OptionError: The algorithm weighs particles.
            ModelError: A latent cannot take the mean of its conditional distribution.
        """
        self.check()
        if self.parts.correction.is_exact:
            raise OptionError(
                f"algorithm {self.algorithm.name!r} weighs particles by the density that they were "
                "drawn from, which a start at means does not have; start from the prior, or use "
                "pgd, mpgd, lpc, mcpc, pc or ipc"
            )
        return self._at_rest(place_at_means(self.division, self.arguments, self.num_particles))

    def arranged(self, blocks: Sequence[Sequence[str]], parts: Parts | None = None) -> Problem:
        """The same problem with other blocks of latents.

        Args:
            blocks: Latents to move jointly.
            parts: Other parts to move them by; None for the same.
        """
        other = copy(self)
        other.density = replace(self.density, division=self.division.arranged(blocks))
        if parts is not None:
            other.algorithm = replace(self.algorithm, parts=parts)
        return other

    def with_blocks(self, reasons: Mapping[tuple[str, ...], str]) -> Problem:
        """The same problem, some of whose latents were found to be correlated.

        Args:
            reasons: By latents to move jointly, why.
        """
        parts = replace(self.parts, blocks=self.algorithm.joint)
        return self.arranged(list(reasons), parts).because(reasons)

    def because(self, reasons: Mapping[tuple[str, ...], str]) -> Problem:
        """The same problem, which tells why latents are one unit."""
        other = copy(self)
        known = {frozenset(sites): reason for sites, reason in reasons.items()}
        found = {unit.name: known.get(frozenset(unit.sites), "") for unit in self.division.units}
        other.joined = {name: reason for name, reason in found.items() if reason}
        return other

    def with_leapfrog_steps(self, steps: int) -> Problem:
        """The same problem, moved by Langevin moves of so many leapfrog steps."""

        def lengthened(parts: Parts) -> Parts:
            assert isinstance(parts.move, Langevin)
            return replace(parts, move=replace(parts.move, leapfrog_steps=steps))

        parts = lengthened(self.parts)
        if parts.blocks is not None:
            parts = replace(parts, blocks=lengthened(parts.blocks))
        other = copy(self)
        other.algorithm = replace(self.algorithm, parts=parts)
        other.tuned_steps = steps
        return other

    @property
    def tunes_moves(self) -> bool:
        """Whether the length of the moves is found by the run: where the user chose no move."""
        return self.algorithm.joint.move == JOINT_MOVE and isinstance(self.parts.move, Langevin)

    def moving_only(self, latents: Collection[str]) -> Problem:
        """The same problem, some of whose latents move, given the others.

        Args:
            latents: All latents of some of the groups.
        """
        other = copy(self)
        other.moved = {
            group.name
            for group in self.division.groups
            if all(name in latents for unit in group.units for name in unit.sites)
        }
        return other

    def with_arguments(self, arguments: Arguments) -> Problem:
        """The same problem with other data, of the same shapes and types."""
        other = copy(self)
        other.arguments = arguments
        other.density = replace(self.density, tensors=arguments.tensors)
        return other

    def tempered(self, temperature: float, observed: Collection[str]) -> Problem:
        """The same problem, in which some observed sites count by a temperature."""
        other = copy(self)
        tempering = Tempering(temperature, observed=frozenset(observed))
        other.density = replace(self.density, tempering=tempering)
        return other

    def as_written(self) -> Problem:
        """The same problem, whose sweeps are not recorded."""
        other = copy(self)
        other._runner = PLAIN
        return other

    def blank(self) -> SweepState:
        """A state of the shapes and types that particles have here, all of them at zero."""
        shapes = self.division.program.example
        latents = {
            name: u.new_zeros((self.num_particles, *u.shape[1:])) for name, u in shapes.items()
        }
        dtype = reduce(torch.promote_types, (u.dtype for u in latents.values()))
        like = next(iter(latents.values()))
        zeros = like.new_zeros((self.num_particles, *self.division.population_shape), dtype=dtype)
        return self._at_rest(SweepState(latents, LogWeights(zeros), zeros))

    @exclusive("Problem.sweep")
    def sweep(
        self,
        state: SweepState,
        *,
        adapt: bool = True,
        adapt_preconditioner: bool = True,
        retargets: bool = True,
        learns: bool = False,
    ) -> tuple[SweepState, SweepInfo]:
        """Reweights the particles to the present parameters, then moves every unit once.

        Args:
            state: Particles and weights.
            adapt: Whether step sizes and preconditioners learn from the sweep.
            adapt_preconditioner: Set to False to let only the step sizes learn.
            retargets: Set to False where the weights refer to this very density already.
            learns: Whether it is one of many sweeps that are followed by `loss`, and is to be
                recorded with it at once. Such sweeps are found out in any case, after a few.

        Raises:
            DataError: The state's particles do not fit these arguments.
            DegenerateWeightsError: No particle of a population cell has positive density.
        """
        self._check_state(state)
        self._runner.begin(self.density, learns=learns)
        return sweep(
            self.density,
            state,
            self.parts,
            adapt=adapt,
            adapt_preconditioner=adapt_preconditioner,
            retargets=retargets and self.parts.correction.is_exact,
            groups=self.moved,
            runner=self._runner,
        )

    def scored(self, state: SweepState) -> SweepState:
        """The state with the scores of its particles, which sweeps then hand on.

        Where several groups move in turn, scores do not last from one to the next.
        """
        if len(self.division.groups) > 1 or self.division.groups[0].is_discrete or state.scored:
            return state
        (group,) = self.division.groups
        unit = self.density.conditional(group, state.latents)
        return replace(state, scored={group.name: unit.evaluate_raw(unit.value)})

    @exclusive("Problem.log_joint")
    def log_joint(self, state: SweepState) -> Tensor:
        """Log-density `log p(x, z_k)` of the particles as they are, `(K, *population)`."""
        self._check_state(state)
        with torch.no_grad():
            return self.density.log_joint(state.latents)

    @exclusive("Problem.prediction_errors")
    def prediction_errors(self, state: SweepState) -> dict[str, Tensor]:
        """Prediction errors: the scores of the continuous latents where the particles are.

        Each is the gradient of its unit's log-density in the unconstrained value. Over the
        posterior its mean is zero.

        Returns:
            By latent, `(K, *batch, *event)`.
        """
        self._check_state(state)
        errors: dict[str, Tensor] = {}
        for group in self.division.groups:
            if not group.is_discrete:
                unit = self.density.conditional(group, state.latents)
                errors |= group.unpack(unit.score(unit.value))
        return errors

    @exclusive("Problem.loss")
    def loss(self, state: SweepState) -> Tensor:
        """`- sum_cells sum_k W_k log p(x, z_k)`: its gradient trains the model's parameters."""
        self._check_state(state)
        return self._runner.loss(self.density, state)

    @exclusive("Problem.guide_loss")
    def guide_loss(self, state: SweepState) -> Tensor:
        """`- sum_k W_k log q(z_k | x)`: its gradient trains the guide on the particles.

        Raises:
            OptionError: There is no guide.
        """
        if self.guide is None:
            raise OptionError("there is no guide to train; give one: DCPC(model, guide, ...)")
        self._check_state(state)
        values = self.constrain(state.latents)
        return guide_loss(self.guide, self.division, self.arguments, state, values)

    @exclusive("Problem.anneal")
    def anneal(
        self,
        num_temperatures: int | None = None,
        *,
        conditional_ess: float = 0.9,
        bar: ProgressBar | None = None,
    ) -> Annealed:
        """Evidence by annealing from the prior, and particles at the posterior.

        A pilot adapts the proposals, and chooses the temperatures and the sweeps at each unless the
        number of temperatures is given; the second run, with everything fixed, is the estimate.

        Args:
            num_temperatures: Length of a fixed ladder `(t / T)^3`; None to adapt it.
            conditional_ess: Conditional ESS that each step of an adaptive ladder keeps, over K.
            bar: Where progress is shown.

        Raises:
            EvidenceError: The correction is not exact, or a prior is improper.
            OptionError: An option out of range.
        """
        check_annealing(num_temperatures, conditional_ess)
        self.check()
        refusal = self.evidence_refusal()
        if refusal:
            raise EvidenceError(refusal)
        ladder = None if num_temperatures is None else spaced_ladder(num_temperatures)
        start = self.starting_density({})
        return self.anneal_twice(start, conditional_ess, bar or ProgressBar(False), ladder)

    def anneal_twice(
        self,
        start: Density,
        conditional_ess: float,
        bar: ProgressBar,
        ladder: Sequence[Rung] | None = None,
    ) -> Annealed:
        """A pilot that adapts, then a run in which nothing does and `Zhat` is unbiased."""
        pilot = self.anneal_once(start, "annealing, pilot", conditional_ess, bar, ladder)
        return self.anneal_once(start, "annealing", conditional_ess, bar, pilot.ladder, adapt=False)

    def anneal_once(
        self,
        start: Density,
        stage: str,
        conditional_ess: float,
        bar: ProgressBar,
        ladder: Sequence[Rung] | None = None,
        *,
        max_sweeps: int = MAX_SWEEPS,
        adapt: bool = True,
    ) -> Annealed:
        """Brings particles from the prior (or the references) to the posterior."""
        bar.stage(stage)
        return anneal(
            start,
            self.draw_from_prior(start),
            self.parts,
            ladder=ladder,
            conditional_ess=conditional_ess,
            max_sweeps=max_sweeps,
            adapt=adapt,
            progress=bar.temperature,
            runner=self._runner,
        )

    def starting_density(self, initial_values: Mapping[str, Tensor]) -> Density:
        """The density, with references for latents with flat priors or with initial values.

        Args:
            initial_values: Constrained values by site.

        Raises:
            OptionError: A name that is not a latent, or a value that the site cannot have.
        """
        references = starting_references(self.density, self.arguments, initial_values)
        return self.density.at(1.0, references)

    def draw_from_prior(self, density: Density) -> SweepState:
        """Independent particles from the prior, or from references where a latent has one."""
        return self._at_rest(draw_from_prior(density, self.arguments, self.num_particles))

    @exclusive("Problem.constrain")
    def constrain(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Constrained values of unconstrained latents `(K, *batch, *event)`.

        Latents that are summed out are drawn given the others.
        """
        model = self._divisions.model
        return self._in_batches(
            lambda batch: constrained_particles(model, self.arguments, batch),
            self.completed(latents)[0],
        )

    def completed(
        self, latents: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Latents with draws of those that are summed out, and the probabilities of these.

        Args:
            latents: Unconstrained, `(n K, *batch, *event)`.

        Returns:
            All latents, and the conditional probabilities `(n K, *batch, *event, S)` of those that
            are summed out.
        """
        return complete(self.division, self.density.tensors, latents, self.num_particles)

    @exclusive("Problem.observation_means")
    def observation_means(self, state: SweepState) -> dict[str, Tensor]:
        """Posterior mean of every observed site's mean: the reconstruction of the data.

        The distributions' means (`fn.mean`) are averaged over the particles by their weights.

        Returns:
            By observed site, `(*batch, *event)`.
        """
        self._check_state(state)
        division, model = self.division, self._divisions.model
        args, kwargs = self.arguments.rebuild(self.arguments.tensors)
        means = self._in_batches(
            lambda batch: map_particles(
                lambda latents: observation_means(model, latents, args, kwargs), dict(batch)
            ),
            self.completed(state.latents)[0],
        )
        weights = state.log_weight.normalized()
        result = {}
        for name, mean in means.items():
            batch_dims = len(division.model_sites[name].batch_shape)
            shape = [mean.shape[0]] + [1] * (mean.dim() - 1)
            for plate in division.population:
                shape[1 + batch_dims + plate.dim] = plate.size
            result[name] = (weights.reshape(shape) * mean).sum(0)
        return result

    def evidence_refusal(self) -> str:
        """Why there is no evidence estimate; empty if there is one."""
        flat = self.density.without_prior()
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

    def _at_rest(self, state: SweepState) -> SweepState:
        """The state with what the move keeps of particles that have not moved yet."""
        return replace(state, memory=self.parts.init_memory(state.latents))

    def guide_refusal(self) -> str:
        """Why particles from the guide have no proper weights; empty if they have."""
        assert self.guide is not None
        return guide_refusal(self.guide, self.division, self.arguments)

    def _in_batches(
        self, function: Callable[[Latents], dict[str, Tensor]], latents: Latents
    ) -> dict[str, Tensor]:
        """Values by plain runs of the model, for as many particles at once as the user allows."""
        size = self._divisions.batch_size
        return function(latents) if size is None else in_batches(function, latents, size=size)

    def _find(self, thorough: bool) -> Density:
        division = self._divisions.find(self.arguments, thorough=thorough)
        if thorough:
            _check_subsampling(division, self.parts)
        return Density(division, self.arguments.tensors)

    def check(self) -> None:
        """Looks at the sites and the data anew, once.

        Raises:
            ModelError, DataError, CertificationError: The model or data cannot be handled.
            OptionError: The data are a subsample that exact corrections cannot handle.
        """
        if not self._is_checked:
            self.density = self._find(thorough=True)
            self._is_checked = True

    def _check_state(self, state: SweepState) -> None:
        for name in self.division.latents:
            expected = (self.num_particles, *self.division.sites[name].unconstrained_shape)
            got = tuple(state.latents[name].shape) if name in state.latents else None
            if got != expected:
                raise DataError(
                    f"the particles of site '{name}' have shape {got}, but the model's arguments "
                    f"ask for {expected}; a state belongs to the data it was initialised with: "
                    "call init(...) again for data of another shape"
                )


def check_annealing(num_temperatures: int | None, conditional_ess: float) -> None:
    """Checks the options of annealing.

    Raises:
        OptionError: One of them is out of range.
    """
    if num_temperatures is not None and num_temperatures < 1:
        raise OptionError(f"num_temperatures must be at least 1, got {num_temperatures}")
    if not 0.0 < conditional_ess < 1.0:
        raise OptionError(f"conditional_ess must lie in (0, 1), got {conditional_ess!r}")


def _check_subsampling(division: Division, parts: Parts) -> None:
    """Refuses exact corrections of global latents where a plate subsamples.

    Raises:
        OptionError: They are refused.
    """
    if not parts.correction.is_exact:
        return
    sites = division.sites
    scaled = [name for name, site in sites.items() if site.scale != 1.0]
    outside = [name for name in division.latents if sites[name].scale == 1.0]
    if scaled and len({site.scale for site in sites.values()}) > 1:
        plates = sorted({p.name for name in scaled for p in sites[name].plates})
        raise OptionError(
            f"site(s) {scaled} are in a plate that subsamples (one of {plates}), beside others "
            f"outside of it ({outside or 'observed sites'}): what a subsample says of these is an "
            "estimate of their density, so that no correction is exact; pass all the data (no "
            "subsample_size), or use algorithm='sgld', which moves them by stochastic gradients"
        )
