"""A mixture of the particles' modes, fitted by expectation and maximisation (Dempster et al. 1977).

The number of components is that of the lowest Bayesian information criterion (Schwarz 1978), for
every element of the plates on its own. Covariances borrow from one another what few particles do
not determine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dcpc.conquer.jump import JUMP_DEGREES
from dcpc.conquer.preconditioner import factor_of
from dcpc.divide.joint_reference import StudentMixture

__all__ = ["fit_mixture"]

NUM_COMPONENTS = (1, 2, 4, 8)
"""Numbers of components that are tried."""

PARTICLES_PER_COMPONENT = 4
"""Particles per value, from which a component is tried."""

NUM_STARTS = 3
"""Random starts of each."""

NUM_STEPS = 25
"""Steps of expectation and maximisation."""

INFLATION = 1.1
"""Scale matrices of the components, over those of the same covariance as the particles."""

MAX_ELEMENTS = 1 << 24
"""Values of all particles and components at most, so that memory is enough."""


@dataclass(frozen=True)
class _Components:
    """Gaussian components of a standardised cloud, by cell.

    Attributes:
        log_share: Log-probabilities, `(C, M)`.
        loc: Centres, `(C, M, d)`.
        factor: Cholesky factors of the covariances, `(C, M, d, d)`.
    """

    log_share: Tensor
    loc: Tensor
    factor: Tensor

    def log_prob(self, value: Tensor) -> Tensor:
        """Joint log-density `(C, M, K)` of components and values `(C, K, d)`."""
        deviation = value.unsqueeze(1) - self.loc.unsqueeze(2)  # (C, M, K, d)
        white = torch.linalg.solve_triangular(self.factor.mT, deviation, upper=True, left=False)
        log_det = self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = self.log_share - log_det - 0.5 * value.shape[-1] * math.log(2 * math.pi)
        return constant.unsqueeze(-1) - 0.5 * white.square().sum(-1)

    def or_where(self, condition: Tensor, other: _Components) -> _Components:
        """These, or others in the cells `(C,)` where a condition holds."""
        return _Components(
            torch.where(condition[:, None], other.log_share, self.log_share),
            torch.where(condition[:, None, None], other.loc, self.loc),
            torch.where(condition[:, None, None, None], other.factor, self.factor),
        )

    def without(self, absent: Tensor) -> _Components:
        """Without the components `(M,)` that no cell has."""
        return _Components(
            self.log_share[:, ~absent], self.loc[:, ~absent], self.factor[:, ~absent]
        )

    def padded(self, count: int) -> _Components:
        """With copies of the first component, of no share, so that there are `count`."""
        missing = count - self.loc.shape[1]
        nothing = self.log_share[:, :1] - math.inf
        return _Components(
            torch.cat([self.log_share, nothing.expand(-1, missing)], 1),
            torch.cat([self.loc, self.loc[:, :1].expand(-1, missing, -1)], 1),
            torch.cat([self.factor, self.factor[:, :1].expand(-1, missing, -1, -1)], 1),
        )


def fit_mixture(value: Tensor) -> StudentMixture:
    """A mixture of Student-t distributions that is close to particles.

    Args:
        value: Particles `(K, *plates, d)`, equally weighted.
    """
    plates, size = value.shape[1:-1], value.shape[-1]
    cloud = value.reshape(len(value), -1, size).movedim(1, 0)  # (C, K, d)
    loc = cloud.mean(1)
    scale = (cloud - loc[:, None]).square().mean(1).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    standard = (cloud - loc[:, None]) / scale[:, None]
    best = _choose(standard)
    shrink = math.sqrt(INFLATION * (JUMP_DEGREES - 2.0) / JUMP_DEGREES)
    centre = loc[:, None] + scale[:, None] * best.loc
    factor = shrink * scale[:, None, :, None] * best.factor
    return StudentMixture(
        centre.movedim(1, 0).reshape(-1, *plates, size),
        factor.movedim(1, 0).reshape(-1, *plates, size, size),
        JUMP_DEGREES,
        best.log_share.mT.reshape(-1, *plates),
    )


def _choose(value: Tensor) -> _Components:
    """The components of the lowest criterion, for each cell of values `(C, K, d)`."""
    num_particles, size = value.shape[1:]
    best, lowest = None, torch.full_like(value[:, 0, 0], math.inf)
    for count in NUM_COMPONENTS:
        if count > 1 and (
            num_particles < PARTICLES_PER_COMPONENT * size * count
            or value.numel() * count > MAX_ELEMENTS
        ):
            break
        components, log_density = _fit_best(value, count)
        num_parameters = count * (1 + size + size * (size + 1) // 2) - 1
        criterion = num_parameters * math.log(num_particles) - 2.0 * num_particles * log_density
        is_better = criterion < lowest
        lowest = torch.where(is_better, criterion, lowest)
        best = components if best is None else best.padded(count).or_where(is_better, components)
    assert best is not None
    return best.without(best.log_share.isneginf().all(0))


def _fit_best(value: Tensor, count: int) -> tuple[_Components, Tensor]:
    """The best of several fits, and its mean log-density `(C,)`."""
    best, highest = _fit(value, count)
    for _ in range(NUM_STARTS - 1 if count > 1 else 0):
        other, log_density = _fit(value, count)
        is_better = log_density > highest
        best = best.or_where(is_better, other)
        highest = torch.where(is_better, log_density, highest)
    return best, highest


def _fit(value: Tensor, count: int) -> tuple[_Components, Tensor]:
    """Components from a random start, and their mean log-density `(C,)`."""
    share = _nearest(value, _spread_out(value, count))
    components = _maximised(value, share)
    for _ in range(NUM_STEPS if count > 1 else 0):
        components = _maximised(value, components.log_prob(value).softmax(1))
    log_density = components.log_prob(value).logsumexp(1)
    return components, log_density.mean(1).nan_to_num(nan=-math.inf)


def _spread_out(value: Tensor, count: int) -> Tensor:
    """Particles `(C, M, d)` far from one another (Arthur & Vassilvitskii 2007)."""
    cells = torch.arange(len(value), device=value.device)
    chosen: list[Tensor] = []
    odds = torch.ones_like(value[..., 0])
    for _ in range(count):
        odds = torch.where(odds.sum(1, keepdim=True) > 0, odds, 1.0)
        chosen.append(value[cells, torch.multinomial(odds, 1)[:, 0]])
        distance = (value - chosen[-1][:, None]).square().sum(-1)
        odds = distance if len(chosen) == 1 else odds.minimum(distance)
    return torch.stack(chosen, 1)


def _nearest(value: Tensor, centre: Tensor) -> Tensor:
    """One where a component's centre `(C, M, d)` is the nearest, `(C, M, K)`."""
    nearest = torch.cdist(centre, value).argmin(1)
    return torch.nn.functional.one_hot(nearest, centre.shape[1]).mT.to(value)


def _maximised(value: Tensor, share: Tensor) -> _Components:
    """The components that fit best, given the particles' shares `(C, M, K)` of them."""
    count = share.sum(-1)
    weight = share / count.clamp(min=torch.finfo(value.dtype).tiny).unsqueeze(-1)
    total = count / value.shape[1]
    loc = torch.einsum("cmk,ckd->cmd", weight, value)
    deviation = value.unsqueeze(1) - loc.unsqueeze(2)
    covariance = (weight.unsqueeze(-1) * deviation).mT @ deviation
    pooled = (total[..., None, None] * covariance).sum(1, keepdim=True)
    borrowed = value.shape[-1] / (count + value.shape[-1])
    covariance = torch.lerp(covariance, pooled, borrowed[..., None, None])
    return _Components(total.log(), loc, factor_of(covariance))
