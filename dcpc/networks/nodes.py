"""Nodes: the values of a network, each with the energy of its prediction error.

A node sits between layers. It has a prediction `u`, what the layers before it make of the node
before them, and a value `z`, which relaxation moves. Its energy per sample, with `r = z - u`:

    SquaredErrorNode           |r|^2 / 2                          the Gaussian of covariance I
    ScaledGaussianNode         |r|^2 / (2 s) + n/2 log s          one variance s
    FactorizedGaussianNode     sum_i r_i^2 / (2 s_i) + log(s_i)/2  one variance per unit
    MultivariateGaussianNode   r' S^-1 r / 2 + log(det S) / 2     covariance S = L L'
    CrossEntropyNode           - z . log_softmax(u)
    FloatingNode, FixedNode    0
    FunctionNode               the user's own

The Gaussian energies are minus the log-density up to `n/2 log(2 pi)`: Millidge, Seth & Buckley,
"Predictive coding: a theoretical and experimental review" (2021), section 2.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from dcpc.distributions import SharedScaleNormal
from dcpc.errors import DataError, OptionError
from dcpc.networks.parameters import eparameters, mparameters

__all__ = [
    "BiasNode",
    "CrossEntropyNode",
    "FactorizedGaussianNode",
    "FixedNode",
    "FloatingNode",
    "FunctionNode",
    "GaussianNode",
    "MultivariateGaussianNode",
    "Node",
    "ScaledGaussianNode",
    "SquaredErrorNode",
]


@eparameters("value")
class Node(nn.Module):
    """A value per sample and its energy.

    The value is no part of `state_dict()`: it belongs to a batch, and any batch size will do.

    Args:
        *shape: Of one sample's value; None in the place of an axis of any size. No shape at all
            takes values of any shape.

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

    def forward(self, prediction: Tensor) -> Tensor:
        """What the next layer gets: the value, or the prediction while there is none."""
        return self.value if self.has_value else prediction

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
            DataError: It is not of shape `(batch, *shape)`.
        """
        self._check(value)
        if not self.is_clamped:
            # The parameter stays the same one: an optimiser may hold it.
            self.value.data = value.detach().clone()

    def clamp(self, value: Tensor) -> None:
        """Sets the value and keeps it there until `release` or `reset`.

        Raises:
            DataError: It is not of shape `(batch, *shape)`.
        """
        self.is_clamped = False
        self.init(value)
        self.is_clamped = True

    def release(self) -> None:
        """Lets a clamped value move again, from where it is."""
        self.is_clamped = False

    def reset(self) -> None:
        """Empties and releases the value."""
        self.is_clamped = False
        self.value.data = self.value.data.new_empty(0)
        self.value.grad = None

    def _check(self, value: Tensor) -> None:
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
class BiasNode(nn.Module):
    """A learned vector in the place of an input, for networks that only have outputs.

    Args:
        *shape: Of the vector.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        """The bias once per row of `x`, `(batch, *shape)`."""
        return self.bias.expand(len(x), *self.bias.shape)


class GaussianNode(Node):
    """Base class of the nodes with a Gaussian energy of mean `u`.

        F = 1/2 [r' S^-1 r + log det S],   r = z - u

    Subclasses have the factor `L` of the covariance `S = L L'`.
    """

    def energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        whitened = self.whiten(value - prediction).flatten(1)
        return 0.5 * whitened.square().sum(1) + self.half_log_det(value)

    def error(self, value: Tensor, prediction: Tensor) -> Tensor:
        """The precision-weighted prediction error `S^-1 (z - u)`, the gradient of F in `z`."""
        return self.whiten_transposed(self.whiten(value - prediction))

    def sample(self, prediction: Tensor) -> Tensor:
        """Draws from `N(u, S)`, `(batch, *shape)`."""
        return self.distribution(prediction).rsample()

    @abstractmethod
    def distribution(self, prediction: Tensor) -> TorchDistribution:
        """`N(u, S)`, of batch shape `(batch,)` and event shape `shape`."""

    @abstractmethod
    def whiten(self, residual: Tensor) -> Tensor:
        """`L^-1 r`, of the shape of `r`."""

    @abstractmethod
    def whiten_transposed(self, residual: Tensor) -> Tensor:
        """`L^-T r`, of the shape of `r`."""

    @abstractmethod
    def half_log_det(self, value: Tensor) -> Tensor:
        """`1/2 log det S` over all axes of a sample of `value`, of no shape."""


class SquaredErrorNode(GaussianNode):
    """Energy `|z - u|^2 / 2`: the Gaussian of covariance I."""

    def energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        # The same without a determinant to add: inference is so short a step that it shows.
        return 0.5 * (value - prediction).square().flatten(1).sum(1)

    def whiten(self, residual: Tensor) -> Tensor:
        return residual

    def whiten_transposed(self, residual: Tensor) -> Tensor:
        return residual

    def distribution(self, prediction: Tensor) -> TorchDistribution:
        return _independent_normal(prediction, torch.ones_like(prediction))

    def half_log_det(self, value: Tensor) -> Tensor:
        return value.new_zeros(())


@mparameters("logvar")
class FactorizedGaussianNode(GaussianNode):
    """Gaussian with one learned variance per unit, `S = diag(exp(logvar))`.

    Args:
        *shape: Of one sample's value; the units along an axis of size None share a variance.
        variance: Of all units, at first.

    Raises:
        OptionError: No positive variance.
    """

    def __init__(self, *shape: int | None, variance: float = 1.0) -> None:
        super().__init__(*shape)
        if not variance > 0.0:
            raise OptionError(f"variance must be positive, got {variance}")
        sizes = self._logvar_shape()
        self.logvar = nn.Parameter(torch.tensor(variance).log().expand(sizes).clone())

    def _logvar_shape(self) -> list[int]:
        return [size or 1 for size in self.shape]

    def whiten(self, residual: Tensor) -> Tensor:
        return residual * (-0.5 * self.logvar).exp()

    def whiten_transposed(self, residual: Tensor) -> Tensor:
        return self.whiten(residual)

    def distribution(self, prediction: Tensor) -> TorchDistribution:
        return _independent_normal(prediction, (0.5 * self.logvar).exp())

    def half_log_det(self, value: Tensor) -> Tensor:
        return 0.5 * self.logvar.expand(value.shape[1:]).sum()


class ScaledGaussianNode(FactorizedGaussianNode):
    """Gaussian with one learned variance for all units, `S = exp(logvar) I`."""

    def _logvar_shape(self) -> list[int]:
        return []


@mparameters("raw_scale")
class MultivariateGaussianNode(GaussianNode):
    """Gaussian with a learned full covariance `S = L L'`, the identity at first.

    `L` has the lower triangle of `raw_scale`, with the exponential of its diagonal.

    Args:
        size: Number of units, n; the value is `(batch, n)`.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.raw_scale = nn.Parameter(torch.zeros(size, size))

    @property
    def scale_tril(self) -> Tensor:
        """The factor `L`, `(n, n)`."""
        return self.raw_scale.tril(-1) + self.raw_scale.diagonal().exp().diag()

    def whiten(self, residual: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.scale_tril, residual.mT, upper=False).mT

    def whiten_transposed(self, residual: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.scale_tril.mT, residual.mT, upper=True).mT

    def distribution(self, prediction: Tensor) -> TorchDistribution:
        return SharedScaleNormal(prediction, self.scale_tril)

    def half_log_det(self, value: Tensor) -> Tensor:
        return self.raw_scale.diagonal().sum()


class CrossEntropyNode(Node):
    """Energy `- z . log_softmax(u)`, of class probabilities or a one-hot label `z`."""

    def energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        return -(value * prediction.log_softmax(1)).flatten(1).sum(1)

    def distribution(self, prediction: Tensor) -> TorchDistribution:
        """Of one-hot labels, whose log-probability is minus the energy."""
        return dist.OneHotCategorical(logits=prediction)


class FunctionNode(Node):
    """A node with an energy of the user's own.

    Args:
        function: Of `(value, prediction)`, both `(batch, *shape)`, giving `(batch,)`.
        *shape: Of one sample's value.
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


def _independent_normal(loc: Tensor, scale: Tensor) -> TorchDistribution:
    return dist.Normal(loc, scale).to_event(loc.dim() - 1)
