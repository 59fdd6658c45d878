"""Resample-move: particles take in one observation after the other.

Gilks & Berzuini (2001); Chopin (2002); that a block of the last steps moves is from Doucet, Briers
& Senecal (2006). At a new step the particles draw its latents from their prior, weigh by the
density of its observations, are resampled as whole paths where their ESS is low, and move their
last steps by sweeps that leave the posterior of the data so far invariant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dcpc.approach.tuning import tuned
from dcpc.divide import prior_particles
from dcpc.divide.model import Latents
from dcpc.errors import ModelError
from dcpc.filtering.evidence import RunningError
from dcpc.filtering.genealogy import Generation
from dcpc.filtering.growth import Growth
from dcpc.filtering.steps import Steps
from dcpc.filtering.window import NUM_FREE, Bind, Window, disagreement, open_window
from dcpc.parts import Adaptation
from dcpc.posterior import Evidence
from dcpc.presets import JOINT_MOVE
from dcpc.problem import Problem
from dcpc.recombine import LogWeights
from dcpc.sweep import SweepState, resample, restart_adaptation

__all__ = ["Filter", "advance"]

MAX_EXTRA = 4
"""Steps that a window is prolonged by where factors look further back than the latents tell."""

NUM_ADAPTING = 15
"""Sweeps on a copy of the particles in which proposals adapt."""

SANE_ACCEPTANCE = (0.5, 0.97)
"""Acceptance rates at which proposals are still good; outside they adapt anew."""

MIN_CONDITIONAL_ESS = 0.2
"""Conditional ESS, over K, down to which observations are taken in at once."""

TEMPERED_ESS = 0.5
"""Conditional ESS, over K, that each power keeps where they are not."""

SMALLEST_STEP = 1e-4
"""Smallest step of the temperature then."""

MIN_SURVIVORS = 20.0
"""Conditional ESS of an observation below which a warning names its step; of few particles a tenth.
"""

ENOUGH_DISTINCT = 100
"""Distinct values of a latent that holds for all times, below which there is a warning."""


@dataclass(frozen=True)
class Filter:
    """State of a filter after an observation. Names of sites are those in the whole model.

    Attributes:
        num_steps: Number of steps so far.
        steps: The sites by step.
        order: Markov order.
        state: Latents of the window and those that hold for all times, with centred weights, and
            the window's log-density.
        run: Evidence of the run that it began with.
        log_evidence: Sum of the evidence increments since, double, `(*population)`.
        error: Standard error of the sum of both.
        last: The last generation of final values.
        window: The last steps of the model; None before the first observation.
        adaptation: Proposals by group.
        certified: Number of steps when a window was first compared with the whole; 0 for never.
        draws: Latents after every sweep of the last step, or as they are where none was made.
        acceptance: Acceptance rate of these sweeps; NaN where nothing is accepted.
        step_size: By group.
        surprises: Steps whose observations were far from where the particles expected them.
        degenerate: Latents that hold for all times of which few distinct values are left.
    """

    num_steps: int
    steps: Steps
    order: int
    state: SweepState
    run: Evidence
    log_evidence: Tensor
    error: RunningError
    last: Generation | None
    window: Window | None = None
    adaptation: Mapping[str, Adaptation] = field(default_factory=dict)
    certified: int = 0
    draws: tuple[Latents, ...] = ()
    acceptance: float = math.nan
    step_size: Mapping[str, Tensor] = field(default_factory=dict)
    surprises: tuple[int, ...] = ()
    degenerate: tuple[str, ...] = ()


def advance(known: Filter, growth: Growth, bind: Bind, num_sweeps: int) -> Filter:
    """The filter after one more step.

    Args:
        known: The filter before.
        growth: The arguments, longer by one step at least.
        bind: Binds the model to arguments.
        num_sweeps: Sweeps that move the last steps.

    Raises:
        ModelError: The steps are not alike.
        DegenerateWeightsError: No particle has positive density.
        DCPCError: The model or data cannot be handled.
    """
    leaving = {} if known.window is None else known.window.constrain(known.state.latents)
    known, latents = _grown(known, growth, bind)
    window = known.window
    assert window is not None
    with window.naming():
        return _taken_in(known, window, latents, leaving, num_sweeps)


def _taken_in(
    known: Filter,
    window: Window,
    latents: Latents,
    leaving: Latents,
    num_sweeps: int,
) -> Filter:
    """The filter after the observations of the window's last step.

    Their density is taken in at once where the particles can follow, else power by power, with
    moves between (Neal 2001).

    Args:
        known: The filter.
        window: Its window.
        latents: The window's latents, by its own names.
        leaving: Constrained values of the window before.
        num_sweeps: Sweeps that move the last steps.
    """
    final = {name: z for name, z in leaving.items() if window.is_final(name)}
    state = SweepState(dict(latents), known.state.log_weight, known.state.log_joint)
    temperature = 0.0
    while temperature < 1.0:
        increment, before = _increment(window, state.latents), temperature
        temperature = _next_temperature(state.log_weight, increment, before) if num_sweeps else 1.0
        known, state = _weighed(known, state, (temperature - before) * increment)
        known, state = _resampled(known, window, state, final)
        known = _adapted(known, window.at(temperature), state)
        known, state = _moved(known, temperature, state, num_sweeps)
        final = {}
    log_joint = window.problem.density.log_joint(state.latents)
    return _degeneracy(replace(known, state=replace(known.state, log_joint=log_joint)))


def _grown(known: Filter, growth: Growth, bind: Bind) -> tuple[Filter, dict[str, Tensor]]:
    """The filter with the window of one more step, whose latents are drawn from their prior.

    The window begins as the whole model. Where it becomes a part of it, and now and then from there
    on (`_is_due`), the factors of its free steps are compared with those of the whole. They may
    depend on data further back than on latents: the first time, longer windows are tried.

    Returns:
        The filter, and the window's latents by its own names.

    Raises:
        ModelError: The steps are not alike.
    """
    stop, first = known.num_steps + 1, 0 if known.window is None else known.window.start
    problem = ""
    most = known.order + (0 if known.certified else MAX_EXTRA)
    for order in range(known.order, most + 1):
        window = open_window(bind, growth, known.steps, order, stop, known.window)
        if window.start < first:
            break
        if window.start == 0:
            order = max(order, known.steps.order(window.problem.division.graph))
        latents = _drawn(window, known.state.latents)
        certified = known.certified
        if window.start > 0 and _is_due(certified, stop):
            problem, certified = disagreement(window, growth, latents), certified or stop
        if window.start == 0 or not problem:
            is_same = known.window is not None and known.window.shares_units(window)
            return replace(
                known,
                num_steps=stop,
                order=order,
                window=window,
                certified=certified,
                adaptation=known.adaptation if is_same else {},
            ), latents
    raise ModelError(
        f"extend: the model on its last {known.order + NUM_FREE} steps differs from the whole: "
        f"{problem}; expected steps that are alike: pass what depends on time (a trend, a season) "
        "as data with a row per step, and start from a run over more steps if one looks far back"
    )


def _is_due(certified: int, stop: int) -> bool:
    """Whether a window of so many steps is to be compared with the whole.

    The first eight are, and four in a row whenever the steps since have doubled: a period that
    divides the step of one comparison does not divide that of the next.
    """
    passed = stop - certified
    return not certified or passed < 8 or passed - (1 << passed.bit_length() - 1) < 4


def _drawn(window: Window, latents: Latents) -> dict[str, Tensor]:
    """The window's latents, by its own names: as they are, and from the prior for the new step."""
    given, problem = window.inside(latents), window.problem
    sites = problem.division.sites
    drawn = prior_particles(problem.model, sites, problem.arguments, problem.num_particles, given)
    return {**drawn, **given}


def _increment(window: Window, latents: Latents) -> Tensor:
    """Log-density of the new step's observations, `(K, *population)`; zero where there are none."""
    factors = window.problem.density.log_factors(latents)
    new = {name: factors[name] for name in window.observed}
    over_population = window.problem.division.over_population
    return over_population(new) if new else torch.zeros_like(over_population(factors))


def _next_temperature(weights: LogWeights, increment: Tensor, temperature: float) -> float:
    """The temperature up to which observations are taken in, by the worst cell's conditional ESS.

    One where that stays above `MIN_CONDITIONAL_ESS`; and where it falls below `TEMPERED_ESS`
    however little is taken in, since the observations have density zero at most particles.
    """

    def kept(other: float) -> float:
        taken = weights.conditional_ess((other - temperature) * increment)
        return float(taken.min()) / weights.num_particles

    low, high = temperature + SMALLEST_STEP, 1.0
    if high <= low or kept(high) >= MIN_CONDITIONAL_ESS or kept(low) < TEMPERED_ESS:
        return 1.0
    for _ in range(20):
        middle = math.sqrt((low - temperature) * (high - temperature)) + temperature
        low, high = (middle, high) if kept(middle) >= TEMPERED_ESS else (low, middle)
    return low


def _weighed(known: Filter, state: SweepState, increment: Tensor) -> tuple[Filter, SweepState]:
    """Weighs the particles; the evidence takes the mean of the new weights under the old ones.

    Raises:
        ModelError: The window has another population than the particles.
    """
    weights = state.log_weight
    if increment.shape != weights.log_weight.shape:
        raise ModelError(
            f"extend: particles weigh by {tuple(weights.population)} cells, the model on its last "
            f"steps by {tuple(increment.shape[1:])}; expected plates that hold all sites at any "
            "length, or at none"
        )
    kept = weights.conditional_ess(increment)
    poor = bool((kept < min(MIN_SURVIVORS, 0.1 * weights.num_particles)).any())
    weights = weights.add(increment)
    log_mean = weights.log_mean()
    surprises = (*known.surprises, known.num_steps - 1) if poor else known.surprises
    known = replace(
        known,
        log_evidence=known.log_evidence + log_mean.double(),
        surprises=surprises,
    )
    return known, replace(state, log_weight=weights.add(-log_mean))


def _resampled(
    known: Filter, window: Window, state: SweepState, final: Latents
) -> tuple[Filter, SweepState]:
    """Resamples whole paths where the ESS is low.

    Args:
        final: Values that will not move any more.
    """
    before = state.log_weight
    state, ancestors = resample(window.problem.density, state, window.base.parts)
    if ancestors is not None:
        known = replace(known, error=known.error.resampled(before, ancestors))
    return replace(known, last=Generation(final, ancestors, known.last)), state


def _adapted(known: Filter, problem: Problem, state: SweepState) -> Filter:
    """The filter with proposals for its window.

    They are learned from a copy of the particles, when the window is another one or they are
    accepted too rarely or too often: at the window's full length with as many leapfrog steps as the
    particles need.
    """
    low, high = SANE_ACCEPTANCE
    window = known.window
    assert window is not None
    if all(group.is_discrete for group in problem.groups):
        return known
    if known.adaptation and (not problem.parts.adapts_step_size or low <= known.acceptance <= high):
        return known
    state, _ = resample(problem.density, state, window.base.parts, always=True)
    adaptation = _learned(problem, state)
    if window.is_full(known.order):
        moves = tuned(problem, replace(state, adaptation=adaptation), jumps=False)
        # Few sweeps follow an observation: no shorter moves than those of a joint unit.
        if moves.problem.tuned_steps > JOINT_MOVE.leapfrog_steps:
            tuned_problem = window.problem.with_leapfrog_steps(moves.problem.tuned_steps)
            window = replace(window, problem=tuned_problem)
            adaptation = _learned(moves.problem, replace(state, adaptation=moves.adaptation))
    return replace(known, window=window, adaptation=adaptation)


def _learned(problem: Problem, state: SweepState) -> Mapping[str, Adaptation]:
    """Proposals after some sweeps that adapt."""
    state = restart_adaptation(state, problem.parts)
    for _ in range(NUM_ADAPTING):
        state, _ = problem.sweep(state, retargets=False)
    return state.adaptation


def _moved(
    known: Filter, temperature: float, state: SweepState, num_sweeps: int
) -> tuple[Filter, SweepState]:
    """Moves the latents of the last steps by sweeps with frozen proposals."""
    window = known.window
    assert window is not None
    problem = window.at(temperature)
    state = replace(state, adaptation=known.adaptation)
    draws, accepted = [], []
    step_size: Mapping[str, Tensor] = {}
    for _ in range(num_sweeps):
        state, info = problem.sweep(state, adapt=False, retargets=False)
        draws.append(window.outside(state.latents))
        accepted += [float(rate.mean()) for rate in info.statistic.values()]
        step_size = info.step_size
    outside = SweepState(window.outside(state.latents), state.log_weight, state.log_joint)
    known = replace(
        known,
        state=outside,
        draws=tuple(draws) or (outside.latents,),
        acceptance=sum(accepted) / len(accepted) if accepted else math.nan,
        step_size=step_size,
    )
    return known, replace(state, adaptation={})


def _degeneracy(known: Filter) -> Filter:
    """Notes which latents that hold for all times have few distinct values left."""
    assert known.window is not None
    graph = known.window.problem.division.graph
    limit = min(ENOUGH_DISTINCT, known.state.num_particles // 2)
    few = []
    for name in set(known.steps.constant) - set(known.steps.initial(graph, known.order)):
        u = known.state.latents[name]
        distinct = 1 + (u.reshape(len(u), -1).sort(0).values.diff(dim=0) != 0).sum(0)
        if int(distinct.min()) < limit:
            few.append(name)
    return replace(known, degenerate=tuple(sorted(few)))
