"""Choices between rows, made as late as possible.

After a Metropolis step every particle is where it was or where it was to go, by a `where` on whole
rows, and at both ends everything was evaluated. An operator that works on rows gives, on the
result of such a choice, the same choice between its results: where these are there already,
nothing is computed anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from dcpc.graphs.like import Like, Node
from dcpc.operators import ELEMENTWISE

__all__ = ["Choices"]

aten = torch.ops.aten

Shape = tuple[int, ...]


class Choices:
    """The nodes of a graph that are choices between rows of two others.

    Args:
        make: Finds or makes a node of a target, arguments, keyword arguments and what it is like.
        find: Finds one, or gives None.
        elementwise: Operators that work element by element.
    """

    def __init__(
        self,
        make: Callable[..., fx.Node],
        find: Callable[..., fx.Node | None],
        elementwise: frozenset[Any],
    ) -> None:
        self._make = make
        self._find = find
        self._elementwise = elementwise
        self._chosen: dict[Node, tuple[Node, fx.Node, fx.Node]] = {}

    def note(self, node: Node) -> None:
        """Takes note of a `where` that chooses between rows."""
        condition, first, second = node.args
        if not all(isinstance(n, fx.Node) for n in node.args):
            return
        shape = node.meta["like"].shape
        if first.meta["like"].shape != shape or second.meta["like"].shape != shape:
            return
        while condition.target is aten.view.default:
            condition = condition.args[0]
        rows = _num_rows(shape, math.prod(condition.meta["like"].shape))
        if rows and _is_by_row(node.args[0].meta["like"].shape, shape, rows):
            self._chosen[node] = condition, first, second

    def pushed(self, target: Any, args: tuple, kwargs: dict, like: Like) -> Node | None:
        """The choice between an operator's results, if they are there; the latest choice first."""
        if not self._chosen:
            return None
        shape = like.shape
        arguments = list[fx.Node]()
        fx.map_arg((args, kwargs), lambda n: arguments.append(n) if n in self._chosen else None)
        for condition in reversed(dict.fromkeys(self._chosen[n][0] for n in arguments)):
            chosen = {n for n in arguments if self._chosen[n][0] is condition}
            count = math.prod(condition.meta["like"].shape)
            if not self._works_on_rows(target, args, kwargs, chosen, count, shape):
                continue
            ends = []
            for end in (1, 2):
                swapped = _replaced(args, kwargs, {n: self._chosen[n][end] for n in chosen})
                if target is aten.view.default:
                    ends.append(self._view(swapped[0][0], like))
                else:
                    ends.append(self._find(target, *swapped))
            if None not in ends:
                rows = _num_rows(shape, count)
                by_row = [*shape[:rows], *(1,) * (len(shape) - rows)]
                of_rows = condition.meta["like"].reshaped(tuple(by_row))
                viewed = self._make(aten.view.default, (condition, by_row), {}, of_rows)
                node = self._make(aten.where.self, (viewed, *ends), {}, like)
                self._chosen[node] = condition, *ends
                return node
        return None

    def _view(self, node: Node, like: Like) -> Node:
        """A view of a node, or of what that is a view of."""
        while node.target is aten.view.default and node.meta["like"].shape != like.shape:
            node = node.args[0]
        own = node.meta["like"]
        if own.shape == like.shape:
            return node
        if not own.is_contiguous:
            layout = {"memory_format": torch.contiguous_format}
            node = self._make(aten.clone.default, (node,), layout, own.reshaped(own.shape))
        return self._make(aten.view.default, (node, list(like.shape)), {}, like)

    def _works_on_rows(
        self, target: Any, args: tuple, kwargs: dict, chosen: set[Node], count: int, shape: Shape
    ) -> bool:
        """Whether each row of the result depends on the same row of what was chosen, only."""
        rows = _num_rows(shape, count)
        if not rows:
            return False
        shapes = [n.meta["like"].shape for n in chosen]
        if target is aten.view.default:
            return True
        if target in self._elementwise or target in ELEMENTWISE:
            return all(len(s) == len(shape) and s[:rows] == shape[:rows] for s in shapes)
        if target is aten.mm.default:
            return args[1] not in chosen and rows == 1
        if target is aten.linalg_solve_triangular.default:
            return args[0] not in chosen and kwargs.get("left") is False and shapes[0] == shape
        if target in (aten.sum.dim_IntList, aten.mean.dim):
            dims = [dim % len(shapes[0]) for dim in args[1]]
            return shapes[0][:rows] == shape[:rows] and min(dims) >= rows
        return False


def _replaced(args: tuple, kwargs: dict, others: dict[Node, Node]) -> tuple[tuple, dict]:
    """Arguments with other nodes in the places of some."""
    return fx.map_arg((args, kwargs), lambda node: others.get(node, node))


def _num_rows(shape: Shape, count: int) -> int:
    """Number of leading axes that hold so many rows; 0 if there is none."""
    for axes in range(1, len(shape) + 1):
        if math.prod(shape[:axes]) == count:
            return axes
    return 0


def _is_by_row(condition: Shape, shape: Shape, rows: int) -> bool:
    padded = (1,) * (len(shape) - len(condition)) + tuple(condition)
    return padded[:rows] == shape[:rows] and all(size == 1 for size in padded[rows:])
