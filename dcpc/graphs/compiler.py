"""Recordings compiled by Inductor, torch's compiler."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from dcpc.graphs.like import Like
from dcpc.graphs.recording import Recording
from dcpc.kernels import FORMULAS

__all__ = ["compile_nodes", "compile_recording"]

aten = torch.ops.aten

_BLOCK = 16
"""Torch makes normal numbers in double precision in blocks of so many."""


def compile_recording(recording: Recording) -> None:
    """Lets a recording run as compiled code, with the same random numbers.

    What depends on settled inputs only is computed first, and once: in one piece with the rest,
    Inductor would compute it anew for every element that needs it. Inductor keeps the code on disk,
    by the graph, for other processes.

    Raises:
        Exception: Whatever torch raises where it cannot compile.
    """
    recording.run = _Compiled(recording)
    recording.draws = [_as_uniform(*draw) for draw in recording.draws]


def compile_nodes(
    inputs: Sequence[fx.Node],
    nodes: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    examples: Sequence[Tensor],
) -> Callable[..., Sequence[Tensor]]:
    """Compiles some nodes of a graph.

    Args:
        inputs: Nodes that are given.
        nodes: Nodes to compute, in order.
        outputs: Nodes whose values to return.
        examples: Values of the inputs.

    Raises:
        Exception: Whatever torch raises where it cannot compile.
    """
    return _compile(inputs, nodes, outputs, {}, [Like.of(value) for value in examples])


@dataclass(frozen=True)
class _Part:
    """A compiled part of a graph.

    Attributes:
        run: The code, of a list of inputs.
        inputs: Positions of its inputs among those of the whole.
        strides: How they must lie in memory.
    """

    run: Callable[[list[Tensor]], Sequence[Tensor]]
    inputs: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    def __call__(self, *values: Tensor) -> Sequence[Tensor]:
        given = [values[i] for i in self.inputs]
        for index, (value, stride) in enumerate(zip(given, self.strides, strict=True)):
            if value.stride() != stride:
                given[index] = value.new_empty_strided(value.shape, stride).copy_(value)
        return self.run(given)


class _Compiled:
    """A recording's graph in two parts: what settled inputs determine, then the rest."""

    def __init__(self, recording: Recording) -> None:
        graph = recording.graph
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        num_moving = len(inputs) - recording.num_settled
        num_moving -= len(recording.closure) + len(recording.draws)
        end = recording.num_settled + num_moving
        settled = {
            *inputs[: recording.num_settled],
            *inputs[end : len(inputs) - len(recording.draws)],
        }
        early = set(settled)
        for node in graph.nodes:
            if node.op == "call_function" and early.issuperset(node.all_input_nodes):
                early.add(node)
        noise = {
            node: _normal_from_uniform(like)
            for node, (draw, like) in zip(
                inputs[len(inputs) - len(recording.draws) :], recording.draws, strict=True
            )
            if _is_made_here(draw, like)
        }
        early |= set(noise)
        kept = [
            node
            for node in graph.nodes
            if node in early and node not in settled and not early.issuperset(node.users)
        ]
        outputs = next(node for node in graph.nodes if node.op == "output").args[0]
        examples = [node.meta["like"] for node in inputs]
        for node in noise:
            like = node.meta["like"]
            examples[inputs.index(node)] = like.reshaped((_num_uniform(like),))
        operators = [n for n in graph.nodes if n.op == "call_function"]
        first, rest = ([n for n in operators if (n in early) is part] for part in (True, False))
        self._first = _compile(inputs, first, kept, noise, examples)
        examples += [node.meta["like"] for node in kept]
        self._second = _compile([*inputs, *kept], rest, outputs, {}, examples)

    def __call__(self, *values: Tensor) -> Sequence[Tensor]:
        return self._second(*values, *self._first(*values))


def _compile(
    inputs: Sequence[fx.Node],
    nodes: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    made: Mapping[fx.Node, Callable[[Tensor], Tensor]],
    examples: Sequence[Like],
) -> _Part:
    """Compiles some nodes of a graph.

    Args:
        inputs: Nodes that are given.
        nodes: Nodes to compute, in order.
        outputs: Nodes whose values to return.
        made: For some of the inputs, how their values are made from what is given.
        examples: What the inputs are like.
    """
    graph, copied, used = fx.Graph(), dict[fx.Node, fx.Node](), list[int]()
    needed = {n for node in nodes for n in node.all_input_nodes}.union(outputs, made)
    # Noise that was made of uniform numbers comes again, as what is made of it.
    for node, position in {node: index for index, node in enumerate(inputs)}.items():
        if node in needed:
            copied[node] = graph.placeholder(f"input{position}")
            used.append(position)
    for node in made:
        copied[node] = graph.call_function(made[node], (copied[node],))
    for node in nodes:
        copied[node] = graph.node_copy(node, copied.__getitem__)
        if node.target is aten.view.default:  # the compiler lays out some results otherwise
            copied[node].target = aten.reshape.default
    graph.output(tuple(copied[node] for node in outputs))
    graph.eliminate_dead_code()
    module = fx.GraphModule({}, graph)
    strides = tuple(examples[i].stride for i in used)
    return _Part(_inductor(module, [examples[i].empty() for i in used]), tuple(used), strides)


def _inductor(
    module: fx.GraphModule, examples: Sequence[Tensor]
) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """Code for a graph of operators, from Inductor or from its cache on disk."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        table: Any = {**select_decomp_table(), **FORMULAS, aten.nan_to_num.default: _nan_to_num}
        flat = make_fx(module, decomposition_table=table, tracing_mode="fake")(*examples)
        fake = [n.meta["val"] for n in flat.graph.nodes if n.op == "placeholder"]
        if not fake or not any(node.op == "call_function" for node in flat.graph.nodes):
            return lambda values: module(*values)
        context = torch._guards.TracingContext(fake[0].fake_mode)
        with torch._guards.tracing(context), config.patch({"cpp.simdlen": _vector_bits()}):
            return compile_fx_inner(flat, fake, is_inference=True)


def _vector_bits() -> int | None:
    """256 bits where there are such registers: the last axes of most models fill no longer ones."""
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list

    return 256 if any(isa.bit_width() == 256 for isa in valid_vec_isa_list()) else None


def _nan_to_num(
    x: Tensor,
    nan: float | None = None,
    posinf: float | None = None,
    neginf: float | None = None,
) -> Tensor:
    """`nan_to_num`, by one comparison where all that is not finite becomes zero."""
    if nan == posinf == neginf == 0.0:
        return torch.where(x.abs() < math.inf, x, 0.0)
    finfo = torch.finfo(x.dtype)
    high, low = finfo.max if posinf is None else posinf, finfo.min if neginf is None else neginf
    x = torch.where(x == math.inf, high, torch.where(x == -math.inf, low, x))
    return torch.where(x == x, x, nan or 0.0)


def _is_made_here(draw: Callable[[Tensor], Tensor], like: Like) -> bool:
    """Whether compiled code makes normal numbers of uniform ones, which is five times as fast."""
    return (
        draw is Tensor.normal_
        and like.dtype == torch.float64
        and like.device.type == "cpu"
        and like.numel >= _BLOCK
        and like.is_contiguous
    )


def _as_uniform(
    draw: Callable[[Tensor], Tensor], like: Like
) -> tuple[Callable[[Tensor], Tensor], Like]:
    if not _is_made_here(draw, like):
        return draw, like
    return Tensor.uniform_, like.reshaped((_num_uniform(like),))


def _num_uniform(like: Like) -> int:
    """Number of uniform numbers that torch takes for so many normal ones."""
    return like.numel + (_BLOCK if like.numel % _BLOCK else 0)


def _normal_from_uniform(like: Like) -> Callable[[Tensor], Tensor]:
    """The normal numbers that torch itself makes of uniform ones (Box & Muller 1958).

    In blocks of 16, of which one half gives radii and the other angles. The last 16 numbers of a
    tensor that ends within a block are made anew, from 16 more.
    """
    shape, count = like.shape, like.numel

    def normal(uniform: Tensor) -> Tensor:
        whole = count // _BLOCK * _BLOCK
        blocks = _box_muller(uniform[:whole])
        if whole < count:
            blocks = torch.cat([blocks[: count - _BLOCK], _box_muller(uniform[count:])])
        return blocks.reshape(shape)

    return normal


def _box_muller(uniform: Tensor) -> Tensor:
    pairs = uniform.reshape(-1, 2, _BLOCK // 2)
    radius = (-2.0 * (1.0 - pairs[:, 0]).log()).sqrt()
    angle = 2.0 * math.pi * pairs[:, 1]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1).flatten()
