"""Divide-and-conquer predictive coding: inference and learning for static Pyro models."""

from typing import TYPE_CHECKING

from dcpc.lazy import exported

if TYPE_CHECKING:
    from dcpc.convergence import ConvergenceWarning
    from dcpc.inference import DCPC
    from dcpc.posterior import Posterior
    from dcpc.sweep import SweepInfo, SweepState

__version__ = "0.1.0"

__all__ = ["DCPC", "ConvergenceWarning", "Posterior", "SweepInfo", "SweepState"]

__getattr__, __dir__ = exported(
    __name__,
    {
        "dcpc.convergence": ["ConvergenceWarning"],
        "dcpc.inference": ["DCPC"],
        "dcpc.posterior": ["Posterior"],
        "dcpc.sweep": ["SweepInfo", "SweepState"],
    },
)
