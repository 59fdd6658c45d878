"""Standard error of an evidence estimate that grows by an increment per step.

Of a long series all particles descend from one, and the genealogy of the whole says nothing any
more about the error of `log Zhat`. But the error adds up, and forgets: so time is cut in blocks.
Let `C_s(t)` be the relative variance that the families since time s show at time t, by Lee &
Whiteley (2018), as in `annealing.genealogical_standard_error`. A block from `s_b` to `s_{b+1}` adds

    C_{s_{b-1}}(s_{b+1}) - C_{s_{b-1}}(s_b)

to the variance: what families from one block earlier have grown in it, so that particles that were
one not long ago do not count as independent (a fixed lag, as in Olsson & Douc 2019).
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
"""Effective number of families since its beginning below which a block ends."""

ENOUGH_SHARE = 0.5
"""The same as a share of the particles, of which there may be few."""


@dataclass(frozen=True)
class RunningError:
    """Variance of `log Zhat` so far.

    Attributes:
        variance: Of the blocks that have ended and of the run before, less what the families of
            the last block had grown to when the present one began, `(*population)`.
        families: Index of each particle's ancestor at the beginning of the block before this one,
            `(K, *population)`.
        younger: Index of its ancestor at the beginning of this one, likewise.
    """

    variance: Tensor
    families: Tensor
    younger: Tensor

    @classmethod
    def start(cls, standard_error: Tensor, weights: LogWeights) -> RunningError:
        """The error of a run, whose particles begin the first block."""
        index = _index(weights)
        return cls(standard_error.square(), index, index)

    def resampled(self, weights: LogWeights, ancestors: Tensor) -> RunningError:
        """The same after particles of some cells were resampled, at which a block may end.

        Args:
            weights: Weights before.
            ancestors: Ancestors `(K, *population)`.
        """
        axes, index = tuple(range(1, ancestors.dim())), _index(weights)
        limit = min(ENOUGH_FAMILIES, ENOUGH_SHARE * weights.num_particles)
        ends = (effective_families(weights, self.younger) < limit) & (ancestors != index).any(0)
        grown = _relative(weights, self.families) - _relative(weights, self.younger)
        families = torch.where(ends, self.younger, self.families)
        return replace(
            self,
            variance=torch.where(ends, self.variance + grown, self.variance),
            families=take_particles(families, ancestors, axes),
            younger=torch.where(ends, index, take_particles(self.younger, ancestors, axes)),
        )

    def standard_error(self, weights: LogWeights) -> Tensor:
        """Standard error of `log Zhat`, `(*population)`."""
        return (self.variance + _relative(weights, self.families)).clamp(min=0.0).sqrt()


def _relative(weights: LogWeights, families: Tensor) -> Tensor:
    """Relative variance that families show, `(*population)`; infinite where they are too few."""
    return genealogical_standard_error(weights, families, MIN_DECORRELATED_FAMILIES).square()


def _index(weights: LogWeights) -> Tensor:
    like = weights.log_weight
    index = torch.arange(like.shape[0], device=like.device)
    return index.reshape(-1, *(1,) * (like.dim() - 1)).expand(like.shape).contiguous()
