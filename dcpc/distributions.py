"""Distributions that Pyro lacks, or computes at many times the cost they need.

`ContinuousBernoulli` is the likelihood of grey-scale pixels, by its logit. `SharedScaleNormal` is a
multivariate normal whose scale is one matrix for the whole batch. Both agree with their namesakes
in `torch.distributions`, stay accurate where those do not, and survive a capture by
`make_fx(torch.vmap(...))` as a few nodes that still differentiate when the graph runs again.

A `torch.autograd.Function` would lose its backward in a capture, and an operator given one by
`torch.library.register_autograd` raises under `torch.func.grad` and returns zero tangents under
`torch.func.jvp` (torch 2.13). So the operators of the continuous Bernoulli bring their own kernel
for the dispatcher's `Autograd` key.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all

__all__ = ["ContinuousBernoulli", "SharedScaleNormal"]

_LIBRARY = torch.library.Library("dcpc", "FRAGMENT")


def _define_elementwise(
    schema: str, kernel: Callable[..., Tensor], partials: tuple[Callable[..., Tensor], ...]
) -> Any:
    """Defines a broadcasting elementwise operator that is one node in every capture.

    Args:
        schema: the operator's schema; every argument and the result are tensors.
        kernel: the value. It runs below autograd and may work in place on its own temporaries.
        partials: for each argument, the partial derivative as a function of all arguments.

    Returns:
        The operator. `torch.autograd` in both modes, any nesting of `torch.func` transforms,
        `make_fx` and `torch.compile` understand it.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    op = getattr(torch.ops.dcpc, name).default

    class Elementwise(_SingleLevelFunction):
        @staticmethod
        def forward(keyset: Any, grad: bool, forward_grad: bool, *inputs: Tensor) -> Tensor:
            # A Function turns both modes off, here and in jvp; outer transforms still need them.
            with (
                torch._C._AutoDispatchBelowAutograd(),
                torch.set_grad_enabled(grad),
                forward_ad._set_fwd_grad_enabled(forward_grad),
            ):
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            ctx.save_for_backward(*inputs[3:])
            ctx.save_for_forward(*inputs[3:])

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            inputs = ctx.saved_tensors
            columns = zip(ctx.needs_input_grad[3:], partials, strict=True)
            # Autograd sums what was broadcast.
            grads = [grad * partial(*inputs) if needed else None for needed, partial in columns]
            return None, None, None, *grads

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
            columns = zip(tangents[3:], partials, strict=True)
            with forward_ad._set_fwd_grad_enabled(True):
                inputs = [forward_ad.unpack_dual(x).primal for x in ctx.saved_tensors]
                terms = [t * partial(*inputs) for t, partial in columns if t is not None]
                return functools.reduce(torch.add, terms)

    def autograd_kernel(keyset: Any, *inputs: Tensor) -> Tensor:
        modes = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
        with enable_single_level_autograd_function():
            return Elementwise.apply(keyset, *modes, *inputs)  # type: ignore[attr-defined]

    def fake(*inputs: Tensor) -> Tensor:
        return torch.empty_like(functools.reduce(torch.add, inputs))

    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        rank = max(x.dim() - (dim is not None) for x, dim in zip(inputs, dims, strict=True))
        aligned = []
        for x, dim in zip(inputs, dims, strict=True):
            if dim is not None:
                x = x.movedim(dim, 0)
                x = x.reshape(x.shape[:1] + (1,) * (rank + 1 - x.dim()) + x.shape[1:])
            aligned.append(x)
        return op(*aligned), 0

    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, autograd_kernel, "Autograd", with_keyset=True)
    torch.library.register_fake(f"dcpc::{name}", fake, lib=_LIBRARY)
    torch.library.register_vmap(f"dcpc::{name}", vmap, lib=_LIBRARY)
    return op


# mean - 1/2 = sum over k of B_2k / (2k)! lambda^(2k-1), B the Bernoulli numbers. Below the switch
# 1/(1 - exp(-lambda)) - 1/lambda loses digits, and these terms are exact to rounding; in single
# precision the first four are.
_SWITCH = 1.0
_SERIES = (
    1 / 12,
    -1 / 720,
    1 / 30240,
    -1 / 1209600,
    1 / 47900160,
    -691 / 1307674368000,
    1 / 74724249600,
    -3617 / 10670622842880000,
    43867 / 5109094217170944000,
    -174611 / 802857662698291200000,
)


def _log_prob_kernel(value: Tensor, logits: Tensor) -> Tensor:
    magnitude = logits.abs().clamp_(min=torch.finfo(logits.dtype).tiny)
    log_ratio = magnitude.neg().expm1_().div_(magnitude).neg_().log_()
    # relu comes off the exponent first: it cancels there, and would swamp log_ratio.
    return (value * logits).sub_(logits.clamp(min=0)).sub_(log_ratio)


def _mean_kernel(logits: Tensor) -> Tensor:
    series = _SERIES if logits.dtype == torch.float64 else _SERIES[:4]
    mean = logits.neg().exp_().neg_().add_(1).reciprocal_()
    square = logits.reciprocal()
    mean.sub_(square)
    torch.mul(logits, logits, out=square)
    near_zero = square.mul(series[-1])
    for coefficient in series[-2:0:-1]:
        near_zero.add_(coefficient).mul_(square)
    near_zero.add_(series[0]).mul_(logits).add_(0.5)
    return torch.where(square < _SWITCH**2, near_zero, mean, out=mean)


def _variance(logits: Tensor) -> Tensor:
    small = logits.abs() < _SWITCH
    magnitude = torch.where(small, _SWITCH, logits.abs())
    decay = torch.exp(-magnitude)
    square = torch.where(small, logits, 0).square()
    near_zero = torch.zeros_like(logits)
    for power, coefficient in reversed(list(enumerate(_SERIES))):
        near_zero = near_zero * square + (2 * power + 1) * coefficient
    return torch.where(small, near_zero, magnitude**-2 - decay / (1 - decay) ** 2)


_mean = _define_elementwise(
    "continuous_bernoulli_mean(Tensor logits) -> Tensor", _mean_kernel, (_variance,)
)
_log_prob = _define_elementwise(
    "continuous_bernoulli_log_prob(Tensor value, Tensor logits) -> Tensor",
    _log_prob_kernel,
    (lambda value, logits: logits, lambda value, logits: value - _mean(logits)),
)


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
        return _mean(self._logits).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """Variance, of shape `batch_shape`; the second derivative of `log Z`."""
        return _variance(self._logits).expand(self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, of the shape of `value` broadcast against `batch_shape`."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        return _log_prob(value, self._logits).expand(shape)

    def entropy(self) -> Tensor:
        """Differential entropy: minus the log-density, which is linear in x, at the mean."""
        return -_log_prob(_mean(self._logits), self._logits).expand(self.batch_shape)

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


def _shared_solve(scale_tril: Tensor, rows: Tensor) -> Tensor:
    """Solves `scale_tril y = x` for every row x: `(d, d)` and `(*batch, d)` to `(*batch, d)`."""
    flat = rows.reshape(-1, rows.shape[-1])
    solved = torch.linalg.solve_triangular(scale_tril.mT, flat, upper=True, left=False)
    return solved.reshape(rows.shape)


def _shared_solve_vmap(
    info: Any, dims: tuple[int | None, ...], scale_tril: Tensor, rows: Tensor
) -> tuple[Tensor, int]:
    """Folds the mapped axis into the rows, where torch would solve once per batch element."""
    scale_dim, rows_dim = dims[0], dims[1]
    if scale_dim is None and rows_dim is not None:
        return torch.ops.dcpc.shared_solve(scale_tril, rows.movedim(rows_dim, 0)), 0
    assert scale_dim is not None
    scales = scale_tril.movedim(scale_dim, 0)
    if rows_dim is None:
        rows = rows.expand(scales.shape[:1] + rows.shape)
    else:
        rows = rows.movedim(rows_dim, 0)
    flat = rows.reshape(rows.shape[0], -1, rows.shape[-1])
    solved = torch.linalg.solve_triangular(scales.mT, flat, upper=True, left=False)
    return solved.reshape(rows.shape), 0


# Composite: it dissolves into plain torch operators everywhere, also in a capture and its backward.
_LIBRARY.define("shared_solve(Tensor scale_tril, Tensor rows) -> Tensor")
_LIBRARY.impl("shared_solve", _shared_solve, "CompositeImplicitAutograd")
torch.library.register_vmap("dcpc::shared_solve", _shared_solve_vmap, lib=_LIBRARY)


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
        whitened = torch.ops.dcpc.shared_solve(self.scale_tril, value - self.loc)
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
