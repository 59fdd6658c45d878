"""Nodes: the values of a network, each with the energy of its prediction error.

A node sits between layers. It has a prediction `u`, what the layers before it make of the node
before them, and a value `z`, which relaxation moves. Its energy per sample:

    GaussianNode               of a covariance; see `gaussian_nodes`
    CrossEntropyNode           - z . log_softmax(u)
    FloatingNode, FixedNode    0
    FunctionNode               the user's own
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from dcpc.errors import DataError, OptionError
from dcpc.networks.parameters import eparameters, mparameters

__all__ = [
    "Bias",
    "CrossEntropyNode",
    "FixedNode",
    "FloatingNode",
    "FunctionNode",
    "Node",
]


@eparameters("value")
class Node(nn.Module, ABC):
    """A value per sample and its energy.

    The value is no part of `state_dict()`: it belongs to a batch, and any batch size will do.

    Args:
        *shape: Shape of one sample's value; None in the place of an axis of any size. Without any,
            values of any shape are accepted.

    Attributes:
        value: `(batch, *shape)`; empty before it is set, and after `reset`.
        is_clamped: Whether the value was given, as data are, and stays until released.
        is_frozen: Whether relaxation leaves the value where it is, for this batch and all others.

    Raises:
        OptionError: A size is no positive integer.
    """

    value: nn.Parameter

    def __init__(self, *shape: int | None) -> None:
        super().__init__()
        if any(size is not None and (not isinstance(size, int) or size < 1) for size in shape):
            raise OptionError(f"a node's shape must hold positive integers or None, got {shape}")
        self.shape = shape
        self.is_clamped = False
        self.is_frozen = False
        self._make_value()

    def _make_value(self) -> None:
        self.value = nn.Parameter(torch.empty(0))

    @abstractmethod
    def energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        """Energy per sample, `(batch,)`, of a value `(batch, *shape)` given its prediction."""

    @property
    def has_value(self) -> bool:
        """Whether the value is set."""
        return self.value.numel() > 0

    @property
    def is_free(self) -> bool:
        """Whether relaxation moves the value."""
        return self.has_value and not (self.is_clamped or self.is_frozen)

    @torch.no_grad()
    def init(self, value: Tensor) -> None:
        """Sets the value to a copy, unless it is clamped.

        Raises:
            DataError: It is not of shape `(batch, *shape)`, empty, or of integers that would move.
        """
        self.check(value)
        if not self.is_clamped:
            self._set(value)

    def clamp(self, value: Tensor) -> None:
        """Sets the value and keeps it there until `release` or `reset`.

        Raises:
            DataError: As `init`; the node is then left as it was.
        """
        self.check(value)
        self._set(value)
        self.is_clamped = True

    def release(self) -> None:
        """Lets a clamped value move again, from where it is."""
        self.is_clamped = False

    def reset(self) -> None:
        """Empties and releases the value."""
        self.is_clamped = False
        self.value.data = self.value.data.new_empty(0)
        self.value.grad = None

    def check(self, value: Tensor) -> None:
        """Refuses what cannot be a value of this node.

        Raises:
            DataError: It is not of shape `(batch, *shape)`, empty, or of integers that would move.
        """
        sizes = tuple(value.shape[1:])
        fits = not self.shape or (
            len(sizes) == len(self.shape)
            and all(want in (None, got) for want, got in zip(self.shape, sizes, strict=True))
        )
        if value.dim() < 1 or not fits:
            expected = ", ".join("any" if size is None else str(size) for size in self.shape)
            raise DataError(
                f"{type(self).__name__} expected a value of shape (batch, {expected or '...'}), "
                f"got {tuple(value.shape)}; check the sizes of the layers around the node"
            )
        if value.numel() == 0:
            raise DataError(f"a batch must hold at least one sample, got {tuple(value.shape)}")
        if self.value.requires_grad and not value.is_floating_point():
            raise DataError(
                f"a value that relaxation may move must be floating-point, got {value.dtype}; for "
                "an input of integers give the network input_node=FixedNode()"
            )

    def _set(self, value: Tensor) -> None:
        # The parameter stays the same one: an optimiser may hold it.
        self.value.data = value.detach().clone()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}value", None)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list, *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if f"{prefix}value" in missing:
            missing.remove(f"{prefix}value")

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.shape))


class FloatingNode(Node):
    """A node without energy: an input that relaxation may complete, once it is released."""

    def energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        return value.new_zeros(len(value))


class FixedNode(FloatingNode):
    """An input that never moves: its value is a buffer and no parameter."""

    def _make_value(self) -> None:
        self.register_buffer("value", torch.empty(0), persistent=False)

    @property
    def is_free(self) -> bool:
        return False


@mparameters("bias")
class Bias(nn.Module):
    """A layer in the place of an input, for networks that only have outputs: a learned vector.

    Args:
        *shape: Shape of the vector.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        """The bias once per row of `x`, `(batch, *shape)`."""
        return self.bias.expand(len(x), *self.bias.shape)


class CrossEntropyNode(Node):
    """Energy `- z . log_softmax(u)`, of class probabilities or a one-hot label `z`."""

    def energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        return cross_entropy(prediction, value)

    def distribution(self, prediction: Tensor) -> TorchDistribution:
        """Node of one-hot labels, whose log-probability is minus the energy."""
        return dist.OneHotCategorical(logits=prediction)


class FunctionNode(Node):
    """A node with an energy of the user's own.

    Args:
        function: Energy `(batch,)` as a function of `(value, prediction)`, both `(batch, *shape)`.
        *shape: Shape of one sample's value.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int | None) -> None:
        super().__init__(*shape)
        self.function = function

    def energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        energy = self.function(value, prediction)
        if energy.shape != value.shape[:1]:
            raise DataError(
                f"the energy of a node must be one number per sample, of shape {(len(value),)}, "
                f"got {tuple(energy.shape)}; sum over all axes but the first"
            )
        return energy


def cross_entropy(logits: Tensor, probabilities: Tensor) -> Tensor:
    """`- y . log_softmax(u)` per sample, `(batch,)`, of class probabilities or one-hot labels."""
    return -(probabilities * logits.log_softmax(1)).flatten(1).sum(1)


def squared_error(value: Tensor, prediction: Tensor) -> Tensor:
    """`|z - u|^2 / 2` per sample, `(batch,)`."""
    return 0.5 * (value - prediction).square().flatten(1).sum(1)
