"""Energy-based models of layers: the networks of equilibrium propagation.

Layer `i = 0, ..., n` has a state `u_i` of size `d_i`; `phi_0` is the identity, the other `phi_i`
are one nonlinearity. The input `u_0` is clamped. Scellier & Bengio (2017), section 2.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dcpc.errors import OptionError
from dcpc.networks.network import EnergyNetwork, PredictiveCodingNetwork
from dcpc.networks.nodes import FloatingNode, FunctionNode, Node, squared_error

__all__ = ["ACTIVATIONS", "ConditionalGaussian", "RestrictedHopfield", "activation_named"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "hard_sigmoid": nn.Hardsigmoid,
}


class ConditionalGaussian(PredictiveCodingNetwork):
    """Energy `E = sum_i |W_i phi_i(u_i) + b_i - u_{i+1}|^2`, without a half.

    A predictive coding network whose first values are a feed-forward pass, at which the energy
    and its gradients vanish. The output is a pre-activation.

    Args:
        sizes: `d_0, ..., d_n`.
        activation: Name of the nonlinearity, one of `ACTIVATIONS`.

    Raises:
        OptionError: Fewer than two sizes, one below 1, or an unknown activation.
    """

    def __init__(self, sizes: Sequence[int], activation: str = "sigmoid") -> None:
        require_sizes(sizes)
        phi = activation_named(activation)
        modules: list[nn.Module] = []
        for above, below in itertools.pairwise(sizes):
            modules += [phi()] if modules else []
            modules += [nn.Linear(above, below), FunctionNode(squared_norm, below)]
        super().__init__(*modules)


class RestrictedHopfield(EnergyNetwork):
    """Energy of symmetric connections between neighbouring layers.

        E = sum_i |u_i|^2 / 2 - sum_i phi(u_{i+1})' W_i phi_i(u_i) - sum_i b_i' phi(u_{i+1})

    The states start at zero. Hopfield (1984); Scellier & Bengio (2017), equation 1, with the
    connections restricted to neighbours.

    Args:
        sizes: `d_0, ..., d_n`.
        activation: Name of the nonlinearity, one of `ACTIVATIONS`.

    Raises:
        OptionError: Fewer than two sizes, one below 1, or an unknown activation.
    """

    def __init__(self, sizes: Sequence[int], activation: str = "sigmoid") -> None:
        super().__init__()
        require_sizes(sizes)
        self.phi = activation_named(activation)()
        self.states = nn.ModuleList(FloatingNode(size) for size in sizes)
        self.connections = nn.ModuleList(
            nn.Linear(above, below) for above, below in itertools.pairwise(sizes)
        )

    @property
    def nodes(self) -> list[Node]:
        """From the input to the output."""
        return [state for state in self.states if isinstance(state, Node)]

    @torch.no_grad()
    def init(self, x: Tensor) -> None:
        """Clamps the input, and sets all other states to zero."""
        x = self.like_weights(x)
        self.nodes[0].clamp(x)
        for node in self.nodes[1:]:
            node.init(x.new_zeros(len(x), *(size or 1 for size in node.shape)))

    @torch.no_grad()
    def drive(self) -> Tensor:
        """`W_0 u_0 + b_0`, `(batch, d_1)`, as a constant."""
        return self.connections[0](self.nodes[0].value)

    def energies(self, drive: Tensor | None = None) -> dict[str, Tensor]:
        """The energy of every state and of every connection, `(batch,)`."""
        parts = {
            f"states.{i}": 0.5 * node.value.square().sum(1) for i, node in enumerate(self.nodes)
        }
        active = [self.nodes[0].value, *(self.phi(node.value) for node in self.nodes[1:])]
        for i, connection in enumerate(self.connections):
            known = drive if i == 0 else None
            field = connection(active[i]) if known is None else known
            parts[f"connections.{i}"] = -(active[i + 1] * field).sum(1)
        return parts

    def stage_weights(self, stage: int) -> list[nn.Parameter]:
        """The connection to state 1 to n, with its bias."""
        return list(self.connections[stage - 1].parameters())


def squared_norm(value: Tensor, prediction: Tensor) -> Tensor:
    """`|z - u|^2` per sample."""
    return 2.0 * squared_error(value, prediction)


def activation_named(name: str) -> type[nn.Module]:
    """The class of a nonlinearity.

    Raises:
        OptionError: It is none of `ACTIVATIONS`.
    """
    if name not in ACTIVATIONS:
        raise OptionError(f"activation must be one of {sorted(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def require_sizes(sizes: Sequence[int]) -> None:
    """Checks the sizes of a network's layers.

    Raises:
        OptionError: Fewer than two, or one that is no positive integer.
    """
    if len(sizes) < 2 or any(not isinstance(size, int) or size < 1 for size in sizes):
        raise OptionError(f"sizes must hold at least two positive integers, got {list(sizes)}")
