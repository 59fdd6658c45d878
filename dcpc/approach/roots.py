"""Normal distributions that latents without parents start from, where the data determine them.

Where all latents are too many for one unit, most of the way from the prior to the posterior is that
of a few vague ones: intercepts, scales. A rough pilot finds where they are. What the data hardly
change, and what has parents, starts from its prior.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcpc.divide.tempering import Reference
from dcpc.problem import Problem
from dcpc.sweep import SweepState

__all__ = ["determined_roots"]

MAX_SHARE = 0.5
"""Standard deviation of the posterior over that of the prior, of values that data determine."""

INFLATION = 1.5
"""Standard deviation of a reference over that of the particles."""


def determined_roots(
    problem: Problem, start: SweepState, state: SweepState
) -> dict[str, Reference]:
    """References of latents without parents, all of whose values the data determine.

    Args:
        problem: The problem.
        start: Particles from the prior, or from what takes its place.
        state: Particles and weights at the posterior.
    """
    active = problem.density.active_latents()
    found = {}
    for unit in problem.division.units:
        for name in unit.sites:
            if unit.parents or name in active or problem.division.sites[name].discrete:
                continue
            _, before = _moments(problem, start, name)
            mean, after = _moments(problem, state, name)
            if bool((after < MAX_SHARE * before).all()) and bool((after > 0.0).all()):
                found[name] = Reference(mean, INFLATION * after)
    return found


def _moments(problem: Problem, state: SweepState, name: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a latent's particles, `(*batch, *event)`."""
    u, mass = state.latents[name], state.log_weight.normalized()
    shape = [len(u)] + [1] * (u.dim() - 1)
    axes = problem.division.population_axes(name)
    for axis, plate in zip(axes, problem.division.population, strict=True):
        shape[axis] = plate.size
    mass = mass.reshape(shape).to(u)
    mean = (mass * u).sum(0)
    return mean, torch.sqrt((mass * (u - mean).square()).sum(0))
