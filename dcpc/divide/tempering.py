"""Tempering: how factors are weighed on the way from the prior to the posterior."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dcpc.divide.joint_reference import JointReference
from dcpc.divide.model import Latents
from dcpc.divide.program import Factors
from dcpc.divide.sites import Site

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Reference:
    """A normal distribution in unconstrained space, where a latent starts instead of its prior.

    Attributes:
        loc: Centre `(*batch, *event)`.
        scale: Standard deviation, a number or a tensor that broadcasts to it.
    """

    loc: Tensor
    scale: Tensor | float

    def log_prob(self, u: Tensor, batch_dims: int) -> Tensor:
        """Log-density of `(K, *batch, *event)`, summed over the event: `(K, *batch)`."""
        z = (u - self.loc) / self.scale
        scale = torch.as_tensor(self.scale, device=z.device)
        log_prob = -0.5 * z * z - scale.log() - _HALF_LOG_TWO_PI
        return log_prob.flatten(1 + batch_dims).sum(-1) if u.dim() > 1 + batch_dims else log_prob


@dataclass(frozen=True)
class Tempering:
    """Weights of the factors in the tempered density `p(z) p(x | z)^beta`.

    A latent with a reference distribution `r` starts from it instead of its prior: its own
    factor becomes `r(u)^(1 - beta) p(u | pa)^beta`. Where all latents start from a joint one, the
    density is `r(u)^(1 - beta) p(u, x)^beta`.

    Attributes:
        temperature: `beta`, from 0 (prior or reference) to 1 (posterior); a positive tensor where a
            recording is to serve many.
        references: Reference distributions by latent.
        joint: Reference distribution of all latents, which are one unit; None for none.
        observed: Observed sites that the temperature weighs; None for all.
    """

    temperature: float | Tensor = 1.0
    references: Mapping[str, Reference] = field(default_factory=dict)
    joint: JointReference | None = None
    observed: frozenset[str] | None = None

    @property
    def starts_jointly(self) -> bool:
        """Whether a joint reference is a part of the density."""
        is_posterior = not isinstance(self.temperature, Tensor) and self.temperature >= 1.0
        return self.joint is not None and not is_posterior

    def bridge(self, log_reference: Tensor) -> Tensor:
        """Share of a joint reference in the log-density, `(1 - beta) log r(u)`."""
        return (1.0 - self.temperature) * log_reference

    def weigh(self, factors: Factors, latents: Latents, sites: Mapping[str, Site]) -> Factors:
        """Log-factors of the tempered density from those of the joint, all `(K, *batch_shape)`."""
        beta = self.temperature
        is_recorded = isinstance(beta, Tensor)  # then it is positive
        if not is_recorded and beta == 1.0:
            return factors
        weighed = {}
        for name, value in factors.items():
            if name in self.references:
                batch_dims = len(sites[name].batch_shape)
                start = self.references[name].log_prob(latents[name], batch_dims)
                weighed[name] = (1.0 - beta) * start + (
                    beta * value if is_recorded or beta > 0 else 0.0
                )
            elif self._is_tempered(sites[name]) or self.joint is not None:
                zero = not is_recorded and beta <= 0
                weighed[name] = value.new_zeros(value.shape) if zero else beta * value
            else:
                weighed[name] = value
        return weighed

    def _is_tempered(self, site: Site) -> bool:
        return site.is_observed and (self.observed is None or site.name in self.observed)


POSTERIOR = Tempering()
"""The joint density itself, which is the posterior up to the evidence."""
