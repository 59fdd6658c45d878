"""Learning rules: what moves when.

    Backpropagation               nothing but the weights, on the loss of a forward pass
    InferenceLearning             T steps of all values, then one of all weights
    IncrementalInferenceLearning  steps of all weights in between
    ZeroDivergenceLearning        node after node from the output down: equals backpropagation

All but the first are schedules of phases, of which each evaluates the energy once and moves some
values and some weights on its gradient. `EquilibriumPropagation`, in `equilibrium`, contrasts two
relaxations.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from dcpc.errors import DataError, OptionError, require_at_least
from dcpc.networks.network import EnergyNetwork, PredictiveCodingNetwork
from dcpc.networks.relaxation import (
    OptimizerFactory,
    Phase,
    Relaxation,
    RelaxationError,
    constant_drive,
    move,
    require_separate_steps,
    sgd,
)

__all__ = [
    "Backpropagation",
    "IncrementalInferenceLearning",
    "InferenceLearning",
    "Learned",
    "LearningRule",
    "ScheduledLearning",
    "ZeroDivergenceLearning",
]


GRADIENT_DESCENT = sgd(0.1)
UNIT_STEP = sgd(1.0)


@dataclass(frozen=True)
class Learned:
    """Result of learning from a batch.

    Attributes:
        energy: Mean energy over the samples before every phase, `(num_phases,)`.
        relaxations: Relaxations of equilibrium propagation: free, then nudged.
    """

    energy: Tensor
    relaxations: tuple[Relaxation, ...] = ()


class LearningRule(ABC):
    """Learning rule: how a network learns from a batch, and how it predicts."""

    @torch.enable_grad()
    def learn(self, network: EnergyNetwork, x: Tensor, y: Tensor, optimizer: Optimizer) -> Learned:
        """Steps the weights on a batch, and leaves the network without values.

        Args:
            network: The network.
            x: Data of the input, `(batch, ...)`.
            y: Data of the output, `(batch, ...)`; one-hot labels, to classify.
            optimizer: Optimizer of the weights, whose gradients are reset.

        Raises:
            RelaxationError: The energy became NaN or infinite.
            DataError: Data of the wrong shape or type.
            OptionError: A network that the rule cannot train.
        """
        self.check(network)
        check_target(network, x, y)
        optimizer.zero_grad()
        return self._learn(network, x, y, optimizer)

    def check(self, network: EnergyNetwork) -> None:
        """Refuses a network that the rule cannot train.

        Raises:
            OptionError: It is one.
        """
        if not isinstance(network, EnergyNetwork):
            raise OptionError(
                f"{type(self).__name__} trains an EnergyNetwork, got {type(network).__name__}; put "
                "nodes between its layers: PredictiveCodingNetwork(layer, node, layer, node)"
            )

    @abstractmethod
    def _learn(
        self, network: EnergyNetwork, x: Tensor, y: Tensor, optimizer: Optimizer
    ) -> Learned: ...

    @abstractmethod
    def predict(self, network: EnergyNetwork, x: Tensor) -> Tensor:
        """The output `(batch, ...)` for data of the input, as a constant."""


class FeedForwardRule(LearningRule):
    """Base class: the prediction is a forward pass."""

    def predict(self, network: EnergyNetwork, x: Tensor) -> Tensor:
        self.check(network)
        with torch.no_grad():
            return network(network.like_weights(x))

    def check(self, network: EnergyNetwork) -> None:
        super().check(network)
        if not isinstance(network, PredictiveCodingNetwork):
            raise OptionError(
                f"{type(self).__name__} trains a feed-forward network, a PredictiveCodingNetwork, "
                f"got {type(network).__name__}; train that by EquilibriumPropagation"
            )


class ScheduledLearning(FeedForwardRule):
    """Base class: input and output are clamped, then values and weights move in phases."""

    value_optimizer: OptimizerFactory

    def __post_init__(self) -> None:
        require_separate_steps(self.value_optimizer)

    @abstractmethod
    def phases(self, num_stages: int) -> Iterator[Phase]:
        """Phases of learning, in a network of L stages."""

    def _learn(self, network: EnergyNetwork, x: Tensor, y: Tensor, optimizer: Optimizer) -> Learned:
        try:
            network.init(x)
            output = network.nodes[-1]
            require_same_shape(y, output.value)
            output.clamp(y.to(output.value))
            values = [node.value for node in network.free_nodes()]
            value_optimizer = self.value_optimizer(values) if values else None
            energy, drive = [], None
            for step, phase in enumerate(self.phases(network.num_stages)):
                if drive is None or phase.weights:
                    drive = constant_drive(network, phase)
                energy.append(move(network, phase, step, value_optimizer, optimizer, drive))
        finally:
            network.reset()
        return Learned(torch.stack(energy))


@dataclass(frozen=True)
class InferenceLearning(ScheduledLearning):
    """Relaxes the values, then steps the weights: expectation maximisation on the energy.

    Whittington & Bogacz (2017), "An approximation of the error backpropagation algorithm in a
    predictive coding network with local Hebbian synaptic plasticity".

    Args:
        num_steps: T, steps of the values per batch.
        value_optimizer: Makes their optimiser, anew for every batch; one that works entry by entry.

    Raises:
        OptionError: A negative number of steps, or an optimiser that mixes samples.
    """

    num_steps: int = 20
    value_optimizer: OptimizerFactory = GRADIENT_DESCENT

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("num_steps", self.num_steps, 0)

    def phases(self, num_stages: int) -> Iterator[Phase]:
        for _ in range(self.num_steps):
            yield Phase(values=range(num_stages + 1))
        yield Phase(weights=range(1, num_stages + 1))


@dataclass(frozen=True)
class IncrementalInferenceLearning(ScheduledLearning):
    """Steps the weights while the values relax.

    After the step `t = 0, ..., T - 1` of the values, the weights take one if `t >= T0` and `t - T0`
    is a multiple of `Ti`. Salvatori et al., "A stable, fast, and fully automatic learning algorithm
    for predictive coding networks", ICLR 2024.

    Args:
        num_steps: T, steps of the values per batch.
        first: T0, the step after which the weights move first.
        every: Ti, steps from one move of the weights to the next.
        value_optimizer: Makes their optimiser, anew for every batch; one that works entry by entry.

    Raises:
        OptionError: A number out of range, so that the weights would never move, or an optimiser
            that mixes samples.
    """

    num_steps: int = 20
    first: int = 0
    every: int = 1
    value_optimizer: OptimizerFactory = GRADIENT_DESCENT

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("num_steps", self.num_steps, 1)
        require_at_least("first", self.first, 0)
        require_at_least("every", self.every, 1)
        if self.first >= self.num_steps:
            raise OptionError(
                f"first must be below num_steps, or the weights never move, got "
                f"first={self.first} and num_steps={self.num_steps}"
            )

    def phases(self, num_stages: int) -> Iterator[Phase]:
        for step in range(self.num_steps):
            yield Phase(values=range(num_stages + 1))
            if step >= self.first and (step - self.first) % self.every == 0:
                yield Phase(weights=range(1, num_stages + 1))


@dataclass(frozen=True)
class ZeroDivergenceLearning(ScheduledLearning):
    """Z-IL: from forward-initialised values, one node and one stage after the other.

    At step `t = 0, ..., L - 1`, stage `L - t` learns and node `L - t - 1` moves, by a step of size
    one, onto the gradient that backpropagation has there. Song et al., "Can the brain do
    backpropagation? Exact implementation of backpropagation in predictive coding networks",
    NeurIPS 2020. Equal to backpropagation where hidden nodes have squared-error energies and every
    stage has weights of its own: shared ones would have moved before the next stage learns.
    """

    value_optimizer: OptimizerFactory = field(default_factory=lambda: UNIT_STEP, init=False)

    def phases(self, num_stages: int) -> Iterator[Phase]:
        for stage in range(num_stages, 0, -1):
            yield Phase(values=[stage - 1], weights=[stage])


@dataclass(frozen=True)
class Backpropagation(FeedForwardRule):
    """The gradient of the output's energy after a forward pass: what the others approximate."""

    def _learn(self, network: EnergyNetwork, x: Tensor, y: Tensor, optimizer: Optimizer) -> Learned:
        output = network(network.like_weights(x))
        require_same_shape(y, output)
        loss = network.nodes[-1].energy(y.to(output), output).mean()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise RelaxationError(
                f"the loss is {value}; lower the learning rate, or look for NaN in the data and "
                "the weights"
            )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return Learned(loss.detach().unsqueeze(0))


def check_target(network: EnergyNetwork, x: Tensor, y: Tensor) -> None:
    """Refuses what cannot be the output's data.

    Raises:
        DataError: Targets of integers, of another number than the inputs, or of the wrong shape.
    """
    if not y.is_floating_point():
        raise DataError(
            f"targets must be floating-point values of the output, got {y.dtype}; of class labels, "
            "make F.one_hot(labels, num_classes).float()"
        )
    if len(y) != len(x):
        raise DataError(f"there are {len(y)} targets, but {len(x)} data of the input")
    network.nodes[-1].check(y)


def require_same_shape(y: Tensor, output: Tensor) -> None:
    """Refuses targets that would broadcast against the output.

    Raises:
        DataError: They are of another shape.
    """
    if y.shape != output.shape:
        raise DataError(
            f"the targets have shape {tuple(y.shape)}, but the network's output has "
            f"{tuple(output.shape)}"
        )
