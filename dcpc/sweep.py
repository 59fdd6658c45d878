"""One sweep of divide-and-conquer predictive coding, on particles that are plain tensors.

A sweep reads like Algorithm 1 of Sennesh, Wu & Salvatori (2024): for every group of units,
predict (evaluate), propose along the prediction error, correct; then recombine. Everything that
varies is in `Parts`; everything that persists is in `SweepState`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dcpc.conquer import ConditionalDraw, Start, draw_from_conditional
from dcpc.divide import Conditional, Density, Division, ScoredDensity, UnitGroup
from dcpc.errors import DegenerateWeightsError
from dcpc.parts import Adaptation, Parts
from dcpc.recombine import LogWeights, take_particles
from dcpc.recombine.correction import ProposedMove
from dcpc.recombine.resampling import along_population


@dataclass(frozen=True)
class SweepState:
    """State of the sampler: all that the next sweep needs, and nothing else.

    Attributes:
        latents: Unconstrained values `(K, *batch, *event)` by name.
        log_weight: Log-weights `(K, *population)`.
        log_joint: Log-density `(K, *population)` that the weights refer to: the one of the last
            sweep, or of the distribution that the particles were drawn from.
        adaptation: By group name.
        memory: Per-particle state of the move (a momentum), by kind and by latent, each
            of the latent's shape.
        scored: Log-densities and scores of the particles, as they are, by the name of the only
            group, if they are followed; those of the density that the weights refer to.
    """

    latents: dict[str, Tensor]
    log_weight: LogWeights
    log_joint: Tensor
    adaptation: Mapping[str, Adaptation] = field(default_factory=dict)
    memory: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)
    scored: Mapping[str, ScoredDensity] = field(default_factory=dict)

    @property
    def num_particles(self) -> int:
        """K."""
        return self.log_weight.num_particles

    def map(self, change: Callable[[str, Tensor], Tensor]) -> SweepState:
        """The state with every latent's values, and what is kept of them, changed alike.

        Evaluations are dropped.

        Args:
            change: From a latent's name and a tensor `(K, *batch, *event)` to another one.
        """
        return replace(
            self,
            latents={name: change(name, u) for name, u in self.latents.items()},
            memory={
                kind: {name: change(name, value) for name, value in by_latent.items()}
                for kind, by_latent in self.memory.items()
            },
            scored={},
        )


@dataclass
class SweepInfo:
    """Diagnostics of a sweep.

    Attributes:
        ess: Effective sample size before resampling, `(*population)`.
        ancestors: `(K, *population)`, where whole particles were resampled; None if nowhere.
        statistic: By group name, what adaptation looks at, `(n,)`: the acceptance rate
            (metropolis), or that times the conditional ESS over K (weight). Empty for the others.
        step_size: By group name, `(n,)`.
        num_bad: Number of log-densities that were NaN or infinite.
        num_bad_scores: By group name, number of units `(n,)` whose score was NaN or infinite at a
            finite log-density, over particles and plates; they move without a drift.
        probabilities: By enumerated discrete latent, the mean over the particles of the conditional
            probabilities that it was drawn from, `(*batch, *event, S)`, or `(*batch, S)` of one-hot
            vectors.
    """

    ess: Tensor
    ancestors: Tensor | None = None
    statistic: dict[str, Tensor] = field(default_factory=dict)
    step_size: dict[str, Tensor] = field(default_factory=dict)
    num_bad: Tensor | int = 0
    num_bad_scores: dict[str, Tensor] = field(default_factory=dict)
    probabilities: dict[str, Tensor] = field(default_factory=dict)

    def add(
        self, group: str, step_size: Tensor, predicted: ScoredDensity, statistic: Tensor | None
    ) -> None:
        """Adds the move of a group."""
        self.step_size[group] = step_size
        self.num_bad_scores[group] = predicted.count_bad_scores()
        if statistic is not None:
            self.statistic[group] = statistic

    def add_draw(self, drawn: ConditionalDraw, weights: LogWeights, division: Division) -> None:
        """Adds the draw of a discrete group: its probabilities, averaged over the particles."""
        for name, probability in drawn.probabilities.items():
            self.probabilities[name] = mean_over_particles(probability, name, weights, division)


def mean_over_particles(
    value: Tensor, name: str, weights: LogWeights, division: Division
) -> Tensor:
    """Weighted mean over the particles.

    Args:
        value: `(K, *batch, ...)`, of a latent's batch shape.
        name: The latent.
        weights: The particles' weights, `(K, *population)`.
        division: The divided model.
    """
    mass = weights.normalized().to(value)
    return (along_population(mass, value, division.population_axes(name)) * value).sum(0)


@dataclass(frozen=True)
class Adapting:
    """What learns from a sweep.

    Attributes:
        step_size: Whether step sizes do.
        preconditioner: Whether preconditioners do.
    """

    step_size: bool
    preconditioner: bool


class Runner:
    """What evaluates and moves the particles of a sweep: as it is written here, or a recording."""

    def begin(self, density: Density, *, learns: bool) -> None:
        """Begins a sweep, which the gradient of a loss follows if it `learns`."""

    def evaluate(
        self, density: Density, state: SweepState, parts: Parts
    ) -> tuple[dict[str, ScoredDensity], Tensor]:
        """Log-density `(K, *population)` of the particles.

        Returns:
            Evaluations by group name that fell off on the way, and the log-density.
        """
        return density.evaluate_leading(state.latents)

    def move(
        self,
        density: Density,
        state: SweepState,
        info: SweepInfo,
        evaluations: Mapping[str, ScoredDensity],
        parts: Parts,
        groups: Sequence[UnitGroup],
        how: Adapting,
    ) -> tuple[SweepState, SweepInfo]:
        """Moves units, as `move_units` does."""
        return move_units(density, state, info, evaluations, parts, groups, how)

    def loss(self, density: Density, state: SweepState) -> Tensor:
        """The loss of particles, as `loss` gives it."""
        return loss(density, state)

    @contextmanager
    def expecting(self, num_sweeps: int, say: Callable[[str], None]) -> Iterator[None]:
        """A block of code that makes at least so many sweeps.

        Args:
            num_sweeps: Their number.
            say: Told what takes long, and what is not done and why.
        """
        yield


PLAIN = Runner()


def sweep(
    density: Density,
    state: SweepState,
    parts: Parts,
    *,
    adapt: bool = False,
    adapt_preconditioner: bool = True,
    retargets: bool = False,
    groups: Collection[str] | None = None,
    runner: Runner = PLAIN,
) -> tuple[SweepState, SweepInfo]:
    """Moves every unit once.

    Args:
        density: Density to leave invariant; the weights in `state` must refer to it, unless
            `retargets`.
        state: Particles, weights, adaptation.
        parts: Parts of the sweep.
        adapt: Whether step sizes and preconditioners learn from this sweep.
        adapt_preconditioner: Set to False to let only the step sizes learn.
        retargets: Whether the particles are first reweighted to the density, as by `retarget`,
            which costs less here than on its own.
        groups: Names of the groups to move; None for all.
        runner: What evaluates and moves the particles.

    Returns:
        The new state and the sweep's diagnostics.

    Raises:
        DegenerateWeightsError: All particles of a population cell have zero density; names the
            sites that are to blame.
    """
    state, info, evaluations = _recombine(density, state, parts, retargets, runner)
    chosen = [g for g in density.division.groups if groups is None or g.name in groups]
    how = Adapting(adapt, adapt and adapt_preconditioner)
    return runner.move(density, state, info, evaluations, parts, chosen, how)


def move_units(
    density: Density,
    state: SweepState,
    info: SweepInfo,
    evaluations: Mapping[str, ScoredDensity],
    parts: Parts,
    groups: Sequence[UnitGroup],
    how: Adapting,
) -> tuple[SweepState, SweepInfo]:
    """Moves units, group after group, each with the others where they have come to be.

    Args:
        density: Density to leave invariant.
        state: Particles, weights, adaptation.
        info: Diagnostics so far.
        evaluations: By group name, evaluations at `state` that are known already, of the groups
            that move first.
        parts: Parts of the sweep.
        groups: The groups to move, in order.
        how: What learns from the sweep.
    """
    latents, adaptation = dict(state.latents), dict(state.adaptation)
    memory = _copied(state.memory or parts.init_memory(latents))
    log_weight, log_joint = parts.correction.begin(state.log_weight), state.log_joint
    active = density.active_values()
    scored: dict[str, ScoredDensity] = {}
    for group in groups:
        unit = density.conditional(group, latents, active.get(group.name))
        own = parts.of(group)
        if group.is_discrete:
            drawn = draw_from_conditional(unit, greedy=not parts.move.is_random)
            info.add_draw(drawn, log_weight, density.division)
            outcome = parts.correction.keep(unit, drawn, parts.resampler)
        else:
            predicted = evaluations.get(group.name) or unit.evaluate_raw(unit.value)
            learned = adaptation.get(group.name) or _init_adaptation(
                unit, own, predicted, log_weight, how
            )
            step_size = own.dual_averaging.step_size(learned.step_size, adapting=how.step_size)
            if learned.reference:
                unit, predicted, gained = _jump(
                    unit, predicted, learned, step_size, own, log_weight, info
                )
                latents, log_joint = dict(unit.latents), log_joint + gained
            proposed = _propose(unit, predicted, learned, step_size, own, log_weight, memory)
            outcome = own.correction.apply(proposed)
            if how.step_size:
                score = proposed.before.score if how.preconditioner else None
                learned = _learn(unit, own, learned, score, log_weight, outcome.statistic)
            adaptation[group.name] = learned
            info.add(group.name, step_size, predicted, outcome.statistic)

        latents.update(group.unpack(outcome.value))
        for kind, value in outcome.memory.items():
            memory[kind].update(group.unpack(value))
        if outcome.log_weight is not None:
            log_weight = log_weight.add(outcome.log_weight)
        if outcome.log_joint is not None:
            log_joint = log_joint + outcome.log_joint
        info.num_bad = info.num_bad + outcome.num_bad
        # Where there are several groups, the next one's move makes a score worthless.
        if outcome.kept and group.name in evaluations and len(density.division.groups) == 1:
            scored[group.name] = outcome.kept
    log_weight = parts.correction.end(log_weight, lambda: density.log_joint(latents))
    return SweepState(latents, log_weight, log_joint, adaptation, memory, scored), info


def _recombine(
    density: Density, state: SweepState, parts: Parts, retargets: bool, runner: Runner
) -> tuple[SweepState, SweepInfo, dict[str, ScoredDensity]]:
    """Reweights the particles if asked to, and resamples whole ones where the ESS is low.

    Returns:
        The state, the beginning of the diagnostics, and evaluations that fell off on the way.
    """
    evaluations = {} if retargets else dict(state.scored)
    if retargets:
        evaluations, log_joint = runner.evaluate(density, state, parts)
        state = _reweighted(density, state, log_joint)
    info = SweepInfo(state.log_weight.ess())
    if parts.correction.is_exact:
        state, info.ancestors = resample(density, state, parts)
    if info.ancestors is not None:
        evaluations = {name: _take(e, info.ancestors) for name, e in evaluations.items()}
    return state, info, evaluations


def _propose(
    unit: Conditional,
    predicted: ScoredDensity,
    learned: Adaptation,
    step_size: Tensor,
    parts: Parts,
    log_weight: LogWeights,
    memory: Mapping[str, Mapping[str, Tensor]],
) -> ProposedMove:
    """Proposes values for a group of units along their scores; inactive values stay."""
    value, before = unit.value, unit.usable(predicted)
    metric = parts.preconditioner.metric(learned.preconditioner, before.score)
    kept = {kind: unit.group.pack(by_latent) for kind, by_latent in memory.items()}
    start = Start(value, before.score, step_size, metric, unit.score, kept)
    proposal = parts.move.propose(start)
    if unit.active is not None:
        proposal = replace(proposal, value=torch.where(unit.active, proposal.value, value))
    return ProposedMove(unit, value, predicted, proposal, log_weight, parts.resampler)


def _jump(
    unit: Conditional,
    predicted: ScoredDensity,
    learned: Adaptation,
    step_size: Tensor,
    parts: Parts,
    log_weight: LogWeights,
    info: SweepInfo,
) -> tuple[Conditional, ScoredDensity, Tensor]:
    """Jumps from the mixture of a group of units.

    Returns:
        The conditionals where the jumps have led, log-densities and scores there, and the change
        of the log-joints.
    """
    jumping = parts.jumping(learned)
    proposed = _propose(unit, predicted, learned, step_size, jumping, log_weight, {})
    outcome = jumping.correction.apply(proposed)
    assert outcome.kept is not None
    assert outcome.log_joint is not None
    info.num_bad = info.num_bad + outcome.num_bad
    latents = {**unit.latents, **unit.group.unpack(outcome.value)}
    return replace(unit, latents=latents), outcome.kept, outcome.log_joint


def _learn(
    unit: Conditional,
    parts: Parts,
    learned: Adaptation,
    score: Tensor | None,
    weights: LogWeights,
    statistic: Tensor | None,
) -> Adaptation:
    """Adaptation state after a move; without a score, the preconditioner stays."""
    if score is not None:
        learned = parts.learn_preconditioner(learned, unit, score, weights)
    return parts.learn_step_size(learned, statistic)


def _copied(memory: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {kind: dict(by_latent) for kind, by_latent in memory.items()}


def _init_adaptation(
    unit: Conditional,
    parts: Parts,
    predicted: ScoredDensity,
    weights: LogWeights,
    how: Adapting,
) -> Adaptation:
    """Adaptation state before any move; with weights, it learns from the particles at once."""
    score = unit.usable(predicted).score
    first = parts.init_adaptation(unit.group, score)
    if not how.step_size:
        return first
    return parts.learn_preconditioner(first, unit, score, weights)


def restart_adaptation(state: SweepState, parts: Parts) -> SweepState:
    """Lets the step sizes adapt anew from where they are: the density has changed."""
    adaptation = {name: parts.restart(learned) for name, learned in state.adaptation.items()}
    return replace(state, adaptation=adaptation)


def retarget(density: Density, state: SweepState) -> SweepState:
    """Reweights the particles to a density that is not the one that their weights refer to.

    The temperature rose, the parameters were updated, or the particles were drawn from a prior
    or a guide: each weight takes the ratio of the new log-density to the one it refers to.

    Raises:
        DegenerateWeightsError: No particle of a population cell has positive density.
    """
    return _reweighted(density, state, density.log_joint(state.latents))


def _reweighted(density: Density, state: SweepState, log_joint: Tensor) -> SweepState:
    """The state whose weights refer to the density, which is `log_joint` at the particles."""
    log_weight = state.log_weight.add(log_joint - state.log_joint)
    moved = replace(state, log_weight=log_weight, log_joint=log_joint, scored={})
    _check_alive(density, moved)
    return moved


def resample(
    density: Density, state: SweepState, parts: Parts, *, always: bool = False
) -> tuple[SweepState, Tensor | None]:
    """Resamples whole particles in the population cells whose ESS is low.

    The cell's particles then share its mean weight, so that `E[Zhat] = Z` still holds.

    Returns:
        The state, and the ancestors `(K, *population)`; None if nothing was resampled.
    """
    weights = state.log_weight
    low = weights.ess() < parts.resample_threshold * weights.num_particles
    if always:
        low = torch.ones_like(low)
    if weights.num_particles == 1 or not bool(low.any()):
        _check_alive(density, state)
        return state, None
    try:
        normalized = weights.normalized()
    except DegenerateWeightsError as error:
        raise _name_bad_sites(density, state) from error
    stay = torch.arange(weights.num_particles, device=low.device)
    stay = stay.reshape(-1, *(1,) * low.dim()).expand(weights.log_weight.shape)
    ancestors = torch.where(low, parts.resampler(normalized), stay)
    taken = state.map(
        lambda name, u: take_particles(u, ancestors, density.division.population_axes(name))
    )
    log_joint = take_particles(state.log_joint, ancestors, tuple(range(1, state.log_joint.dim())))
    return replace(taken, log_joint=log_joint, log_weight=weights.reset_to_mean(low)), ancestors


def loss(density: Density, state: SweepState) -> Tensor:
    """`- sum_cells sum_k W_k log p(x, z_k)`, whose gradient in the parameters is local.

    The particles and weights are constants (Sennesh, Wu & Salvatori 2024, Theorem 2). Scales of
    the model apply, so that a plate that subsamples counts for the whole dataset.
    """
    latents = {name: u.detach() for name, u in state.latents.items()}
    return -(state.log_weight.normalized() * density.learnable_log_joint(latents)).sum()


def _take(evaluation: ScoredDensity, ancestors: Tensor) -> ScoredDensity:
    """The evaluation of resampled particles."""
    axes = tuple(range(1, ancestors.dim()))
    return ScoredDensity(
        take_particles(evaluation.log_density, ancestors, axes),
        take_particles(evaluation.score, ancestors, axes),
    )


def _check_alive(density: Density, state: SweepState) -> None:
    if bool((state.log_weight.num_bad == state.num_particles).any()):
        raise _name_bad_sites(density, state)


def _name_bad_sites(density: Density, state: SweepState) -> DegenerateWeightsError:
    """The error for a population cell without any particle of positive density."""
    division = density.division
    with torch.no_grad():
        factors = density.log_factors(state.latents)
    cells = {
        name: ~division.over_population({name: value}).isfinite() for name, value in factors.items()
    }
    blamed = [name for name, bad in cells.items() if bool(bad.all(0).any())]
    blamed = blamed or [name for name, bad in cells.items() if bool(bad.any())]
    dead = int((state.log_weight.num_bad == state.num_particles).sum())
    return DegenerateWeightsError(
        f"all {state.num_particles} particles have zero density in {dead} of "
        f"{state.log_weight.num_bad.numel()} population cells: the log-density of site(s) "
        f"{blamed or sorted(division.sites)} is NaN or infinite. Check the data and the prior of "
        "these sites, lower the step size, or use more particles."
    )
