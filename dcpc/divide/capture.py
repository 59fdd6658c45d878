"""Capture of a vectorised function as an ATen graph, and slices of that graph.

`make_fx(vmap(f))` records the tensor operations of a Pyro program once. In the graph, an output
depends on an input exactly when there is a path between them, which gives the dependency graph
of the program, and dead-code elimination leaves each subset of outputs with its own program.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dcpc.divide.repeats import without_repeats

Function = Callable[..., tuple[Tensor, ...]]

_SHAPE_ONLY = frozenset(
    f"{kind}_like" for kind in ("zeros", "ones", "full", "empty", "rand", "randn", "randint")
) | frozenset(f"new_{kind}" for kind in ("zeros", "ones", "full", "empty", "empty_strided"))
_SLICES = (torch.ops.aten.slice.Tensor, torch.ops.aten.slice_scatter.default)
_READS = frozenset(("numpy", "tolist", "__array__"))


class ReadsOfData:
    """Lets a program that is captured take data out of torch, and remembers that it did.

    Python numbers, branches and shapes that come from data (`x.std().item()`, `if x.mean() > 0`,
    `int(group.max())`, `F.one_hot`, `x[x > 0]`, numpy) are constants of the capture, which then is
    right for these very data only. `torch.vmap` still refuses them where they come from a latent.

    Attributes:
        found: Whether anything was read since the start.
    """

    def __init__(self) -> None:
        self.found = False

    def watch(self, function: Function) -> Function:
        """The function, with its reads of data allowed and recorded."""

        def watched(*args: Tensor) -> tuple[Tensor, ...]:
            with _MethodReads(self), _OperatorReads(self):
                return function(*args)

        return watched


class _MethodReads(TorchFunctionMode):
    """Records what leaves torch by a method."""

    def __init__(self, reads: ReadsOfData) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _READS:
            self.reads.found = True
        return func(*args, **(kwargs or {}))


class _OperatorReads(TorchDispatchMode):
    """Records operators whose result, or its shape, depends on values; gives numbers."""

    def __init__(self, reads: ReadsOfData) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reads.found = True
            with disable_proxy_modes_tracing():
                return func(*args, **(kwargs or {}))
        if torch.Tag.dynamic_output_shape in func.tags and not _indexes_by_numbers(func, args):
            self.reads.found = True
        return func(*args, **(kwargs or {}))


WRITES_IN_PLACE = "is not possible because there exists a Tensor `other`"
"""Message of `vmap` for an in-place operation whose target has no particle axis."""


def _indexes_by_numbers(func: Any, args: tuple) -> bool:
    """Whether an operator is an index by integers, whose shape does not depend on values."""
    return func is torch.ops.aten.index.Tensor and all(
        index is None or index.dtype not in (torch.bool, torch.uint8) for index in args[1]
    )


def capture(
    function: Function,
    batched: Sequence[Tensor],
    shared: Sequence[Tensor],
    reads: ReadsOfData | None = None,
) -> fx.GraphModule:
    """Records `vmap(function)` as a functional ATen graph.

    Args:
        function: Function of `(*batched, *shared)`, for one particle; returns a tuple of tensors.
        batched: Examples with a leading particle axis.
        shared: Examples of tensors that all particles share.
        reads: Told whether the function takes values out of torch.

    Returns:
        A graph module of `(*batched, *shared)` whose outputs carry the particle axis first.
        Parameters and tensors of the function's closure are in it by reference, so that their
        in-place updates are seen and gradients reach them.
    """
    in_dims = (0,) * len(batched) + (None,) * len(shared)
    function = (reads or ReadsOfData()).watch(function)

    def vectorised(body: Function) -> fx.GraphModule:
        return _traced(torch.vmap(body, in_dims=in_dims, randomness="different"), *batched, *shared)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = vectorised(function)
        except RuntimeError as error:
            if WRITES_IN_PLACE not in str(error):
                raise
            # An in-place write of a latent into a plain buffer: remove the mutation for one
            # particle first, then vectorise what is left.
            single = _traced(
                torch.func.functionalize(function), *(value[0] for value in batched), *shared
            )
            module = vectorised(_without_copy(single))
        if any(_mutates(node) for node in module.graph.nodes):
            module = _without_copy(_traced(torch.func.functionalize(module), *batched, *shared))
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.fill.Scalar:  # what `1 - x` becomes; see `repeat`
            node.target = torch.ops.aten.full_like.default
        elif node.target is torch.ops.aten.linalg_solve_triangular.default:
            node.target = _solve_triangular
    module.graph = _fold_constants(module, without_repeats(module.graph))
    return module


def _traced(function: Callable, *args: Tensor) -> fx.GraphModule:
    """A function's operators as a graph.

    Torch notes the shape of every value by a fake tensor, and makes a mode for each of them unless
    there is one, which takes a third of the time of a long capture.
    """
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        return make_fx(function)(*args)


def dependencies(module: fx.GraphModule) -> list[frozenset[int]]:
    """For every output of a captured graph, the positions of the inputs whose values reach it."""
    reached: dict[fx.Node, frozenset[int]] = {}
    position = 0
    for node in module.graph.nodes:
        if node.op == "placeholder":
            reached[node] = frozenset((position,))
            position += 1
        elif node.op == "output":
            return [reached[output] for output in node.args[0]]
        elif _reads_shape_only(node):
            reached[node] = frozenset()
        else:
            reached[node] = frozenset().union(*(reached[n] for n in node.all_input_nodes))
    raise AssertionError("a graph without an output node")


def slice_outputs(
    module: fx.GraphModule, positions: Sequence[int], *, learns: bool = False
) -> fx.GraphModule:
    """The part of a captured graph that computes some of its outputs; all inputs are kept.

    A slice that does not learn is differentiated with respect to latents only. So the author's
    `detach` is dropped on the way: the score is the derivative of the log-density whatever is
    detached for learning. And the parameters are detached, which spares the backward pass their
    gradients.
    """
    outputs = next(node for node in module.graph.nodes if node.op == "output").args[0]
    wanted = [outputs[position] for position in positions]
    needed: set[fx.Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node in needed and not learns and node.target is torch.ops.aten.detach.default:
            copied[node] = copied[node.args[0]]
        elif node in needed or node.op == "placeholder":
            copied[node] = graph.node_copy(node, copied.__getitem__)
            if node.op == "get_attr" and not learns:
                copied[node] = graph.call_function(torch.ops.aten.detach.default, (copied[node],))
    graph.output(tuple(copied[node] for node in wanted))
    return fx.GraphModule(module, graph)


def repeat(module: fx.GraphModule, varying: Sequence[int], examples: Sequence[Tensor]) -> Function:
    """Records a graph at many values of some inputs at once, the others staying.

    Operators without a batching rule, such as `fill`, are recorded once per value.

    Args:
        module: A captured graph.
        varying: Positions of the inputs that vary.
        examples: All inputs, the varying ones with one more axis in front.

    Returns:
        A function of the inputs whose outputs have that axis in front.
    """
    in_dims = tuple(0 if position in varying else None for position in range(len(examples)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _traced(torch.vmap(module, in_dims=in_dims), *examples)


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _reads_shape_only(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        target.overloadpacket.__name__ in _SHAPE_ONLY
    )


def _without_copy(module: fx.GraphModule) -> fx.GraphModule:
    """Rewrites what functionalisation leaves and `vmap` has no batching rule for.

    `aten.copy(destination, source)` becomes a broadcast; open-ended slices get their true end; a
    write to one index becomes one to a slice, since the batching rule of the former scatters to
    repeated indices, which multiplies the gradient.
    """
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.copy.default:
            node.target, node.kwargs = _broadcast_like, {}
        elif node.target is torch.ops.aten.select_scatter.default:
            node.target = _select_scatter
        elif node.target in _SLICES and sys.maxsize in node.args:
            position = node.args.index(sys.maxsize)
            size = node.args[0].meta["val"].shape[node.args[position - 2]]
            node.args = (*node.args[:position], size, *node.args[position + 1 :])
    module.recompile()
    return module


def _broadcast_like(destination: Tensor, source: Tensor) -> Tensor:
    return source.expand(destination.shape).to(destination.dtype)


def _solve_triangular(
    matrix: Tensor, rows: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tensor:
    """Solves for the rows of all particles at once, where they share a matrix.

    Torch would make a copy of it for each.
    """
    is_shared = matrix.dim() == 2 and not left
    solved = torch.linalg.solve_triangular(
        matrix,
        rows.reshape(-1, rows.shape[-1]) if is_shared else rows,
        upper=upper,
        left=left,
        unitriangular=unitriangular,
    )
    return solved.reshape(rows.shape) if is_shared else solved


def _select_scatter(destination: Tensor, source: Tensor, dim: int, index: int) -> Tensor:
    index %= destination.shape[dim]
    return torch.slice_scatter(destination, source.unsqueeze(dim), dim, index, index + 1)


def _fold_constants(module: fx.GraphModule, graph: fx.Graph) -> fx.Graph:
    """Evaluates once what depends on literals only, such as the log of a fixed prior scale.

    A literal is a tensor made inside the model (`lift_fresh_copy`); tensors of the closure may
    change between calls and stay references.
    """
    literals: dict[fx.Node, Tensor] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target is torch.ops.aten.lift_fresh_copy.default:
            constant = node.args[0]
            if constant.op == "get_attr":
                literals[node] = getattr(module, constant.target)
        elif (
            node.all_input_nodes
            and all(n in literals for n in node.all_input_nodes)
            and torch.Tag.nondeterministic_seeded not in node.target.tags
        ):
            with torch.no_grad():
                value = node.target(
                    *fx.map_arg(node.args, literals.__getitem__),
                    **fx.map_arg(node.kwargs, literals.__getitem__),
                )
            if isinstance(value, Tensor):
                literals[node] = value
    for index, (node, value) in enumerate(literals.items()):
        if all(user in literals for user in node.users):
            continue
        name = f"_literal{index}"
        module.register_buffer(name, value.detach())
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.get_attr(name))
    graph.eliminate_dead_code()
    return graph
