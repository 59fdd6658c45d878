"""Like operators on different values, run as one.

The graph of a model with a site per time step is wide: every site has the same small operators, on
values of its own. Here they become one operator on these values stacked, as in Neubig, Goldberg &
Dyer (2017), "On-the-fly operation batching in dynamic computation graphs", but once, where a graph
is recorded.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from dcpc.graphs.families import LEAST, Families, is_row
from dcpc.graphs.like import Like, Node
from dcpc.graphs.simplify import is_elementwise, rounds_alike

__all__ = ["run_together"]

aten = torch.ops.aten

MOST_ELEMENTS = 2**13
"""Elements of a value above which its arithmetic, not the call, is what takes time."""

Call = tuple[Any, tuple, dict[str, Any]]
"""A target, its arguments and its keyword arguments."""


def run_together(graph: fx.Graph, kinds: Mapping[Node, Any], *, is_exact: bool) -> fx.Graph:
    """The graph with like operators as one.

    Args:
        graph: A graph whose nodes tell in `meta["like"]` what they give.
        kinds: By node, anything; only nodes that agree in it are run as one.
        is_exact: Whether results are to be the same to the last bit.

    Returns:
        Another graph of the same inputs and outputs, or the same one where nothing is alike.
    """
    families = Families(graph, kinds, lambda node: _may_join(node, is_exact)).found
    return _Together(graph, families).run() if families else graph


def _may_join(node: Node, is_exact: bool) -> bool:
    """Whether a node is small and has a rule."""
    likes = [node.meta.get("like"), *(n.meta.get("like") for n in node.all_input_nodes)]
    if len(likes) == 1 or not all(isinstance(like, Like) for like in likes):
        return False
    own, *given = likes
    if own.numel > MOST_ELEMENTS or len({like.device for like in likes}) > 1:
        return False
    if is_elementwise(node.target):
        # A number without axes does not decide the type of a result, one with axes does.
        types = {like.dtype for like in given} - {torch.bool} if _has_number(given) else ()
        is_same = own.is_contiguous and rounds_alike(node)
        return len(types) <= 1 and (is_same or not is_exact)
    if node.target in _LAYOUTS:
        return True
    if is_exact or node.target not in _RULES or not given[0].shape or _has_factors(node):
        return False
    if node.target is aten.linalg_solve_triangular.default:
        return len({len(like.shape) for like in given}) == 1  # else leading axes would not meet
    return True


def _has_number(likes: Sequence[Like]) -> bool:
    """Whether one of some values has no axes."""
    return any(len(like.shape) == 0 for like in likes)


def _has_factors(node: Node) -> bool:
    """Whether a product of matrices is scaled."""
    return node.target is aten.addmm.default and bool(node.kwargs)


@dataclass(frozen=True)
class _Row:
    """A row of a node of the new graph, the value of a member of a family.

    Attributes:
        stack: The node, whose first axis counts the members.
        index: Number of the row.
    """

    stack: Node
    index: int


class _Together:
    """Copies a graph, family by family.

    Args:
        graph: The graph.
        families: By member, its family.
    """

    def __init__(self, graph: fx.Graph, families: Mapping[Node, Sequence[Node]]) -> None:
        self.old = graph
        self.families = families
        self.graph = fx.Graph()
        self.values: dict[Node, Node | _Row] = {}
        self.singles: dict[Node, Node] = {}
        self.stacks: dict[tuple[Node, ...], Node] = {}

    def run(self) -> fx.Graph:
        for node in self.old.nodes:
            if node.op == "placeholder":
                self.values[node] = self.graph.node_copy(node)
            elif node.op == "output":
                self.graph.output(pytree.tree_map(self.single, node.args[0]))
            else:
                self._compute(node)
        self.graph.eliminate_dead_code()
        _unbind(self.graph)
        return self.graph

    def _compute(self, node: Node) -> None:
        """Adds a node with its family, after all that these are computed from."""
        waiting = [node]
        while waiting:
            if waiting[-1] in self.values:
                waiting.pop()
                continue
            family = self.families.get(waiting[-1], waiting[-1:])
            needed = dict.fromkeys(n for member in family for n in member.all_input_nodes)
            missing = [n for n in needed if n not in self.values]
            if missing:
                waiting.extend(missing)
            elif len(family) == 1:
                self.values[family[0]] = self._copy(family[0])
            else:
                self._add(family)

    def _copy(self, node: Node) -> Node:
        """A node of no family."""
        if node.target is aten.stack.default:
            values, *dims = node.args
            if sum(isinstance(self.values[n], _Row) for n in values) >= LEAST:
                return self._stack_rows(values, dims[0] if dims else 0)
        copy = self.graph.node_copy(node, self.single)
        given = zip(node.all_input_nodes, copy.all_input_nodes, strict=True)
        if any(old.meta["like"] != new.meta["like"] for old, new in given):
            copy.meta["like"] = _like_of(copy)
        return copy

    def _stack_rows(self, values: Sequence[Node], dim: int) -> Node:
        """Members of families stacked along an axis, in memory as if they had been on their own."""
        stack = self.stacked(values)
        rank = _rank(stack)
        axes = list(range(1, rank))
        axes.insert(dim % rank, 0)
        return self.call(aten.clone.default, (self.permuted(stack, axes),), _IN_ORDER)

    def _add(self, family: Sequence[Node]) -> None:
        """Adds the members of a family as one node."""
        first, rows = family[0], list(range(len(family)))
        if is_row(first) and first.args[0] is family[1].args[0]:
            source, dim = self.single(first.args[0]), first.args[1] % _rank(first.args[0])
            axes = [dim, *(axis for axis in range(_rank(source)) if axis != dim)]
            stack = self.call(aten.clone.default, (self.permuted(source, axes),), _IN_ORDER)
            rows = [node.args[2] % source.meta["like"].shape[dim] for node in family]
        else:
            rule = _elementwise if is_elementwise(first.target) else _RULES[first.target]
            stack = self.call(*rule(self, family))
        for node, row in zip(family, rows, strict=True):
            self.values[node] = _Row(stack, row)

    # -- nodes of the new graph ----------------------------------------------------------------

    def call(self, target: Any, args: tuple, kwargs: Mapping[str, Any] | None = None) -> Node:
        """A node of an operator."""
        node = self.graph.call_function(target, args, dict(kwargs or {}))
        node.meta["like"] = _like_of(node)
        return node

    def permuted(self, node: Node, axes: Sequence[int]) -> Node:
        """A node with its axes in another order."""
        if list(axes) == list(range(len(axes))):
            return node
        return self.call(aten.permute.default, (node, list(axes)))

    def single(self, value: Any) -> Any:
        """The node of one value, in the place of a node of the old graph."""
        if not isinstance(value, fx.Node):
            return value
        row = self.values[value]
        if not isinstance(row, _Row):
            return row
        if value not in self.singles:
            if is_row(value) and not isinstance(self.values[value.args[0]], _Row):
                made = self.graph.node_copy(value, self.single)
            else:
                made = self.call(aten.select.int, (row.stack, 0, row.index))
            self.singles[value] = made
        return self.singles[value]

    def operand(self, family: Sequence[Node], column: Sequence[Node], rank: int) -> Node:
        """An argument of all members, which broadcasts to values of a rank behind a first axis."""
        if len(set(column)) == 1:
            return self.single(column[0])
        stack = self.stacked(column)
        count, *shape = stack.meta["like"].shape
        missing = rank - len(shape)
        if not missing:
            return stack
        return self.call(aten.reshape.default, (stack, [count, *(1,) * missing, *shape]))

    def stacked(self, column: Sequence[Node]) -> Node:
        """Values as rows of one node."""
        key = tuple(column)
        if key not in self.stacks:
            pieces = self._pieces([self.values[node] for node in column])
            self.stacks[key] = (
                pieces[0] if len(pieces) == 1 else self.call(aten.cat.default, (pieces,))
            )
        return self.stacks[key]

    def _pieces(self, values: Sequence[Node | _Row]) -> list[Node]:
        """Nodes that hold values as their rows, one after the other."""
        pieces, start = list[Node](), 0
        while start < len(values):
            end, first = start + 1, values[start]
            if isinstance(first, _Row):
                step = 1
                while end < len(values):
                    value = values[end]
                    if not isinstance(value, _Row) or value.stack is not first.stack:
                        break
                    if end == start + 1:
                        step = max(value.index - first.index, 1)
                    if value.index != first.index + step * (end - start):
                        break
                    end += 1
                pieces.append(self._rows(first.stack, first.index, end - start, step))
            else:
                while end < len(values) and not isinstance(values[end], _Row):
                    end += 1
                pieces.append(self.call(aten.stack.default, (list(values[start:end]),)))
            start = end
        return pieces

    def _rows(self, stack: Node, first: int, count: int, step: int) -> Node:
        """Some rows of a node."""
        if count == stack.meta["like"].shape[0]:
            return stack
        end = first + step * (count - 1) + 1
        return self.call(aten.slice.Tensor, (stack, 0, first, end, step))


def _unbind(graph: fx.Graph) -> None:
    """Takes many rows of a node at once."""
    rows = [
        n for n in graph.nodes if is_row(n) and n.args[1] == 0 and n.args[0].op == "call_function"
    ]
    taken = Counter(row.args[0] for row in rows)
    made: dict[Node, Node] = {}
    for row in rows:
        stack = row.args[0]
        size = stack.meta["like"].shape[0]
        if 2 * taken[stack] < size or size == 1:
            continue
        if stack not in made:
            with graph.inserting_after(stack):
                made[stack] = graph.call_function(aten.unbind.int, (stack,))
            made[stack].meta["like"] = [row.meta["like"]] * size
        row.target, row.args = operator.getitem, (made[stack], row.args[2])


def _like_of(node: Node) -> Any:
    """Shape, layout and type of what a node gives, by its operator on tensors without values."""
    inputs = [n.meta["like"] for n in node.all_input_nodes if isinstance(n.meta["like"], Like)]

    def empty(like: Any) -> Any:
        if not isinstance(like, Like):
            return like
        return replace(like, device=torch.device("meta")).empty()

    def given(leaf: Any) -> Any:
        return pytree.tree_map(empty, leaf.meta["like"]) if isinstance(leaf, fx.Node) else leaf

    def like(result: Any) -> Any:
        return replace(Like.of(result), device=inputs[0].device)

    args, kwargs = pytree.tree_map(given, (node.args, node.kwargs))
    return pytree.tree_map(like, node.target(*args, **kwargs))


def _rank(node: Node) -> int:
    return len(node.meta["like"].shape)


# -- rules: one operator for a family ----------------------------------------------------------


def _elementwise(new: _Together, family: Sequence[Node]) -> Call:
    """An operator element by element: shorter shapes broadcast behind the first axis."""
    return family[0].target, *_arguments(new, family, _rank(family[0]))


def _arguments(
    new: _Together, family: Sequence[Node], rank: int | None = None
) -> tuple[tuple, dict[str, Any]]:
    """Arguments of all members; of a rank, or each of its own and of all members."""
    leaves, structures = zip(
        *(pytree.tree_flatten((node.args, node.kwargs)) for node in family), strict=True
    )
    columns = [list(column) for column in zip(*leaves, strict=True)]

    def argument(column: list[Any]) -> Any:
        if not isinstance(column[0], fx.Node):
            return column[0]
        if rank is not None:
            return new.operand(family, column, rank)
        return new.stacked(column)

    return pytree.tree_unflatten(map(argument, columns), structures[0])


def _as_it_is(new: _Together, family: Sequence[Node]) -> Call:
    """An operator that takes any number of leading axes."""
    return family[0].target, *_arguments(new, family)


def _along(
    position: int, default: int | tuple[()] = 0
) -> Callable[[_Together, Sequence[Node]], Call]:
    """An operator along axes that the argument at a position names.

    Args:
        position: The position.
        default: What is named where there is no such argument; none for all axes.
    """

    def rule(new: _Together, family: Sequence[Node]) -> Call:
        args, kwargs = _arguments(new, family)
        rank = _rank(family[0].all_input_nodes[0]) + (family[0].target is aten.unsqueeze.default)
        named: Any = args[position] if len(args) > position else default
        if isinstance(named, int):
            shifted: Any = 1 + named % rank
        else:
            shifted = [1 + axis % rank for axis in named or range(rank)]
        return family[0].target, (*args[:position], shifted, *args[position + 1 :]), kwargs

    return rule


def _sum(new: _Together, family: Sequence[Node]) -> Call:
    """The sum of all elements."""
    args, kwargs = _arguments(new, family)
    return aten.sum.dim_IntList, (args[0], list(range(1, _rank(args[0])))), kwargs


def _reshape(new: _Together, family: Sequence[Node]) -> Call:
    (stack, _), _ = _arguments(new, family)
    return aten.reshape.default, (stack, [len(family), *family[0].meta["like"].shape]), {}


def _expand(new: _Together, family: Sequence[Node]) -> Call:
    shape = family[0].meta["like"].shape
    stack = new.operand(family, [node.args[0] for node in family], len(shape))
    return aten.expand.default, (stack, [len(family), *shape]), {}


def _transposed(new: _Together, family: Sequence[Node]) -> Call:
    (stack,), _ = _arguments(new, family)
    return aten.permute.default, (stack, [0, *reversed(range(1, _rank(stack)))]), {}


def _permute(new: _Together, family: Sequence[Node]) -> Call:
    (stack, axes), _ = _arguments(new, family)
    return aten.permute.default, (stack, [0, *(1 + axis % len(axes) for axis in axes)]), {}


def _product(new: _Together, family: Sequence[Node]) -> Call:
    """Products of matrices, one of which may be that of all members."""
    columns = list(zip(*(node.args for node in family), strict=True))
    return torch.matmul, tuple(new.operand(family, column, 2) for column in columns), {}


def _affine(new: _Together, family: Sequence[Node]) -> Call:
    """Products of matrices plus vectors."""
    columns = list(zip(*(node.args for node in family), strict=True))
    return _matmul_plus, tuple(new.operand(family, column, 2) for column in columns), {}


def _matmul_plus(offset: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return first @ second + offset


_IN_ORDER = {"memory_format": torch.contiguous_format}

_LAYOUTS: dict[Any, Callable[[_Together, Sequence[Node]], Call]] = {
    aten.select.int: _along(1),
    aten.slice.Tensor: _along(1),
    aten.unsqueeze.default: _along(1),
    aten.squeeze.dim: _along(1),
    aten.squeeze.dims: _along(1),
    aten.flip.default: _along(1),
    aten.cat.default: _along(1),
    aten.view.default: _reshape,
    aten.expand.default: _expand,
    aten.permute.default: _permute,
    aten.t.default: _transposed,
    aten.clone.default: _as_it_is,
}
"""Rules of operators that only lay out their values."""

_RULES = _LAYOUTS | {
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _along(1),
    aten.mean.dim: _along(1),
    aten.amax.default: _along(1, ()),
    aten.amin.default: _along(1, ()),
    aten.logsumexp.default: _along(1),
    aten.cumsum.default: _along(1),
    aten._softmax.default: _along(1),
    aten._log_softmax.default: _along(1),
    aten._softmax_backward_data.default: _along(2),
    aten._log_softmax_backward_data.default: _along(2),
    aten.gather.default: _along(1),
    aten.scatter_add.default: _along(1),
    aten.linalg_solve_triangular.default: _as_it_is,
    aten.mm.default: _product,
    aten.addmm.default: _affine,
}
"""Rules of all operators that do not work element by element."""
