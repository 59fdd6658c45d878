"""Learning rules: what moves when.

    Backpropagation               nothing but the weights, on the loss of a forward pass
    InferenceLearning             T steps of all values, then one of all weights
    IncrementalInferenceLearning  steps of all weights in between
    ZeroDivergenceLearning        node after node from the output down: equals backpropagation
    EquilibriumPropagation        the difference of two relaxations, without and with a nudge

All but the last are schedules of phases, of which each evaluates the energy once and moves some
values and some weights on its gradient.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from dcpc.errors import DataError, OptionError
from dcpc.networks.network import Cost, EnergyNetwork, PredictiveCodingNetwork
from dcpc.networks.nodes import CrossEntropyNode
from dcpc.networks.relaxation import (
    OptimizerFactory,
    Phase,
    Relaxation,
    RelaxationError,
    constant_drive,
    move,
    relax,
    sgd,
)

__all__ = [
    "COSTS",
    "Backpropagation",
    "EquilibriumPropagation",
    "IncrementalInferenceLearning",
    "InferenceLearning",
    "Learned",
    "LearningRule",
    "ZeroDivergenceLearning",
]


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """`- y . log_softmax(u)` per sample, of class probabilities or a one-hot label `y`."""
    return F.cross_entropy(output, target, reduction="none")


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """`|u - y|^2 / 2` per sample."""
    return 0.5 * (output - target).square().flatten(1).sum(1)


GRADIENT_DESCENT = sgd(0.1)
UNIT_STEP = sgd(1.0)

COSTS: dict[str, Cost] = {"cross_entropy": cross_entropy, "squared_error": squared_error}


@dataclass(frozen=True)
class Learned:
    """What a batch did.

    Attributes:
        energy: Mean energy over the samples before every phase, `(num_phases,)`.
        relaxations: Of equilibrium propagation: free, then nudged.
    """

    energy: Tensor
    relaxations: tuple[Relaxation, ...] = ()


class LearningRule(ABC):
    """How a network learns from a batch, and how it predicts."""

    def learn(self, network: EnergyNetwork, x: Tensor, y: Tensor, optimizer: Optimizer) -> Learned:
        """Steps the weights on a batch, and leaves the network without values.

        Args:
            network: The network.
            x: Data of the input, `(batch, ...)`.
            y: Data of the output, `(batch, ...)`; one-hot labels, to classify.
            optimizer: Of the weights. Gradients that they have already are forgotten.

        Raises:
            RelaxationError: The energy became NaN or infinite.
            DataError: Data of the wrong shape or type.
            OptionError: A network that the rule cannot train.
        """
        self.check(network)
        _check_target(network, x, y)
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
        """The output `(batch, ...)` for data of the input."""


class FeedForwardRule(LearningRule):
    """Base class: the prediction is a forward pass."""

    def predict(self, network: EnergyNetwork, x: Tensor) -> Tensor:
        self.check(network)
        return network(x)

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

    @abstractmethod
    def phases(self, num_stages: int) -> Iterator[Phase]:
        """What moves when, in a network of L stages."""

    def _learn(self, network: EnergyNetwork, x: Tensor, y: Tensor, optimizer: Optimizer) -> Learned:
        try:
            network.init(x)
            network.nodes[-1].clamp(y)
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
        value_optimizer: Makes their optimiser, anew for every batch.

    Raises:
        OptionError: A negative number of steps.
    """

    num_steps: int = 20
    value_optimizer: OptimizerFactory = GRADIENT_DESCENT

    def __post_init__(self) -> None:
        _require("num_steps", self.num_steps, at_least=0)

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
        value_optimizer: Makes the values' optimiser, anew for every batch.

    Raises:
        OptionError: A number out of range, so that the weights would never move.
    """

    num_steps: int = 20
    first: int = 0
    every: int = 1
    value_optimizer: OptimizerFactory = GRADIENT_DESCENT

    def __post_init__(self) -> None:
        _require("num_steps", self.num_steps, at_least=1)
        _require("first", self.first, at_least=0)
        _require("every", self.every, at_least=1)
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
    NeurIPS 2020. Equal to backpropagation where hidden nodes have squared-error energies.
    """

    value_optimizer: OptimizerFactory = field(default=UNIT_STEP, init=False)

    def phases(self, num_stages: int) -> Iterator[Phase]:
        for stage in range(num_stages, 0, -1):
            yield Phase(values=[stage - 1], weights=[stage])


@dataclass(frozen=True)
class Backpropagation(FeedForwardRule):
    """The gradient of the output's energy after a forward pass: what the others approximate."""

    def _learn(self, network: EnergyNetwork, x: Tensor, y: Tensor, optimizer: Optimizer) -> Learned:
        loss = network.nodes[-1].energy(y, network(x)).mean()
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


@dataclass(frozen=True)
class EquilibriumPropagation(LearningRule):
    """Contrasts the energy's gradient at two equilibria, of which one is nudged to the target.

        [dE/dw at beta - dE/dw at 0] / beta
        [dE/dw at beta - dE/dw at -beta] / 2 beta, symmetric

    It tends to the gradient of the cost at the free equilibrium as beta does to zero. Scellier &
    Bengio, "Equilibrium propagation" (2017), theorem 1; symmetric: Laborieux et al. (2021).

    Args:
        cost: Of the output, one of `COSTS`.
        beta: Strength of the nudge; the cost must not be linear in the output, as the energy of a
            `CrossEntropyNode` is: there is no equilibrium then.
        symmetric: Whether to nudge both ways, which cancels the bias of order beta.
        free_steps: Steps to the free equilibrium; none where the first values are at it, as those
            of `ConditionalGaussian` are.
        nudged_steps: Steps from there to a nudged one.
        value_optimizer: Makes the values' optimiser; plain descent of step size `dt / tau`. With
            `|W|` the largest singular value of all weights, and slopes of the nonlinearity up to
            one, the Gaussian is stable below `2 / (2 (1 + |W|)^2 + beta)`.
        tolerance: Stops relaxing after a step that changed no value by more than this.

    Raises:
        OptionError: An unknown cost, no strength, or a number out of range.
    """

    cost: str = "cross_entropy"
    beta: float = 1.0
    symmetric: bool = False
    free_steps: int = 20
    nudged_steps: int = 20
    value_optimizer: OptimizerFactory = GRADIENT_DESCENT
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        _require("free_steps", self.free_steps, at_least=0)
        _require("nudged_steps", self.nudged_steps, at_least=1)
        if self.cost not in COSTS:
            raise OptionError(f"cost must be one of {sorted(COSTS)}, got {self.cost!r}")
        if self.beta == 0.0 or not math.isfinite(self.beta):
            raise OptionError(
                f"beta must be finite and not 0, or the nudge does nothing, got {self.beta}"
            )

    def check(self, network: EnergyNetwork) -> None:
        super().check(network)
        if isinstance(network.nodes[-1], CrossEntropyNode):
            raise OptionError(
                "the energy of a CrossEntropyNode is linear in its value, so that a free output "
                "has no equilibrium; end the network with a SquaredErrorNode, and give the rule "
                "cost='cross_entropy'"
            )

    def _learn(self, network: EnergyNetwork, x: Tensor, y: Tensor, optimizer: Optimizer) -> Learned:
        weights = network.weights()
        relaxations = self.gradients(network, x, y)
        optimizer.step()
        for parameter in weights:
            parameter.grad = None
        return Learned(torch.cat([r.energy for r in relaxations]), relaxations)

    def gradients(self, network: EnergyNetwork, x: Tensor, y: Tensor) -> tuple[Relaxation, ...]:
        """Sets the weights' `.grad`, and leaves the network without values.

        Returns:
            The free relaxation and the nudged ones.

        Raises:
            RelaxationError, DataError, OptionError: As `learn`.
        """
        self.check(network)
        _check_target(network, x, y)
        try:
            network.init(x)
            relaxations = [self._relax(network, self.free_steps)]
            free = [(node, node.value.detach().clone()) for node in network.free_nodes()]
            slopes = [] if self.symmetric else [_weight_gradients(network)]
            for strength in (self.beta, -self.beta)[: 1 + self.symmetric]:
                for node, value in free:
                    node.init(value)
                network.nudge(COSTS[self.cost], y, strength)
                relaxations.append(self._relax(network, self.nudged_steps))
                network.release()
                slopes.append(_weight_gradients(network))
        finally:
            network.reset()
        first, second = (slopes[1], slopes[0]) if self.symmetric else (slopes[0], slopes[1])
        distance = 2.0 * self.beta if self.symmetric else self.beta
        for parameter, low, high in zip(network.weights(), first, second, strict=True):
            parameter.grad = (high - low) / distance
        return tuple(relaxations)

    def _relax(self, network: EnergyNetwork, num_steps: int) -> Relaxation:
        return relax(network, num_steps, self.value_optimizer, self.tolerance)

    def predict(self, network: EnergyNetwork, x: Tensor) -> Tensor:
        self.check(network)
        try:
            network.init(x)
            self._relax(network, self.free_steps)
            return network.nodes[-1].value.detach().clone()
        finally:
            network.reset()


def _weight_gradients(network: EnergyNetwork) -> Sequence[Tensor]:
    """Gradients of the mean energy, without the nudge's cost, in all weights."""
    weights = network.weights()
    gradients = torch.autograd.grad(network.energy().mean(), weights, allow_unused=True)
    return [
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(weights, gradients, strict=True)
    ]


def _check_target(network: EnergyNetwork, x: Tensor, y: Tensor) -> None:
    if not y.is_floating_point():
        raise DataError(
            f"targets must be floating-point values of the output, got {y.dtype}; of class labels, "
            "make F.one_hot(labels, num_classes).float()"
        )
    if len(y) != len(x):
        raise DataError(f"there are {len(y)} targets, but {len(x)} data of the input")
    network.nodes[-1].check(y)


def _require(name: str, value: int, at_least: int) -> None:
    if value < at_least:
        raise OptionError(f"{name} must be at least {at_least}, got {value}")
