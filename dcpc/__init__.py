"""Divide-and-conquer predictive coding: inference and learning for static Pyro models."""

from dcpc.convergence import ConvergenceWarning
from dcpc.inference import DCPC
from dcpc.posterior import Posterior
from dcpc.sweep import SweepInfo, SweepState
from dcpc.version import __version__

__all__ = ["DCPC", "ConvergenceWarning", "Posterior", "SweepInfo", "SweepState", "__version__"]
