"""Torch's plain functions in the place of operators: half the price of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from dcpc.operators import KERNELS

__all__ = ["with_plain_targets"]

aten = torch.ops.aten


def with_plain_targets(old: fx.Graph) -> fx.GraphModule:
    """A copy of a graph that calls plain functions, for running it without a compiler."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(old, {}))
    for node in graph.nodes:
        plain = _PLAIN.get(node.target) or KERNELS.get(node.target)
        if plain is not None and not node.kwargs and isinstance(node.args[0], fx.Node):
            node.target = plain
    return fx.GraphModule({}, graph)


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
