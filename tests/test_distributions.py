"""`dcpc.distributions` against mpmath, quadrature, finite differences and `torch.distributions`."""

import itertools
import math

import mpmath
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from dcpc.distributions import (
    Bernoulli,
    ContinuousBernoulli,
    DiscretizedNormal,
    OrderedCategorical,
    SharedScaleNormal,
)

EXTREME = [-1e4, -300.0, -88.8, -17.0, 17.0, 88.8, 300.0, 1e4]
NEAR_ZERO = [0.0, -0.0, 1e-30, 1e-8, -1e-6, 1e-4, -7.4e-4, 1e-3, 0.04, -0.05]
# Around the switch of the mean's series at |logit| = 1.
MIDDLE = [0.3, -0.7, 0.99999, -0.99999, 1.0, -1.0, 1.00001, 2.5, -6.0, 9.0]
LOGITS = NEAR_ZERO + MIDDLE + EXTREME


# Forward-mode differentiation compiles some of torch's own formulas with torch.jit.
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


@pytest.fixture(autouse=True)
def _seed() -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def exact(logit: float) -> tuple[mpmath.mpf, mpmath.mpf, mpmath.mpf]:
    """Log-normaliser, mean and variance to 30 digits (through mpmath's working precision)."""
    with mpmath.workdps(120):
        z = mpmath.mpf(logit)
        if z == 0:
            return mpmath.mpf(0), mpmath.mpf(1) / 2, mpmath.mpf(1) / 12
        log_z = mpmath.log(mpmath.expm1(z) / z)
        mean = 1 / (1 - mpmath.exp(-z)) - 1 / z
        variance = 1 / z**2 - 1 / (4 * mpmath.sinh(z / 2) ** 2)
        return log_z, mean, variance


def exact_moments(logits: Tensor) -> tuple[Tensor, Tensor]:
    moments = [exact(z)[1:] for z in logits.flatten().tolist()]
    mean, variance = torch.tensor([[float(x) for x in m] for m in moments], dtype=torch.float64).T
    return mean.reshape(logits.shape), variance.reshape(logits.shape)


def exact_log_prob(value: float, logit: float) -> float:
    with mpmath.workdps(60):
        return float(mpmath.mpf(value) * mpmath.mpf(logit) - exact(logit)[0])


def exact_score(value: float, logit: float) -> float:
    with mpmath.workdps(60):
        return float(mpmath.mpf(value) - exact(logit)[1])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-15), (torch.float32, 4e-7)])
def test_value_and_gradient_are_exact_from_zero_to_extreme_logits(dtype, tolerance) -> None:
    pairs = list(itertools.product([0.0, 1e-5, 0.25, 0.5, 0.999, 1.0], LOGITS))
    value = torch.tensor([v for v, _ in pairs], dtype=dtype)
    logits = torch.tensor([z for _, z in pairs], dtype=dtype, requires_grad=True)
    log_prob = ContinuousBernoulli(logits).log_prob(value)
    (score,) = torch.autograd.grad(log_prob.sum(), logits)
    inputs = list(zip(value.tolist(), logits.tolist(), strict=True))
    expected = torch.tensor([exact_log_prob(*p) for p in inputs], dtype=torch.float64)
    # The product value * logit rounds: no formula avoids that share.
    rounding = torch.finfo(dtype).eps * (value * logits).double().abs()
    error = (log_prob.double() - expected).abs()
    assert (error <= tolerance * (1 + expected.abs()) + rounding).all()
    expected = torch.tensor([exact_score(*p) for p in inputs], dtype=torch.float64)
    torch.testing.assert_close(score.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("logit", [1e4, 200.0, -1e4])
def test_single_precision_keeps_the_density_of_saturated_pixels(logit: float) -> None:
    # log p = log |logit| and the score 1 / |logit| would drown in the rounding of the logit.
    value = torch.tensor(float(logit > 0))
    logits = torch.tensor(logit, requires_grad=True)
    log_prob = ContinuousBernoulli(logits).log_prob(value)
    log_prob.backward()
    assert log_prob.item() == pytest.approx(math.log(abs(logit)), rel=2e-7)
    assert logits.grad is not None
    assert logits.grad.item() == pytest.approx(1 / logit, rel=1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 4e-15), (torch.float32, 2e-6)])
def test_mean_and_variance_are_exact(dtype: torch.dtype, tolerance: float) -> None:
    logits = torch.tensor(LOGITS, dtype=dtype)
    distribution = ContinuousBernoulli(logits)
    mean, variance = exact_moments(logits)
    torch.testing.assert_close(distribution.mean.double(), mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        distribution.variance.double(), variance, rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(distribution.stddev**2, distribution.variance)


def test_agrees_with_torch() -> None:
    logits = torch.linspace(-12, 12, 97, dtype=torch.float64)[:, None].requires_grad_()
    value = torch.rand(97, 5, dtype=torch.float64)
    ours = ContinuousBernoulli(logits)
    theirs = torch.distributions.ContinuousBernoulli(logits=logits)
    torch.testing.assert_close(ours.probs, theirs.probs)
    # torch's own error next to its Taylor region sets the tolerance.
    tolerance = {"rtol": 1e-7, "atol": 1e-7}
    torch.testing.assert_close(ours.log_prob(value), theirs.log_prob(value), **tolerance)
    torch.testing.assert_close(ours.mean, theirs.mean, **tolerance)
    torch.testing.assert_close(ours.variance, theirs.variance, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.entropy(), theirs.entropy(), **tolerance)
    torch.testing.assert_close(ours.cdf(value), theirs.cdf(value), **tolerance)
    torch.testing.assert_close(ours.icdf(value), theirs.icdf(value), **tolerance)
    ours_score = torch.autograd.grad(ours.log_prob(value).sum(), logits)
    theirs_score = torch.autograd.grad(theirs.log_prob(value).sum(), logits)
    torch.testing.assert_close(ours_score, theirs_score, **tolerance)


@pytest.mark.parametrize("logit", [-40.0, -1.5, -0.5, 0.0, 1e-5, 0.5, 1.5, 40.0])
def test_density_integrates_to_one_with_its_moments_and_entropy(logit: float) -> None:
    nodes, weights = np.polynomial.legendre.leggauss(80)
    value = torch.tensor((nodes + 1) / 2)
    distribution = ContinuousBernoulli(torch.tensor(logit, dtype=torch.float64))
    log_prob = distribution.log_prob(value)
    mass = log_prob.exp() * torch.tensor(weights / 2)
    mean = (mass * value).sum()
    assert mass.sum().item() == pytest.approx(1, abs=1e-13)
    assert distribution.mean.item() == pytest.approx(mean.item(), abs=1e-13)
    variance = (mass * (value - mean) ** 2).sum().item()
    assert distribution.variance.item() == pytest.approx(variance, abs=1e-13)
    entropy = -(mass * log_prob).sum().item()
    assert distribution.entropy().item() == pytest.approx(entropy, abs=1e-12)


@forward_mode
def test_derivatives_of_first_and_second_order_match_finite_differences() -> None:
    logits = torch.tensor([*NEAR_ZERO, *MIDDLE, -20.0, 25.0], dtype=torch.float64)
    logits.requires_grad_()
    value = torch.rand(len(logits), dtype=torch.float64, requires_grad=True)

    def log_prob(value: Tensor, logits: Tensor) -> Tensor:
        return ContinuousBernoulli(logits, validate_args=False).log_prob(value)

    def mean(logits: Tensor) -> Tensor:
        return ContinuousBernoulli(logits).mean

    assert torch.autograd.gradcheck(log_prob, (value, logits), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(log_prob, (value, logits))
    # Away from the switches, which finite differences straddle.
    smooth = torch.tensor([-20.0, -3.0, -0.6, 0.0, 0.2, 1.5], dtype=torch.float64)
    smooth.requires_grad_()
    assert torch.autograd.gradcheck(mean, (smooth,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(mean, (smooth,))


def test_gradients_of_broadcast_arguments_are_reduced_to_their_shapes() -> None:
    value = torch.rand(3, 1, 2, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(4, 1, dtype=torch.float64, requires_grad=True)
    log_prob = ContinuousBernoulli(logits).log_prob(value)
    assert log_prob.shape == (3, 4, 2)
    ours = torch.autograd.grad(log_prob.sin().sum(), (value, logits))
    theirs = torch.distributions.ContinuousBernoulli(logits=logits).log_prob(value)
    expected = torch.autograd.grad(theirs.sin().sum(), (value, logits))
    torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("value_dtype", [torch.float64, torch.float32, torch.int64])
def test_value_and_logits_of_different_types_promote_as_in_torch(value_dtype) -> None:
    value = torch.tensor([0, 1, 1]).to(value_dtype)
    logits = torch.tensor([0.3, -2.0, 5.0], requires_grad=True)
    log_prob = ContinuousBernoulli(logits, validate_args=False).log_prob(value)
    assert log_prob.dtype == torch.promote_types(value_dtype, torch.float32)
    (score,) = torch.autograd.grad(log_prob.sum(), logits)
    expected = [exact_score(v, z) for v, z in zip([0, 1, 1], logits.tolist(), strict=True)]
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, torch.tensor(expected))


@pytest.mark.parametrize("logit", [-30.0, -2.0, -1e-3, 0.0, 0.02, 0.5, 4.0, 30.0])
def test_samples_have_the_exact_moments_and_distribution_function(logit: float) -> None:
    num_samples = 40_000
    distribution = ContinuousBernoulli(torch.tensor(logit, dtype=torch.float64))
    samples = distribution.sample((num_samples,))
    assert samples.shape == (num_samples,)
    assert ((samples >= 0) & (samples <= 1)).all()
    _, mean, variance = (float(x) for x in exact(logit))
    assert abs(samples.mean().item() - mean) < 4 * math.sqrt(variance / num_samples)
    squares = (samples - mean) ** 2
    assert abs(squares.mean().item() - variance) < 4 * squares.std().item() / num_samples**0.5
    # Kolmogorov-Smirnov: P(sqrt(n) D > 1.95) = .001.
    uniform = distribution.cdf(samples).sort().values
    ranks = torch.arange(1, num_samples + 1, dtype=torch.float64) / num_samples
    assert num_samples**0.5 * (uniform - ranks).abs().max().item() < 1.95


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_quantile_function_is_exact_at_every_logit(dtype, tolerance) -> None:
    pairs = list(itertools.product(LOGITS, [0.0, 0.01, 0.5, 0.8, 1.0]))
    logits = torch.tensor([z for z, _ in pairs], dtype=dtype)
    uniform = torch.tensor([u for _, u in pairs], dtype=dtype)

    def quantile(z: float, u: float) -> float:
        with mpmath.workdps(120):
            return float(mpmath.log(1 - mpmath.mpf(u) + u * mpmath.exp(z)) / z) if z else u

    expected = [quantile(*p) for p in zip(logits.tolist(), uniform.tolist(), strict=True)]
    actual = ContinuousBernoulli(logits).icdf(uniform)
    torch.testing.assert_close(
        actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )
    assert ((actual >= 0) & (actual <= 1)).all()


def test_distribution_function_stays_exact_at_extreme_logits() -> None:
    logits = torch.tensor([-1e4, -50.0, -1e-9, 0.0, 1e-9, 50.0, 1e4], dtype=torch.float64)
    value = torch.tensor([-1.0, 0.0, 1e-4, 0.3, 1 - 1e-4, 1.0, 2.0], dtype=torch.float64)

    def mass(z: float, x: float) -> float:
        with mpmath.workdps(60):
            x = min(max(x, 0.0), 1.0)
            return float(mpmath.expm1(mpmath.mpf(z) * x) / mpmath.expm1(z)) if z else x

    expected = torch.tensor(
        [[mass(z, x) for z in logits.tolist()] for x in value.tolist()], dtype=torch.float64
    )
    actual = ContinuousBernoulli(logits).cdf(value[:, None])
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_reparameterised_samples_differentiate_in_the_logit_everywhere() -> None:
    # d x / d logit at fixed u, by central differences of the exact quantile function.
    uniform = torch.tensor([1e-9, 0.1, 0.5, 0.9, 1 - 1e-9], dtype=torch.float64)
    for logit in [0.0, -1e-10, 1e-6, -5e-4, 8e-4, -0.02, 0.5, -3.0, 20.0]:
        logits = torch.full((5,), logit, dtype=torch.float64, requires_grad=True)
        value = ContinuousBernoulli(logits).icdf(uniform)
        (slope,) = torch.autograd.grad(value.sum(), logits)
        with mpmath.workdps(60):

            def quantile(z: mpmath.mpf, u: float) -> mpmath.mpf:
                return mpmath.log1p(mpmath.mpf(u) * mpmath.expm1(z)) / z

            h = mpmath.mpf(10) ** -20
            z = mpmath.mpf(logit)
            expected = [
                float((quantile(z + h, u) - quantile(z - h, u)) / (2 * h)) for u in uniform.tolist()
            ]
        torch.testing.assert_close(
            slope, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-9
        )
    # At the end points, in single precision, as a uniform draw may give exactly zero.
    logits = torch.tensor([-40.0, 0.0, 40.0], requires_grad=True)
    (slope,) = torch.autograd.grad(ContinuousBernoulli(logits).icdf(torch.zeros(3)).sum(), logits)
    torch.testing.assert_close(slope, torch.zeros(3))


def test_rsample_gradient_is_that_of_the_mean() -> None:
    logits = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    samples = ContinuousBernoulli(logits).rsample((40_000,))
    assert samples.shape == (40_000, 3)
    (slope,) = torch.autograd.grad(samples.mean(0).sum(), logits)
    # |d x / d logit| < 1/4, so four standard errors are below .005.
    torch.testing.assert_close(slope, exact_moments(logits)[1], rtol=0, atol=5e-3)


def test_expand_shares_the_logits_and_keeps_every_shape() -> None:
    logits = torch.randn(5)
    distribution = ContinuousBernoulli(logits)
    expanded = distribution.expand([3, 2, 5])
    assert type(expanded) is ContinuousBernoulli
    assert expanded.batch_shape == (3, 2, 5)
    assert repr(expanded) == "ContinuousBernoulli(logits: torch.Size([3, 2, 5]))"
    for name in ("logits", "probs", "mean", "variance"):
        assert torch.equal(getattr(expanded, name), getattr(distribution, name).expand(3, 2, 5))
    assert expanded.logits.data_ptr() == logits.data_ptr()
    value = torch.rand(2, 1)
    expected = distribution.log_prob(value.expand(3, 2, 5))
    assert torch.equal(expanded.log_prob(value), expected)
    assert expanded.entropy().shape == (3, 2, 5)
    assert expanded.cdf(value).shape == expanded.icdf(value).shape == (3, 2, 5)
    assert expanded.sample((7,)).shape == (7, 3, 2, 5)
    # Independent noise per element of the expanded batch.
    assert expanded.sample().unique().numel() == 30
    event = expanded.to_event(2)
    assert event.batch_shape == (3,)
    assert event.log_prob(value.expand(3, 2, 5)).shape == (3,)
    torch.testing.assert_close(event.log_prob(value.expand(3, 2, 5)), expected.sum((1, 2)))


def test_number_as_logit_gives_a_scalar_distribution() -> None:
    distribution = ContinuousBernoulli(1.5)
    assert distribution.batch_shape == ()
    assert distribution.log_prob(torch.tensor(0.25)).item() == pytest.approx(
        exact_log_prob(0.25, 1.5), rel=1e-6
    )


def test_continuous_bernoulli_validates_like_torch() -> None:
    with pytest.raises(ValueError, match="logits"):
        ContinuousBernoulli(torch.tensor([0.0, math.nan]), validate_args=True)
    distribution = ContinuousBernoulli(torch.zeros(2), validate_args=True)
    with pytest.raises(ValueError, match="support"):
        distribution.log_prob(torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="support"):
        distribution.expand([3, 2]).log_prob(torch.tensor(-0.1))
    with pytest.raises(ValueError, match="broadcast"):
        distribution.log_prob(torch.zeros(3))
    unchecked = ContinuousBernoulli(torch.zeros(2), validate_args=False)
    assert torch.equal(unchecked.log_prob(torch.tensor(1.5)), torch.zeros(2))


def bernoulli_log_prob(value: Tensor, logits: Tensor) -> Tensor:
    return ContinuousBernoulli(logits, validate_args=False).log_prob(value)


def torch_log_prob(value: Tensor, logits: Tensor) -> Tensor:
    return torch.distributions.ContinuousBernoulli(logits=logits, validate_args=False).log_prob(
        value
    )


@forward_mode
def test_every_nesting_of_transforms_gives_the_derivative() -> None:
    value = torch.rand(4, 3, dtype=torch.float64)
    logits = torch.randn(4, 3, dtype=torch.float64)
    mean, variance = exact_moments(logits)

    def total(logits: Tensor, value: Tensor = value) -> Tensor:
        return bernoulli_log_prob(value, logits).sum()

    def row_total(logits: Tensor, value: Tensor) -> Tensor:
        return bernoulli_log_prob(value, logits).sum()

    close = torch.testing.assert_close
    close(grad(total)(logits), value - mean)
    close(vmap(grad(row_total))(logits, value), value - mean)
    close(vmap(vmap(grad(row_total)))(logits, value), value - mean)
    close(grad(lambda z: vmap(bernoulli_log_prob)(value, z).sum())(logits), value - mean)
    close(vmap(grad(row_total), in_dims=(1, 1), out_dims=1)(logits, value), value - mean)
    close(grad(lambda z: grad(total)(z).sum())(logits), -variance)
    close(vmap(grad(lambda z, x: grad(row_total)(z, x).sum()))(logits, value), -variance)
    close(hessian(row_total)(logits[0], value[0]), -variance[0].diag())
    close(jacrev(lambda z: bernoulli_log_prob(value[0], z))(logits[0]), (value - mean)[0].diag())
    # A global value or logit below vmap: its gradient sums over the broadcast axis.
    close(
        vmap(grad(row_total), in_dims=(0, None))(logits[:, 0], value[0]),
        (value[0] - mean[:, :1]).sum(1),
    )
    by_value = vmap(grad(row_total, argnums=1), in_dims=(None, 0))(logits[0], value[:, 0])
    close(by_value, logits[0].sum().expand(4))
    tangent = torch.ones_like(logits)
    close(jvp(lambda z: bernoulli_log_prob(value, z), (logits,), (tangent,))[1], value - mean)
    close(jvp(lambda x: bernoulli_log_prob(x, logits), (value,), (tangent,))[1], logits)
    slope = lambda z: jvp(lambda z: bernoulli_log_prob(value, z), (z,), (tangent,))[1]  # noqa: E731
    close(jvp(slope, (logits,), (tangent,))[1], -variance)


@pytest.mark.parametrize(
    ("value_shape", "logits_shape", "in_dims"),
    [
        ((7, 3), (4, 7, 3), (None, 0)),  # data shared by all particles
        ((3,), (4, 7, 3), (None, 0)),
        ((4, 7, 3), (3,), (0, None)),  # a global logit
        ((4, 3), (4, 7, 3), (0, 0)),  # ranks differ below vmap
        ((7, 4, 3), (3, 4), (1, 1)),
        ((4,), (7, 3, 4), (0, 2)),
    ],
)
def test_vmap_equals_a_loop(value_shape, logits_shape, in_dims) -> None:
    value = torch.rand(value_shape, dtype=torch.float64)
    logits = torch.randn(logits_shape, dtype=torch.float64)
    mapped = vmap(bernoulli_log_prob, in_dims=in_dims)(value, logits)

    def pick(x: Tensor, dim: int | None, i: int) -> Tensor:
        return x if dim is None else x.select(dim, i)

    for i in range(4):
        expected = torch_log_prob(pick(value, in_dims[0], i), pick(logits, in_dims[1], i))
        torch.testing.assert_close(mapped[i], expected, rtol=1e-7, atol=1e-7)


def operators(graph: GraphModule) -> list[str]:
    return [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]


@forward_mode
def test_capture_is_one_node_and_keeps_value_and_gradients_on_new_data() -> None:
    def capture(value: Tensor, logits: Tensor) -> GraphModule:
        return make_fx(vmap(bernoulli_log_prob, in_dims=(None, 0)))(value, logits)

    graph = capture(torch.rand(7, 3), torch.randn(4, 7, 3))
    names = [name for name in operators(graph) if "dcpc" in name]
    assert names == ["dcpc.continuous_bernoulli_log_prob.default"]

    value = torch.rand(7, 3, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(4, 7, 3, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(4, 7, 3, dtype=torch.float64)
    actual = graph(value, logits)
    expected = torch_log_prob(value, logits)
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)
    actual_grads = torch.autograd.grad(actual, (value, logits), cotangent)
    expected_grads = torch.autograd.grad(expected, (value, logits), cotangent)
    torch.testing.assert_close(actual_grads, expected_grads, rtol=1e-7, atol=1e-7)
    # The captured graph is itself open to torch.func, in both modes.
    func_grads = grad(lambda v, z: (graph(v, z) * cotangent).sum(), argnums=(0, 1))(value, logits)
    torch.testing.assert_close(func_grads, expected_grads, rtol=1e-7, atol=1e-7)
    _, tangent = jvp(lambda z: (graph(value, z) * cotangent).sum(), (logits,), (logits,))
    torch.testing.assert_close(tangent, (expected_grads[1] * logits).sum(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("style", ["autograd", "func"])
def test_captured_gradient_equals_the_eager_one(style: str) -> None:
    value = torch.rand(4, 3, dtype=torch.float64)

    def score(logits: Tensor, value: Tensor) -> Tensor:
        if style == "func":
            return vmap(grad(lambda z, x: bernoulli_log_prob(x, z).sum()))(logits, value)
        logits = logits.detach().requires_grad_()
        return torch.autograd.grad(vmap(bernoulli_log_prob)(value, logits).sum(), logits)[0]

    graph = make_fx(score)(torch.zeros(4, 3, dtype=torch.float64), value)
    assert "dcpc.continuous_bernoulli_mean.default" in operators(graph)
    logits = torch.randn(4, 3, dtype=torch.float64)
    mean, _ = exact_moments(logits)
    torch.testing.assert_close(graph(logits, value), value - mean)


def test_operators_pass_torchs_own_checks() -> None:
    value = torch.rand(2, 1, 3, requires_grad=True)
    logits = torch.randn(4, 1, requires_grad=True)
    torch.library.opcheck(torch.ops.dcpc.continuous_bernoulli_log_prob.default, (value, logits))
    torch.library.opcheck(torch.ops.dcpc.continuous_bernoulli_mean.default, (logits,))


def random_scale(dim: int) -> Tensor:
    factor = torch.randn(dim, dim, dtype=torch.float64)
    return torch.linalg.cholesky(factor @ factor.mT / dim + 0.5 * torch.eye(dim).double())


def shared_log_prob(value: Tensor, loc: Tensor, scale_tril: Tensor) -> Tensor:
    return SharedScaleNormal(loc, scale_tril, validate_args=False).log_prob(value)


def dense_log_prob(value: Tensor, loc: Tensor, scale_tril: Tensor) -> Tensor:
    covariance = scale_tril @ scale_tril.mT
    return torch.distributions.MultivariateNormal(
        loc, covariance_matrix=covariance, validate_args=False
    ).log_prob(value)


@pytest.mark.parametrize(
    ("value_shape", "loc_shape"),
    [((5,), (5,)), ((3, 5), (5,)), ((5,), (3, 5)), ((2, 1, 5), (3, 5)), ((4, 2, 3, 5), (2, 3, 5))],
)
def test_log_prob_and_gradients_agree_with_the_dense_normal(value_shape, loc_shape) -> None:
    value = torch.randn(value_shape, dtype=torch.float64, requires_grad=True)
    loc = torch.randn(loc_shape, dtype=torch.float64, requires_grad=True)
    scale_tril = random_scale(5).requires_grad_()
    actual = shared_log_prob(value, loc, scale_tril)
    expected = dense_log_prob(value, loc, scale_tril)
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(expected)
    actual_grads = torch.autograd.grad(actual, (value, loc, scale_tril), cotangent)
    expected_grads = torch.autograd.grad(expected, (value, loc, scale_tril), cotangent)
    torch.testing.assert_close(actual_grads[:2], expected_grads[:2])
    # The covariance depends on the upper triangle too; as a parameter the scale has none.
    torch.testing.assert_close(actual_grads[2].tril(), expected_grads[2].tril())
    assert not actual_grads[2].triu(1).any()


@forward_mode
def test_log_prob_passes_gradcheck_twice() -> None:
    arguments = (torch.randn(3, 4), torch.randn(3, 4), random_scale(4))
    arguments = tuple(x.double().requires_grad_() for x in arguments)

    def log_prob(value: Tensor, loc: Tensor, scale_tril: Tensor) -> Tensor:
        return shared_log_prob(value, loc, scale_tril.tril())

    assert torch.autograd.gradcheck(log_prob, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(log_prob, arguments)


def test_moments_and_entropy_agree_with_the_dense_normal() -> None:
    loc = torch.randn(2, 3, 4, dtype=torch.float64)
    scale_tril = random_scale(4)
    ours = SharedScaleNormal(loc, scale_tril)
    theirs = torch.distributions.MultivariateNormal(loc, scale_tril @ scale_tril.mT)
    assert ours.batch_shape == (2, 3)
    assert ours.event_shape == (4,)
    for name in ("mean", "mode", "variance", "stddev", "covariance_matrix", "precision_matrix"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), msg=name)
    torch.testing.assert_close(ours.entropy(), theirs.entropy())


def test_samples_have_the_mean_and_covariance() -> None:
    num_samples = 40_000
    loc = torch.randn(2, 3, dtype=torch.float64)
    scale_tril = random_scale(3)
    samples = SharedScaleNormal(loc, scale_tril).sample((num_samples,))
    assert samples.shape == (num_samples, 2, 3)
    covariance = scale_tril @ scale_tril.mT
    standard_error = covariance.diagonal().sqrt() / num_samples**0.5
    assert ((samples.mean(0) - loc).abs() < 4 * standard_error).all()
    deviation = samples - loc
    for i, j in itertools.product(range(2), range(2)):
        product = deviation[:, i, :, None] * deviation[:, j, None, :]
        expected = covariance if i == j else torch.zeros_like(covariance)
        error = (product.mean(0) - expected).abs()
        assert (error < 4.5 * product.std(0) / num_samples**0.5).all()


def test_rsample_is_differentiable_in_loc_and_scale() -> None:
    loc = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    scale_tril = random_scale(3).requires_grad_()
    sample = SharedScaleNormal(loc, scale_tril).rsample((5,))
    weights = torch.randn(5, 2, 3, dtype=torch.float64)
    loc_grad, scale_grad = torch.autograd.grad((sample * weights).sum(), (loc, scale_tril))
    torch.testing.assert_close(loc_grad, weights.sum(0))
    noise = torch.linalg.solve(scale_tril, sample.mT).mT.detach()
    torch.testing.assert_close(scale_grad, torch.einsum("abi,abj->ij", weights, noise))


@pytest.mark.parametrize(
    "in_dims",
    [(0, 0, None), (0, None, None), (None, 0, None), (2, 1, None), (0, 0, 0), (None, None, 2)],
)
def test_shared_scale_vmap_equals_a_loop(in_dims) -> None:
    arguments = [torch.randn(7, 3).double(), torch.randn(7, 3).double(), random_scale(3)]
    if in_dims[2] is not None:
        arguments[2] = torch.stack([random_scale(3) for _ in range(4)])
    for k in (0, 1):
        if in_dims[k] is not None:
            arguments[k] = torch.randn(4, 7, 3, dtype=torch.float64)
    mapped = [
        x if dim is None else x.movedim(0, dim) for x, dim in zip(arguments, in_dims, strict=True)
    ]
    cotangent = torch.randn(4, 7, dtype=torch.float64)
    for x in mapped:
        x.requires_grad_()
    actual = vmap(shared_log_prob, in_dims=in_dims)(*mapped)
    loop = [
        dense_log_prob(
            *(x if d is None else x.select(d, i) for x, d in zip(mapped, in_dims, strict=True))
        )
        for i in range(4)
    ]
    expected = torch.stack(loop)
    torch.testing.assert_close(actual, expected)
    actual_grads = torch.autograd.grad(actual, mapped, cotangent)
    expected_grads = torch.autograd.grad(expected, mapped, cotangent)
    torch.testing.assert_close(actual_grads[:2], expected_grads[:2])
    actual_scale, expected_scale = (
        g[2] if in_dims[2] is None else g[2].movedim(in_dims[2], 0)
        for g in (actual_grads, expected_grads)
    )
    torch.testing.assert_close(actual_scale.tril(), expected_scale.tril())


def test_nested_vmap_and_func_grad_agree_with_the_dense_normal() -> None:
    loc = torch.randn(4, 2, 7, 3, dtype=torch.float64)
    value = torch.randn(2, 7, 3, dtype=torch.float64)
    scale_tril = random_scale(3)
    nested = vmap(vmap(shared_log_prob, in_dims=(0, 0, None)), in_dims=(None, 0, None))
    torch.testing.assert_close(
        nested(value, loc, scale_tril), dense_log_prob(value, loc, scale_tril)
    )
    actual = grad(lambda *a: nested(*a).sum(), argnums=(0, 1))(value, loc, scale_tril)
    expected = grad(lambda *a: dense_log_prob(*a).sum(), argnums=(0, 1))(value, loc, scale_tril)
    torch.testing.assert_close(actual, expected)
    # Scale mapped outside, rows mapped inside.
    scales = torch.stack([random_scale(3) for _ in range(4)])
    mixed = vmap(vmap(shared_log_prob, in_dims=(0, 0, None)), in_dims=(None, 0, 0))
    expected = torch.stack([dense_log_prob(value, m, s) for m, s in zip(loc, scales, strict=True)])
    torch.testing.assert_close(mixed(value, loc, scales), expected)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_capture_solves_once_and_never_expands_the_scale(with_gradient: bool) -> None:
    particles, population, dim = 6, 5, 3
    weight = torch.randn(dim, dim, dtype=torch.float64)

    def log_prob(z: Tensor, scale_tril: Tensor) -> Tensor:
        return vmap(lambda z: shared_log_prob(z.sin(), z @ weight, scale_tril))(z)

    def score(z: Tensor, scale_tril: Tensor) -> tuple[Tensor, ...]:
        z, scale_tril = z.detach().requires_grad_(), scale_tril.detach().requires_grad_()
        return torch.autograd.grad(log_prob(z, scale_tril).sum(), (z, scale_tril))

    scale_tril = random_scale(dim)
    z = torch.randn(particles, population, dim, dtype=torch.float64)
    graph = make_fx(score if with_gradient else log_prob)(z, scale_tril)
    solves = [n for n in graph.graph.nodes if "solve" in str(n.target)]
    # The gradient's second solve is with the transposed scale.
    assert len(solves) == 1 + with_gradient
    for node in solves:
        assert str(node.target) == "aten.linalg_solve_triangular.default"
        matrix, rows = (a.meta["tensor_meta"].shape for a in node.args)
        assert matrix == (dim, dim)
        assert rows == (particles, population, dim)
    for node in graph.graph.nodes:
        meta = node.meta.get("tensor_meta")
        assert getattr(meta, "shape", torch.Size()).numel() <= particles * population * dim

    z = torch.randn(particles, population, dim, dtype=torch.float64, requires_grad=True)
    scale_tril = random_scale(dim).requires_grad_()
    expected = dense_log_prob(z.sin(), z @ weight, scale_tril)
    expected_grads = torch.autograd.grad(expected.sum(), (z, scale_tril), retain_graph=True)
    if with_gradient:
        actual_grads = graph(z, scale_tril)
    else:
        torch.testing.assert_close(graph(z, scale_tril), expected)
        actual_grads = torch.autograd.grad(graph(z, scale_tril).sum(), (z, scale_tril))
    torch.testing.assert_close(actual_grads[0], expected_grads[0])
    torch.testing.assert_close(actual_grads[1].tril(), expected_grads[1].tril())


def test_bernoulli_agrees_with_cross_entropy() -> None:
    logits = torch.tensor(
        [-800.0, -50.0, -1.5, 0.0, 1e-9, 3.0, 39.0, 41.0, 800.0], dtype=torch.float64
    )
    for value in (0.0, 0.3, 1.0):
        x = torch.full_like(logits, value)
        leaf = logits.clone().requires_grad_()
        log_prob = Bernoulli(logits=leaf, validate_args=False).log_prob(x)
        # x log p + (1 - x) log(1 - p), with both logarithms without cancellation.
        expected = -x * torch.logaddexp(torch.zeros(()), -logits) - (1 - x) * torch.logaddexp(
            torch.zeros(()), logits
        )
        torch.testing.assert_close(log_prob, expected, rtol=1e-14, atol=1e-15)
        (slope,) = torch.autograd.grad(log_prob.sum(), leaf)
        torch.testing.assert_close(slope, x - torch.special.expit(logits))


def test_bernoulli_is_three_operations_in_a_capture() -> None:
    logits, x = torch.randn(3, 5), torch.rand(5)

    def log_prob(logits: Tensor) -> Tensor:
        return Bernoulli(logits=logits, validate_args=False).log_prob(x)

    graph = make_fx(vmap(log_prob))(logits)
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    views = ("aten.permute.default", "aten.view.default")
    names = [call.split(".")[1] for call in calls if call not in views]
    assert sorted(names) == ["mul", "softplus", "sub"]
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits
    expected = -cross_entropy(logits, x.expand(3, 5), reduction="none")
    torch.testing.assert_close(graph(logits), expected)


def test_bernoulli_checks_its_values() -> None:
    with pytest.raises(ValueError, match="support"):
        Bernoulli(logits=torch.zeros(2), validate_args=True).log_prob(torch.tensor([0.5, 1.0]))


def test_expand_leaves_the_scale_alone() -> None:
    scale_tril = random_scale(3)
    distribution = SharedScaleNormal(torch.randn(3).double(), scale_tril)
    expanded = distribution.expand([4, 2])
    assert type(expanded) is SharedScaleNormal
    assert expanded.scale_tril is scale_tril
    assert (expanded.batch_shape, expanded.event_shape) == ((4, 2), (3,))
    value = torch.randn(3, dtype=torch.float64)
    assert torch.equal(expanded.log_prob(value), distribution.log_prob(value).expand(4, 2))
    assert expanded.sample((5,)).shape == (5, 4, 2, 3)
    assert expanded.covariance_matrix.shape == (4, 2, 3, 3)
    assert expanded.covariance_matrix.untyped_storage().nbytes() == 9 * 8
    event = expanded.to_event(1)
    assert (event.batch_shape, event.event_shape) == ((4,), (2, 3))
    assert event.log_prob(torch.randn(4, 2, 3).double()).shape == (4,)


def test_shared_scale_normal_validates_like_torch() -> None:
    scale_tril = random_scale(3)
    loc = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="scale_tril"):
        SharedScaleNormal(loc, -scale_tril, validate_args=True)
    with pytest.raises(ValueError, match="scale_tril"):
        SharedScaleNormal(loc, scale_tril.mT, validate_args=True)
    with pytest.raises(ValueError, match="loc"):
        SharedScaleNormal(loc / 0, scale_tril, validate_args=True)
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 2\)"):
        SharedScaleNormal(loc, torch.eye(2))
    with pytest.raises(ValueError, match="MultivariateNormal"):
        SharedScaleNormal(loc, scale_tril.expand(2, 3, 3))
    with pytest.raises(ValueError, match="loc"):
        SharedScaleNormal(torch.tensor(0.0), scale_tril)
    distribution = SharedScaleNormal(loc, scale_tril, validate_args=True)
    with pytest.raises(ValueError, match="support"):
        distribution.log_prob(torch.full((3,), math.nan, dtype=torch.float64))
    with pytest.raises(ValueError, match="shape"):
        distribution.log_prob(torch.zeros(2, 4, dtype=torch.float64))


def pixel_model(images: Tensor, scale_tril: Tensor, weight: Tensor) -> None:
    data = pyro.plate("data", images.shape[0], dim=-2)
    with data, pyro.plate("views", 2, dim=-1):
        z = pyro.sample("z", SharedScaleNormal(scale_tril.new_zeros(3), scale_tril))
    with data:
        logits = (z @ weight).sum(-2, keepdim=True)
        pyro.sample("x", ContinuousBernoulli(logits).to_event(1), obs=images[:, None, :])


def test_both_work_in_a_pyro_model_with_plates() -> None:
    images = torch.rand(5, 4, dtype=torch.float64)
    weight = torch.randn(3, 4, dtype=torch.float64)
    scale_tril = random_scale(3)
    trace = poutine.trace(pixel_model).get_trace(images, scale_tril, weight)
    trace.compute_log_prob()
    z = trace.nodes["z"]["value"]
    assert z.shape == (5, 2, 3)
    assert trace.nodes["z"]["log_prob"].shape == (5, 2)
    assert trace.nodes["x"]["log_prob"].shape == (5, 1)
    expected = dist.MultivariateNormal(torch.zeros(3).double(), scale_tril=scale_tril).log_prob(z)
    torch.testing.assert_close(trace.nodes["z"]["log_prob"], expected)
    logits = (z @ weight).sum(-2)
    expected = dist.ContinuousBernoulli(logits=logits).to_event(1).log_prob(images)
    torch.testing.assert_close(trace.nodes["x"]["log_prob"][:, 0], expected, rtol=1e-7, atol=1e-7)


def test_captured_pyro_model_gives_the_gradient_of_its_log_joint() -> None:
    images = torch.rand(5, 4, dtype=torch.float64)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    scale_tril = random_scale(3).requires_grad_()

    def log_joint(z: Tensor, weight: Tensor, scale_tril: Tensor) -> Tensor:
        conditioned = poutine.condition(pixel_model, data={"z": z})
        with pyro.validation_enabled(False):
            trace = poutine.trace(conditioned).get_trace(images, scale_tril, weight)
            return trace.log_prob_sum()

    z = torch.randn(6, 5, 2, 3, dtype=torch.float64)
    graph = make_fx(vmap(log_joint, in_dims=(0, None, None)))(z, weight, scale_tril)
    z = torch.randn(6, 5, 2, 3, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(3, dtype=torch.float64)
    prior = dense_log_prob(z, zero, scale_tril).sum((1, 2))
    logits = (z @ weight).sum(-2)
    expected = prior + torch_log_prob(images, logits).sum((1, 2))
    actual = graph(z, weight, scale_tril)
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)
    leaves = (z, weight, scale_tril)
    actual_grads = torch.autograd.grad(actual.sum(), leaves)
    expected_grads = torch.autograd.grad(expected.sum(), leaves)
    torch.testing.assert_close(actual_grads[:2], expected_grads[:2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        actual_grads[2].tril(), expected_grads[2].tril(), rtol=1e-6, atol=1e-6
    )


LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1
SCALES = [1e-3, 4e-3, 0.0156, 0.0158, 0.03, 0.2, 1.0, 30.0, 1e3]
# In scales from the centre of the bin, around the hand-overs of the formulas and far out.
DISTANCES = [0.0, 1e-3, 0.4, -1.0, 2.5, -4.9, 5.2, 14.0, -40.0, 1e3, -1e3]


def exact_bin(level: int, loc: float, scale: float) -> tuple[float, float, float]:
    """Log-mass of a bin and its derivatives in loc and scale, from the definition."""
    with mpmath.workdps(60):
        loc, scale = mpmath.mpf(loc), mpmath.mpf(scale)
        edges = [mpmath.mpf(2 * level + shift) / 255 - 1 for shift in (-1, 1)]
        lower, upper = ((edge - loc) / scale for edge in edges)
        lower = -mpmath.inf if level == 0 else lower
        upper = mpmath.inf if level == 255 else upper

        def tail(x: mpmath.mpf) -> mpmath.mpf:
            return mpmath.erfc(x / mpmath.sqrt(2)) / 2

        def moment(x: mpmath.mpf) -> mpmath.mpf:
            return mpmath.mpf(0) if mpmath.isinf(x) else x * mpmath.npdf(x)

        # The side on which both tails are small, so that 60 digits suffice.
        above = lower > 0
        mass = tail(lower) - tail(upper) if above else tail(-upper) - tail(-lower)
        by_loc = (mpmath.npdf(lower) - mpmath.npdf(upper)) / (mass * scale)
        by_scale = (moment(lower) - moment(upper)) / (mass * scale)
        return float(mpmath.log(mass)), float(by_loc), float(by_scale)


@pytest.mark.parametrize("level", [0, 1, 100, 254, 255])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-12), (torch.float32, 2e-5)])
def test_discretized_normal_is_exact_at_every_scale_and_distance(level, dtype, tolerance) -> None:
    pairs = list(itertools.product(SCALES, DISTANCES))
    scale = torch.tensor([s for s, _ in pairs], dtype=dtype, requires_grad=True)
    centre = LEVELS[level].to(dtype)
    offset = torch.tensor([s * d for s, d in pairs], dtype=dtype)
    loc = (centre - offset).detach().requires_grad_()
    log_prob = DiscretizedNormal(loc, scale).log_prob(centre)
    actual = (log_prob, *torch.autograd.grad(log_prob.sum(), (loc, scale)))
    # The formula sees `centre - loc` as rounded, and centres that are not quite j / 127.5 - 1.
    seen = LEVELS[level] - (centre - loc).detach().double()
    inputs = zip(seen.tolist(), scale.tolist(), strict=True)
    expected = torch.tensor([exact_bin(level, *x) for x in inputs], dtype=torch.float64).T
    # Units: nats, nats per scale. Terms of size m^2 cancel in the derivatives' sums.
    size = 1 + (offset.double() / scale.detach().double()).square()
    scale = scale.detach().double()
    assert all(bool(x.isfinite().all()) for x in actual)
    assert ((actual[0].double() - expected[0]).abs() <= tolerance * size).all()
    for got, right in zip(actual[1:], expected[1:], strict=True):
        assert ((got.double() - right).abs() * scale <= tolerance * size).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("loc", [-1.0, 0.0, 0.003, 0.71, 1.4, -60.0])
def test_the_256_probabilities_sum_to_one(loc: float, scale: float) -> None:
    arguments = (torch.tensor(loc, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64))
    log_prob = DiscretizedNormal(*arguments).log_prob(LEVELS)
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-12)
    single = DiscretizedNormal(*(x.float() for x in arguments)).log_prob(LEVELS.float())
    assert single.double().exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("loc", "scale"), [(0.1, 0.2), (-0.95, 0.3), (1.3, 0.1), (0.501, 2e-3)])
def test_moments_and_samples_are_those_of_the_256_probabilities(loc: float, scale: float) -> None:
    distribution = DiscretizedNormal(
        *(torch.tensor([x], dtype=torch.float64) for x in (loc, scale))
    )
    mass = torch.tensor(
        [math.exp(exact_bin(level, loc, scale)[0]) for level in range(256)]
    ).double()
    mean = (mass * LEVELS).sum().item()
    variance = (mass * (LEVELS - mean) ** 2).sum().item()
    assert distribution.mean.item() == pytest.approx(mean, abs=1e-7)
    assert distribution.variance.item() == pytest.approx(variance, rel=1e-6)
    num_samples = 20_000
    samples = distribution.sample((num_samples,))
    assert samples.shape == (num_samples, 1)
    assert distribution.support.check(samples).all()
    counts = torch.bincount((samples.flatten() * 127.5 + 127.5).round().long(), minlength=256)
    expected = num_samples * mass
    likely = expected > 5
    # Chi-squared over n bins: mean n, standard deviation sqrt(2 n).
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum().item()
    count = int(likely.sum())
    assert statistic < count + 4.5 * math.sqrt(2 * count)
    assert counts[~likely].sum().item() <= expected[~likely].sum().item() + 12


def discretized_log_prob(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return DiscretizedNormal(loc, scale, validate_args=False).log_prob(value)


def plain_log_prob(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The definition, which is accurate near loc and in double precision."""
    normal = torch.distributions.Normal(loc, scale, validate_args=False)
    below = torch.where(value < -0.999, 0.0, normal.cdf(value - 1 / 255))
    above = torch.where(value > 0.999, 1.0, normal.cdf(value + 1 / 255))
    return (above - below).log()


def pixels(*shape: int) -> Tensor:
    """Levels of every kind: inner ones, and the two open ends."""
    return LEVELS[torch.randint(-40, 296, shape).clamp(0, 255)]


def discretized_arguments() -> tuple[Tensor, Tensor]:
    loc = torch.empty(4, 7, 3, dtype=torch.float64).uniform_(-0.8, 0.8)
    return loc, torch.tensor([0.9, 0.7, 0.6], dtype=torch.float64)


@forward_mode
def test_discretized_derivatives_match_finite_differences() -> None:
    value, (loc, scale) = pixels(5, 3), discretized_arguments()
    loc, scale[2] = loc[0, :5], 0.01  # which needs the tails
    loc[:, 2] = value[:, 2] + 0.01 * torch.randn(5, dtype=torch.float64)
    loc.requires_grad_()
    scale.requires_grad_()
    function = discretized_log_prob
    assert torch.autograd.gradcheck(
        lambda loc, scale: function(value, loc, scale), (loc, scale), check_forward_ad=True
    )
    fixed = scale.detach()
    assert torch.autograd.gradgradcheck(lambda loc: function(value, loc, fixed), (loc,))
    (slope,) = torch.autograd.grad(function(value, loc, scale).sum(), loc, create_graph=True)
    with pytest.raises(NotImplementedError, match="in loc only"):
        slope.sum().backward()


def test_value_and_gradient_do_not_depend_on_how_the_work_is_vectorised() -> None:
    value, (loc, scale) = pixels(7, 3), discretized_arguments()
    expected = plain_log_prob(value, loc, scale)
    by_loc, by_scale = torch.autograd.functional.jacobian(
        lambda loc, scale: plain_log_prob(value, loc, scale).sum(), (loc, scale)
    )
    close = torch.testing.assert_close
    tolerance = {"rtol": 1e-8, "atol": 1e-9}
    over_particles = vmap(discretized_log_prob, in_dims=(None, 0, None))
    close(over_particles(value, loc, scale), expected, **tolerance)
    both = grad(lambda *a: over_particles(value, *a).sum(), argnums=(0, 1))(loc, scale)
    close(both, (by_loc, by_scale), **tolerance)
    inside = vmap(grad(lambda loc: discretized_log_prob(value, loc, scale).sum()))(loc)
    close(inside, by_loc, **tolerance)
    # All shapes of scale: a number, per pixel, per particle, wider than loc.
    close(discretized_log_prob(value, loc, scale.expand(4, 7, 3)), expected, **tolerance)
    close(
        discretized_log_prob(value, loc[0, 0, 0], scale), plain_log_prob(value, loc[0, 0, 0], scale)
    )
    mapped = vmap(discretized_log_prob, in_dims=(None, None, 0))
    scales = scale.expand(4, 3) * torch.arange(1, 5)[:, None]
    each = torch.stack([plain_log_prob(value, loc[0], s) for s in scales])
    close(mapped(value, loc[0], scales), each, **tolerance)


def test_discretized_capture_is_one_node_and_keeps_its_gradients_on_new_data() -> None:
    function = vmap(discretized_log_prob, in_dims=(None, 0, None))
    graph = make_fx(function)(pixels(7, 3), *discretized_arguments())
    names = [name for name in operators(graph) if "dcpc" in name]
    assert names == ["dcpc.discretized_normal_log_prob.default"]
    value, arguments = pixels(7, 3), discretized_arguments()
    for x in arguments:
        x.requires_grad_()
    expected = plain_log_prob(value, *arguments)
    actual = graph(value, *arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)
    actual_grads = torch.autograd.grad(actual.sum(), arguments)
    torch.testing.assert_close(actual_grads, torch.autograd.grad(expected.sum(), arguments))
    torch.library.opcheck(
        torch.ops.dcpc.discretized_normal_log_prob.default, (pixels(7, 3), *discretized_arguments())
    )


def test_discretized_expand_shares_its_arguments_and_keeps_every_shape() -> None:
    loc, scale = torch.zeros(3), torch.tensor(0.2)
    distribution = DiscretizedNormal(loc, scale)
    expanded = distribution.expand([4, 2, 3])
    assert expanded.batch_shape == (4, 2, 3)
    assert expanded.loc.data_ptr() == loc.data_ptr()
    for name in ("loc", "scale", "mean", "variance"):
        assert torch.equal(getattr(expanded, name), getattr(distribution, name).expand(4, 2, 3))
    value = pixels(2, 3).float()
    assert torch.equal(expanded.log_prob(value), distribution.log_prob(value).expand(4, 2, 3))
    assert expanded.sample((5,)).shape == (5, 4, 2, 3)
    assert expanded.sample().unique().numel() > 15  # independent noise
    assert expanded.to_event(2).log_prob(value).shape == (4,)
    assert DiscretizedNormal(0.0, 1.0).batch_shape == ()
    assert DiscretizedNormal(0.0, torch.ones(2).double()).loc.dtype == torch.float64


def test_discretized_normal_validates_like_torch() -> None:
    with pytest.raises(ValueError, match="scale"):
        DiscretizedNormal(torch.zeros(2), torch.tensor(0.0), validate_args=True)
    with pytest.raises(ValueError, match="loc"):
        DiscretizedNormal(torch.tensor(math.nan), 1.0, validate_args=True)
    distribution = DiscretizedNormal(torch.zeros(2), 1.0, validate_args=True)
    for wrong in (1 + 2 / 255, 0.0, math.nan):  # no level; zero lies between two
        with pytest.raises(ValueError, match="support"):
            distribution.log_prob(torch.tensor(wrong))
    assert distribution.log_prob(LEVELS[:, None].float()).shape == (256, 2)


def test_an_ordered_categorical_has_the_moments_of_its_levels() -> None:
    probabilities = torch.tensor([[0.1, 0.2, 0.7], [1.0, 0.0, 0.0]], dtype=torch.float64)
    levels = OrderedCategorical(probabilities)
    # 0.2 + 2 * 0.7, and 0.2 + 4 * 0.7 - 1.6^2
    torch.testing.assert_close(levels.mean, torch.tensor([1.6, 0.0], dtype=torch.float64))
    torch.testing.assert_close(levels.variance, torch.tensor([0.44, 0.0], dtype=torch.float64))
    assert levels.expand([3, 2]).to_event(1).mean.shape == (3, 2)
