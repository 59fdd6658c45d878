"""Standardised coordinates: a latent's value by what is left once its parents have had their say.

A value `z = loc + scale e` of a location-scale family has the coordinate `e`, whose distribution
its parents do not change: the non-centred parameterisation (Papaspiliopoulos, Roberts & Skold
2007). In a hierarchy of predictions `e` is the prediction error in units of its scale.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
import torch.distributions as td
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    IndependentTransform,
    Transform,
)

from dcpc.distributions import SharedScaleNormal

__all__ = ["Standardised", "standardised"]


class Standardised(TorchDistribution):
    """A distribution whose latents are held in standardised coordinates; else the same.

    Args:
        base: The distribution, of values `z`.
        standard: The distribution of `e`.
        transform: From `e` to `z`.
    """

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, base: Any, standard: Any, transform: Transform) -> None:
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)
        self.base = base
        self.standard = standard
        self.transform = transform

    @property
    def support(self) -> Any:
        """Support of the values."""
        return self.base.support

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether its draws have gradients."""
        return self.base.has_rsample

    @property
    def mean(self) -> Tensor:
        """Mean of the values."""
        return self.base.mean

    @property
    def variance(self) -> Tensor:
        """Variance of the values."""
        return self.base.variance

    def expand(self, batch_shape: Any, _instance: Any = None) -> Standardised:
        """The distribution with a larger batch shape."""
        expanded = standardised(self.base.expand(batch_shape))
        assert expanded is not None
        return expanded

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self.base.sample(sample_shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self.base.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base.log_prob(value)


class _StandardNormal(dist.Normal):
    """The standard normal, with a log-density of two operations."""

    @classmethod
    def like(cls, loc: Tensor) -> _StandardNormal:
        """As many of them as a tensor has elements."""
        one = torch.ones((), dtype=loc.dtype, device=loc.device)
        return cls(torch.zeros_like(one), one, validate_args=False).expand(loc.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return -0.5 * (value.square() + math.log(2 * math.pi))


class _Triangular(Transform):
    """`e -> loc + L e` for a lower-triangular `L` with positive diagonal."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, loc: Tensor, scale_tril: Tensor) -> None:
        super().__init__()
        self.loc = loc
        self.scale_tril = scale_tril

    def _call(self, x: Tensor) -> Tensor:
        if self.scale_tril.dim() == 2:  # one for all rows
            return self.loc + x @ self.scale_tril.mT
        return self.loc + (self.scale_tril @ x.unsqueeze(-1)).squeeze(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        rows = y - self.loc
        if self.scale_tril.dim() == 2:
            flat = rows.reshape(-1, rows.shape[-1])
            solved = torch.linalg.solve_triangular(self.scale_tril.mT, flat, upper=True, left=False)
            return solved.reshape(rows.shape)
        solved = torch.linalg.solve_triangular(self.scale_tril, rows.unsqueeze(-1), upper=False)
        return solved.squeeze(-1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return log_det.expand(torch.broadcast_shapes(log_det.shape, x.shape[:-1]))


def standardised(fn: Any) -> Standardised | None:
    """A distribution in standardised coordinates; None where it has none.

    Args:
        fn: A location-scale family, a transformation of one that acts element by element, a
            multivariate normal, or many of them side by side.
    """
    found = _standard_form(fn)
    return None if found is None else Standardised(fn, *found)


def _standard_form(fn: Any) -> tuple[Any, Transform] | None:
    """The distribution of `e`, and the transform from `e` to `z`."""
    if isinstance(fn, td.Independent):
        inner = _standard_form(fn.base_dist)
        if inner is None:
            return None
        extra = fn.reinterpreted_batch_ndims
        return inner[0].to_event(extra), IndependentTransform(inner[1], extra)
    if type(fn) in _NORMAL:
        return _StandardNormal.like(fn.loc), AffineTransform(fn.loc, fn.scale)
    if type(fn) in _LOCATION_SCALE:
        own = {name: getattr(fn, name) for name in fn.arg_constraints}
        own |= {"loc": torch.zeros_like(fn.loc), "scale": torch.ones_like(fn.scale)}
        return type(fn)(**own, validate_args=False), AffineTransform(fn.loc, fn.scale)
    if type(fn) in _MULTIVARIATE_NORMAL:
        return _StandardNormal.like(fn.loc).to_event(1), _Triangular(fn.loc, _shared(fn))
    if isinstance(fn, td.TransformedDistribution) and _acts_by_element(fn):
        inner = _standard_form(fn.base_dist)
        if inner is not None:
            return inner[0], ComposeTransform([inner[1], *fn.transforms])
    return None


def _acts_by_element(fn: Any) -> bool:
    """Whether nothing but its transforms, element by element, makes a distribution's density."""
    log_prob = next(vars(kind)["log_prob"] for kind in type(fn).__mro__ if "log_prob" in vars(kind))
    return (
        log_prob is td.TransformedDistribution.log_prob
        and len(fn.base_dist.event_shape) == 0
        and all(t.bijective and t.domain.event_dim == 0 for t in fn.transforms)
    )


def _shared(fn: Any) -> Tensor:
    """The triangular factor, `(d, d)` where the distribution has kept it as one."""
    return getattr(fn, "_unbroadcasted_scale_tril", fn.scale_tril)


_NORMAL: frozenset[type] = frozenset((dist.Normal, td.Normal))

_MULTIVARIATE_NORMAL: frozenset[type] = frozenset(
    (dist.MultivariateNormal, td.MultivariateNormal, SharedScaleNormal)
)

_LOCATION_SCALE: frozenset[type] = frozenset(
    (
        dist.Laplace,
        dist.SoftLaplace,
        dist.AsymmetricLaplace,
        dist.Cauchy,
        dist.StudentT,
        dist.Gumbel,
    )
)
"""Other families whose `loc` and `scale` shift and stretch one distribution."""
