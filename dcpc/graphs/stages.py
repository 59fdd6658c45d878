"""A recording that runs in stages, between which the caller does what no graph can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, fx

from dcpc.graphs.compiler import compile_nodes
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
        self.recording = recording
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
        self._carried = [self._carried_over(index) for index in range(len(entries))]

    @property
    def num_operators(self) -> int:
        """Number of operators of all stages."""
        return self.recording.num_operators

    def compiled(self, leaves: Sequence[Tensor]) -> Stages:
        """The same with every stage as compiled code.

        What a stage is given lies in memory as the compiled stages before it leave it.

        Args:
            leaves: Leaves of the recorded function's arguments.

        Raises:
            Exception: Whatever torch raises where it cannot compile.
        """
        other = copy(self)
        other._stages = [copy(stage) for stage in self._stages]
        run = other.start()
        for index, stage in enumerate(other._stages):
            stage.run = compile_nodes(
                stage.given, stage.nodes, stage.kept, run.given(index, leaves)
            )
            run.stage(index, leaves)
        return other

    def start(self) -> Run:
        """A run, before its first stage."""
        return Run(self.recording, self._inputs, self._stages, self._carried)

    def _carried_over(self, index: int) -> list[fx.Node]:
        """Values of particles that earlier stages compute, and this or a later one needs."""
        before, later = self._stages[:index], self._stages[index:]
        needed = {node for stage in later for node in (*stage.given, *stage.outputs)}
        kept = [node for stage in before for node in stage.kept]
        return [node for node in kept if node in needed and node in self._varying]


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
        self.nodes, self.given = list(nodes), list(given)
        self.kept, self.outputs = list(kept), list(outputs)
        self.drawn = {node for node in given if node.op == "placeholder"}
        self.structure = structure
        graph = fx.Graph()
        copied = {node: graph.placeholder(node.name) for node in self.given}
        for node in self.given:
            copied[node].meta["like"] = node.meta.get("like")
        for node in nodes:
            copied[node] = graph.node_copy(node, copied.__getitem__)
        graph.output(tuple(copied[node] for node in self.kept))
        self.run: Callable[..., Sequence[Tensor]] = with_plain_targets(graph)


class Run:
    """Values of a graph, stage by stage.

    Args:
        recording: The recording.
        inputs: Its inputs.
        stages: Its stages.
        carried: For every stage, what those before it have computed of particles for it and later
            ones.
    """

    def __init__(
        self,
        recording: Recording,
        inputs: Sequence[fx.Node],
        stages: Sequence[_Stage],
        carried: Sequence[Sequence[fx.Node]],
    ) -> None:
        self._recording = recording
        self._inputs = inputs
        self._stages = stages
        self._carried = carried
        self._next = 0
        self._values: dict[fx.Node, Tensor] = {}
        self._versions = [x._version for x in recording.closure]

    def copy(self) -> Run:
        """A run that goes on from the same values."""
        other = Run(self._recording, self._inputs, self._stages, self._carried)
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
        num_cells = ancestors[0].numel()
        cells = torch.arange(num_cells, device=ancestors.device)
        rows = (ancestors.reshape(-1, num_cells) * num_cells + cells).flatten()
        carried, shape = self._carried[self._next], tuple(ancestors.shape)
        taken = [_taken(self._values[node], shape, rows) for node in carried]
        self._values.update((n, x) for n, x in zip(carried, taken, strict=True) if x is not None)
        return all(value is not None for value in taken)

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
        stage, values = self._stages[index], self._values
        self._next = index + 1
        with torch.no_grad():
            results = stage.run(*self.given(index, leaves))
        values.update(zip(stage.kept, results, strict=True))
        return unflatten([values[n] for n in stage.outputs], stage.structure)

    def given(self, index: int, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Inputs of a stage; its random numbers are drawn once.

        Args:
            index: Number of the stage.
            leaves: Leaves of the recorded function's arguments.
        """
        stage, recording, values = self._stages[index], self._recording, self._values
        first = len(leaves) + len(recording.closure)
        values.update(zip(self._inputs, (*leaves, *recording.closure), strict=False))
        for node, (draw, like) in zip(self._inputs[first:], recording.draws, strict=True):
            if node in stage.drawn and node not in values:
                values[node] = draw(like.empty())
        return [values[node] for node in stage.given]


def _taken(value: Tensor, shape: tuple[int, ...], rows: Tensor) -> Tensor | None:
    """A value of other particles; None if its first axes are not those of particles and cells."""
    if value.shape[: len(shape)] == shape:
        by_row = value.reshape(len(rows), *value.shape[len(shape) :])
        return by_row.index_select(0, rows).view(value.shape)
    return value.index_select(0, rows) if value.shape[:1] == (len(rows),) else None


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes and all that they are computed from."""
    found, stack = set[fx.Node](), list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found
