"""Divide: a Pyro program becomes complete-conditional units, each with its own program."""

from dcpc.divide.density import Conditional, Density
from dcpc.divide.dividing import divide
from dcpc.divide.division import Division
from dcpc.divide.program import Arguments, constrained_particles, prior_particles
from dcpc.divide.sites import axis_names, read_sites
from dcpc.divide.tempering import POSTERIOR, Reference, Tempering
from dcpc.divide.unit import ScoredDensity, Unit, UnitGroup

__all__ = [
    "POSTERIOR",
    "Arguments",
    "Conditional",
    "Density",
    "Division",
    "Reference",
    "ScoredDensity",
    "Tempering",
    "Unit",
    "UnitGroup",
    "axis_names",
    "constrained_particles",
    "divide",
    "prior_particles",
    "read_sites",
]
