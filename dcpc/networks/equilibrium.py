"""Equilibrium propagation: the difference of two relaxations, without and with a nudge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from dcpc.errors import OptionError, require_at_least
from dcpc.networks.network import Cost, EnergyNetwork
from dcpc.networks.nodes import CrossEntropyNode, cross_entropy, squared_error
from dcpc.networks.relaxation import (
    OptimizerFactory,
    Relaxation,
    finite_energy,
    relax,
    require_separate_steps,
    sgd,
)
from dcpc.networks.rules import Learned, LearningRule, check_target, require_same_shape

__all__ = ["COSTS", "EquilibriumPropagation"]

GRADIENT_DESCENT = sgd(0.1)

COSTS: dict[str, Cost] = {"cross_entropy": cross_entropy, "squared_error": squared_error}


@dataclass(frozen=True)
class EquilibriumPropagation(LearningRule):
    """Contrasts the energy's gradient at two equilibria, of which one is nudged to the target.

        [dE/dw at beta - dE/dw at 0] / beta
        [dE/dw at beta - dE/dw at -beta] / 2 beta, symmetric

    It tends to the gradient of the cost at the free equilibrium as beta does to zero. Scellier &
    Bengio, "Equilibrium propagation" (2017), theorem 1; symmetric: Laborieux et al. (2021).

    Args:
        cost: Cost of the output, one of `COSTS`.
        beta: Strength of the nudge; the cost must not be linear in the output, as the energy of a
            `CrossEntropyNode` is: there is no equilibrium then.
        symmetric: Whether to nudge both ways, which cancels the bias of order beta.
        free_steps: Steps to the free equilibrium; none where the first values are at it, as those
            of `ConditionalGaussian` are.
        nudged_steps: Steps from there to a nudged one.
        value_optimizer: Makes the values' optimiser; plain descent of step size `dt / tau`. With
            `|W|` the largest singular value of all weights, and slopes of the nonlinearity up to
            one, the Gaussian is stable below `2 / (2 (1 + |W|)^2 + beta)`.
        tolerance: Stops relaxing after a step that changed no value of any sample by more than
            this.

    Raises:
        OptionError: An unknown cost, no strength, a number out of range, or an optimiser that mixes
            samples.
    """

    cost: str = "cross_entropy"
    beta: float = 1.0
    symmetric: bool = False
    free_steps: int = 20
    nudged_steps: int = 20
    value_optimizer: OptimizerFactory = GRADIENT_DESCENT
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        require_separate_steps(self.value_optimizer)
        require_at_least("free_steps", self.free_steps, 0)
        require_at_least("nudged_steps", self.nudged_steps, 1)
        if not self.tolerance >= 0.0:
            raise OptionError(f"tolerance must be at least 0, got {self.tolerance}")
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
        relaxations = self._contrast(network, x, y)
        optimizer.step()
        for parameter in network.weights():
            parameter.grad = None
        return Learned(torch.cat([r.energy for r in relaxations]), relaxations)

    @torch.enable_grad()
    def gradients(self, network: EnergyNetwork, x: Tensor, y: Tensor) -> tuple[Relaxation, ...]:
        """Sets the weights' `.grad`, and leaves the network without values.

        Returns:
            The free relaxation and the nudged ones.

        Raises:
            RelaxationError, DataError, OptionError: As `learn`.
        """
        self.check(network)
        check_target(network, x, y)
        return self._contrast(network, x, y)

    def _contrast(self, network: EnergyNetwork, x: Tensor, y: Tensor) -> tuple[Relaxation, ...]:
        """Sets the weights' `.grad` to the difference of slopes at two equilibria."""
        try:
            network.init(x)
            output = network.nodes[-1].value
            require_same_shape(y, output)
            relaxations = [self._relax(network, self.free_steps)]
            free = [(node, node.value.detach().clone()) for node in network.free_nodes()]
            slopes = {} if self.symmetric else {0.0: _weight_gradients(network)}
            for strength in (self.beta, -self.beta)[: 1 + self.symmetric]:
                for node, value in free:
                    node.init(value)
                network.nudge(COSTS[self.cost], y.to(output), strength)
                relaxations.append(self._relax(network, self.nudged_steps))
                slopes[strength] = _weight_gradients(network)
        finally:
            network.reset()
        start = -self.beta if self.symmetric else 0.0
        pairs = zip(slopes[self.beta], slopes[start], strict=True)
        for parameter, (nudged, other) in zip(network.weights(), pairs, strict=True):
            parameter.grad = (nudged - other) / (self.beta - start)
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
    """Gradients of the mean energy in all weights; the cost of a nudge has none."""
    weights = network.weights()
    energy = finite_energy(network, "at the end")
    gradients = torch.autograd.grad(energy.mean(), weights, allow_unused=True)
    return [
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(weights, gradients, strict=True)
    ]
