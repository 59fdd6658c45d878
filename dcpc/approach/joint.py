"""All latents as one unit: pilots fit a reference to the posterior, from which annealing starts.

From a prior that is vague, flat, or far from the data, hardly a particle reaches the posterior.
Here a first pilot starts from the prior and from Gaussians along paths of ascent, half and half,
and takes large steps; the next one starts from the prior and a Student-t distribution with the
moments of the first one's particles, and so on until the way is short. The prior's share defends
against what no such distribution covers (Hesterberg 1995). What the last pilot learned
(reference, temperatures, proposals) is then fixed, and fresh draws from the reference take that
way: their evidence estimate is unbiased, and their weights are proper.

A reference can miss a part of the posterior that the first pilot has seen. Its evidence is then the
lower one, and the particles start from where the first pilot did.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dcpc.annealing import Annealed
from dcpc.approach.path import DEGREES, Paths, choose_starts
from dcpc.conquer import Covariance
from dcpc.divide.joint_reference import HalfPrior, JointReference, StudentMixture
from dcpc.divide.program import LoopProgram
from dcpc.problem import Problem
from dcpc.progress import ProgressBar
from dcpc.sweep import SweepState

MAX_SIZE = 128
"""Most values of a cell that are moved as one unit."""

MIN_PARTICLES = 64
"""Particles that it takes to know the shape of a posterior."""

PARTICLES_PER_VALUE = 4
"""The same, per value of a cell."""

FIRST_CONDITIONAL_ESS = 0.5
"""Conditional ESS, over K, that the first pilot's steps keep."""

FIRST_SWEEPS = 2
"""Sweeps of the first pilot at each of its temperatures."""

MAX_SWEEPS = 8
"""Sweeps of the others at each of theirs, at most."""

MAX_PILOTS = 3
"""Pilots after the first one."""

SHORT = 8
"""Temperatures of a way that is short enough."""

SHORTER = 0.8
"""Temperatures, over those of the pilot before, above which another pilot would not help."""

INFLATION = 1.2
"""Scale matrix of a reference, over the covariance of the particles."""


def particles_for(size: int) -> int:
    """Particles that it takes to move so many values of a cell as one unit; 0 if none do."""
    return max(MIN_PARTICLES, PARTICLES_PER_VALUE * size) if size <= MAX_SIZE else 0


def joint_problem(problem: Problem) -> Problem | None:
    """The problem with all latents as one unit; None where they are too many, or not all alike.

    Discrete latents are drawn, not moved; values that a mask takes out of the density do not move.
    """
    division, num_particles = problem.division, problem.num_particles
    sizes = [unit.size * math.prod(p.size for p in unit.plates) for unit in division.units]
    size = sum(sizes) // math.prod(division.population_shape)
    if (
        not 0 < particles_for(size) <= num_particles
        or any(group.is_discrete for group in division.groups)
        or problem.density.active_latents()
        or isinstance(division.program, LoopProgram)
    ):
        return None
    return problem.arranged([division.latents], problem.algorithm.joint)


@dataclass(frozen=True)
class Pilot:
    """A pilot's way from a reference to the posterior."""

    reference: JointReference
    annealed: Annealed


def send_pilots(problem: Problem, conditional_ess: float, bar: ProgressBar) -> Pilot:
    """The pilot whose way is to be taken.

    Args:
        problem: A problem whose latents are one unit.
        conditional_ess: Conditional ESS that the steps of its ladder keep, over K.
        bar: Where progress is shown.

    Raises:
        DegenerateWeightsError: No particle finds any density.
    """
    first_reference = _first_reference(problem, bar)
    first = _send(problem, first_reference, FIRST_CONDITIONAL_ESS, FIRST_SWEEPS, bar)
    last, before = first, math.inf
    for _ in range(MAX_PILOTS):
        reference: JointReference = _fitted(problem, last.annealed.state)
        if isinstance(first_reference, HalfPrior):
            reference = HalfPrior(reference)
        last = _send(problem, reference, conditional_ess, MAX_SWEEPS, bar)
        length = len(last.annealed.ladder)
        if length <= SHORT or length > SHORTER * before:
            break
        before = length
    if finds_more(first.annealed, last.annealed):
        return _send(problem, first_reference, conditional_ess, MAX_SWEEPS, bar)
    return last


def follow(problem: Problem, pilot: Pilot, conditional_ess: float, bar: ProgressBar) -> Annealed:
    """Fresh draws of a pilot's reference on its way, with nothing that adapts."""
    start = problem.density.starting_from(pilot.reference)
    return problem.anneal_once(
        start, "annealing", conditional_ess, bar, pilot.annealed.ladder, adapt=False
    )


def _send(
    problem: Problem,
    reference: JointReference,
    conditional_ess: float,
    max_sweeps: int,
    bar: ProgressBar,
) -> Pilot:
    start = problem.density.starting_from(reference)
    annealed = problem.anneal_once(start, "pilot", conditional_ess, bar, max_sweeps=max_sweeps)
    return Pilot(reference, annealed)


def _first_reference(problem: Problem, bar: ProgressBar) -> JointReference:
    """The prior and Gaussians along paths, half and half; these alone where it is improper."""
    bar.stage("paths")
    is_improper = bool(problem.density.without_prior())
    (group,) = problem.division.groups
    prior = group.pack(problem.draw_from_prior(problem.density).latents).squeeze(-2)
    paths = Paths(problem.density, problem.num_particles)
    gaussians = paths.follow(choose_starts(paths, prior, is_improper=is_improper))
    return gaussians if is_improper else HalfPrior(gaussians)


def _fitted(problem: Problem, state: SweepState) -> StudentMixture:
    """A Student-t distribution with the particles' mean and a little more than their covariance."""
    (group,) = problem.division.groups
    value, mass = group.pack(state.latents), state.log_weight.normalized()
    mass = mass.reshape(mass.shape + (1,) * (len(group.plates) - group.population))
    known = Covariance().see_values(Covariance().init(value, group.population), value, mass)
    loc = (mass.unsqueeze(-1) * value.squeeze(-2)).sum(0, keepdim=True)
    factor = math.sqrt(INFLATION) * known["factor"].squeeze(-3).unsqueeze(0)
    return StudentMixture(loc.to(value), factor, DEGREES)


def finds_more(first: Annealed, other: Annealed) -> bool:
    """Whether the first pilot has found more evidence in a cell, beyond 4 standard errors."""
    low = first.log_evidence - 4.0 * first.log_evidence_se
    high = other.log_evidence + 4.0 * other.log_evidence_se.nan_to_num(posinf=0.0)
    return bool((low > high).any())


__all__ = ["Pilot", "finds_more", "follow", "joint_problem", "particles_for", "send_pilots"]
