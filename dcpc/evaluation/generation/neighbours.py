"""Nearest training data of samples: has the model learned, or learned by heart?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dcpc.errors import DataError, OptionError, require_at_least

__all__ = ["Neighbours", "nearest_neighbours"]


class Neighbours(NamedTuple):
    """The nearest data, nearest first: `indices` in the training set and `distances`, `(S, n)`."""

    indices: Tensor
    distances: Tensor


def nearest_neighbours(
    samples: Tensor, data: Tensor, num_neighbours: int = 1, chunk_size: int = 10_000
) -> Neighbours:
    """Finds the nearest data of every sample by Euclidean distance, exhaustively.

    Costs `S N d` operations; memory for `S chunk_size` distances. Distances are sums of squared
    differences, not expanded into products as in scikit-learn's brute force, so that copies have
    distance zero, and data stay in their memory-mapped file.

    Args:
        samples: `(S, *shape)`.
        data: `(N, *shape)`; may lie in a memory-mapped file.
        num_neighbours: n, at most N.
        chunk_size: Data compared at once.

    Raises:
        DataError: Samples and data of different shapes, or one of them of bytes.
        OptionError: A number out of range.
    """
    if samples.shape[1:] != data.shape[1:]:
        raise DataError(
            f"samples and data must have the same shape but for their number, got "
            f"{tuple(samples.shape)} and {tuple(data.shape)}"
        )
    if samples.is_floating_point() != data.is_floating_point():
        raise DataError(
            f"samples and data must have the same intensities, got {samples.dtype} and "
            f"{data.dtype}; divide bytes by 255 where samples lie between 0 and 1"
        )
    require_at_least("chunk_size", chunk_size, 1)
    if not 1 <= num_neighbours <= len(data):
        raise OptionError(
            f"num_neighbours must lie between 1 and the number of data, {len(data)}, got "
            f"{num_neighbours}"
        )
    rows = samples.reshape(len(samples), -1)
    best = Neighbours(
        torch.empty(len(rows), 0, dtype=torch.long, device=rows.device),
        rows.new_empty(len(rows), 0),
    )
    for start in range(0, len(data), chunk_size):
        chunk = data[start : start + chunk_size].to(rows)
        chunk = chunk.reshape(len(chunk), -1)
        distance = torch.cdist(rows, chunk, compute_mode="donot_use_mm_for_euclid_dist")
        index = torch.arange(start, start + len(chunk), device=rows.device).expand_as(distance)
        candidates = Neighbours(
            torch.cat([best.indices, index], 1), torch.cat([best.distances, distance], 1)
        )
        kept = min(num_neighbours, candidates.distances.shape[1])
        nearest = candidates.distances.topk(kept, largest=False, sorted=True)
        best = Neighbours(candidates.indices.gather(1, nearest.indices), nearest.values)
    return best
