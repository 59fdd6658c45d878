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
    """A mixture of S multivariate Student-t distributions.

    With `z = F^-1 (u - loc)`,

        log p = log Gamma((v + d) / 2) - log Gamma(v / 2) - d / 2 log(pi v) - log |det F|
                - (v + d) / 2 log(1 + |z|^2 / v)

    Attributes:
        loc: Centres `(S, *plates, d)`.
        factor: Lower triangular factors F of the scale matrices, `(S, *plates, d, d)`.
        degrees: Degrees of freedom `v`.
        log_share: Log-probabilities of the components, `(S, *plates)`; None where they are equal.
    """

    loc: Tensor
    factor: Tensor
    degrees: float = 5.0
    log_share: Tensor | None = None

    def draw(self, prior: Tensor) -> Tensor:
        """Draws, of which equal components are taken in turns: a stratified sample."""
        if self.log_share is not None:
            return self.draw_each(prior)
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

    def draw_each(self, like: Tensor) -> Tensor:
        """Draws of the shape `(K, *plates, d)` of a tensor, each of which is one of the mixture."""
        noise = torch.randn_like(like) * (self.degrees / self._chi_square(like)).sqrt()
        drawn, *others = (
            loc + torch.einsum("...ij,k...j->k...i", factor, noise)
            for loc, factor in zip(self.loc, self.factor, strict=True)
        )
        if others:
            share = self._log_shares.exp().movedim(0, -1)  # (*plates, S)
            which = (torch.rand_like(like[..., :1]) > share.cumsum(-1)[..., :-1]).sum(-1, True)
            for number, other in enumerate(others, 1):
                drawn = torch.where(which == number, other, drawn)
        return drawn

    def _chi_square(self, like: Tensor) -> Tensor:
        """Chi-square draws `(K, *plates, 1)` with an even number of degrees of freedom."""
        assert self.degrees % 2 == 0, f"{self.degrees} degrees of freedom are not even"
        count = int(self.degrees) // 2
        uniform = torch.rand_like(like[..., :1].expand(*like.shape[:-1], count))
        return -2.0 * uniform.log().sum(-1, keepdim=True)

    def log_prob(self, value: Tensor, log_prior: Tensor) -> Tensor:
        size, v = value.shape[-1], self.degrees
        deviation = value.unsqueeze(0) - self.loc.unsqueeze(1)
        white = torch.einsum("s...ij,sk...j->sk...i", self._whitener, deviation)
        tail = (v + size) / 2 * torch.log1p(white.square().sum(-1) / v)
        return (self._log_norm.unsqueeze(1) - tail).logsumexp(0)

    @cached_property
    def _whitener(self) -> Tensor:
        """`F^-1`."""
        factor = self.factor
        identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        return torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)

    @cached_property
    def _log_norm(self) -> Tensor:
        """Log-densities of the components at their centres, and shares, `(S, *plates)`."""
        size, v = self.loc.shape[-1], self.degrees
        constant = (
            math.lgamma((v + size) / 2) - math.lgamma(v / 2) - size / 2 * math.log(v * math.pi)
        )
        log_det = self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return constant - log_det + self._log_shares

    @property
    def _log_shares(self) -> Tensor:
        """Log-probabilities of the components, `(S, *plates)`."""
        if self.log_share is not None:
            return self.log_share
        return torch.full_like(self.loc[..., 0], -math.log(len(self.loc)))


@dataclass(frozen=True)
class HalfPrior(JointReference):
    """An equal mixture of the prior and another distribution.

    Attributes:
        other: The other one.
    """

    other: JointReference

    def draw(self, prior: Tensor) -> Tensor:
        # On average a half, of an odd number too.
        half = int(len(prior) / 2 + float(torch.rand((), device="cpu")))
        return torch.cat([prior[:half], self.other.draw(prior[half:])])

    def log_prob(self, value: Tensor, log_prior: Tensor) -> Tensor:
        return torch.logaddexp(log_prior, self.other.log_prob(value, log_prior)) + LOG_HALF
