"""Densities and draws by the unconstrained value, exact up to both edges of a support.

A density near an edge is large where the Jacobian is small, and in single precision the value
rounds to the edge: the sigmoid of 17 is 1, the exponential of -104 is 0. A Beta(.1, .1) has a tenth
of its mass above 1 - 2^-24, a Gamma(.01, .01) four tenths below the smallest float. So the density
is written in `u`, from which the value never has to be recovered.

Every family has a function from `(distribution, u)` to `log p(T(u))` and one from
`(distribution, batch_shape)` to an exact draw of `u`, where `T` is torch's bijection onto the
support (`biject_to`). All are plain tensor programs: `torch.vmap` and `make_fx` take them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
import torch.distributions as td
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from dcpc.divide.supports.jacobians import log_sech, log_stick_breaking, stick_breaking_logits

_TAIL = 40.0
"""Beyond it, `log(1 + e^-x)` is `e^-x` to double precision."""


@dataclass(frozen=True)
class Family:
    """Density and draws of one class of distributions, by the unconstrained value.

    Attributes:
        log_prob: From `(fn, u)` to `log p(T(u))`, of the batch shape of `u`.
        draw: From `(fn, batch_shape)` to a draw `(*batch_shape, *event)` of `u`.
    """

    log_prob: Callable[[Any, Tensor], Tensor]
    draw: Callable[[Any, torch.Size], Tensor]


def log_gamma_variate(shape: Tensor) -> Tensor:
    """Logarithm of a standard gamma variate, exact for any shape parameter.

    `log G(a) = log G(a + 1) + log(U) / a`. Source: Marsaglia and Tsang, "A simple method for
    generating gamma variables", ACM TOMS 26 (2000), section 6.

    Args:
        shape: Shape parameter, `(*batch)`.
    """
    return torch._standard_gamma(shape + 1).log() - exponential_variate(shape) / shape


def exponential_variate(like: Tensor) -> Tensor:
    """Standard exponential variate, positive. torch's own fills in place, which `vmap` refuses."""
    uniform = torch.rand(like.shape, dtype=like.dtype, device=like.device)
    # A uniform variate is zero once in 2^24 times in single precision.
    return -torch.log1p(-uniform).clamp(max=-torch.finfo(like.dtype).eps / 4)


def _beta_log_prob(fn: Any, u: Tensor) -> Tensor:
    a, b = fn.concentration1, fn.concentration0
    log_beta = a.lgamma() + b.lgamma() - (a + b).lgamma()
    return (a - 1) * logsigmoid(u) + (b - 1) * logsigmoid(-u) - log_beta


def _beta_draw(fn: Any, batch_shape: torch.Size) -> Tensor:
    a, b = fn.concentration1.expand(batch_shape), fn.concentration0.expand(batch_shape)
    return log_gamma_variate(a) - log_gamma_variate(b)


def _affine_beta_log_prob(fn: Any, u: Tensor) -> Tensor:
    return _beta_log_prob(fn.base_dist, u) - fn.scale.log()


def _affine_beta_draw(fn: Any, batch_shape: torch.Size) -> Tensor:
    return _beta_draw(fn.base_dist, batch_shape)


def _uniform_log_prob(fn: Any, u: Tensor) -> Tensor:
    return -(fn.high - fn.low).log().expand(torch.broadcast_shapes(u.shape, fn.low.shape))


def _uniform_draw(fn: Any, batch_shape: torch.Size) -> Tensor:
    low = fn.low.expand(batch_shape)
    return exponential_variate(low).log() - exponential_variate(low).log()


def _kumaraswamy_log_prob(fn: Any, u: Tensor) -> Tensor:
    """Density `a b x^(a-1) (1 - x^a)^(b-1)`."""
    a, b = fn.concentration1, fn.concentration0
    # 1 - x^a = 1 - e^-t with t = a softplus(-u), of which the logarithm does not underflow.
    log_softplus = torch.where(u > _TAIL, -u, softplus(-u.clamp(max=_TAIL), threshold=_TAIL).log())
    log_rest = _log1mexp_exp(a.log() + log_softplus)
    return a.log() + b.log() + (a - 1) * logsigmoid(u) + (b - 1) * log_rest


def _kumaraswamy_draw(fn: Any, batch_shape: torch.Size) -> Tensor:
    """`(1 - x^a)^b = U`, so `x = e^-t` with `a t = -log(1 - e^-s)` and `s = -log(U) / b`."""
    a, b = fn.concentration1.expand(batch_shape), fn.concentration0.expand(batch_shape)
    s = exponential_variate(b) / b
    log_at = torch.where(s > _TAIL, -s, (-_log1mexp(s.clamp(max=_TAIL))).log())
    log_t = log_at - a.log()
    return -log_t.exp() - _log1mexp_exp(log_t)


def _dirichlet_log_prob(fn: Any, u: Tensor) -> Tensor:
    a = fn.concentration
    log_beta = a.lgamma().sum(-1) - a.sum(-1).lgamma()
    return ((a - 1) * log_stick_breaking(u)).sum(-1) - log_beta


def _dirichlet_draw(fn: Any, batch_shape: torch.Size) -> Tensor:
    a = fn.concentration
    return stick_breaking_logits(log_gamma_variate(a.expand(*batch_shape, a.shape[-1])))


def _relaxed_one_hot_log_prob(fn: Any, u: Tensor) -> Tensor:
    """Concrete density on the simplex. Source: Maddison et al. (ICLR 2017), equation 10."""
    log_x = log_stick_breaking(u)
    num = log_x.shape[-1]
    score = fn.logits - log_x * fn.temperature.unsqueeze(-1)
    log_scale = math.lgamma(num) + (num - 1) * fn.temperature.log()
    return log_scale + (score.log_softmax(-1) - log_x).sum(-1)


def _relaxed_one_hot_draw(fn: Any, batch_shape: torch.Size) -> Tensor:
    logits = fn.logits.expand(*batch_shape, fn.logits.shape[-1])
    gumbel = -exponential_variate(logits).log()
    return stick_breaking_logits((logits + gumbel) / fn.temperature.unsqueeze(-1))


def _relaxed_bernoulli_log_prob(fn: Any, u: Tensor) -> Tensor:
    """Density `temperature x logistic(logits - temperature u) / (x (1 - x))`."""
    difference = fn.logits - u * fn.temperature
    base = fn.temperature.log() + logsigmoid(difference) + logsigmoid(-difference)
    return base - logsigmoid(u) - logsigmoid(-u)


def _relaxed_bernoulli_draw(fn: Any, batch_shape: torch.Size) -> Tensor:
    logits = fn.logits.expand(batch_shape)
    logistic = exponential_variate(logits).log() - exponential_variate(logits).log()
    return (logits + logistic) / fn.temperature


def _gamma_log_prob(fn: Any, u: Tensor) -> Tensor:
    a, rate = fn.concentration, fn.rate
    return a * rate.log() + (a - 1) * u - (u + rate.log()).exp() - a.lgamma()


def _gamma_draw(fn: Any, batch_shape: torch.Size) -> Tensor:
    return log_gamma_variate(fn.concentration.expand(batch_shape)) - fn.rate.log()


def _inverse_gamma_log_prob(fn: Any, u: Tensor) -> Tensor:
    a, rate = fn.concentration, fn.rate
    return a * rate.log() - (a + 1) * u - (rate.log() - u).exp() - a.lgamma()


def _inverse_gamma_draw(fn: Any, batch_shape: torch.Size) -> Tensor:
    return fn.rate.log() - log_gamma_variate(fn.concentration.expand(batch_shape))


def _exponential_log_prob(fn: Any, u: Tensor) -> Tensor:
    log_rate = fn.rate.log()
    return log_rate - (u + log_rate).exp()


def _exponential_draw(fn: Any, batch_shape: torch.Size) -> Tensor:
    rate = fn.rate.expand(batch_shape)
    return exponential_variate(rate).log() - rate.log()


def _weibull_log_prob(fn: Any, u: Tensor) -> Tensor:
    k, standard = fn.concentration, u - fn.scale.log()
    return k.log() - fn.scale.log() + (k - 1) * standard - (k * standard).exp()


def _weibull_draw(fn: Any, batch_shape: torch.Size) -> Tensor:
    k = fn.concentration.expand(batch_shape)
    return exponential_variate(k).log() / k + fn.scale.log()


def _fisher_snedecor_log_prob(fn: Any, u: Tensor) -> Tensor:
    a, b = fn.df1 / 2, fn.df2 / 2
    log_beta = a.lgamma() + b.lgamma() - (a + b).lgamma()
    standard = u + fn.df1.log() - fn.df2.log()
    return a * standard - u - (a + b) * softplus(standard, threshold=_TAIL) - log_beta


def _fisher_snedecor_draw(fn: Any, batch_shape: torch.Size) -> Tensor:
    a, b = fn.df1.expand(batch_shape) / 2, fn.df2.expand(batch_shape) / 2
    return log_gamma_variate(a) - log_gamma_variate(b) + fn.df2.log() - fn.df1.log()


def _half_cauchy_log_prob(fn: Any, u: Tensor) -> Tensor:
    log_scale = fn.scale.log()
    return math.log(2 / math.pi) - log_scale - softplus(2 * (u - log_scale), threshold=_TAIL)


def _half_cauchy_draw(fn: Any, batch_shape: torch.Size) -> Tensor:
    scale = fn.scale.expand(batch_shape)
    return _log_abs_normal(scale) - _log_abs_normal(scale) + scale.log()


def _half_normal_log_prob(fn: Any, u: Tensor) -> Tensor:
    standard = u - fn.scale.log()
    return 0.5 * math.log(2 / math.pi) - fn.scale.log() - 0.5 * (2 * standard).exp()


def _half_normal_draw(fn: Any, batch_shape: torch.Size) -> Tensor:
    scale = fn.scale.expand(batch_shape)
    return _log_abs_normal(scale) + scale.log()


def _pareto_log_prob(fn: Any, u: Tensor) -> Tensor:
    """Density of `x = scale + e^u`."""
    log_scale = fn.scale.log()
    return fn.alpha.log() - log_scale - (fn.alpha + 1) * softplus(u - log_scale, threshold=_TAIL)


def _pareto_draw(fn: Any, batch_shape: torch.Size) -> Tensor:
    excess = exponential_variate(fn.alpha.expand(batch_shape)) / fn.alpha
    return fn.scale.log() + excess + _log1mexp(excess)


def _lkj_cholesky_log_prob(fn: Any, u: Tensor) -> Tensor:
    """Density of the Cholesky factor, from the logarithms of its diagonal.

    `log L_ii = 1/2 sum_j log(1 - tanh(u_ij)^2)`; the order of `L_ii` and the constant are those of
    `torch.distributions.LKJCholesky`.
    """
    rows = torch.tril_indices(fn.dim, fn.dim, -1, device=u.device)[0]
    orders = 2 * (fn.concentration.unsqueeze(-1) - 1) + fn.dim - 1 - rows.to(u.dtype)
    others = fn.dim - 1
    alpha = fn.concentration + 0.5 * others
    constant = (
        0.5 * others * math.log(math.pi)
        + torch.mvlgamma(alpha - 0.5, others)
        - others * alpha.lgamma()
    )
    return (orders * log_sech(u)).sum(-1) - constant


def _lkj_cholesky_draw(fn: Any, batch_shape: torch.Size) -> Tensor:
    """Partial correlations `tanh(u)`, independent `2 Beta(b, b) - 1`.

    Source: Lewandowski, Kurowicka and Joe, J. Multivariate Analysis 100 (2009), section 2.4.
    """
    columns = torch.tril_indices(fn.dim, fn.dim, -1, device=fn.concentration.device)[1]
    b = fn.concentration.unsqueeze(-1) + 0.5 * (fn.dim - 2 - columns)
    b = b.expand(*batch_shape, len(columns))
    return 0.5 * (log_gamma_variate(b) - log_gamma_variate(b))


def _log_abs_normal(like: Tensor) -> Tensor:
    return torch.randn_like(like).abs().clamp(min=torch.finfo(like.dtype).tiny).log()


def _log1mexp(t: Tensor) -> Tensor:
    """`log(1 - e^-t)` for positive `t`, without cancellation at either end.

    Source: Maechler, "Accurately computing log(1 - exp(-|a|))" (2012).
    """
    small = t < math.log(2)
    near = torch.where(small, t, 1.0)
    far = torch.where(small, 1.0, t)
    return torch.where(small, (-torch.expm1(-near)).log(), torch.log1p(-(-far).exp()))


def _log1mexp_exp(log_t: Tensor) -> Tensor:
    """`log(1 - exp(-e^log_t))`, also where the inner exponential underflows."""
    rest = _log1mexp(log_t.clamp(min=-_TAIL).exp())
    return torch.where(log_t < -_TAIL, log_t, rest)


FAMILIES: dict[type, Family] = {
    td.Beta: Family(_beta_log_prob, _beta_draw),
    dist.AffineBeta: Family(_affine_beta_log_prob, _affine_beta_draw),
    td.Uniform: Family(_uniform_log_prob, _uniform_draw),
    td.Kumaraswamy: Family(_kumaraswamy_log_prob, _kumaraswamy_draw),
    td.RelaxedBernoulli: Family(_relaxed_bernoulli_log_prob, _relaxed_bernoulli_draw),
    td.Dirichlet: Family(_dirichlet_log_prob, _dirichlet_draw),
    td.RelaxedOneHotCategorical: Family(_relaxed_one_hot_log_prob, _relaxed_one_hot_draw),
    td.Gamma: Family(_gamma_log_prob, _gamma_draw),
    td.InverseGamma: Family(_inverse_gamma_log_prob, _inverse_gamma_draw),
    td.Exponential: Family(_exponential_log_prob, _exponential_draw),
    td.Weibull: Family(_weibull_log_prob, _weibull_draw),
    td.FisherSnedecor: Family(_fisher_snedecor_log_prob, _fisher_snedecor_draw),
    td.HalfCauchy: Family(_half_cauchy_log_prob, _half_cauchy_draw),
    td.HalfNormal: Family(_half_normal_log_prob, _half_normal_draw),
    td.Pareto: Family(_pareto_log_prob, _pareto_draw),
    td.LKJCholesky: Family(_lkj_cholesky_log_prob, _lkj_cholesky_draw),
}
"""By the class whose `log_prob` a distribution has."""
