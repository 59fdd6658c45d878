"""Unconstrained coordinates of latents, exact up to both edges of a support.

`transform_of` gives the bijection `T` from the line onto a distribution's support,
`log_density` the density of `T(u)` and the Jacobian as functions of `u`, and `draw` a draw of `u`.
The value `T(u)` may round to an edge of the support; neither the density nor a draw goes through
it. Wrappers (Independent, expanded, masked, mixtures) are taken apart here; the formulas are in
`families`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributions as td
from pyro.distributions import LKJ, ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import IndependentTransform, Transform

from dcpc.divide.supports.circular import WrapAngle, draw_angle, is_circular
from dcpc.divide.supports.discrete import counted, is_discrete
from dcpc.divide.supports.families import FAMILIES, Family, exponential_variate
from dcpc.divide.supports.jacobians import elementary_parts, is_parameter_free, log_abs_det
from dcpc.divide.supports.standardised import Standardised


def transform_of(fn: Any) -> Transform:
    """Bijection from unconstrained space onto the support of a distribution.

    It is torch's `biject_to(support)`, except for angles, which are wrapped, for mixtures of one
    family, which have the bijection of their components, for discrete values, which are held as
    floating-point numbers, and for what is held in standardised coordinates.

    Raises:
        NotImplementedError: No bijection onto the support is known.
    """
    if is_discrete(fn):
        return counted(fn)
    if isinstance(fn, Standardised):
        return fn.transform
    inner = fn
    while isinstance(inner, td.Independent | ExpandedDistribution | MaskedDistribution):
        inner = inner.base_dist
    if is_circular(inner):
        return WrapAngle()
    if isinstance(inner, td.MixtureSameFamily):
        transform = transform_of(inner._component_distribution)
        if is_parameter_free(transform):
            extra = len(fn.event_shape) - len(inner.event_shape)
            return IndependentTransform(transform, extra) if extra else transform
    return biject_to(fn.support)


def log_density(fn: Any, u: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Log-density of `T(u)`, and the log-determinant of the Jacobian, from `u` alone.

    The density of `u` is the sum of the two. They come apart because Pyro's scales and masks act on
    the first only; masks within the distribution are applied to it. Standardised coordinates are
    neither scaled nor masked, and have their density as a whole.

    Args:
        fn: Distribution of a latent.
        u: Unconstrained value, with the batch shape of the distribution.

    Returns:
        `log p(T(u))` and `log |det dT/du|`, each `(*batch_shape)`; None for a distribution for
        which `fn.log_prob(T(u))` is as good, or that is not known here.
    """
    if isinstance(fn, Standardised):
        return fn.standard.log_prob(u).expand(fn.batch_shape), None
    log_prob = None if is_discrete(fn) else _log_prob(fn, u)
    if log_prob is None:
        return None
    transform = transform_of(fn)
    log_det = log_abs_det(transform, u)
    if log_det is None:
        return None
    # An elementwise bijection leaves the event dimensions of the distribution to be summed.
    extra = log_det.dim() - (u.dim() - _unconstrained_event_dim(fn, transform))
    if extra > 0:
        log_det = log_det.sum(tuple(range(-extra, 0)))
    shape = torch.broadcast_shapes(fn.batch_shape, log_prob.shape, log_det.shape)
    return log_prob.expand(shape), log_det.expand(shape)


def draw(fn: Any) -> Tensor | None:
    """Exact draw of the unconstrained value, not rounded at the edges; without gradient.

    Returns:
        `u`, `(*batch_shape, *event)`, or None for a distribution of which `T.inv(fn.sample())` is
        as good, or that is not known here.
    """
    if is_discrete(fn):
        return None
    with torch.no_grad():
        if isinstance(fn, Standardised):
            return _sample(fn.standard, fn.batch_shape)
        return _draw(fn, fn.batch_shape)


def _log_prob(fn: Any, u: Tensor) -> Tensor | None:
    """`log p(T(u))`, of the batch shape of `u`."""
    if isinstance(fn, td.Independent):
        base = _log_prob(fn.base_dist, u)
        dims = tuple(range(-fn.reinterpreted_batch_ndims, 0))
        return base if base is None or not dims else base.sum(dims)
    if isinstance(fn, ExpandedDistribution):
        return _log_prob(fn.base_dist, u)
    if isinstance(fn, MaskedDistribution):
        base = _log_prob(fn.base_dist, u)
        if base is None:
            return None
        if isinstance(fn._mask, bool):
            return base if fn._mask else torch.zeros_like(base)
        return torch.where(fn._mask, base, base.new_zeros(()))
    if isinstance(fn, td.MixtureSameFamily):
        return _mixture_log_prob(fn, u)
    family = _family_of(fn)
    if family is not None:
        return family.log_prob(fn, u)
    return _image_log_prob(fn, u)


def _draw(fn: Any, batch_shape: torch.Size) -> Tensor | None:
    """Draw of `u` for a distribution that is expanded to a batch shape."""
    if isinstance(fn, td.Independent):
        return _draw(fn.base_dist, batch_shape + fn.event_shape[: fn.reinterpreted_batch_ndims])
    if isinstance(fn, ExpandedDistribution | MaskedDistribution):
        return _draw(fn.base_dist, batch_shape)
    if is_circular(fn):
        return draw_angle(fn, batch_shape)
    if isinstance(fn, td.MixtureSameFamily):
        return _mixture_draw(fn, batch_shape)
    if type(fn) is LKJ:
        return _draw(fn.base_dist, batch_shape)  # the same coordinates, of its Cholesky factor
    family = _family_of(fn)
    if family is not None:
        return family.draw(fn, batch_shape)
    return _image_draw(fn, batch_shape)


def _family_of(fn: Any) -> Family | None:
    """The family whose density a distribution has; None where a subclass defines its own."""
    for kind in type(fn).__mro__:
        if kind in FAMILIES:
            return FAMILIES[kind]
        if "log_prob" in vars(kind):
            return None
    return None


def _mixture_log_prob(fn: Any, u: Tensor) -> Tensor | None:
    """Mixture of one family: the components share the bijection, so their Jacobians are equal."""
    component = fn._component_distribution
    transform = transform_of(component)
    if not is_parameter_free(transform):
        return None
    base = _log_prob(component, u.unsqueeze(-1 - _unconstrained_event_dim(component, transform)))
    if base is None:
        return None
    return (base + fn._mixture_distribution.logits).logsumexp(-1)


def _mixture_draw(fn: Any, batch_shape: torch.Size) -> Tensor | None:
    component = fn._component_distribution
    transform = transform_of(component)
    if not is_parameter_free(transform):
        return None
    draws = _draw(component, batch_shape + component.batch_shape[-1:])
    if draws is None:
        return None
    event_dim = _unconstrained_event_dim(component, transform)
    index = fn._mixture_distribution.expand(batch_shape).sample()
    index = index.reshape(*batch_shape, 1, *(1,) * event_dim)
    index = index.expand(*batch_shape, 1, *draws.shape[draws.dim() - event_dim :])
    return draws.gather(len(batch_shape), index).squeeze(len(batch_shape))


def _image_log_prob(fn: Any, u: Tensor) -> Tensor | None:
    """Density of a transformed distribution whose last transform is the bijection itself."""
    inner = _inner_transforms(fn)
    if inner is None:
        return None
    base = fn.base_dist
    if inner:
        base = td.TransformedDistribution(base, inner, validate_args=False)
    log_prob, log_det = base.log_prob(u), log_abs_det(elementary_parts(transform_of(fn))[0], u)
    assert log_det is not None, "an elementary bijection has a log-determinant"
    extra = log_det.dim() - log_prob.dim()
    return log_prob - (log_det.sum(tuple(range(-extra, 0))) if extra > 0 else log_det)


def _image_draw(fn: Any, batch_shape: torch.Size) -> Tensor | None:
    inner = _inner_transforms(fn)
    if inner is None:
        return None
    value = _sample(fn.base_dist, batch_shape)
    for transform in inner:
        value = transform(value)
    return value


def _inner_transforms(fn: Any) -> list[Transform] | None:
    """Transforms before the last one, where that is the bijection onto the support; else None."""
    log_prob = next(vars(kind)["log_prob"] for kind in type(fn).__mro__ if "log_prob" in vars(kind))
    if log_prob is not td.TransformedDistribution.log_prob:
        return None
    own = [part for transform in fn.transforms for part in elementary_parts(transform)]
    bijection = elementary_parts(transform_of(fn))
    if len(bijection) != 1 or not own or type(own[-1]) is not type(bijection[0]):
        return None
    return own[:-1] if log_abs_det(bijection[0], torch.zeros(1)) is not None else None


def _sample(fn: Any, batch_shape: torch.Size) -> Tensor:
    """A draw by a sampler that `vmap` takes; torch's own fill in place for these two."""
    if isinstance(fn, td.Independent):
        return _sample(fn.base_dist, batch_shape + fn.event_shape[: fn.reinterpreted_batch_ndims])
    if isinstance(fn, td.Laplace):
        scale = fn.scale.expand(batch_shape)
        return fn.loc + scale * (exponential_variate(scale) - exponential_variate(scale))
    if isinstance(fn, td.Cauchy):
        scale = fn.scale.expand(batch_shape)
        return fn.loc + scale * torch.randn_like(scale) / torch.randn_like(scale)
    return fn.expand(batch_shape).sample()


def _unconstrained_event_dim(fn: Any, transform: Transform) -> int:
    return len(fn.event_shape) - transform.codomain.event_dim + transform.domain.event_dim
