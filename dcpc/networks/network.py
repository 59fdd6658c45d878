"""Networks: an energy of values and weights.

Nodes `0, 1, ..., L` hold the values; node 0 is the input, node L the output. Stage `l` is what
stands between the nodes `l - 1` and `l`, and owns the weights there. Inference relaxes the values
on the energy, learning steps the weights on it.
"""

from __future__ import annotations

import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dcpc.errors import OptionError
from dcpc.networks.nodes import FloatingNode, Node
from dcpc.networks.parameters import partition

__all__ = ["Cost", "EnergyNetwork", "PredictiveCodingNetwork"]

Cost = Callable[[Tensor, Tensor], Tensor]
"""Cost per sample `(batch,)` of the output's value `(batch, *shape)`, given targets."""


class EnergyNetwork(nn.Module, ABC):
    """Base class: values, weights, and their energy per sample."""

    def __init__(self) -> None:
        super().__init__()
        self._nudge: tuple[Cost, Tensor, float] | None = None

    @property
    @abstractmethod
    def nodes(self) -> list[Node]:
        """From the input to the output."""

    @property
    def num_stages(self) -> int:
        """L, how many nodes there are beside the input."""
        return len(self.nodes) - 1

    @abstractmethod
    def drive(self) -> Tensor:
        """Output of stage 1's layers for the input, `(batch, ...)`, as a constant.

        A clamped input drives the network by the same amount at every step of the other values,
        and the first weights are often the largest.
        """

    @abstractmethod
    def energies(self, drive: Tensor | None = None) -> Mapping[str, Tensor]:
        """The energy by its parts, each `(batch,)`; the parts are named after layers or nodes.

        Args:
            drive: Taken for what stage 1 makes of the input, where it is known.
        """

    @abstractmethod
    def init(self, x: Tensor) -> None:
        """Clamps the input to data `(batch, ...)`, and gives the other nodes first values.

        The values have the device and the precision of the weights, whatever those of the data.
        """

    @abstractmethod
    def stage_weights(self, stage: int) -> list[nn.Parameter]:
        """The weights of stage 1 to L."""

    def like_weights(self, x: Tensor) -> Tensor:
        """Data on the device and in the precision of the weights; integers stay integers."""
        stages = range(1, self.num_stages + 1)
        weight = next((p for stage in stages for p in self.stage_weights(stage)), x)
        return x.to(weight) if x.is_floating_point() else x.to(weight.device)

    def energy(self) -> Tensor:
        """The energy at the present values, `(batch,)`; with the nudge's cost if there is one."""
        return sum_parts(self.all_energies())

    def all_energies(self, drive: Tensor | None = None) -> Mapping[str, Tensor]:
        """The parts of the energy, and `cost` while the output is nudged."""
        parts = dict(self.energies(drive))
        if self._nudge is not None:
            cost, target, strength = self._nudge
            parts["cost"] = strength * cost(self.nodes[-1].value, target)
        return parts

    def nudge(self, cost: Cost, target: Tensor, strength: float) -> None:
        """Adds `strength * cost(output, target)` to the energy, until `remove_nudge`.

        Scellier & Bengio, "Equilibrium propagation" (2017), equation 3.
        """
        self._nudge = (cost, target, strength)

    def remove_nudge(self) -> None:
        """Takes the nudge's cost out of the energy."""
        self._nudge = None

    def reset(self) -> None:
        """Empties all values: nothing of a batch is left."""
        self.remove_nudge()
        for node in self.nodes:
            node.reset()

    def free_nodes(self, selection: Sequence[int] | None = None) -> list[Node]:
        """The nodes that relaxation moves, of some or of all."""
        nodes = self.nodes
        chosen = nodes if selection is None else [nodes[index] for index in selection]
        return [node for node in chosen if node.is_free]

    def weights(self, stages: Sequence[int] | None = None) -> list[nn.Parameter]:
        """The weights that learn, of some stages or of all; shared ones once."""
        stages = range(1, self.num_stages + 1) if stages is None else stages
        unique = {id(p): p for stage in stages for p in self.stage_weights(stage)}
        return [parameter for parameter in unique.values() if parameter.requires_grad]


class Stage(NamedTuple):
    """Stage of a network: the layers between two nodes, and the second of them.

    Attributes:
        name: Name of the node within the network.
        layers: From the value before to the prediction.
        node: Whose value is predicted.
    """

    name: str
    layers: list[nn.Module]
    node: Node

    def predict(self, value: Tensor) -> Tensor:
        """The prediction of the node, from the value of the node before."""
        return functools.reduce(lambda hidden, layer: layer(hidden), self.layers, value)


class PredictiveCodingNetwork(EnergyNetwork):
    """A feed-forward network with nodes between its layers.

        F = sum_l e_l(z_l, u_l),   u_l = f_l(z_{l-1}),   z_0 = x

    `f_l` are the layers between two nodes. Called on data, it is the plain feed-forward network.
    Layers are evaluated at every step of a relaxation, but for those in front of node 1 where the
    input is clamped: those that are random, or that mix the samples of a batch, as dropout and
    batch normalisation do, make a moving target of the energy.

    Args:
        *modules: Layers and nodes, in order; the last one is a node. A layer may occur twice.
        input_node: Node 0, of no energy; by default a `FloatingNode`.

    Raises:
        OptionError: There is no node, a layer behind the last one, a node that occurs twice, or an
            input that has an energy.
    """

    def __init__(self, *modules: nn.Module, input_node: Node | None = None) -> None:
        super().__init__()
        if not modules or not isinstance(modules[-1], Node):
            what = "no modules" if not modules else f"{type(modules[-1]).__name__} last"
            raise OptionError(
                f"a network must end with a node, whose value is the output, got {what}; append "
                "SquaredErrorNode(size) or CrossEntropyNode(size)"
            )
        nodes = [module for module in modules if isinstance(module, Node)]
        if len({*map(id, nodes)}) < len(nodes):
            raise OptionError(
                "a node occurs twice, but has one value; make one node per place, and let layers "
                "occur twice to share weights"
            )
        if input_node is not None and not isinstance(input_node, FloatingNode):
            raise OptionError(
                f"the input has no prediction, and so no energy: input_node must be a FloatingNode "
                f"or a FixedNode, got {type(input_node).__name__}"
            )
        self.input: Node = FloatingNode() if input_node is None else input_node
        self.layers = nn.ModuleList(modules)

    @property
    def stages(self) -> list[Stage]:
        """Stages 1 to L."""
        stages: list[Stage] = []
        layers: list[nn.Module] = []
        for index, module in enumerate(self.layers):
            if isinstance(module, Node):
                stages.append(Stage(f"layers.{index}", layers, module))
                layers = []
            else:
                layers.append(module)
        return stages

    @property
    def nodes(self) -> list[Node]:
        """From the input to the output."""
        return [self.input, *(stage.node for stage in self.stages)]

    def forward(self, x: Tensor) -> Tensor:
        """The feed-forward prediction of the output, `(batch, *shape)`; ignores all values."""
        for stage in self.stages:
            x = stage.predict(x)
        return x

    @torch.no_grad()
    def init(self, x: Tensor) -> None:
        """Clamps the input, and sets every node to its prediction, from the input to the output."""
        self.input.clamp(self.like_weights(x))
        before: Node = self.input
        for stage in self.stages:
            stage.node.init(stage.predict(before.value))
            before = stage.node

    @torch.no_grad()
    def drive(self) -> Tensor:
        """Output of stage 1's layers for the input, `(batch, ...)`, as a constant."""
        return self.stages[0].predict(self.input.value)

    def energies(self, drive: Tensor | None = None) -> dict[str, Tensor]:
        """The energy of every node, `(batch,)`."""
        before: Node = self.input
        parts = {}
        for stage in self.stages:
            known = drive if before is self.input else None
            prediction = stage.predict(before.value) if known is None else known
            parts[stage.name] = stage.node.energy(stage.node.value, prediction)
            before = stage.node
        return parts

    def stage_weights(self, stage: int) -> list[nn.Parameter]:
        """The weights of stage 1 to L, those of its node among them."""
        _, layers, node = self.stages[stage - 1]
        return [weight for part in (*layers, node) for weight in partition(part).weights.values()]


def sum_parts(parts: Mapping[str, Tensor]) -> Tensor:
    """The whole energy, `(batch,)`."""
    return functools.reduce(operator.add, parts.values())
