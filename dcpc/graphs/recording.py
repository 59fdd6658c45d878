"""A function of trees of tensors, recorded as one graph of operators."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from dcpc.divide.repeats import is_random
from dcpc.graphs.like import Like
from dcpc.graphs.products import add_in_products, invert_once
from dcpc.graphs.simplify import is_elementwise, simplify
from dcpc.graphs.targets import with_plain_targets
from dcpc.graphs.together import run_together
from dcpc.graphs.trees import Structure, flatten, leaves_of, unflatten

__all__ = ["Function", "NotRecordable", "Recording", "record"]

aten = torch.ops.aten

Function = Callable[..., Sequence[Tensor]]

_DRAWS: dict[Any, Callable[[Tensor], Tensor]] = {
    aten.rand_like.default: Tensor.uniform_,
    aten.randn_like.default: Tensor.normal_,
}
"""Operators that draw random numbers of a known distribution, and how to draw them."""


class NotRecordable(Exception):
    """A function that cannot be recorded; the message says why."""


class Recording:
    """A function of two trees of tensors, as a graph of operators that can be compiled.

    Tensors of the function's closure, such as parameters, are inputs of the graph too, by
    reference, so that their changes in place are seen. So are random numbers: they are drawn from
    torch's generator before the graph runs, in the order in which the function draws them.

    Args:
        graph: The graph, of the leaves of the function's arguments, the tensors of the closure and
            the random numbers.
        num_settled: Number of leaves of the first argument.
        closure: Tensors of the closure.
        draws: For every random input, how it is drawn, and what it is like.
        structure: Structure of the result.

    Attributes:
        run: What runs the graph.
    """

    def __init__(
        self,
        graph: fx.Graph,
        num_settled: int,
        closure: tuple[Tensor, ...],
        draws: list[tuple[Callable[[Tensor], Tensor], Like]],
        structure: Structure,
    ) -> None:
        self.graph = graph
        self.num_settled = num_settled
        self.closure = closure
        self.draws = draws
        self._structure = structure
        self._outputs = _lift_outputs(graph)
        self.run: Function = with_plain_targets(graph)

    def entries(self) -> list[tuple[list[fx.Node], Structure]]:
        """For every entry of a result that is a tuple, its nodes and its structure."""
        output = next(node for node in self.graph.nodes if node.op == "output")
        inputs = (node for node in self.graph.nodes if node.op == "placeholder")
        values = [*output.args[0], *inputs]
        rest = iter([values[position] for position in self._outputs])
        return [
            ([next(rest) for _ in range(entry.num_leaves)], entry)
            for entry in self._structure.children()
        ]

    @property
    def num_operators(self) -> int:
        """Number of operators of the graph."""
        return sum(node.op == "call_function" for node in self.graph.nodes)

    def num_elements(self, *, least: int = 0, by_element: bool = False) -> int:
        """Number of elements that its operators write.

        Args:
            least: Size of a tensor to count.
            by_element: Whether only operators element by element count.
        """
        operators = (node for node in self.graph.nodes if node.op == "call_function")
        counted = (n for n in operators if not by_element or is_elementwise(n.target))
        likes = (node.meta.get("like") for node in counted)
        sizes = (like.numel for like in likes if isinstance(like, Like))
        return sum(size for size in sizes if size >= least)

    def __call__(self, settled: Any, moving: Any) -> Any:
        """The function's result; the trees must have the structure that was recorded."""
        return self.on_leaves(leaves_of((settled, moving)))

    def on_leaves(self, leaves: Sequence[Tensor]) -> Any:
        """The function's result, from the leaves of its arguments."""
        with torch.no_grad():
            noise = [draw(like.empty()) for draw, like in self.draws]
            inputs = (*leaves, *self.closure, *noise)
            values = (*self.run(*inputs), *inputs)
        return unflatten([values[i] for i in self._outputs], self._structure)


def record(
    function: Callable[[Any, Any], Any],
    settled: Any,
    moving: Any,
    *,
    is_exact: bool,
    inverts: bool = False,
) -> Recording:
    """Records a function of two trees of tensors, which gives another tree.

    Args:
        function: The function. It must do the same operations whatever the values are.
        settled: Example of its first argument, what is computed from which alone is to be computed
            once.
        moving: Example of its second argument.
        is_exact: Whether the recording gives what the function gives to the last bit.
        inverts: Whether triangular matrices that are solved with often may be inverted instead;
            this, too, where the recording is not exact only.

    Raises:
        NotRecordable: It looks at values, writes in place, or draws random numbers that are not
            known here.
    """
    leaves, inputs = flatten((settled, moving))
    num_settled = len(leaves_of(settled))
    # Tensors of their own: what comes in twice, or is a parameter too, must not be taken for one.
    leaves = [leaf.detach() for leaf in leaves]
    recorder = _Recorder(leaves)
    try:
        with torch.no_grad(), recorder:
            result = function(*unflatten(leaves, inputs))
    except Exception as error:
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotRecordable(message[:200]) from error
    outputs, structure = flatten(result)
    graph = simplify(recorder.finish(outputs), is_exact=is_exact)
    if not is_exact:
        add_in_products(graph)
        if inverts:
            invert_once(graph)
    graph = run_together(graph, _kinds(graph, structure, num_settled), is_exact=is_exact)
    closure, draws = tuple(recorder.closure), recorder.draws
    return Recording(graph, num_settled, closure, draws, structure)


def _kinds(graph: fx.Graph, structure: Structure, num_settled: int) -> dict[fx.Node, Any]:
    """When a node is computed: for which entry of a result that is a tuple, and from what.

    That is the first entry that needs it, and whether settled inputs determine it.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    settled = set(inputs[:num_settled])
    for node in graph.nodes:
        if node.op == "call_function" and settled.issuperset(node.all_input_nodes):
            settled.add(node)
    (outputs,) = next(node for node in graph.nodes if node.op == "output").args
    entries = structure.children() if structure.type is tuple else [structure]
    rest, kinds = iter(outputs), dict[fx.Node, Any]()
    for index, entry in enumerate(entries):
        waiting = [next(rest) for _ in range(entry.num_leaves)]
        while waiting:
            node = waiting.pop()
            if node not in kinds:
                kinds[node] = index, node in settled
                waiting.extend(node.all_input_nodes)
    return kinds


def _lift_outputs(graph: fx.Graph) -> list[int]:
    """Lets a graph give what it computes only, once.

    Returns:
        For every output, its position among what the graph now gives, followed by its inputs.
    """
    output = next(node for node in graph.nodes if node.op == "output")
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    computed = list(dict.fromkeys(node for node in output.args[0] if node.op != "placeholder"))
    position = {node: index for index, node in enumerate((*computed, *inputs))}
    outputs = [position[node] for node in output.args[0]]
    output.args = (tuple(computed),)
    return outputs


class _Recorder(TorchDispatchMode):
    """Records every operator that runs, below autograd, so that gradients are recorded too.

    Attributes:
        closure: Tensors that came from elsewhere than the leaves.
        draws: For every draw of random numbers, how it was made, and what it is like.
    """

    def __init__(self, leaves: list[Tensor]) -> None:
        super().__init__()
        self.closure: list[Tensor] = []
        self.draws: list[tuple[Callable[[Tensor], Tensor], Like]] = []
        self._graph = fx.Graph()
        self._inputs: dict[str, list[fx.Node]] = {"leaf": [], "closure": [], "noise": []}
        self._nodes: Any = WeakTensorKeyDictionary()
        for leaf in leaves:
            self._nodes[leaf] = self._input("leaf", leaf)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            raise NotRecordable("it looks at the values of tensors")
        if func._schema.is_mutable:
            return self._write(func, args, kwargs)
        result = func(*args, **kwargs)
        if func in _DRAWS:
            self._nodes[result] = self._input("noise", result)
            self.draws.append((_DRAWS[func], Like.of(result)))
            return result
        arguments = map_aggregate((args, kwargs), self._node_of)
        node = self._graph.call_function(func, *arguments)
        if is_random(node):
            raise NotRecordable(f"it draws random numbers by {func}")
        self._track(result, node)
        return result

    def finish(self, outputs: list[Tensor]) -> fx.Graph:
        """The graph, with these outputs; its inputs are the leaves, the closure and the noise."""
        self._graph.output(tuple(self._node_of(value) for value in outputs))
        last, *rest = [node for kind in self._inputs.values() for node in kind]
        for node in rest:
            last.append(node)
            last = node
        return self._graph

    def _write(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Records a write into a value of its own, which is as good as a new value.

        Derivatives write so into what they have just made.

        Raises:
            NotRecordable: Something else looks at the same memory, or the operator is another one.
        """
        target: Any = args[0] if args else None
        name = func.overloadpacket.__name__
        plain: Any = getattr(getattr(aten, name.removesuffix("_"), None), func._overloadname, None)
        is_drawn = torch.Tag.nondeterministic_seeded in func.tags
        if not name.endswith("_") or plain is None or is_drawn or not self._is_own(target):
            raise NotRecordable(f"it writes in place ({func})")
        node = self._graph.call_function(plain, *map_aggregate((args, kwargs), self._node_of))
        if plain(*args, **kwargs).dtype != target.dtype:
            raise NotRecordable(f"it writes in place, into another type ({func})")
        result = func(*args, **kwargs)
        self._track(target, node)
        return result

    def _is_own(self, value: Any) -> bool:
        """Whether a tensor was made here, and nothing else that lives has its memory."""
        node = self._nodes.get(value) if isinstance(value, Tensor) else None
        if node is None or node.op != "call_function":
            return False
        memory = value.untyped_storage().data_ptr()
        others = (x for x in self._nodes if x is not value)
        return all(x.untyped_storage().data_ptr() != memory for x in others)

    def _input(self, kind: str, value: Tensor) -> fx.Node:
        node = self._graph.placeholder(f"{kind}{len(self._inputs[kind])}")
        node.meta["like"] = Like.of(value)
        self._inputs[kind].append(node)
        return node

    def _node_of(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        node = self._nodes.get(value)
        if node is None:
            node = self._nodes[value] = self._input("closure", value)
            self.closure.append(value)
        return node

    def _track(self, result: Any, node: fx.Node) -> None:
        if isinstance(result, Tensor):
            node.meta["like"] = Like.of(result)
            self._nodes[result] = node
            return
        node.meta["like"] = [Like.of(x) if isinstance(x, Tensor) else None for x in result]
        for index, part in enumerate(result):
            if isinstance(part, Tensor):
                self._track(part, self._graph.call_function(operator.getitem, (node, index)))
