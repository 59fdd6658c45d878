"""Nodes with Gaussian energies.

With `r = z - u`, the prediction error:

    SquaredErrorNode           |r|^2 / 2                           covariance I
    ScaledGaussianNode         |r|^2 / (2 s) + n/2 log s           one variance s
    FactorizedGaussianNode     sum_i r_i^2 / (2 s_i) + log(s_i)/2  one variance per unit
    MultivariateGaussianNode   r' S^-1 r / 2 + log(det S) / 2      covariance S = L L'

These are minus the log-density up to `n/2 log(2 pi)`: Millidge, Seth & Buckley, "Predictive coding:
a theoretical and experimental review" (2021), section 2.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from dcpc.distributions import SharedScaleNormal
from dcpc.errors import OptionError
from dcpc.networks.nodes import Node, squared_error
from dcpc.networks.parameters import mparameters

__all__ = [
    "FactorizedGaussianNode",
    "GaussianNode",
    "MultivariateGaussianNode",
    "ScaledGaussianNode",
    "SquaredErrorNode",
]


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
        return squared_error(value, prediction)

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
        *shape: Shape of one sample's value; the units along an axis of size None share a variance.
        variance: Initial variance of all units.

    Raises:
        OptionError: No shape, or no positive variance.
    """

    def __init__(self, *shape: int | None, variance: float = 1.0) -> None:
        super().__init__(*shape)
        if not 0.0 < variance < math.inf:
            raise OptionError(f"variance must be positive and finite, got {variance}")
        sizes = self._logvar_shape()
        self.logvar = nn.Parameter(torch.tensor(variance).log().expand(sizes).clone())

    def _logvar_shape(self) -> list[int]:
        if not self.shape:
            raise OptionError(
                "a FactorizedGaussianNode has a variance per unit, so it needs the shape of a "
                "sample's value; give FactorizedGaussianNode(size), or take a ScaledGaussianNode"
            )
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


def _independent_normal(loc: Tensor, scale: Tensor) -> TorchDistribution:
    return dist.Normal(loc, scale).to_event(loc.dim() - 1)
