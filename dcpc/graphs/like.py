"""Shapes, memory layouts, types and devices of the tensors in a graph."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Like", "Node", "contiguous_strides"]

Node = Any
"""A node of a graph, `fx.Node`; what its arguments are is known by its target, not by its type."""


@dataclass(frozen=True)
class Like:
    """Shape, memory layout, type and device of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> Like:
        """Those of a tensor."""
        return cls(tuple(x.shape), x.stride(), x.dtype, x.device)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in memory one after the other."""
        expected = contiguous_strides(self.shape)
        return 0 in self.shape or all(
            size == 1 or own == other
            for size, own, other in zip(self.shape, self.stride, expected, strict=True)
        )

    def reshaped(self, shape: tuple[int, ...]) -> Like:
        """The same with another shape, contiguous."""
        return Like(shape, contiguous_strides(shape), self.dtype, self.device)

    def transposed(self) -> Like:
        """The same with axes in the opposite order."""
        return Like(self.shape[::-1], self.stride[::-1], self.dtype, self.device)

    def spread(self, shape: tuple[int, ...]) -> Like:
        """The same expanded to a shape that it broadcasts to."""
        missing = len(shape) - len(self.shape)
        own = zip((1,) * missing + self.shape, (0,) * missing + self.stride, shape, strict=True)
        strides = tuple(0 if size != whole else stride for size, stride, whole in own)
        return Like(shape, strides, self.dtype, self.device)

    def empty(self) -> Tensor:
        """A tensor of these, without values."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor whose elements lie in memory one after the other."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
