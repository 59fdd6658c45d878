"""Conquer: a unit moves along its prediction error."""

from dcpc.conquer.langevin import MOVES, Gradient, Langevin, Move, Proposal
from dcpc.conquer.preconditioner import (
    PRECONDITIONERS,
    Adapted,
    Dense,
    DenseSecondMoment,
    Diagonal,
    Identity,
    Metric,
    ParticleVariance,
    Preconditioner,
    SecondMoment,
)
from dcpc.conquer.step_size import DualAveraging

__all__ = [
    "MOVES",
    "PRECONDITIONERS",
    "Adapted",
    "Dense",
    "DenseSecondMoment",
    "Diagonal",
    "DualAveraging",
    "Gradient",
    "Identity",
    "Langevin",
    "Metric",
    "Move",
    "ParticleVariance",
    "Preconditioner",
    "Proposal",
    "SecondMoment",
]
