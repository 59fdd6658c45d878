"""Evidence that grows by an increment per step, and its standard error in blocks of time.

Of a long series all particles descend from one, and the genealogy of the whole says nothing any
more about the error of `log Zhat`. The error adds up over time, and forgets: so the series is cut
in blocks, within each of which the families since its beginning tell the relative variance of the
block's factor (`annealing.genealogical_standard_error`, after Lee & Whiteley 2018), and variances
add up over the blocks, as in their fixed-lag variant (Olsson & Douc 2019).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dcpc.annealing import (
    MIN_DECORRELATED_FAMILIES,
    effective_families,
    genealogical_standard_error,
)
from dcpc.recombine import LogWeights, take_particles

__all__ = ["RunningError"]

ENOUGH_FAMILIES = 100.0
"""Effective number of families below which a block ends; of few particles, `ENOUGH_SHARE`."""

ENOUGH_SHARE = 0.3
"""The same, as a share of the particles."""


@dataclass(frozen=True)
class RunningError:
    """Variance of `log Zhat` so far.

    Attributes:
        variance: Of the blocks that have ended, and of the run before, `(*population)`.
        eve: Index of each particle's ancestor at the beginning of the present block,
            `(K, *population)`.
    """

    variance: Tensor
    eve: Tensor

    @classmethod
    def start(cls, standard_error: Tensor, weights: LogWeights) -> RunningError:
        """The error of a run, whose particles begin the first block."""
        return cls(standard_error.square(), _index(weights.log_weight))

    def resampled(self, weights: LogWeights, ancestors: Tensor) -> RunningError:
        """The same after particles of some cells were resampled, at which a block may end.

        Args:
            weights: Weights before.
            ancestors: Ancestors `(K, *population)`.
        """
        axes = tuple(range(1, ancestors.dim()))
        index = _index(weights.log_weight)
        limit = min(ENOUGH_FAMILIES, ENOUGH_SHARE * weights.num_particles)
        ends = (effective_families(weights, self.eve) < limit) & (ancestors != index).any(0)
        variance = torch.where(ends, self.variance + self._block(weights), self.variance)
        eve = torch.where(ends, index, take_particles(self.eve, ancestors, axes))
        return replace(self, variance=variance, eve=eve)

    def standard_error(self, weights: LogWeights) -> Tensor:
        """Standard error of `log Zhat`, `(*population)`."""
        return (self.variance + self._block(weights)).sqrt()

    def _block(self, weights: LogWeights) -> Tensor:
        error = genealogical_standard_error(weights, self.eve, MIN_DECORRELATED_FAMILIES)
        return error.square()


def _index(like: Tensor) -> Tensor:
    index = torch.arange(like.shape[0], device=like.device)
    return index.reshape(-1, *(1,) * (like.dim() - 1)).expand(like.shape).contiguous()
