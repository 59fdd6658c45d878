"""Lines through a unit's discrete value: the values that a draw chooses from.

A line is chosen without a look at where the unit is on it, so that a draw from the complete
conditional along it leaves that conditional invariant.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dcpc.divide.supports.discrete import INTEGERS, MULTINOMIAL, ONE_HOT, DiscreteSupport

MAX_VALUES = 256
"""Values of an integer up to which it is enumerated; one-hot vectors always are."""

MAX_JOINT_VALUES = 64
"""Values up to which the components of a unit are enumerated together."""

WINDOW = 16
"""Values on a line through a count."""

NUM_STRIDES = 10
"""The strides of long windows are powers of two up to this one."""


@dataclass(frozen=True)
class Candidates:
    """The values on a line.

    Attributes:
        values: `(S, K, *plates, n, d)`.
        current: Index of the present value, `(K, *plates, n)`.
        feasible: Which of them are in the support, `(S, K, *plates, n)`; None for all.
    """

    values: Tensor
    current: Tensor
    feasible: Tensor | None = None


class Line(ABC):
    """A set of values that has the present one among them."""

    @abstractmethod
    def through(self, value: Tensor) -> Candidates:
        """The values on the line through a unit's values `(K, *plates, n, d)`."""


@dataclass(frozen=True)
class Component(Line):
    """All values of one component, the others staying.

    Attributes:
        start: Position of the component in the unit's numbers.
        support: Its support.
    """

    start: int
    support: DiscreteSupport

    def through(self, value: Tensor) -> Candidates:
        values = self.support.values(value)
        part = slice(self.start, self.start + self.support.width)
        candidates = value.expand(len(values), *value.shape).clone()
        candidates[..., part] = values.reshape(len(values), *(1,) * (value.dim() - 1), -1)
        return Candidates(candidates, self.support.index(value[..., part]))


@dataclass(frozen=True)
class AllComponents(Line):
    """All values of all components of a unit.

    Attributes:
        supports: Supports of the components, in order.
    """

    supports: tuple[DiscreteSupport, ...]

    def through(self, value: Tensor) -> Candidates:
        per_component = [support.values(value).unbind(0) for support in self.supports]
        rows = torch.stack([torch.cat(row) for row in itertools.product(*per_component)])
        current, start = torch.zeros(value.shape[:-1], dtype=torch.long, device=value.device), 0
        for support in self.supports:
            index = support.index(value[..., start : start + support.width])
            current = current * int(support.num_values) + index
            start += support.width
        rows = rows.reshape(len(rows), *(1,) * (value.dim() - 1), -1)
        return Candidates(rows.expand(-1, *value.shape), current)


@dataclass(frozen=True)
class Window(Line):
    """Values in steps of a stride on both sides of a count, at an offset that is drawn.

    From every value in a window the same window is as probable (Neal 2003, section 4.1, of slices).

    Attributes:
        direction: Change of the unit's numbers by one step, `(d)`.
        support: Support of the components.
        part: Numbers of the component.
        stride: Length of a step.
    """

    direction: Tensor
    support: DiscreteSupport
    part: slice
    stride: int

    def through(self, value: Tensor) -> Candidates:
        offset = torch.randint(WINDOW, value.shape[:-1], device=value.device)
        steps = torch.arange(WINDOW, device=value.device)
        steps = steps.reshape(-1, *(1,) * offset.dim()) - offset
        change = (steps * self.stride).unsqueeze(-1) * self.direction
        candidates = value + change.to(value.dtype)
        feasible = self.support.contains(candidates[..., self.part])
        # Outside of the support the model may not run at all (an index that is out of range).
        return Candidates(torch.where(feasible.unsqueeze(-1), candidates, value), offset, feasible)


def lines_of(supports: Sequence[DiscreteSupport], like: Tensor) -> Iterator[Line]:
    """Lines along which a unit of some components moves in one sweep.

    All components together where they have few values; else one after the other, over all values or
    over two windows, a fine one and a coarse one.

    Args:
        supports: Supports of the components, in order.
        like: The unit's value, `(K, *plates, n, d)`.
    """
    if math.prod(support.num_values for support in supports) <= _most(supports):
        yield AllComponents(tuple(supports)) if len(supports) > 1 else Component(0, supports[0])
        return
    start = 0
    for support in supports:
        part = slice(start, start + support.width)
        if support.num_values <= MAX_VALUES or support.kind == ONE_HOT:
            yield Component(start, support)
        elif support.kind == INTEGERS:
            direction = like.new_zeros(like.shape[-1])
            direction[start] = 1.0
            for stride in _strides():
                yield Window(direction, support, part, stride)
        else:
            yield from _exchanges(support, part, like)
        start += support.width


def _most(supports: Sequence[DiscreteSupport]) -> int:
    return MAX_VALUES if len(supports) == 1 else MAX_JOINT_VALUES


def _strides() -> tuple[int, int]:
    return 1, 2 ** int(torch.randint(1, NUM_STRIDES + 1, ()))


def _exchanges(support: DiscreteSupport, part: slice, like: Tensor) -> Iterator[Line]:
    """Windows along which counts go from one category to another, which keeps their sum."""
    assert support.kind == MULTINOMIAL
    order = torch.randperm(support.width).tolist()
    for giver, taker in zip(order, order[1:] + order[:1], strict=True):
        direction = like.new_zeros(like.shape[-1])
        direction[part.start + giver], direction[part.start + taker] = -1.0, 1.0
        for stride in _strides():
            yield Window(direction, support, part, stride)
