"""Torch's plain functions in the place of operators: half the price of a call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from dcpc.graphs.like import Like, Node
from dcpc.operators import KERNELS

__all__ = ["with_plain_targets"]

aten = torch.ops.aten


def with_plain_targets(old: fx.Graph) -> Callable[..., Sequence[Tensor]]:
    """A function that runs a graph by plain functions, without a compiler."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(old, {}))
    numbers = _Numbers(graph)
    for node in graph.nodes:
        plain = _PLAIN.get(node.target) or KERNELS.get(node.target)
        if plain is not None and not node.kwargs and isinstance(node.args[0], fx.Node):
            numbers.replace(node)
            node.target = plain
    return partial(fx.GraphModule({}, graph), *numbers.tensors)


class _Numbers:
    """Numbers in a graph as tensors, which are the first inputs: torch makes one at every call.

    Args:
        graph: The graph.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.tensors: list[Tensor] = []
        self._graph = graph
        self._first = next(iter(graph.nodes))
        self._known: dict[Any, fx.Node] = {}

    def replace(self, node: Node) -> None:
        """Lets an operator by element take a tensor in the place of a number."""
        like = node.args[0].meta.get("like")
        if node.target not in _WITH_NUMBERS or not isinstance(like, Like):
            return
        number = node.args[1]
        if type(number) not in (int, float) or not like.dtype.is_floating_point:
            return
        if like.device.type == "cpu":
            node.args = (node.args[0], self._input(number, like.dtype))

    def _input(self, number: float, dtype: torch.dtype) -> fx.Node:
        key = (dtype, float(number), math.copysign(1.0, number))
        if key not in self._known:
            with self._graph.inserting_before(self._first):
                self._known[key] = self._graph.placeholder(f"number{len(self.tensors)}")
            self.tensors.append(torch.tensor(float(number), dtype=dtype, device="cpu"))
        return self._known[key]


_WITH_NUMBERS = frozenset(
    getattr(getattr(aten, name), overload)
    for name in ("add", "sub", "mul", "div", "lt", "gt", "le", "ge", "eq", "ne")
    for overload in ("Tensor", "Scalar")
)
"""Operators that take a tensor or a number as their second argument."""

_PLAIN: dict[Any, Callable[..., Any]] = {
    getattr(getattr(aten, name), overload): getattr(torch, name)
    for name, overloads in {
        "add": "Tensor Scalar",
        "sub": "Tensor Scalar",
        "mul": "Tensor Scalar",
        "div": "Tensor Scalar",
        "rsub": "Scalar Tensor",
        "pow": "Tensor_Scalar Tensor_Tensor",
        "lt": "Scalar Tensor",
        "gt": "Scalar Tensor",
        "le": "Scalar Tensor",
        "ge": "Scalar Tensor",
        "eq": "Scalar Tensor",
        "ne": "Scalar Tensor",
        "where": "self",
        "masked_fill": "Scalar Tensor",
        "lerp": "Scalar Tensor",
        "sum": "default dim_IntList",
        "mean": "default dim",
        "select": "int",
        "squeeze": "dim",
        "bitwise_and": "Tensor",
        "minimum": "default",
        "maximum": "default",
        "mm": "default",
        "bmm": "default",
        "addmm": "default",
        "unsqueeze": "default",
        "permute": "default",
        "addcmul": "default",
        "clamp": "default",
        "nan_to_num": "default",
        "stack": "default",
        "cat": "default",
        "neg": "default",
        "abs": "default",
        "exp": "default",
        "expm1": "default",
        "log": "default",
        "log1p": "default",
        "sqrt": "default",
        "rsqrt": "default",
        "reciprocal": "default",
        "sigmoid": "default",
        "tanh": "default",
        "relu": "default",
        "lgamma": "default",
        "digamma": "default",
        "bitwise_not": "default",
        "isnan": "default",
        "erf": "default",
        "t": "default",
    }.items()
    for overload in overloads.split()
} | {aten.view.default: Tensor.view, aten.expand.default: Tensor.expand}
