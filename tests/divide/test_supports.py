"""Unconstrained coordinates up to the edges of supports, against mpmath, Pyro and exact CDFs."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms
from scipy import stats
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dcpc.divide.supports import draw, log_density, transform_of
from dcpc.divide.supports.circular import NUM_PROPOSALS, WrapAngle
from dcpc.divide.supports.families import log_gamma_variate

NUM_DRAWS = 4000


@pytest.fixture(autouse=True)
def unvalidated():
    """As in a run of the engine: validation branches on values, which `vmap` cannot."""
    with pyro.validation_enabled(False):
        yield


def t(*values: float) -> Tensor:
    """A scalar or vector of the default dtype."""
    return torch.tensor(values[0] if len(values) == 1 else values)


SCALARS = {
    "beta": lambda: dist.Beta(t(0.1), t(0.1)),
    "lopsided_beta": lambda: dist.Beta(t(3.0), t(0.05)),
    "affine_beta": lambda: dist.AffineBeta(t(0.3), t(2.0), t(-1.0), t(3.0)),
    "uniform": lambda: dist.Uniform(t(5.0), t(10.0)),
    "kumaraswamy": lambda: dist.Kumaraswamy(t(0.2), t(0.1)),
    "relaxed_bernoulli": lambda: dist.RelaxedBernoulli(t(0.2), logits=t(0.5)),
    "gamma": lambda: dist.Gamma(t(0.05), t(0.01)),
    "chi2": lambda: dist.Chi2(t(3.0)),
    "inverse_gamma": lambda: dist.InverseGamma(t(0.1), t(2.0)),
    "exponential": lambda: dist.Exponential(t(2.0)),
    "weibull": lambda: dist.Weibull(t(2.0), t(0.1)),
    "fisher_snedecor": lambda: dist.FisherSnedecor(t(0.2), t(0.3)),
    "half_cauchy": lambda: dist.HalfCauchy(t(2.0)),
    "half_normal": lambda: dist.HalfNormal(t(2.0)),
    "pareto": lambda: dist.Pareto(t(2.0), t(0.1)),
    "log_normal": lambda: dist.LogNormal(t(0.3), t(9.0)),
    "logit_laplace": lambda: dist.TransformedDistribution(
        dist.Laplace(t(0.0), t(3.0)),
        [transforms.AffineTransform(1.0, 2.0), transforms.SigmoidTransform()],
    ),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(t(0.3, 0.7)), dist.Beta(t(0.1, 9.0), t(9.0, 0.2))
    ),
}
VECTORS = {
    "dirichlet": lambda: dist.Dirichlet(t(0.05, 0.1, 2.0, 0.3)),
    "relaxed_one_hot": lambda: dist.RelaxedOneHotCategorical(t(0.5), logits=t(0.3, 1.0, -2.0)),
    "logistic_normal": lambda: dist.LogisticNormal(torch.zeros(3), torch.ones(3)),
    "lkj_cholesky": lambda: dist.LKJCholesky(4, t(0.3)),
    "two_dirichlets": lambda: dist.Dirichlet(torch.ones(2, 3)).to_event(1),
    "expanded": lambda: dist.Gamma(t(0.7), t(2.0)).expand([3, 2]).to_event(1),
    "expanded_by_pyro": lambda: dist.ExpandedDistribution(
        dist.Beta(torch.full((2, 1), 0.7), t(2.0)), torch.Size([4, 2, 3])
    ),
    "masked": lambda: dist.Beta(t(0.1, 0.2), t(2.0)).mask(torch.tensor([True, False])).to_event(1),
    "mixture_of_vectors": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(3)), dist.LogNormal(torch.zeros(2, 3, 2), 1.0).to_event(1)
    ),
}
ALL = {**SCALARS, **VECTORS}


def unconstrained(fn: dist.Distribution, scale: float = 1.0) -> Tensor:
    shape = transform_of(fn).inverse_shape(fn.batch_shape + fn.event_shape)
    return scale * torch.randn(shape)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ALL)
def test_density_and_jacobian_are_those_of_pyro_away_from_the_edges(name):
    fn = ALL[name]()
    u = unconstrained(fn)
    log_prob, log_det = log_density(fn, u)
    transform = transform_of(fn)
    expected = transform.log_abs_det_jacobian(u, transform(u))
    extra = expected.dim() - len(fn.batch_shape)
    torch.testing.assert_close(log_prob, fn.log_prob(transform(u)))
    torch.testing.assert_close(
        log_det, expected.sum(tuple(range(-extra, 0))) if extra else expected
    )
    assert log_prob.shape == log_det.shape == fn.batch_shape


def grid_cdf(fn: dist.Distribution) -> tuple[np.ndarray, np.ndarray]:
    """Distribution function of `u` by quadrature, on a grid that is dense in the middle."""
    u = 3000 * torch.linspace(-1, 1, 200_001, dtype=torch.float64) ** 3
    density = sum(log_density(fn, u)).exp()
    cdf = torch.cat([torch.zeros_like(u[:1]), torch.cumulative_trapezoid(density, u)])
    return u.numpy(), cdf.numpy()


def follows(draws: Tensor, grid: np.ndarray, cdf: np.ndarray) -> bool:
    """Whether draws pass a Kolmogorov-Smirnov test, at a level that a fixed seed keeps to."""
    return stats.kstest(draws.numpy(), lambda x: np.interp(x, grid, cdf)).pvalue > 1e-3


@pytest.mark.parametrize("name", SCALARS)
def test_density_integrates_to_one_and_single_precision_draws_follow_it(name):
    u = torch.vmap(lambda _: draw(SCALARS[name]()), randomness="different")(torch.zeros(NUM_DRAWS))
    assert u.dtype is torch.float32
    assert u.isfinite().all()
    torch.set_default_dtype(torch.float64)
    grid, cdf = grid_cdf(SCALARS[name]())
    assert cdf[-1] == pytest.approx(1.0, abs=1e-6)
    assert follows(u, grid, cdf)


mpmath.mp.dps = 300  # 1 - sigmoid(u) has 130 zeros at u = -300


def sigmoid(u: float) -> mpmath.mpf:
    return 1 / (1 + mpmath.exp(-mpmath.mpf(u)))


def log_beta(a: float, b: float) -> mpmath.mpf:
    return mpmath.log(mpmath.beta(a, b))


EXACT = {
    "beta": lambda u, a, b: (
        (a - 1) * mpmath.log(sigmoid(u)) + (b - 1) * mpmath.log(1 - sigmoid(u)) - log_beta(a, b)
    ),
    "kumaraswamy": lambda u, a, b: (
        mpmath.log(a * b)
        + (a - 1) * mpmath.log(sigmoid(u))
        + (b - 1) * mpmath.log(1 - sigmoid(u) ** mpmath.mpf(a))
    ),
    "fisher_snedecor": lambda u, a, b: (
        a / 2 * mpmath.log(mpmath.mpf(a) / b)
        + (mpmath.mpf(a) / 2 - 1) * u
        - (mpmath.mpf(a) + b) / 2 * mpmath.log(1 + mpmath.mpf(a) / b * mpmath.exp(u))
        - log_beta(mpmath.mpf(a) / 2, mpmath.mpf(b) / 2)
    ),
    "pareto": lambda u, scale, a: (
        mpmath.log(a)
        + a * mpmath.log(scale)
        - (a + 1) * mpmath.log(mpmath.mpf(scale) + mpmath.exp(u))
    ),
    "half_cauchy": lambda u, scale, _: (
        mpmath.log(2 / (mpmath.pi * scale)) - mpmath.log(1 + (mpmath.exp(u) / scale) ** 2)
    ),
}
MAKERS = {
    "beta": dist.Beta,
    "kumaraswamy": dist.Kumaraswamy,
    "fisher_snedecor": dist.FisherSnedecor,
    "pareto": dist.Pareto,
    "half_cauchy": lambda scale, _: dist.HalfCauchy(scale),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_densities_and_scores_are_exact_far_beyond_where_values_round_to_an_edge(name, dtype):
    a, b = 0.25, 1.5
    places = [-300.0, -90.0, -41.0, -17.0, -1.0, 0.0, 1.0, 17.0, 39.0, 90.0, 300.0]
    u = torch.tensor(places, dtype=dtype, requires_grad=True)
    fn = MAKERS[name](torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype))
    log_prob, _ = log_density(fn, u)
    (score,) = torch.autograd.grad(log_prob.sum(), u)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    for place, value, slope in zip(places, log_prob, score, strict=True):
        exact = EXACT[name](place, a, b)
        assert value.item() == pytest.approx(float(exact), rel=tolerance, abs=tolerance)
        derivative = mpmath.diff(lambda x: EXACT[name](x, a, b), place)
        assert slope.item() == pytest.approx(float(derivative), rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", ALL)
def test_scores_in_single_precision_are_finite_at_far_values(name):
    fn = ALL[name]()
    for scale in (30.0, 300.0):
        u = unconstrained(fn, scale).requires_grad_()
        density = torch.stack(log_density(fn, u))
        (score,) = torch.autograd.grad(density.sum(), u)
        assert not density.isnan().any()
        if density.isfinite().all():
            assert score.isfinite().all()


def test_the_two_ends_of_an_interval_are_alike():
    u = torch.linspace(-200, 200, 401)
    ours = log_density(dist.Beta(0.1, 0.7), u)
    mirrored = log_density(dist.Beta(0.7, 0.1), -u)
    assert torch.equal(ours[1], mirrored[1])
    torch.testing.assert_close(ours[0], mirrored[0], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("end", [1, -1])
def test_mass_beyond_the_last_float_before_one_is_drawn(end):
    u = end * draw(dist.Beta(0.1, 0.1).expand([20_000]))
    for place in (17.0, 40.0):
        expected = stats.beta(0.1, 0.1).cdf(math.exp(-place))
        error = math.sqrt(expected * (1 - expected) / len(u))
        assert (u > place).float().mean().item() == pytest.approx(expected, abs=4 * error)


def test_sparse_dirichlet_draws_have_beta_breaks():
    a = torch.tensor([0.05, 0.1, 2.0, 0.3])
    u = draw(dist.Dirichlet(a).expand([NUM_DRAWS]))
    for k in range(3):
        grid, cdf = grid_cdf(dist.Beta(a[k].double(), a[k + 1 :].double().sum()))
        breaks = u[:, k].double() - math.log(3 - k)
        assert follows(breaks, grid, cdf)


@pytest.mark.parametrize("kind", [dist.LKJ, dist.LKJCholesky])
def test_lkj_draws_have_beta_correlations(kind):
    fn = kind(4, torch.tensor(0.7))
    u = torch.vmap(lambda _: draw(fn), randomness="different")(torch.zeros(NUM_DRAWS))
    value = transform_of(fn)(u)
    correlations = value if kind is dist.LKJ else value @ value.mT
    shape = 0.7 + (4 - 2) / 2
    for row, column in ((1, 0), (2, 1), (3, 2), (3, 0)):
        r = correlations[:, row, column]
        assert stats.kstest(r.numpy(), stats.beta(shape, shape, loc=-1, scale=2).cdf).pvalue > 1e-3


def test_relaxed_one_hot_draws_are_those_of_pyro():
    fn = dist.RelaxedOneHotCategorical(t(0.7), logits=t(0.3, 1.0, -0.5)).expand([NUM_DRAWS])
    ours, theirs = transform_of(fn)(draw(fn)), fn.sample()
    for k in range(3):
        assert stats.ks_2samp(ours[:, k].numpy(), theirs[:, k].numpy()).pvalue > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_draws_are_finite_of_the_right_shape_and_differ_between_particles(name):
    fn = ALL[name]()
    u = torch.vmap(lambda _: draw(fn), randomness="different")(torch.zeros(5))
    assert u[0].shape == unconstrained(fn).shape
    assert u.isfinite().all()
    assert len(u.flatten().unique()) == u.numel()
    value = transform_of(fn)(u)
    assert value.shape == (5, *fn.batch_shape, *fn.event_shape)


@pytest.mark.parametrize("name", ALL)
def test_vmap_and_capture_give_the_numbers_and_scores_of_a_loop(name):
    fn = ALL[name]()
    u = torch.stack([unconstrained(fn, scale) for scale in (0.1, 1.0, 5.0, 20.0)])

    def density(u: Tensor) -> Tensor:
        return sum(log_density(fn, u))

    looped = u.clone().requires_grad_()
    expected = torch.stack([density(row) for row in looped])
    (expected_score,) = torch.autograd.grad(expected.sum(), looped)
    captured = make_fx(torch.vmap(density))(u.clone())
    for vectorised in (torch.vmap(density), captured):
        leaf = u.clone().requires_grad_()
        result = vectorised(leaf)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)
        (score,) = torch.autograd.grad(result.sum(), leaf)
        torch.testing.assert_close(score, expected_score, rtol=1e-4, atol=1e-4)


def test_densities_vectorise_over_parameters_that_depend_on_latents():
    def density(a: Tensor, u: Tensor) -> Tensor:
        return sum(log_density(dist.Beta(a.exp(), 0.3), u))

    a, u = torch.randn(6), 10 * torch.randn(6)
    captured = make_fx(torch.vmap(density))(a, u)
    expected = torch.stack([density(*pair) for pair in zip(a, u, strict=True)])
    torch.testing.assert_close(captured(a, u), expected)


def test_a_mask_takes_the_density_but_not_the_jacobian():
    u = torch.tensor([1.0, 2.0])
    plain = log_density(dist.Beta(0.1, 0.2).expand([2]), u)
    masked = log_density(dist.Beta(0.1, 0.2).expand([2]).mask(torch.tensor([True, False])), u)
    assert torch.equal(masked[0], torch.stack([plain[0][0], torch.zeros(())]))
    assert torch.equal(masked[1], plain[1])
    assert torch.equal(log_density(dist.Beta(0.1, 0.2).mask(False), u)[0], torch.zeros(2))


def test_distributions_that_need_no_care_or_define_their_own_density_are_left_alone():
    class Squared(dist.Beta):
        def log_prob(self, value):
            return 2 * super().log_prob(value)

    for fn in (dist.Normal(0.0, 1.0), Squared(0.1, 0.1), dist.VonMises(0.0, 1.0)):
        assert log_density(fn, torch.zeros(())) is None
    assert draw(dist.Normal(0.0, 1.0)) is None


def test_angles_wrap_into_one_period_with_unit_jacobian():
    u = torch.tensor([0.0, 3.0, 3.5, -3.5, math.pi, 100.0], requires_grad=True)
    wrap = transform_of(dist.VonMises(0.0, 1.0).expand([6]).to_event(1))
    assert isinstance(wrap, WrapAngle)
    angle = wrap(u)
    assert ((angle > -math.pi - 1e-6) & (angle <= math.pi)).all()
    torch.testing.assert_close(angle.cos(), u.cos(), atol=1e-5, rtol=0)
    torch.testing.assert_close(angle.sin(), u.sin(), atol=1e-5, rtol=0)
    assert torch.equal(torch.autograd.grad(angle.sum(), u)[0], torch.ones(6))
    assert torch.equal(wrap.log_abs_det_jacobian(u, angle), torch.zeros(6))


@pytest.mark.parametrize("concentration", [1e-4, 0.5, 4.0, 200.0])
def test_von_mises_draws_follow_their_distribution_under_vmap(concentration):
    fn = dist.VonMises(torch.tensor(2.0), torch.tensor(concentration))
    u = torch.vmap(lambda _: draw(fn), randomness="different")(torch.zeros(NUM_DRAWS))
    assert u.abs().max() <= math.pi
    centred = torch.remainder(u.double() - 2.0 + math.pi, 2 * math.pi) - math.pi
    assert stats.kstest(centred.numpy(), stats.vonmises(concentration).cdf).pvalue > 1e-3


def test_the_von_mises_envelope_cannot_run_out_of_proposals():
    kappa = torch.logspace(-4, 6, 200, dtype=torch.float64)
    r = (1 + torch.hypot(torch.ones_like(kappa), 2 * kappa)) / (2 * kappa)
    excess = (1 + 1 / (torch.hypot(torch.ones_like(kappa), 2 * kappa) + 2 * kappa)) / 2
    rate = torch.special.i0e(kappa) * (excess * kappa * (r + 1)).sqrt() * (1 - excess).exp()
    assert rate.max() <= 1 + 1e-9
    assert (1 - rate.min()) ** NUM_PROPOSALS < 1e-29


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("parameters", [(1.0, 2.0, 0.8), (0.1, 0.1, 5.0), (50.0, 20.0, 25.0)])
def test_sine_bivariate_draws_follow_both_marginals(parameters):
    first, second, coupling = map(torch.tensor, parameters)
    fn = dist.SineBivariateVonMises(torch.tensor(0.5), torch.tensor(-1.0), first, second, coupling)
    u = torch.vmap(lambda _: draw(fn), randomness="different")(torch.zeros(NUM_DRAWS))
    grid = torch.linspace(-math.pi, math.pi, 20_001)
    locs = (fn.phi_loc, fn.psi_loc)
    for angle, (k, other), loc in zip(u.T, ((first, second), (second, first)), locs, strict=True):
        w = torch.hypot(other, coupling * grid.sin())
        density = (k * grid.cos() + w + torch.special.i0e(w).log()).softmax(0)
        centred = WrapAngle()(angle - loc)
        assert follows(centred, grid.numpy(), density.cumsum(0).numpy())


def test_skewed_angles_are_drawn_as_pyro_draws_them():
    base = dist.VonMises(torch.tensor([1.0, 0.0]), 2.0).to_event(1)
    fn = dist.SineSkewed(base, torch.tensor([0.6, -0.3])).expand([NUM_DRAWS])
    ours, theirs = draw(fn), fn.sample()
    for k in range(2):
        assert stats.ks_2samp(ours[:, k].numpy(), theirs[:, k].numpy()).pvalue > 1e-3


def test_gamma_variates_of_small_shape_go_on_below_the_smallest_float():
    """P(G < x) is x^a / Gamma(a + 1) for small x: .37 at log x = -100 and a = .01."""
    draws = log_gamma_variate(torch.full((20_000,), 0.01, dtype=torch.float32))
    expected = math.exp(-1.0) / math.gamma(1.01)
    assert (draws < -100).double().mean() == pytest.approx(expected, abs=0.015)
