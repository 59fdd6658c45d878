"""Conquer: a unit moves along its prediction error."""

from dcpc.conquer.barker import Barker
from dcpc.conquer.gibbs import ConditionalDraw, draw_from_conditional
from dcpc.conquer.gradient import Gradient
from dcpc.conquer.jump import Jump
from dcpc.conquer.kinetic import Kinetic
from dcpc.conquer.langevin import Langevin
from dcpc.conquer.move import Move, Proposal, Start, WayBack
from dcpc.conquer.preconditioner import (
    PRECONDITIONERS,
    Adapted,
    Covariance,
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
from dcpc.conquer.stochastic import NoisyMoment, StochasticLangevin
from dcpc.conquer.underdamped import Underdamped

MOVES: dict[str, type[Move]] = {
    "langevin": Langevin,
    "barker": Barker,
    "underdamped": Underdamped,
    "kinetic": Kinetic,
    "gradient": Gradient,
}
"""Moves by name; a new one is a line here."""

__all__ = [
    "MOVES",
    "PRECONDITIONERS",
    "Adapted",
    "Barker",
    "ConditionalDraw",
    "Covariance",
    "Dense",
    "DenseSecondMoment",
    "Diagonal",
    "DualAveraging",
    "Gradient",
    "Identity",
    "Jump",
    "Kinetic",
    "Langevin",
    "Metric",
    "Move",
    "NoisyMoment",
    "ParticleVariance",
    "Preconditioner",
    "Proposal",
    "SecondMoment",
    "Start",
    "StochasticLangevin",
    "Underdamped",
    "WayBack",
    "draw_from_conditional",
]
