"""Equal nodes of a graph become one: what is computed twice is computed once."""

from __future__ import annotations

import math
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["is_random", "key_of", "without_repeats"]


def without_repeats(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph in which operators of the same arguments are computed once.

    Apart stay random draws, memory that is not filled yet, operators that write into their
    arguments, what is computed before and after such a write, and the outputs, each of which has
    its own memory.
    """
    outputs = set(graph.output_node().all_input_nodes)
    copy = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    known: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), copied.__getitem__)
        if _writes(node):
            known.clear()
        may_repeat = _gives_the_same_again(node) and node not in outputs
        key = (node.target, key_of(args), key_of(kwargs), _kind(node)) if may_repeat else None
        if may_repeat and key in known:
            copied[node] = known[key]
            continue
        copied[node] = copy.node_copy(node, copied.__getitem__)
        if may_repeat:
            known[key] = copied[node]
    return copy


def is_random(node: Any) -> bool:
    """Whether a node draws random numbers."""
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
    )


def key_of(value: Any) -> Any:
    """A hashable key of a node's argument, different for 1, 1.0 and True, and for 0.0 and -0.0."""
    if isinstance(value, list | tuple):
        return (type(value), *map(key_of, value))
    if isinstance(value, dict):
        return (dict, *((name, key_of(value[name])) for name in sorted(value)))
    if isinstance(value, slice):
        return (slice, *map(key_of, (value.start, value.stop, value.step)))
    if isinstance(value, complex):
        return (complex, key_of(value.real), key_of(value.imag))
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if isinstance(value, float) and value == 0.0:
        return ("zero", math.copysign(1.0, value))
    return (type(value), value)


def _gives_the_same_again(node: fx.Node) -> bool:
    """Whether a node is an operator, or a function, that its arguments determine."""
    if node.op != "call_function" or _writes(node) or is_random(node):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return "empty" not in node.target.overloadpacket.__name__
    return isinstance(node.target, FunctionType | BuiltinFunctionType)


def _writes(node: fx.Node) -> bool:
    """Whether a node may write into memory that it was given."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return node.op in ("call_module", "call_method") or (
        node.op == "call_function"
        and not isinstance(node.target, FunctionType | BuiltinFunctionType)
    )


def _kind(node: fx.Node) -> Any:
    """Type and layout of a node's value: nodes that differ in these are not equal."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return type(value)
    return value.dtype, value.device, tuple(value.shape), value.stride()
