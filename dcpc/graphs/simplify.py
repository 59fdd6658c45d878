"""A captured graph with fewer operators, and with the same numbers.

A gradient that was captured is full of constants: it begins with ones, spread to a shape, and what
is spread goes through many an operator before it meets a value that varies. Here what is constant
over an axis is computed once for it, and spread as late as possible; equal nodes are computed once;
views of views, copies by `detach`, and operators without an effect go away.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from dcpc.divide.repeats import is_random, key_of
from dcpc.graphs.like import Like, Node
from dcpc.graphs.rows import Choices
from dcpc.operators import ELEMENTWISE

__all__ = ["is_elementwise", "rounds_alike", "simplify"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _Value:
    """A value of the graph: that of a node, reshaped and then spread to a shape.

    Attributes:
        node: A node of the new graph; None of a number.
        number: The number that every element is, if it is known.
        inner: Shape of the node's value before it is spread; it broadcasts to `shape`.
        like: What the operator in the old graph gives.
        is_view: Whether that is a view in the old graph, which is not copied when it is spread.
    """

    node: Node | None
    number: float | bool | None
    inner: tuple[int, ...]
    like: Like
    is_view: bool = False

    @property
    def is_spread(self) -> bool:
        return self.inner != tuple(self.like.shape)


def simplify(graph: fx.Graph, *, is_exact: bool) -> fx.Graph:
    """The graph with fewer operators.

    Args:
        graph: A graph whose nodes tell in `meta["like"]` what they give.
        is_exact: Whether results are to be the same to the last bit. Torch's functions round
            differently in the middle and at the end of a tensor, so that those of what is spread
            then come after it is.
    """
    return _Simplifier(graph, is_exact).run()


def is_elementwise(target: Any) -> bool:
    """Whether the result of an operator at an element depends on that element of its arguments."""
    return target in _ELEMENTWISE or target in ELEMENTWISE


def rounds_alike(node: Node) -> bool:
    """Whether an operator by element gives the same numbers anywhere in a tensor."""
    return node.target in _EXACT or (node.target is aten.pow.Tensor_Scalar and node.args[1] == 2)


class _Simplifier:
    """Copies a graph node by node; nodes that are equal become one."""

    def __init__(self, graph: fx.Graph, is_exact: bool) -> None:
        self.old = graph
        self.is_exact = is_exact
        self.graph = fx.Graph()
        self.values: dict[Node, Any] = {}
        self.known: dict[Any, fx.Node] = {}
        self.scales: dict[Node, tuple[float, _Value]] = {}
        self.choices = Choices(self._node, self._find, _ELEMENTWISE)

    def run(self) -> fx.Graph:
        for node in self.old.nodes:
            if node.op == "placeholder":
                self.values[node] = self._plain(self.graph.node_copy(node), node.meta["like"])
            elif node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self._materialised))
            else:
                self.values[node] = self._rewritten(node)
        self.graph.eliminate_dead_code()
        return self.graph

    def _plain(self, node: Node, like: Any) -> Any:
        node.meta["like"] = like
        if not isinstance(like, Like):
            return node
        return _Value(node, None, like.shape, like)

    def _rewritten(self, node: Node) -> Any:
        like = node.meta.get("like")
        for rule in (self._without_effect, self._number, self._reshaped, self._elementwise):
            if isinstance(like, Like) or rule is self._reshaped:
                result = rule(node, like)
                if result is not None:
                    return result
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._materialised)
        if node.target is aten.linalg_solve_triangular.default:
            args, kwargs = self._in_order(args, kwargs)
        return self._plain(self._node(node.target, args, kwargs, like, is_random(node)), like)

    def _in_order(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments of a triangular solve from the right, with a matrix that needs no copy."""
        like = args[0].meta["like"]
        if kwargs.get("left") is False and not like.is_contiguous:
            layout = {"memory_format": torch.contiguous_format}
            copy = self._node(aten.clone.default, args[:1], layout, like.reshaped(like.shape))
            args = (copy, *args[1:])
        return args, kwargs

    def _node(
        self,
        target: Any,
        args: tuple,
        kwargs: dict[str, Any],
        like: Any,
        is_new: bool = False,
    ) -> Node:
        """The node of an operator; one that is there already unless it is to be a new one."""
        node = None if is_new else self._find(target, args, kwargs)
        if node is None and isinstance(like, Like) and not is_new:
            node = self.choices.pushed(target, args, kwargs, like)
        if node is None:
            node = self.graph.call_function(target, args, kwargs)
            node.meta["like"] = like
            if target is aten.where.self:
                self.choices.note(node)
        self.known[self._key(target, args, kwargs)] = node
        return node

    def _find(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Node | None:
        return self.known.get(self._key(target, args, kwargs))

    def _key(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
        return target, key_of(args), key_of(kwargs)

    # -- rules: the value of a node of the old graph, or None ---------------------------------

    def _without_effect(self, node: Node, like: Like) -> _Value | None:
        target, args = node.target, node.args
        if target in _NOTHING:
            return self._same(args[0], like)
        if target in (aten.mul.Tensor, aten.mul.Scalar, aten.add.Tensor) and not node.kwargs:
            neutral = 0 if target is aten.add.Tensor else 1
            for index in (0, 1):
                if self._is_number(args[index], neutral):
                    return self._same(args[1 - index], like)
        if target is aten.sub.Tensor and not node.kwargs and self._is_number(args[1], 0):
            return self._same(args[0], like)
        if target is aten.pow.Tensor_Scalar and args[1] == 1:
            return self._same(args[0], like)
        if target is aten._to_copy.default and isinstance(args[0], fx.Node):
            asked = {k: v for k, v in node.kwargs.items() if v is not None}
            return self._same(args[0], like) if set(asked) <= {"dtype"} else None
        return None

    def _same(self, argument: Any, like: Like) -> _Value | None:
        """The value of an argument, if it has the shape and the type that is asked for."""
        value = self.values[argument] if isinstance(argument, fx.Node) else None
        if not isinstance(value, _Value) or value.like.dtype != like.dtype:
            return None
        return value if value.like.shape == like.shape else None

    def _is_number(self, argument: Any, number: float) -> bool:
        if isinstance(argument, fx.Node):
            value = self.values[argument]
            return isinstance(value, _Value) and value.number == number
        return isinstance(argument, int | float) and argument == number

    def _number(self, node: Node, like: Like) -> _Value | None:
        """A tensor of one number, made so or computed from such ones."""
        number = self._number_of(node)
        if number is None:
            return None
        return _Value(None, number, (), like)

    def _number_of(self, node: Node) -> float | bool | None:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            return None
        name = target.overloadpacket.__name__
        for kind, number in (("zeros", 0.0), ("ones", 1.0)):
            if name in (kind, f"{kind}_like", f"new_{kind}"):
                return number
        if name in ("full", "new_full", "full_like"):
            return node.args[1] if isinstance(node.args[1], int | float) else None
        if name == "scalar_tensor" or (
            target is aten._to_copy.default and isinstance(node.args[0], int | float)
        ):
            return node.args[0]
        if not node.all_input_nodes or any(
            not isinstance(self.values[n], _Value) or self.values[n].number is None
            for n in node.all_input_nodes
        ):
            return None
        if target in _RESHAPES or target is aten.expand.default:
            return self.values[node.args[0]].number
        if target not in _OF_NUMBERS:
            return None
        like = node.meta["like"]
        arguments = [
            torch.tensor(self.values[a].number, dtype=like.dtype, device=like.device)
            if _is_node(a)
            else a
            for a in node.args
        ]
        return target(*arguments, **node.kwargs).item()

    def _reshaped(self, node: Node, like: Any) -> _Value | None:
        """A view that only names axes anew, of a node whose memory is in order."""
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            split, index = node.args
            # Single rows, whose axis goes away.
            if split.target is aten.unbind.int and len(split.meta["like"]) == 1:
                return self._view(self.values[split.args[0]], like)
            if split.target is aten.unbind.int:
                dim = split.args[1] if len(split.args) > 1 else 0
                source = self._materialised(split.args[0])
                row = self._node(aten.select.int, (source, dim, index), {}, like)
                return self._plain(row, like)
            return None
        if node.target is aten.stack.default and len(node.args[0]) == 1:
            return self._view(self.values[node.args[0][0]], like)
        if node.target is aten.select.int:
            source, dim, _ = node.args
            if source.meta["like"].shape[dim] == 1:
                return self._view(self.values[source], like)
        if node.target is aten.expand.default:
            return self._spread(self.values[node.args[0]], like)
        if node.target is aten.t.default:
            return self._transposed_back(self.values[node.args[0]], like)
        if node.target in _REDUCTIONS and not node.kwargs:
            source = node.args[0].meta["like"]  # a sum of truth values is a number
            single = node.args[1] and all(source.shape[dim] == 1 for dim in node.args[1])
            if single and source.dtype == like.dtype:
                return self._view(self.values[node.args[0]], like)
        if node.target in _RESHAPES or _is_identity(node):
            return self._view(self.values[node.args[0]], like)
        return None

    def _transposed_back(self, value: Any, like: Like) -> _Value | None:
        """The matrix that was transposed twice; None of others."""
        if not isinstance(value, _Value) or value.is_spread or value.node is None:
            return None
        if value.node.target is not aten.t.default:
            return None
        source = value.node.args[0]
        return _Value(source, None, like.shape, like) if source.meta["like"] == like else None

    def _view(self, value: Any, like: Like) -> _Value | None:
        if not isinstance(value, _Value) or value.node is None:
            return None
        if value.is_spread:
            inner = _reshaped_inner(value, like.shape)
            if inner is None:
                return None
            small = _Value(value.node, None, value.inner, value.node.meta["like"])
            viewed = self._view(small, value.like.reshaped(inner))
            return None if viewed is None else replace(viewed, like=like, is_view=value.is_view)
        if value.node.meta["like"].shape == like.shape:
            return _Value(value.node, None, like.shape, like)
        source = value.node
        if source.target is aten.view.default:
            source = source.args[0]
        if not source.meta["like"].is_contiguous:
            return None
        shape = list(like.shape)
        if list(source.meta["like"].shape) == shape:
            return _Value(source, None, tuple(shape), like)
        contiguous = like.reshaped(like.shape)
        return self._plain(self._node(aten.view.default, (source, shape), {}, contiguous), like)

    def _spread(self, value: Any, like: Like) -> _Value | None:
        if not isinstance(value, _Value) or value.node is None:
            return None
        return _Value(value.node, None, value.inner, like, is_view=True)

    def _elementwise(self, node: Node, like: Like) -> _Value | None:
        """An operator element by element, on what is not spread yet."""
        if node.target not in _ELEMENTWISE or any(
            not isinstance(self.values[n], _Value) for n in node.all_input_nodes
        ):
            return None
        tensors = [self.values[n] for n in node.all_input_nodes]
        if all(value.number is not None for value in tensors):
            return None
        if self.is_exact and any(value.is_spread for value in tensors) and not rounds_alike(node):
            return None
        simpler = self._inverse(node, like) or self._scaled(node, like)
        if simpler is not None:
            return simpler
        kinds = {value.like.dtype for value in tensors}

        inners = list[tuple[int, ...]]()

        def small(argument: fx.Node) -> Node:
            value = self.values[argument]
            # A number without axes does not decide the type of a result, one with axes does.
            whole = len(kinds) > 1 and len(value.like.shape) > 0 and not value.inner
            made = self._materialised(argument) if whole else self._inner(value)
            inners.append(made.meta["like"].shape)
            return made

        args, kwargs = fx.map_arg((node.args, node.kwargs), small)
        inner = torch.broadcast_shapes(*inners)
        return self._pointwise(node.target, args, kwargs, like, tuple(inner))

    def _inverse(self, node: Node, like: Like) -> _Value | None:
        """Plus or minus one times a value or divided by it."""
        target, args = node.target, node.args
        if target not in (aten.div.Tensor, aten.mul.Tensor) or node.kwargs:
            return None
        for first, second in (args, args[::-1]) if target is aten.mul.Tensor else (args,):
            sign = next((n for n in (1, -1) if self._is_number(first, n)), None)
            value = self.values[second] if isinstance(second, fx.Node) else None
            if sign is None or value is None or value.like.dtype != like.dtype:
                continue
            if value.node is None or torch.broadcast_shapes(value.inner, like.shape) != like.shape:
                continue
            if target is aten.div.Tensor:
                value = self._pointwise(
                    aten.reciprocal.default, (value.node,), {}, value.like, value.inner
                )
            if sign == -1:
                value = self._pointwise(aten.neg.default, (value.node,), {}, like, value.inner)
            return replace(value, like=like, is_view=False)
        return None

    def _scaled(self, node: Node, like: Like) -> _Value | None:
        """A value times a number; times two numbers, it is multiplied by their product."""
        if not like.dtype.is_floating_point:
            return None
        if node.target is aten.neg.default:
            pairs: tuple = ((-1.0, node.args[0]),)
        elif node.target in (aten.mul.Tensor, aten.mul.Scalar):
            pairs = (node.args, node.args[::-1])
        else:
            return None
        for argument, other in pairs:
            number, value = self._known_number(argument), self.values.get(other)
            if number is not None and isinstance(value, _Value) and value.like.dtype == like.dtype:
                break
        else:
            return None
        first, known = self.scales.get(value.node, (1.0, value))
        if known.inner == value.inner and (not self.is_exact or _doubles(first, number)):
            number, value = first * number, replace(known, like=value.like)
        if value.node is None or torch.broadcast_shapes(value.inner, like.shape) != like.shape:
            return None
        if number == 1.0:
            return replace(value, like=like, is_view=False)
        target, args = (aten.neg.default, ()) if number == -1.0 else (aten.mul.Scalar, (number,))
        made = self._pointwise(target, (value.node, *args), {}, like, value.inner)
        self.scales[made.node] = number, value
        return made

    def _known_number(self, argument: Any) -> float | None:
        """The number that an argument is, if it is known and real."""
        if isinstance(argument, fx.Node):
            value = self.values[argument]
            argument = value.number if isinstance(value, _Value) else None
        return float(argument) if type(argument) in (int, float) else None

    def _pointwise(
        self, target: Any, args: tuple, kwargs: dict, like: Like, inner: tuple[int, ...]
    ) -> _Value:
        small = like.reshaped(inner) if inner != like.shape else like
        made = self._node(target, args, kwargs, small)
        return _Value(made, None, inner, like)

    # -- nodes for values ---------------------------------------------------------------------

    def _inner(self, value: _Value) -> Node:
        """The node of a value before it is spread."""
        if value.node is not None:
            return value.node
        return self._filled(value, ())

    def _filled(self, value: _Value, shape: tuple[int, ...]) -> Node:
        like = value.like.reshaped(shape)
        made = {"dtype": like.dtype, "device": like.device}
        return self._node(aten.full.default, (list(shape), value.number), made, like)

    def _materialised(self, argument: Any) -> Any:
        """The node of a whole value, in the place of a node of the old graph."""
        if not isinstance(argument, fx.Node):
            return argument
        value = self.values[argument]
        if not isinstance(value, _Value):
            return value
        if value.node is None:
            return self._filled(value, value.like.shape)
        if not value.is_spread:
            return value.node
        shape, spread = list(value.like.shape), value.node.meta["like"].spread(value.like.shape)
        node = self._node(aten.expand.default, (value.node, shape), {}, spread)
        if value.is_view:
            return node
        # As it lay in memory, so that sums run in the same order.
        layout = {"memory_format": torch.contiguous_format}
        whole = value.like.reshaped(value.like.shape)
        return self._node(aten.clone.default, (node,), layout, whole)


def _reshaped_inner(value: _Value, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Shape before it is spread of a value that gets or loses axes of one; None of other views."""
    old = value.like.shape
    if [n for n in old if n != 1] != [n for n in shape if n != 1]:
        return None
    padded = (1,) * (len(old) - len(value.inner)) + value.inner
    rest = iter([own for own, whole in zip(padded, old, strict=True) if whole != 1])
    return tuple(1 if whole == 1 else next(rest) for whole in shape)


def _doubles(*numbers: float) -> bool:
    """Whether multiplication by numbers does not round: powers of two."""
    return all(abs(math.frexp(number)[0]) == 0.5 for number in numbers)


def _is_identity(node: Node) -> bool:
    """Whether axes are permuted into the order that they are in."""
    return node.target is aten.permute.default and list(node.args[1]) == list(
        range(len(node.args[1]))
    )


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


_RESHAPES = frozenset(
    (
        aten.view.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
    )
)


_REDUCTIONS = frozenset((aten.sum.dim_IntList, aten.mean.dim))
"""Reductions along axes that leave single elements as they are."""


_NOTHING = frozenset(
    (
        aten.detach.default,
        aten.alias.default,
        aten.lift_fresh.default,
        aten.lift_fresh_copy.default,
    )
)
"""Operators that give what they take."""


_OF_NUMBERS = frozenset((aten.neg.default, aten.mul.Tensor, aten.mul.Scalar))
"""Operators that are computed at once where all their arguments are numbers."""


def _overloads(names: str) -> frozenset[Callable[..., Any]]:
    return frozenset(
        getattr(getattr(aten, name), overload)
        for name in names.split()
        for overload in getattr(aten, name).overloads()
        if not overload.endswith("out") and "Scalar_Tensor" not in overload
    )


_EXACT = _overloads(
    "add sub rsub mul div neg abs sqrt reciprocal square relu clamp clamp_min clamp_max maximum"
    " minimum where masked_fill lt le gt ge eq ne logical_not logical_and logical_or bitwise_not"
    " bitwise_and bitwise_or sign nan_to_num isnan isinf threshold_backward"
)
"""Operators by element that round like the real numbers, or not at all."""

_ELEMENTWISE = _EXACT | _overloads(
    "exp expm1 log log1p log2 rsqrt pow sigmoid tanh sin cos lgamma digamma erf addcmul addcdiv"
    " lerp softplus log_sigmoid_forward softplus_backward sigmoid_backward tanh_backward"
)
"""Operators whose result at an element depends on that element of their arguments."""
