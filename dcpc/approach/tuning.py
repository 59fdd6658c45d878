"""Moves of the right length: as many leapfrog steps as it takes to forget, and no more.

The particles themselves tell how long moves have to be: their correlation with what they were a few
sweeps ago, of every value, of its square, and of the log-density. Steps are doubled until that is
low, or until more of them do not help. Trials are made on a copy of the particles, before anything
is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dcpc.approach.mixture import fit_mixture
from dcpc.conquer.jump import state_of
from dcpc.parts import Adaptation
from dcpc.problem import Problem
from dcpc.sweep import SweepState, restart_adaptation

__all__ = ["Moves", "tuned"]

LENGTHS = (1, 3, 7, 15, 31)
"""Numbers of leapfrog steps that are tried; the scores of a sweep double, one for a jump included.
"""

NUM_ADAPTING = 8
"""Sweeps of a trial in which the step size adapts."""

NUM_MEASURED = 4
"""Sweeps of a trial in which particles are to forget."""

MAX_CORRELATION = 0.1
"""Correlation that counts as forgotten, besides what chance makes of it."""

MAX_LEFT = 0.95
"""Correlation that is left by moves that do not help: where all latents move as one, the values
with the heaviest tails set the step size of all."""

MIN_GAIN = 1.4
"""Factor by which twice the steps have to raise the rate of forgetting."""

MIN_ACCEPTANCE = 0.01
"""Acceptance rate of jumps that are worth their time."""


@dataclass(frozen=True)
class Moves:
    """Moves that were tuned.

    Attributes:
        problem: The problem, with as many leapfrog steps as its particles need.
        adaptation: The proposals, with jumps.
        left: Largest correlation of the particles with themselves after `NUM_MEASURED` sweeps.
    """

    problem: Problem
    adaptation: Mapping[str, Adaptation]
    left: float = 1.0

    @property
    def forget_nothing(self) -> bool:
        """Whether moves of any length leave the particles where they were."""
        return self.problem.tuned_steps > 0 and self.left > MAX_LEFT

    def num_sweeps(self, least: int, most: int) -> int:
        """Number of sweeps of which half are worth fifty independent draws, within bounds.

        With correlation r from one sweep to the next, `(1 + r) / (1 - r)` sweeps are worth one
        independent draw.
        """
        rate = self.left ** (1.0 / NUM_MEASURED)
        if rate >= 1.0:
            return most
        return min(max(int(100.0 * (1.0 + rate) / (1.0 - rate)), least), most)


def tuned(problem: Problem, state: SweepState, *, jumps: bool) -> Moves:
    """Moves with as many leapfrog steps as the particles need, all units the same number.

    Nothing is tuned where a user chose the move.

    Args:
        problem: A problem.
        state: Equally weighted particles at the posterior, with what the proposals have learned.
        jumps: Whether to jump, too, from a mixture that is fitted to the particles; the latents
            must be one unit.
    """
    if not problem.tunes_moves:
        return Moves(problem, state.adaptation)
    if not state.adaptation:  # the way was so short that nothing moved on it
        state, _ = problem.as_written().sweep(state, retargets=False)
    if jumps:
        state = _with_jumps(problem, state)
    chosen, rate = Moves(problem, state.adaptation), 0.0
    for steps in LENGTHS:
        candidate = problem.with_leapfrog_steps(steps)
        left = _correlation_left(candidate.as_written(), state)
        if -math.log(left) < MIN_GAIN * rate:
            break
        chosen, rate = replace(chosen, problem=candidate, left=left), -math.log(left)
        if left <= MAX_CORRELATION + 2.5 / math.sqrt(state.log_joint.numel()):
            break
    return chosen


def _with_jumps(problem: Problem, state: SweepState) -> SweepState:
    """The state with a mixture to jump from, if that is close enough to the posterior."""
    (group,) = problem.division.groups
    value = group.pack(state.latents)
    here = value.squeeze(-2)
    mixture = fit_mixture(here)
    there = mixture.draw_each(here)
    unit = problem.density.conditional(group, state.latents)
    gained = unit.log_density(there.unsqueeze(-2)) - unit.log_density(value)
    ratio = gained.squeeze(-1) + mixture.log_prob(here, here) - mixture.log_prob(there, there)
    if float(ratio.clamp(max=0.0).exp().nan_to_num(nan=0.0).mean()) < MIN_ACCEPTANCE:
        return state
    learned = replace(state.adaptation[group.name], reference=state_of(mixture))
    return replace(state, adaptation={group.name: learned})


def _correlation_left(problem: Problem, state: SweepState) -> float:
    """Largest correlation of the particles with themselves after a few sweeps."""
    state = problem.scored(restart_adaptation(state, problem.parts))
    for index in range(NUM_ADAPTING + NUM_MEASURED):
        if index == NUM_ADAPTING:
            before = _statistics(problem, state)
        adapts = index < NUM_ADAPTING
        state, _ = problem.sweep(state, adapt=adapts, adapt_preconditioner=False, retargets=False)
    correlations = [
        (one * other).flatten(0, -3).mean(0).flatten()
        for one, other in zip(before, _statistics(problem, state), strict=True)
    ]
    largest = torch.cat(correlations).nan_to_num(nan=1.0).amax()
    return min(max(float(largest), 1e-6), 1.0)


def _statistics(problem: Problem, state: SweepState) -> list[Tensor]:
    """Values `(K, *plates, n, d)`, their squares, and log-densities, standardised.

    Log-densities only where all latents move: those of given latents are not forgotten.
    """
    groups = [group for group in problem.groups if not group.is_discrete]
    values = [_standardised(group.pack(state.latents)) for group in groups]
    squares = [_standardised(value.square()) for value in values]
    if problem.moved is not None:
        return [*values, *squares]
    return [*values, *squares, _standardised(state.log_joint)[..., None, None]]


def _standardised(value: Tensor) -> Tensor:
    deviation = value - value.mean(0)
    return deviation / deviation.square().mean(0).sqrt()
