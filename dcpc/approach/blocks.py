"""Which latents are to move jointly: those whose particles are correlated."""

from __future__ import annotations

import torch

from dcpc.problem import Problem
from dcpc.sweep import SweepState

MIN_CORRELATION = 0.3
"""Correlation, in absolute value, of values of two units from which they move jointly."""


def are_correlated(problem: Problem, state: SweepState) -> bool:
    """Whether values of different latents are correlated, in any element of their plates.

    Args:
        problem: A problem whose latents are one unit.
        state: Particles and weights.
    """
    (group,) = problem.division.groups
    value, mass = group.pack(state.latents).squeeze(-2), state.log_weight.normalized()
    mass = mass.reshape(mass.shape + (1,) * (value.dim() - mass.dim()))
    deviation = (value - (mass * value).sum(0)) * mass.sqrt()
    deviation = deviation / deviation.square().sum(0).sqrt()
    correlation = torch.einsum("k...i,k...j->...ij", deviation, deviation).abs()
    owner = torch.cat(
        [
            torch.full((group.size_of(name),), index)
            for index, name in enumerate(group.units[0].sites)
        ]
    )
    return bool((correlation[..., owner[:, None] != owner] > MIN_CORRELATION).any())
