"""A recording that runs in stages, between which the caller does what no graph can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dcpc.graphs.recording import Recording
from dcpc.graphs.targets import with_plain_targets
from dcpc.graphs.trees import Structure, unflatten
from dcpc.recombine import take_particles

__all__ = ["Stages"]


class Stages:
    """A recording whose result is a tuple, each entry of which is a stage of its own.

    A stage computes what its entry needs and no earlier stage has computed. It may be left out, and
    its inputs may come after the stages before it.

    Args:
        recording: A recording of a function that returns a tuple.
    """

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        graph = recording.graph
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        operators = [node for node in graph.nodes if node.op == "call_function"]
        moving = self._inputs[recording.num_settled :]
        self._varying = set(moving[: len(moving) - len(recording.closure) - len(recording.draws)])
        for node in operators:
            if not self._varying.isdisjoint(node.all_input_nodes):
                self._varying.add(node)
        self._stages: list[_Stage] = []
        done: set[fx.Node] = set(self._inputs)
        entries = recording.entries()
        needs = [_ancestors(nodes) for nodes, _ in entries]
        for index, (outputs, structure) in enumerate(entries):
            own = [node for node in operators if node in needs[index] and node not in done]
            done |= set(own)
            later = set[fx.Node]().union(*needs[index + 1 :]) - done
            wanted = {*outputs}.union(*(nodes for nodes, _ in entries[index + 1 :]))
            kept = [n for n in own if n in wanted or not later.isdisjoint(n.users)]
            self._stages.append(_Stage(own, kept, outputs, structure))

    @property
    def num_operators(self) -> int:
        """Number of operators of all stages."""
        return self._recording.num_operators

    def start(self) -> Run:
        """A run, before its first stage."""
        return Run(self._recording, self._inputs, self._stages, self._varying)


class _Stage:
    """Nodes that are computed together.

    Args:
        nodes: The nodes, in order.
        kept: Those whose values are needed afterwards.
        outputs: Nodes of the stage's entry of the result.
        structure: Structure of that entry.
    """

    def __init__(
        self,
        nodes: Sequence[fx.Node],
        kept: Sequence[fx.Node],
        outputs: Sequence[fx.Node],
        structure: Structure,
    ) -> None:
        own = set(nodes)
        given = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in own)
        self.given, self.kept, self.outputs = list(given), list(kept), list(outputs)
        self.drawn = {node for node in given if node.op == "placeholder"}
        self.structure = structure
        graph = fx.Graph()
        copied = {node: graph.placeholder(node.name) for node in self.given}
        for node, copy in copied.items():
            copy.meta["like"] = node.meta.get("like")
        for node in nodes:
            copied[node] = graph.node_copy(node, copied.__getitem__)
        graph.output(tuple(copied[node] for node in self.kept))
        self.run = with_plain_targets(graph)


class Run:
    """Values of a graph, stage by stage."""

    def __init__(
        self,
        recording: Recording,
        inputs: Sequence[fx.Node],
        stages: Sequence[_Stage],
        varying: set[fx.Node],
    ) -> None:
        self._recording = recording
        self._inputs = inputs
        self._stages = stages
        self._varying = varying
        self._next = 0
        self._values: dict[fx.Node, Tensor] = {}
        self._versions = [x._version for x in recording.closure]

    def copy(self) -> Run:
        """A run that goes on from the same values."""
        other = Run(self._recording, self._inputs, self._stages, self._varying)
        other._values, other._versions = dict(self._values), self._versions
        other._next = self._next
        return other

    def take(self, ancestors: Tensor) -> bool:
        """Goes on with other particles in the places of those that were there.

        The inputs of the stages to come must be theirs.

        Args:
            ancestors: Whom each particle comes from, `(K, *population)`.

        Returns:
            Whether all values are by particle and cell, in this order, so that it could be done.
        """
        later = self._stages[self._next :]
        needed = {n for stage in later for n in (*stage.given, *stage.outputs)} & self._varying
        kept = [n for n in self._values if n.op != "placeholder" and n in needed]
        taken = {node: _taken(self._values[node], ancestors) for node in kept}
        self._values.update((node, value) for node, value in taken.items() if value is not None)
        return None not in taken.values()

    @property
    def is_current(self) -> bool:
        """Whether the tensors of the closure are what they were when the run began."""
        return self._versions == [x._version for x in self._recording.closure]

    def stage(self, index: int, leaves: Sequence[Tensor]) -> Any:
        """The entry of a stage, after those before it.

        Args:
            index: Number of the stage.
            leaves: Leaves of the recorded function's arguments.
        """
        stage, recording = self._stages[index], self._recording
        self._next = index + 1
        values, first = self._values, len(leaves) + len(recording.closure)
        with torch.no_grad():
            values.update(zip(self._inputs, (*leaves, *recording.closure), strict=False))
            for node, (draw, like) in zip(self._inputs[first:], recording.draws, strict=True):
                if node in stage.drawn and node not in values:
                    values[node] = draw(like.empty())
            results = stage.run(*(values[node] for node in stage.given))
        values.update(zip(stage.kept, results, strict=True))
        return unflatten([values[n] for n in stage.outputs], stage.structure)


def _taken(value: Tensor, ancestors: Tensor) -> Tensor | None:
    """A value of other particles; None if its first axes are not those of particles and cells."""
    shape, rows = tuple(ancestors.shape), ancestors.numel()
    axes = tuple(range(1, len(shape)))
    if value.shape[: len(shape)] == shape:
        return take_particles(value, ancestors, axes)
    if value.shape[:1] == (rows,):
        by_cell = value.unflatten(0, shape)
        return take_particles(by_cell, ancestors, axes).flatten(0, len(axes))
    return None


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes and all that they are computed from."""
    found, stack = set[fx.Node](), list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found
