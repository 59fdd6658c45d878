"""Joint reference distributions: where all latents of a model start at once.

Values are the packed ones of the unit that holds all latents, `(K, *plates, d)`: every element of
its plates (a datum, say) has a distribution of its own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

LOG_HALF = math.log(0.5)


class JointReference(ABC):
    """A distribution that can be drawn from, and whose density is known."""

    @abstractmethod
    def draw(self, prior: Tensor) -> Tensor:
        """Independent draws.

        Args:
            prior: As many draws from the prior, `(K, *plates, d)`; of any values where that is
                improper.
        """

    @abstractmethod
    def log_prob(self, value: Tensor, log_prior: Tensor) -> Tensor:
        """Log-density `(K, *plates)`, differentiable in the value.

        Args:
            value: `(K, *plates, d)`.
            log_prior: Log-density of the prior there, `(K, *plates)`.
        """


@dataclass(frozen=True)
class StudentMixture(JointReference):
    """An equal mixture of S multivariate Student-t distributions.

    With `z = F^-1 (u - loc)`,

        log p = log Gamma((v + d) / 2) - log Gamma(v / 2) - d / 2 log(pi v) - log |det F|
                - (v + d) / 2 log(1 + |z|^2 / v)

    Components are drawn in turns, with a random first one: a stratified sample.

    Attributes:
        loc: Centres `(S, *plates, d)`.
        factor: Lower triangular factors F of the scale matrices, `(S, *plates, d, d)`.
        degrees: Degrees of freedom `v`.
    """

    loc: Tensor
    factor: Tensor
    degrees: float = 5.0

    def draw(self, prior: Tensor) -> Tensor:
        count, share = len(prior), len(self.loc) / len(prior)
        start = torch.rand((), dtype=self.loc.dtype, device=self.loc.device)
        which = ((torch.arange(count, device=self.loc.device) + start) * share).long()
        which = which.clamp(max=len(self.loc) - 1)
        chi_square = torch.distributions.Chi2(torch.full_like(prior[..., :1], self.degrees))
        noise = torch.randn_like(prior) * (self.degrees / chi_square.sample()).sqrt()
        drawn = torch.empty_like(prior)
        for component in range(len(self.loc)):  # without a copy of the factor for every draw
            rows = which == component
            coloured = (self.factor[component] @ noise[rows].unsqueeze(-1)).squeeze(-1)
            drawn[rows] = self.loc[component] + coloured
        return drawn

    def log_prob(self, value: Tensor, log_prior: Tensor) -> Tensor:
        size, v = value.shape[-1], self.degrees
        deviation = value.unsqueeze(0) - self.loc.unsqueeze(1)
        white = torch.einsum("s...ij,sk...j->sk...i", self._whitener, deviation)
        tail = (v + size) / 2 * torch.log1p(white.square().sum(-1) / v)
        return (self._log_norm.unsqueeze(1) - tail).logsumexp(0)

    @cached_property
    def _whitener(self) -> Tensor:
        """`F^-1`."""
        identity = torch.eye(self.factor.shape[-1]).to(self.factor).expand_as(self.factor)
        return torch.linalg.solve_triangular(self.factor, identity, upper=False)

    @cached_property
    def _log_norm(self) -> Tensor:
        """Log-densities of the components at their centres, over their number, `(S, *plates)`."""
        size, v = self.loc.shape[-1], self.degrees
        constant = (
            math.lgamma((v + size) / 2)
            - math.lgamma(v / 2)
            - size / 2 * math.log(v * math.pi)
            - math.log(len(self.loc))
        )
        return constant - self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


@dataclass(frozen=True)
class HalfPrior(JointReference):
    """An equal mixture of the prior and another distribution.

    Attributes:
        other: The other one.
    """

    other: JointReference

    def draw(self, prior: Tensor) -> Tensor:
        half = int(len(prior) / 2 + float(torch.rand(())))  # on average, of an odd number too
        return torch.cat([prior[:half], self.other.draw(prior[half:])])

    def log_prob(self, value: Tensor, log_prior: Tensor) -> Tensor:
        return torch.logaddexp(log_prior, self.other.log_prob(value, log_prior)) + LOG_HALF
