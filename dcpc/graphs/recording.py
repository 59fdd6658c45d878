"""A function of trees of tensors, recorded as one graph of operators."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from dcpc.graphs.simplify import is_random, simplify
from dcpc.graphs.targets import with_plain_targets

__all__ = ["Function", "NotRecordable", "Recording", "record"]

aten = torch.ops.aten

Function = Callable[..., tuple[Tensor, ...]]

_DRAWS: dict[Any, Callable[[Tensor], Tensor]] = {
    aten.rand_like.default: Tensor.uniform_,
    aten.randn_like.default: Tensor.normal_,
}
"""Operators that draw random numbers of a known distribution, and how to draw them."""


class NotRecordable(Exception):  # noqa: N818
    """A function that cannot be recorded; the message says why."""


class Recording:
    """A function of two trees of tensors, as a graph of operators that can be compiled.

    Tensors of the function's closure, such as parameters, are inputs of the graph too, by
    reference, so that their changes in place are seen. So are random numbers: they are drawn from
    torch's generator before the graph runs, in the order in which the function draws them.

    Args:
        module: The graph, of the leaves of the function's arguments.
        num_settled: Number of leaves of the first argument.
        structure: Structure of the result.

    Attributes:
        module: The graph, of the leaves, the tensors of the closure and the random numbers.
        num_settled: Number of leaves of the first argument.
        closure: Tensors of the closure.
        draws: For every random input, how it is drawn, and an example.
        run: What runs the graph.
    """

    def __init__(
        self, module: fx.GraphModule, num_settled: int, structure: pytree.TreeSpec
    ) -> None:
        self._structure = structure
        self.num_settled = num_settled
        self.closure = _lift_constants(module)
        self.draws = _lift_draws(module)
        module.recompile()
        self.module = module
        self.run: Function = with_plain_targets(module)

    @property
    def num_operators(self) -> int:
        """Number of operators of the graph."""
        return sum(node.op == "call_function" for node in self.module.graph.nodes)

    def __call__(self, settled: Any, moving: Any) -> Any:
        """The function's result; the trees must have the structure that was recorded."""
        leaves = pytree.tree_leaves((settled, moving))
        with torch.no_grad():
            outputs = self.run(*leaves, *self.closure, *self.noise())
        return pytree.tree_unflatten(outputs, self._structure)

    def noise(self) -> list[Tensor]:
        """Random numbers for one run, from torch's generator."""
        return [
            draw(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device))
            for draw, x in self.draws
        ]


def record(function: Callable[[Any, Any], Any], settled: Any, moving: Any) -> Recording:
    """Records a function of two trees of tensors, which gives another tree.

    Args:
        function: The function. It must do the same operations whatever the values are.
        settled: Example of its first argument, what is computed from which alone is to be computed
            once.
        moving: Example of its second argument.

    Raises:
        NotRecordable: It looks at values, or draws random numbers that are not known here.
    """
    leaves, inputs = pytree.tree_flatten((settled, moving))
    result: pytree.TreeSpec | None = None

    def flat(*values: Tensor) -> tuple[Tensor, ...]:
        nonlocal result
        outputs, result = pytree.tree_flatten(
            function(*pytree.tree_unflatten(list(values), inputs))
        )
        return tuple(outputs)

    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            module = make_fx(flat)(*leaves)
            if any(_mutates(node) for node in module.graph.nodes):
                module = make_fx(torch.func.functionalize(module))(*leaves)
    except Exception as error:
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotRecordable(message[:200]) from error
    assert result is not None
    return Recording(simplify(module), len(pytree.tree_leaves(settled)), result)


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _lift_constants(module: fx.GraphModule) -> tuple[Tensor, ...]:
    """Makes tensors of the closure inputs, after the others."""
    constants: list[Tensor] = []
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            constants.append(getattr(module, str(node.target)).detach())
            _replace_by_input(module, node, f"constant{len(constants)}")
    return tuple(constants)


def _lift_draws(module: fx.GraphModule) -> list[tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Makes random numbers inputs, after the others.

    Raises:
        NotRecordable: Some depend on values.
    """
    draws = []
    for node in list(module.graph.nodes):
        if not is_random(node):
            continue
        if node.target not in _DRAWS:
            raise NotRecordable(f"it draws random numbers by {node.target}")
        draws.append((_DRAWS[node.target], node.meta["val"]))
        _replace_by_input(module, node, f"noise{len(draws)}")
    return draws


def _replace_by_input(module: fx.GraphModule, node: fx.Node, name: str) -> None:
    graph = module.graph
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        new = graph.placeholder(name)
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    graph.erase_node(node)
