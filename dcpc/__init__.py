"""Divide-and-conquer predictive coding: inference and learning for static Pyro models."""

from typing import TYPE_CHECKING

from dcpc.lazy import exported
from dcpc.version import __version__

if TYPE_CHECKING:
    from dcpc.convergence import ConvergenceWarning
    from dcpc.inference import DCPC
    from dcpc.posterior import Posterior
    from dcpc.sweep import SweepInfo, SweepState

__all__ = ["DCPC", "ConvergenceWarning", "Posterior", "SweepInfo", "SweepState", "__version__"]

__getattr__, __dir__ = exported(
    __name__,
    {
        "dcpc.convergence": ["ConvergenceWarning"],
        "dcpc.inference": ["DCPC"],
        "dcpc.posterior": ["Posterior"],
        "dcpc.sweep": ["SweepInfo", "SweepState"],
    },
)
