"""Masks of Pyro's handlers and distributions, so that what is masked out has no influence.

A mask takes elements out of a site's log-density. Selecting afterwards is not enough: the
gradient of a masked NaN is zero times NaN. So the value is replaced, where it is masked out, by
one that the distribution supports, before its density is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

_INTEGERS = (constraints.integer_interval, type(constraints.nonnegative_integer))
_COUNTS = (constraints.multinomial, type(constraints.one_hot))


def layers(fn: Any) -> Iterator[Any]:
    """The distribution and those that it wraps (Independent, Masked, Expanded)."""
    while fn is not None:
        yield fn
        fn = getattr(fn, "base_dist", None)


def is_masked(msg: Any) -> bool:
    """Whether a tensor masks a site, from a handler or within its distribution."""
    return any(True for _ in _masks(msg))


def element_mask(msg: Any, batch_shape: torch.Size) -> Tensor:
    """Batch elements of a site that are in its density, boolean `batch_shape`.

    An element of which a mask inside an event takes out a part is in.
    """
    result = torch.ones(batch_shape, dtype=torch.bool, device=msg["value"].device)
    for mask, event_dim in _masks(msg):
        extra = msg["fn"].event_dim - event_dim
        if extra > 0:
            mask = mask.flatten(-extra).any(-1) if mask.dim() >= extra else mask.any()
        result = result & mask
    return result


def selected(msg: Any) -> Tensor | None:
    """Entries of a site's value that are in its density; None for all of them."""
    if msg["mask"] is False or any(
        getattr(part, "_mask", None) is False for part in layers(msg["fn"])
    ):
        return torch.zeros_like(msg["value"], dtype=torch.bool)
    result: Tensor | None = None
    for mask, event_dim in _masks(msg):
        entries = mask.reshape(mask.shape + (1,) * event_dim)
        result = entries if result is None else result & entries
    if result is None:
        return None
    return result.expand(torch.broadcast_shapes(result.shape, msg["value"].shape))


def filled_value(msg: Any) -> Tensor:
    """A site's value; of an observed one, what is masked out is replaced by a feasible value."""
    chosen = selected(msg) if msg["is_observed"] else None
    if chosen is None:
        return msg["value"]
    return torch.where(chosen, msg["value"], feasible_value(msg["fn"], msg["value"]))


def masked_log_prob(msg: Any) -> Tensor:
    """Log-density of a site's value, of batch shape, zero where it is masked out.

    The mask of the handlers is applied, their scale is not.
    """
    return masked(msg["fn"].log_prob(filled_value(msg)), msg["mask"])


def masked(log_prob: Tensor, mask: Any) -> Tensor:
    """A log-density under a handler's mask: a tensor, a bool, or None."""
    if mask is False:
        return torch.zeros_like(log_prob)
    if mask is None or mask is True:
        return log_prob
    return torch.where(mask, log_prob, log_prob.new_zeros(()))


def feasible_value(fn: Any, like: Tensor) -> Tensor:
    """A value that a distribution supports, broadcastable to values of it.

    Args:
        fn: The distribution.
        like: A value, for its dtype, and for its shape where the support is not a known one: then
            its NaN become zero.
    """
    return _feasible(fn, like).to(like.dtype)


def _feasible(fn: Any, like: Tensor) -> Tensor:
    try:
        support = fn.support
    except NotImplementedError:
        return like.nan_to_num()
    base, shape = support, fn.batch_shape + fn.event_shape
    while isinstance(base, constraints.independent):
        base = base.base_constraint
    if isinstance(base, _INTEGERS):
        return torch.as_tensor(base.lower_bound, device=like.device)
    if isinstance(base, _COUNTS):
        first = torch.zeros(fn.event_shape, device=like.device)
        count = getattr(base, "upper_bound", 1)
        return torch.cat([first[..., :1] + 1, first[..., 1:]], -1) * torch.as_tensor(count)
    if base.is_discrete:
        return torch.zeros((), device=like.device)
    try:
        transform = biject_to(support)
    except NotImplementedError:
        return like.nan_to_num()
    zeros = torch.zeros(transform.inverse_shape(shape), dtype=like.dtype, device=like.device)
    return transform(zeros).detach()


def _masks(msg: Any) -> Iterator[tuple[Tensor, int]]:
    """Tensor masks around a site's value, each with the event dimensions to the right of it."""
    if isinstance(msg["mask"], Tensor):
        yield msg["mask"], msg["fn"].event_dim
    for part in layers(msg["fn"]):
        if isinstance(part, dist.MaskedDistribution) and isinstance(part._mask, Tensor):
            yield part._mask, part.event_dim
