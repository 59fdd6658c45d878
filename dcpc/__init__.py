"""Divide-and-conquer predictive coding: inference and learning for static Pyro models."""

from dcpc.convergence import ConvergenceWarning
from dcpc.inference import DCPC
from dcpc.posterior import Posterior
from dcpc.sweep import SweepInfo, SweepState

__version__ = "0.1.0"

__all__ = ["DCPC", "ConvergenceWarning", "Posterior", "SweepInfo", "SweepState"]
