"""Divide: a Pyro program becomes complete-conditional units, each with its own program."""

from dcpc.divide.division import Division, divide
from dcpc.divide.program import Arguments, constrained_particles, prior_particles
from dcpc.divide.sites import read_sites
from dcpc.divide.target import POSTERIOR, Reference, Target
from dcpc.divide.unit import ScoredDensity, Unit, UnitGroup

__all__ = [
    "POSTERIOR",
    "Arguments",
    "Division",
    "Reference",
    "ScoredDensity",
    "Target",
    "Unit",
    "UnitGroup",
    "constrained_particles",
    "divide",
    "prior_particles",
    "read_sites",
]
