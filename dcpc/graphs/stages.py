"""A recording that runs in stages, between which the caller does what no graph can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dcpc.graphs.recording import Recording
from dcpc.graphs.targets import with_plain_targets
from dcpc.graphs.trees import Structure, unflatten

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
        return Run(self._recording, self._inputs, self._stages)


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
        for node in nodes:
            copied[node] = graph.node_copy(node, copied.__getitem__)
        graph.output(tuple(copied[node] for node in self.kept))
        self.run = with_plain_targets(graph)


class Run:
    """Values of a graph, stage by stage."""

    def __init__(
        self, recording: Recording, inputs: Sequence[fx.Node], stages: Sequence[_Stage]
    ) -> None:
        self._recording = recording
        self._inputs = inputs
        self._stages = stages
        self._values: dict[fx.Node, Tensor] = {}
        self._versions = [x._version for x in recording.closure]

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
        values, first = self._values, len(leaves) + len(recording.closure)
        with torch.no_grad():
            values.update(zip(self._inputs, (*leaves, *recording.closure), strict=False))
            for node, (draw, like) in zip(self._inputs[first:], recording.draws, strict=True):
                if node in stage.drawn and node not in values:
                    values[node] = draw(like.empty())
            results = stage.run(*(values[node] for node in stage.given))
        values.update(zip(stage.kept, results, strict=True))
        return unflatten([values[n] for n in stage.outputs], stage.structure)


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes and all that they are computed from."""
    found, stack = set[fx.Node](), list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found
