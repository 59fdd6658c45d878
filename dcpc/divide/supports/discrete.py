"""Discrete supports: their values, the numbers that particles hold, and lines through them.

A particle holds a discrete value as floating-point numbers: integers, or vectors of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributions as td
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform

INTEGERS, ONE_HOT, MULTINOMIAL = "integers", "one_hot", "multinomial"

_ONE_HOT = type(constraints.one_hot)
_AT_LEAST = type(constraints.nonnegative_integer)


@dataclass(frozen=True)
class DiscreteSupport:
    """Support of a component of a discrete latent: an integer, or a vector of them.

    Attributes:
        kind: `integers`, `one_hot` (vectors of zeros and a one) or `multinomial` (vectors of counts
            with a given sum).
        lower: Smallest number.
        upper: Largest number over the elements of the site; infinite where there is none.
        width: Numbers in a component: the length of the vector, else one.
    """

    kind: str
    lower: float
    upper: float
    width: int = 1

    @property
    def num_values(self) -> float:
        """Number of values that a component can be enumerated over; infinite if it cannot."""
        if self.kind == ONE_HOT:
            return self.width
        return self.upper - self.lower + 1 if self.kind == INTEGERS else math.inf

    def values(self, like: Tensor) -> Tensor:
        """All values of a component, `(S, width)`."""
        if self.kind == ONE_HOT:
            return torch.eye(self.width, dtype=like.dtype, device=like.device)
        integers = torch.arange(int(self.num_values), dtype=like.dtype, device=like.device)
        return (integers + self.lower).unsqueeze(-1)

    def index(self, component: Tensor) -> Tensor:
        """Index into `values` of components `(..., width)`."""
        if self.kind == ONE_HOT:
            return component.argmax(-1)
        return (component.squeeze(-1) - self.lower).long()

    def contains(self, components: Tensor) -> Tensor:
        """Whether numbers `(..., width)` that keep the sum of a value lie in the support."""
        return ((components >= self.lower) & (components <= self.upper)).all(-1)

    def other(self, u: Tensor, shift: int = 1) -> Tensor:
        """Another value of the support in the place of each, to see what depends on it.

        Args:
            u: Values `(..., *event)`.
            shift: Which other value, from 1.
        """
        if math.isinf(self.num_values) and self.kind == INTEGERS:
            return u + shift
        count = self.width if self.kind != INTEGERS else int(self.num_values)
        shift = 1 + (shift - 1) % max(count - 1, 1)
        if self.kind != INTEGERS:
            return u.roll(shift, -1)
        return self.lower + (u - self.lower + shift) % count


class Counted(Transform):
    """The value of a discrete distribution from the floating-point numbers that a particle holds.

    Args:
        is_integer: Whether the distribution's values are of an integer type.
        event_dim: Number of event dimensions.
    """

    bijective = True

    def __init__(self, is_integer: bool, event_dim: int) -> None:
        super().__init__()
        self._is_integer = is_integer
        self.domain = constraints.independent(constraints.real, event_dim)
        self.codomain = self.domain

    def _call(self, x: Tensor) -> Tensor:
        return x.long() if self._is_integer else x

    def _inverse(self, y: Tensor) -> Tensor:
        return y if y.is_floating_point() else y.to(torch.get_default_dtype())

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Zero: a discrete value has a probability, and no density."""
        event_dim = self.domain.event_dim
        return x.new_zeros(x.shape[: x.dim() - event_dim])


def is_discrete(fn: Any) -> bool:
    """Whether a distribution has a discrete support."""
    try:
        return bool(fn.support.is_discrete)
    except NotImplementedError:
        return False


def counted(fn: Any) -> Counted:
    """The transform of a discrete distribution."""
    inner = fn
    while isinstance(inner, td.Independent | ExpandedDistribution | MaskedDistribution):
        inner = inner.base_dist
    return Counted(isinstance(inner, td.Categorical), fn.event_dim)


def discrete_support(fn: Any) -> DiscreteSupport:
    """Support of the components of a discrete distribution.

    Raises:
        NotImplementedError: The support is not one that can be moved in.
    """
    support = base_constraint(fn.support)
    if isinstance(support, _ONE_HOT):
        return DiscreteSupport(ONE_HOT, 0.0, 1.0, fn.event_shape[-1])
    if isinstance(support, constraints.multinomial):
        upper = float(torch.as_tensor(support.upper_bound).max())
        if fn.event_shape[-1] == 1:  # a single category has all counts
            return DiscreteSupport(INTEGERS, upper, upper)
        return DiscreteSupport(MULTINOMIAL, 0.0, upper, fn.event_shape[-1])
    if support is constraints.boolean:
        return DiscreteSupport(INTEGERS, 0.0, 1.0)
    if isinstance(support, constraints.integer_interval):
        lower = float(torch.as_tensor(support.lower_bound).min())
        upper = float(torch.as_tensor(support.upper_bound).max())
        return DiscreteSupport(INTEGERS, lower, upper)
    if isinstance(support, _AT_LEAST):
        return DiscreteSupport(INTEGERS, float(support.lower_bound), math.inf)
    raise NotImplementedError


def base_constraint(constraint: Any) -> Any:
    """A support without what makes it that of an event or of a mixture."""
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    return constraint


def bounded_value(fn: Any, value: Tensor, upper: float) -> tuple[Tensor, Tensor | None]:
    """A value to take the probability of, and what to add to its logarithm.

    Elements of a site may have bounds of their own, as binomial counts of different totals; what is
    enumerated over the largest has probability zero beyond an element's own. A bound that is larger
    than `upper`, which the enumeration knows of, gives NaN, so that it is not overlooked.

    Args:
        fn: The distribution.
        value: Value `(*batch, *event)`.
        upper: Largest bound that is known.

    Returns:
        The value with feasible numbers in the place of others, and zero, minus infinity or NaN,
        of batch shape; None where all values are feasible.
    """
    support = base_constraint(fn.support)
    if not isinstance(support, constraints.integer_interval):
        return value, None
    if not isinstance(support.upper_bound, Tensor):
        return value, None
    inside = (value >= support.lower_bound) & (value <= support.upper_bound)
    extra = torch.where(inside, 0.0, -math.inf)
    extra = torch.where(support.upper_bound > upper, math.nan, extra)
    feasible = torch.where(inside, value, torch.as_tensor(support.lower_bound, dtype=value.dtype))
    if fn.event_dim:
        extra = extra.flatten(-fn.event_dim).sum(-1)
    return feasible, extra
