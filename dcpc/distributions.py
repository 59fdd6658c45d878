"""Distributions that Pyro lacks, or computes at many times the cost they need.

`ContinuousBernoulli` is the likelihood of grey-scale pixels, by its logit; `Bernoulli` is Pyro's as
one operator. `DiscretizedNormal` is that of pixels with 256 levels, `OrderedCategorical` that of
pixels with few. `SharedScaleNormal` is a multivariate normal whose scale is one matrix for the
whole batch. All stay accurate where simpler formulas do not, and survive a capture by
`make_fx(torch.vmap(...))` as a few nodes that still differentiate when the graph runs again.
"""

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.nn.functional import softplus

from dcpc import kernels
from dcpc.kernels import NUM_BINS, SPACING

__all__ = [
    "Bernoulli",
    "ContinuousBernoulli",
    "DiscretizedNormal",
    "OrderedCategorical",
    "SharedScaleNormal",
]


class Bernoulli(dist.Bernoulli):
    r"""Pyro's Bernoulli, with a log-probability of three operations.

    .. math:: \log P(x) = x \lambda - \log(1 + e^\lambda)

    In a captured program torch's own dissolves into some forty operators. With
    `validate_args=False` a grey intensity `x` in [0, 1] gets its negative cross-entropy.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability, of the shape of `value` broadcast against `batch_shape`."""
        if self._validate_args:
            self._validate_sample(value)
        # Above the threshold, where exp(-logits) is below rounding in double precision, softplus is
        # its argument.
        return value * self.logits - softplus(self.logits, threshold=40.0)


class ContinuousBernoulli(TorchDistribution):
    r"""Continuous Bernoulli on [0, 1] by its logit, stable for every finite logit.

    .. math:: p(x) = e^{\lambda x} / Z(\lambda), \qquad
        \log Z(\lambda) = \mathrm{relu}(\lambda) + \log\frac{1 - e^{-|\lambda|}}{|\lambda|}

    The gradient in the logit is `x - mean`, `mean = 1/(1 - exp(-lambda)) - 1/lambda`, by its Taylor
    series where `|lambda| < 1`. Value and gradient take one operator each, a dozen passes over the
    logits in place: several times faster than `torch.distributions.ContinuousBernoulli`,
    which also clamps extreme logits. Source: Loaiza-Ganem and Cunningham, "The continuous
    Bernoulli", NeurIPS 2019, rewritten from the probability to the natural parameter.

    Args:
        logits: natural parameter lambda, of shape `batch_shape`; `probs = sigmoid(lambda)` is *not*
            the mean. (torch's class takes `probs` first; this one takes logits only.)
        validate_args: whether to check arguments and values; Pyro's default if None.

    Raises:
        ValueError: while validating, if a logit is NaN or a value lies outside [0, 1].
    """

    arg_constraints = {"logits": constraints.real}  # noqa: RUF012
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, logits: Tensor | float, *, validate_args: bool | None = None) -> None:
        # `expand` leaves these alone: what depends on the logits only is computed once for each.
        (self._logits,) = broadcast_all(logits)
        super().__init__(self._logits.shape, validate_args=validate_args)

    def __repr__(self) -> str:
        return f"ContinuousBernoulli(logits: {self.batch_shape})"

    def expand(self, batch_shape: Any, _instance: Any = None) -> "ContinuousBernoulli":
        """Returns the distribution with a larger batch shape, sharing the logits' memory."""
        new = self._get_checked_instance(ContinuousBernoulli, _instance)
        new._logits = self._logits
        super(ContinuousBernoulli, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def logits(self) -> Tensor:
        """Natural parameter, of shape `batch_shape`."""
        return self._logits.expand(self.batch_shape)

    @property
    def probs(self) -> Tensor:
        """Sigmoid of the logits, of shape `batch_shape`."""
        return self._logits.sigmoid().expand(self.batch_shape)

    @property
    def mean(self) -> Tensor:
        """Mean, of shape `batch_shape`; the derivative of `log Z`."""
        return kernels.continuous_bernoulli_mean(self._logits).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """Variance, of shape `batch_shape`; the second derivative of `log Z`."""
        return kernels.continuous_bernoulli_variance(self._logits).expand(self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, of the shape of `value` broadcast against `batch_shape`."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        return kernels.continuous_bernoulli_log_prob(value, self._logits).expand(shape)

    def entropy(self) -> Tensor:
        """Differential entropy: minus the log-density, which is linear in x, at the mean."""
        return -kernels.continuous_bernoulli_log_prob(
            kernels.continuous_bernoulli_mean(self._logits), self._logits
        ).expand(self.batch_shape)

    def cdf(self, value: Tensor) -> Tensor:
        """Distribution function `expm1(lambda x) / expm1(lambda)`, from the thin end."""
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        tiny = torch.finfo(self._logits.dtype).tiny
        rate = -self._logits.abs().clamp(min=tiny)
        rising = self._logits > 0
        distance = torch.where(rising, 1 - value, value).clamp(0, 1)
        mass = torch.expm1(rate * distance) / torch.expm1(rate)
        return torch.where(rising, 1 - mass, mass).expand(shape)

    def icdf(self, value: Tensor) -> Tensor:
        """Quantile `log1p(u expm1(lambda)) / lambda`, differentiable in the logit everywhere.

        It is `K(lambda) / lambda` for the cumulant function `K` of a Bernoulli variable of
        probability `u`; near zero, its first four cumulants.
        """
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        logits = self._logits
        small = logits.abs() < torch.finfo(logits.dtype).eps ** 0.2
        rising = logits > 0
        rate = torch.where(small, 1, logits.abs())
        mass = torch.where(rising, 1 - value, value)
        inside = torch.where(mass < 1, mass, 0)
        distance = -torch.log1p(inside * torch.expm1(-rate)) / rate
        distance = torch.where(mass < 1, distance, 1).clamp(0, 1)
        spread = value * (1 - value)
        slope = torch.where(small, logits, 0)
        third = (1 - 2 * value) / 6 + slope * (1 - 6 * spread) / 24
        near_zero = value + slope * spread * (0.5 + slope * third)
        far = torch.where(rising, 1 - distance, distance)
        return torch.where(small, near_zero, far).expand(shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Reparameterised draw by the quantile function, `sample_shape + batch_shape`."""
        shape = self._extended_shape(sample_shape)
        return self.icdf(torch.rand(shape, dtype=self._logits.dtype, device=self._logits.device))


def _nearest_level(value: Tensor) -> Tensor:
    level = (value * 127.5 + 127.5).round()
    return (2 * level - 255) / 255  # rounded once, for scales that are hardly above rounding


class _PixelGrid(constraints.Constraint):
    """The 256 values `v / 127.5 - 1`, to within a hundredth of their spacing."""

    is_discrete = True

    def check(self, value: Tensor) -> Tensor:
        on_grid = (value - _nearest_level(value)).abs() < 1e-2 * SPACING
        return on_grid & (value.abs() < 1 + 0.5 * SPACING)

    def __repr__(self) -> str:
        return "PixelGrid()"


class DiscretizedNormal(TorchDistribution):
    r"""A normal variable rounded to the 256 levels of a pixel in [-1, 1].

    .. math:: P(c) = \Phi\Big(\frac{c + d - \mu}{s}\Big) - \Phi\Big(\frac{c - d - \mu}{s}\Big),
        \qquad c = v / 127.5 - 1, \quad d = 1 / 255

    for level `v`; the first bin takes the whole left tail and the last one the whole right tail, so
    that the 256 probabilities sum to one. Log-probability and gradient are exact to rounding at
    every distance of loc and for scales far below and above a bin's width. Source: Ho, Jain and
    Abbeel, "Denoising diffusion probabilistic models", NeurIPS 2020, equation 13.

    Args:
        loc: location mu, of shape `batch_shape` after broadcasting; *not* quite the mean.
        scale: positive s; cheapest as one number for all pixels.
        validate_args: whether to check arguments and values; Pyro's default if None.

    Raises:
        ValueError: while validating, if `scale` is not positive or a value is none of the levels
            (images in [0, 1] are not, nor are those resized after they were rounded).
    """

    arg_constraints = {  # noqa: RUF012
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    support = _PixelGrid()

    def __init__(
        self, loc: Tensor | float, scale: Tensor | float, *, validate_args: bool | None = None
    ) -> None:
        # Not expanded: a scale of one number makes all that depends on it a number.
        like = next((x for x in (loc, scale) if isinstance(x, Tensor)), torch.empty(()))
        self._loc, self._scale = (torch.as_tensor(x).to(like) for x in (loc, scale))
        shape = torch.broadcast_shapes(self._loc.shape, self._scale.shape)
        super().__init__(shape, validate_args=validate_args)

    def __repr__(self) -> str:
        return f"DiscretizedNormal(loc: {self.batch_shape}, scale: {self.batch_shape})"

    def expand(self, batch_shape: Any, _instance: Any = None) -> "DiscretizedNormal":
        """Returns the distribution with a larger batch shape, sharing the arguments' memory."""
        new = self._get_checked_instance(DiscretizedNormal, _instance)
        new._loc, new._scale = self._loc, self._scale
        super(DiscretizedNormal, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def loc(self) -> Tensor:
        """Location, of shape `batch_shape`."""
        return self._loc.expand(self.batch_shape)

    @property
    def scale(self) -> Tensor:
        """Scale, of shape `batch_shape`."""
        return self._scale.expand(self.batch_shape)

    @property
    def mean(self) -> Tensor:
        """Exact mean, of shape `batch_shape`, by a sum over the 255 edges; memory of one.

        It lies inside [-1, 1] wherever loc is. Not meant to be differentiated, which would keep
        all terms.
        """
        total = torch.zeros_like(self._loc / self._scale)
        for edge in _EDGES:
            total = total + self._mass_above(edge)
        return (total * SPACING - 1).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """Exact variance, of shape `batch_shape`, by a sum over the edges of positive terms."""
        mean = self.mean
        centre = _nearest_level(mean)
        total = (centre - mean).square()
        for edge in _EDGES:
            above = self._mass_above(edge)
            mass = torch.where(centre < edge, above, 1 - above)
            total = total + 2 * SPACING * (edge - mean).abs() * mass
        return total

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of the bin that holds `value`, broadcast against `batch_shape`."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        return kernels.discretized_normal_log_prob(
            _nearest_level(value), self._loc, self._scale
        ).expand(shape)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Levels, `sample_shape + batch_shape`: a normal draw, rounded to the grid and clipped."""
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            noise = torch.randn(shape, dtype=self._loc.dtype, device=self._loc.device)
            return _nearest_level((self._loc + self._scale * noise).clamp(-1, 1))

    def _mass_above(self, edge: float) -> Tensor:
        return 0.5 * torch.erfc((edge - self._loc) / self._scale * 0.5**0.5)


_EDGES = tuple((level + 0.5) * SPACING - 1 for level in range(NUM_BINS - 1))


class OrderedCategorical(dist.Categorical):
    """Pyro's Categorical over levels 0, ..., S - 1 that are numbers: it has moments.

    `mean` is `sum_s s p(s)`, what a picture of grey levels shows of it, and `variance` that of the
    level.
    """

    @property
    def mean(self) -> Tensor:
        return (self.probs * self._levels()).sum(-1)

    @property
    def variance(self) -> Tensor:
        away = self._levels() - self.mean.unsqueeze(-1)
        return (self.probs * away.square()).sum(-1)

    def _levels(self) -> Tensor:
        return torch.arange(self.probs.shape[-1]).to(self.probs)


class SharedScaleNormal(TorchDistribution):
    r"""Multivariate normal :math:`N(\mu, L L^\top)` with one `L` for all batch elements.

    .. math:: \log p(x) = -\tfrac12 \lVert L^{-1} (x - \mu) \rVert^2
        - \sum_i \log L_{ii} - \tfrac d2 \log 2\pi

    All rows `x - loc` are right-hand sides of one triangular solve: O(d^2) per row, nothing of size
    `batch x d x d`, also under `torch.vmap` over `loc` and `value`. A solve and not a product with
    the inverse: on 1024 rows the product is at best twice as fast (d = 128, no faster at 256),
    on few rows slower, and its float32 errors are 15-40 times larger (`L` of condition 500).

    Args:
        loc: mean, of shape `(*batch_shape, d)`.
        scale_tril: lower-triangular factor with positive diagonal, of shape `(d, d)`.
        validate_args: whether to check arguments and values; Pyro's default if None.

    Raises:
        ValueError: if the shapes do not fit or, while validating, a constraint is violated.
    """

    arg_constraints = {  # noqa: RUF012
        "loc": constraints.real_vector,
        "scale_tril": constraints.lower_cholesky,
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, loc: Tensor, scale_tril: Tensor, *, validate_args: bool | None = None
    ) -> None:
        if loc.dim() < 1 or scale_tril.shape != (loc.shape[-1], loc.shape[-1]):
            raise ValueError(
                "SharedScaleNormal expected loc of shape (*batch, d) and one scale_tril of shape "
                f"(d, d), got {tuple(loc.shape)} and {tuple(scale_tril.shape)}; for a scale that "
                "varies over the batch use MultivariateNormal"
            )
        self.loc = loc
        self.scale_tril = scale_tril
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "SharedScaleNormal":
        """Returns the distribution with a larger batch shape; only `loc` expands."""
        new = self._get_checked_instance(SharedScaleNormal, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc = self.loc.expand(batch_shape + self.event_shape)
        new.scale_tril = self.scale_tril
        super(SharedScaleNormal, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """Mean, `(*batch_shape, d)`."""
        return self.loc

    @property
    def mode(self) -> Tensor:
        """Mode, `(*batch_shape, d)`."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Marginal variances, `(*batch_shape, d)`, a view of d numbers."""
        return self.scale_tril.square().sum(-1).expand(self.loc.shape)

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariance `L L^T`, `(*batch_shape, d, d)`, a view of one matrix."""
        covariance = self.scale_tril @ self.scale_tril.mT
        return covariance.expand(self.batch_shape + covariance.shape)

    @property
    def precision_matrix(self) -> Tensor:
        """Inverse covariance, `(*batch_shape, d, d)`, a view of one matrix."""
        precision = torch.cholesky_inverse(self.scale_tril)
        return precision.expand(self.batch_shape + precision.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, of `value`'s batch shape broadcast against `batch_shape`."""
        if self._validate_args:
            self._validate_sample(value)
        difference = value - self.loc
        rows = difference.reshape(-1, self.event_shape[0])
        solved = torch.linalg.solve_triangular(self.scale_tril.mT, rows, upper=True, left=False)
        whitened = solved.reshape(difference.shape)
        return -0.5 * whitened.square().sum(-1) - self._log_normalizer()

    def entropy(self) -> Tensor:
        """Differential entropy, of shape `batch_shape`."""
        entropy = 0.5 * self.event_shape[0] + self._log_normalizer()
        return entropy.expand(self.batch_shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Reparameterised draw `loc + L noise`, `sample_shape + batch_shape + (d,)`."""
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + noise @ self.scale_tril.mT

    def _log_normalizer(self) -> Tensor:
        log_scale = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return log_scale + 0.5 * self.event_shape[0] * math.log(2 * math.pi)
