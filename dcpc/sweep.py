"""One sweep of divide-and-conquer predictive coding, on particles that are plain tensors.

A sweep reads like Algorithm 1 of Sennesh, Wu & Salvatori (2024): for every group of units,
predict (evaluate), propose along the prediction error, correct; then recombine. Everything that
varies is in `Parts`; everything that persists is in `SweepState`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from dcpc.conquer import DualAveraging, Move, Preconditioner
from dcpc.divide import POSTERIOR, Division, ScoredDensity, Target, UnitGroup
from dcpc.errors import DegenerateWeightsError
from dcpc.recombine import LogWeights, Resampler, take_particles
from dcpc.recombine.correction import Correction, ProposedMove


@dataclass(frozen=True)
class Parts:
    """The exchangeable parts of a sweep.

    Attributes:
        move: Proposal.
        correction: What makes it a sampler.
        preconditioner: Scale of the proposal.
        resampler: Resampling scheme.
        resample_threshold: Whole particles are resampled in the population cells where ESS / K
            is below it.
        step_size: Fixed step size, or None for one that is adapted where the correction has a
            target, else the default of 0.01.
        dual_averaging: The rule of adaptation.
    """

    move: Move
    correction: Correction
    preconditioner: Preconditioner
    resampler: Resampler
    resample_threshold: float = 0.5
    step_size: float | None = None
    dual_averaging: DualAveraging = field(default_factory=DualAveraging)

    @property
    def adapts_step_size(self) -> bool:
        """Whether the step size is adapted."""
        return self.step_size is None and self.correction.target is not None

    def initial_step_size(self, group: UnitGroup) -> float:
        """Before adaptation: `d^(-1/3)`, the scaling of MALA's optimum with dimension."""
        if self.step_size is not None:
            return self.step_size
        return group.size ** (-1.0 / 3.0) if self.adapts_step_size else DEFAULT_STEP_SIZE


DEFAULT_STEP_SIZE = 0.01
"""Step size of the corrections that have no target to adapt it to."""


@dataclass(frozen=True)
class Adaptation:
    """What a group's proposals have learned: preconditioner and step size, as dicts of tensors."""

    preconditioner: dict[str, Tensor]
    step_size: dict[str, Tensor]


@dataclass(frozen=True)
class SweepState:
    """What the next sweep needs, and nothing else.

    Attributes:
        latents: Unconstrained values `(K, *batch, *event)` by name.
        log_weight: Log-weights `(K, *population)`.
        log_joint: Log-density `(K, *population)` that the weights refer to: that of the last
            target, or of the distribution that the particles were drawn from.
        adaptation: By group name.
    """

    latents: dict[str, Tensor]
    log_weight: LogWeights
    log_joint: Tensor
    adaptation: Mapping[str, Adaptation] = field(default_factory=dict)

    @property
    def num_particles(self) -> int:
        """K."""
        return self.log_weight.num_particles


@dataclass(frozen=True)
class SweepInfo:
    """Diagnostics of a sweep.

    Attributes:
        statistic: By group name, what adaptation looks at, `(n,)`: the acceptance rate
            (metropolis), or that times the conditional ESS over K (weight). Empty for the others.
        step_size: By group name, `(n,)`.
        ess: Effective sample size before resampling, `(*population)`.
        ancestors: `(K, *population)`, where whole particles were resampled; None if nowhere.
        num_bad: Number of log-densities that were NaN or infinite.
        num_bad_scores: By group name, number of units `(n,)` whose score was NaN or infinite at a
            finite log-density, over particles and plates; they move without a drift.
    """

    statistic: dict[str, Tensor]
    step_size: dict[str, Tensor]
    ess: Tensor
    ancestors: Tensor | None
    num_bad: int
    num_bad_scores: dict[str, Tensor] = field(default_factory=dict)


def sweep(
    division: Division,
    state: SweepState,
    parts: Parts,
    tensors: Sequence[Tensor],
    *,
    target: Target = POSTERIOR,
    adapt: bool = False,
    adapt_preconditioner: bool = True,
    retargets: bool = False,
) -> tuple[SweepState, SweepInfo]:
    """Moves every unit once.

    Args:
        division: The divided model.
        state: Particles, weights, adaptation.
        parts: What the sweep is made of.
        tensors: Tensors among the model's arguments.
        target: The density to leave invariant; the weights in `state` must refer to it, unless
            the sweep retargets.
        adapt: Whether step sizes and preconditioners learn from this sweep.
        adapt_preconditioner: Set to False to let only the step sizes learn.
        retargets: Whether the particles are first reweighted to the target, as by `retarget`, which
            costs less here than on its own.

    Returns:
        The new state and the sweep's diagnostics.

    Raises:
        DegenerateWeightsError: All particles of a population cell have zero density; names the
            sites that are to blame.
    """
    correction = parts.correction
    evaluations: dict[str, ScoredDensity] = {}
    if retargets:
        evaluations, log_joint = division.evaluate_leading(state.latents, tensors, target)
        state = _reweighted(division, state, log_joint, tensors, target)
    ess = state.log_weight.ess()
    ancestors = None
    if correction.is_exact:
        state, ancestors = resample(division, state, parts, tensors, target)
    if ancestors is not None:
        evaluations = {name: _take(e, ancestors) for name, e in evaluations.items()}

    latents = dict(state.latents)
    log_weight = correction.begin(state.log_weight)
    log_joint = state.log_joint
    adaptation = dict(state.adaptation)
    statistic: dict[str, Tensor] = {}
    step_sizes: dict[str, Tensor] = {}
    bad_scores: dict[str, Tensor] = {}
    activity = division.activity(tensors).groups
    num_bad = torch.zeros((), dtype=torch.long, device=log_joint.device)

    for group in division.groups:
        value = group.pack(latents)
        active = activity.get(group.name)
        evaluate = partial(_evaluate, group, latents, tensors, target, active)
        before = evaluations.get(group.name) or group.evaluate(value, latents, tensors, target)
        bad_scores[group.name] = _count_bad_scores(before)
        before = _usable(before, active)
        learned = adaptation.get(group.name) or _first_adaptation(
            group, parts, before, active, adapt
        )
        step_size = parts.dual_averaging.step_size(learned.step_size, adapting=adapt)
        metric = parts.preconditioner.metric(learned.preconditioner, before.score)
        step_taken = parts.move.jitter(step_size)
        proposal = parts.move.propose(
            value, before.score, step_taken, metric, partial(_score_at, evaluate)
        )
        if active is not None:
            stays = torch.where(active, proposal.value, value)
            proposal = replace(proposal, value=stays)
        outcome = correction.apply(
            ProposedMove(
                group,
                value,
                before,
                parts.move,
                proposal,
                step_taken,
                metric,
                evaluate,
                partial(_log_density, group, latents, tensors, target),
                log_weight,
                parts.resampler,
                active,
            )
        )

        latents.update(group.unpack(outcome.value))
        if outcome.log_weight is not None:
            log_weight = log_weight.add(outcome.log_weight)
        if outcome.log_joint is not None:
            log_joint = log_joint + outcome.log_joint
        if outcome.statistic is not None:
            statistic[group.name] = outcome.statistic
        if adapt and adapt_preconditioner:
            learned = _learn_preconditioner(learned, group, parts, before, active)
        if adapt and parts.adapts_step_size:
            learned = _learn_step_size(learned, parts, outcome.statistic)
        adaptation[group.name] = learned
        step_sizes[group.name] = step_size
        num_bad = num_bad + outcome.num_bad

    log_weight = correction.end(
        log_weight, lambda: division.log_joint(latents, tensors, target).detach()
    )
    info = SweepInfo(statistic, step_sizes, ess, ancestors, int(num_bad), bad_scores)
    return SweepState(latents, log_weight, log_joint, adaptation), info


def restart_adaptation(state: SweepState, parts: Parts) -> SweepState:
    """Lets the step sizes adapt anew from where they are: the target has changed."""
    return replace(
        state,
        adaptation={
            name: replace(learned, step_size=parts.dual_averaging.restart(learned.step_size))
            for name, learned in state.adaptation.items()
        },
    )


def retarget(
    division: Division,
    state: SweepState,
    tensors: Sequence[Tensor],
    target: Target = POSTERIOR,
) -> SweepState:
    """Reweights the particles to a target that has moved.

    The temperature rose, the parameters were updated, or the particles were drawn from a prior
    or a guide: each weight takes the ratio of the new log-density to the one it refers to.

    Raises:
        DegenerateWeightsError: No particle of a population cell has positive density.
    """
    with torch.no_grad():
        log_joint = division.log_joint(state.latents, tensors, target)
    return _reweighted(division, state, log_joint, tensors, target)


def _reweighted(
    division: Division,
    state: SweepState,
    log_joint: Tensor,
    tensors: Sequence[Tensor],
    target: Target,
) -> SweepState:
    """The state whose weights refer to the target, of log-density `log_joint`."""
    log_weight = state.log_weight.add(log_joint - state.log_joint)
    moved = replace(state, log_weight=log_weight, log_joint=log_joint)
    _check_alive(division, moved, tensors, target)
    return moved


def resample(
    division: Division,
    state: SweepState,
    parts: Parts,
    tensors: Sequence[Tensor],
    target: Target = POSTERIOR,
    *,
    always: bool = False,
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
        _check_alive(division, state, tensors, target)
        return state, None
    try:
        normalized = weights.normalized()
    except DegenerateWeightsError as error:
        raise _name_bad_sites(division, state, tensors, target) from error
    stay = torch.arange(weights.num_particles, device=low.device)
    stay = stay.reshape(-1, *(1,) * low.dim()).expand(weights.log_weight.shape)
    ancestors = torch.where(low, parts.resampler(normalized), stay)
    latents = {
        name: take_particles(u, ancestors, division.population_axes(name))
        for name, u in state.latents.items()
    }
    log_joint = take_particles(state.log_joint, ancestors, tuple(range(1, state.log_joint.dim())))
    return replace(
        state, latents=latents, log_joint=log_joint, log_weight=weights.reset_to_mean(low)
    ), ancestors


def loss(division: Division, state: SweepState, tensors: Sequence[Tensor]) -> Tensor:
    """`- sum_cells sum_k W_k log p(x, z_k)`, whose gradient in the parameters is local.

    The particles and weights are constants (Sennesh, Wu & Salvatori 2024, Theorem 2). Scales of
    the model apply, so that a plate that subsamples counts for the whole dataset.
    """
    latents = {name: u.detach() for name, u in state.latents.items()}
    factors = division.log_factors(latents, tensors)
    log_joint = division.over_population(factors, scaled=True)
    return -(state.log_weight.normalized() * log_joint).sum()


def _take(evaluation: ScoredDensity, ancestors: Tensor) -> ScoredDensity:
    """The evaluation of resampled particles."""
    axes = tuple(range(1, ancestors.dim()))
    return ScoredDensity(
        take_particles(evaluation.log_density, ancestors, axes),
        take_particles(evaluation.score, ancestors, axes),
    )


def _evaluate(
    group: UnitGroup,
    latents: Mapping[str, Tensor],
    tensors: Sequence[Tensor],
    target: Target,
    active: Tensor | None,
    value: Tensor,
) -> ScoredDensity:
    """The units' log-densities and scores at a value of theirs, given the other latents."""
    return _usable(group.evaluate(value, latents, tensors, target), active)


def _log_density(
    group: UnitGroup,
    latents: Mapping[str, Tensor],
    tensors: Sequence[Tensor],
    target: Target,
    value: Tensor,
) -> Tensor:
    """The units' log-densities alone."""
    with torch.no_grad():
        return group.log_density(value, latents, tensors, target)


def _score_at(evaluate: Callable[[Tensor], ScoredDensity], value: Tensor) -> Tensor:
    return evaluate(value).score


def _count_bad_scores(evaluation: ScoredDensity) -> Tensor:
    """Number of units `(n,)` with a bad score where the log-density is finite."""
    bad = ~evaluation.score.isfinite().all(-1) & evaluation.log_density.isfinite()
    return bad.flatten(0, -2).sum(0)


def _usable(evaluation: ScoredDensity, active: Tensor | None) -> ScoredDensity:
    """The evaluation with zero in the place of scores that nothing moves along.

    Those that are NaN or infinite, at both ends of a move alike, so that it stays reversible where
    only the score is bad; and those of values that are no part of the target, of which a reference
    distribution may have one: they stay, and must not count in the ratio of a move.
    """
    score = evaluation.score.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    if active is not None:
        score = torch.where(active, score, 0.0)
    return replace(evaluation, score=score)


def _first_adaptation(
    group: UnitGroup, parts: Parts, before: ScoredDensity, active: Tensor | None, adapt: bool
) -> Adaptation:
    step_size = before.score.new_full((len(group.units),), parts.initial_step_size(group))
    first = Adaptation(
        preconditioner=parts.preconditioner.init(before.score, group.population),
        step_size=parts.dual_averaging.init(step_size),
    )
    return _learn_preconditioner(first, group, parts, before, active) if adapt else first


def _learn_preconditioner(
    learned: Adaptation,
    group: UnitGroup,
    parts: Parts,
    before: ScoredDensity,
    active: Tensor | None,
) -> Adaptation:
    score = before.score
    if active is not None:
        # The mean of squares over the population's cells becomes one over the active cells.
        axes = tuple(range(1, 1 + group.population))
        share = active.to(score.dtype).mean(axes, keepdim=True) if axes else active.to(score.dtype)
        score = score / share.clamp(min=1e-12).sqrt()
    return replace(
        learned,
        preconditioner=parts.preconditioner.update(learned.preconditioner, score, group.population),
    )


def _learn_step_size(learned: Adaptation, parts: Parts, statistic: Tensor | None) -> Adaptation:
    target = parts.correction.target
    if target is None or statistic is None:
        return learned
    return replace(
        learned,
        step_size=parts.dual_averaging.update(learned.step_size, target - statistic),
    )


def _check_alive(
    division: Division, state: SweepState, tensors: Sequence[Tensor], target: Target
) -> None:
    if bool((state.log_weight.num_bad == state.num_particles).any()):
        raise _name_bad_sites(division, state, tensors, target)


def _name_bad_sites(
    division: Division, state: SweepState, tensors: Sequence[Tensor], target: Target
) -> DegenerateWeightsError:
    """The error for a population cell without any particle of positive density."""
    with torch.no_grad():
        factors = target.weigh(
            division.log_factors(state.latents, tensors), state.latents, division.sites
        )
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
