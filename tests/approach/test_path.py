"""Gaussians along paths against posteriors that are Gaussian, and where modes mislead."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import linear_gaussian_dag
from torch.distributions import constraints

from dcpc import DCPC
from dcpc.approach.joint import joint_problem
from dcpc.approach.path import Paths, _inverse_factor, choose_starts
from dcpc.divide.joint_reference import StudentMixture

pytestmark = pytest.mark.usefixtures("float64")

NUM_PARTICLES = 200


def followed(model, *args) -> tuple[StudentMixture, Paths]:
    """The Gaussians of a model."""
    engine = DCPC(model, num_particles=NUM_PARTICLES)
    problem = joint_problem(engine.bind(*args))
    assert problem is not None
    (group,) = problem.division.groups
    is_improper = bool(problem.density.without_prior())
    prior = group.pack(problem.draw_from_prior(problem.density).latents).squeeze(-2)
    paths = Paths(problem.density, NUM_PARTICLES)
    return paths.follow(choose_starts(paths, prior, is_improper=is_improper)), paths


@pytest.mark.parametrize("seed", range(4))
def test_a_gaussian_posterior_is_found_by_every_path(seed):
    torch.manual_seed(seed)
    exact = linear_gaussian_dag(seed)
    found, _ = followed(exact.model, *exact.args)
    mean, sd = exact.mean, exact.covariance.diagonal().sqrt()
    covariance = found.factor @ found.factor.mT
    for loc, matrix in zip(found.loc, covariance, strict=True):
        assert float(((loc - mean) / sd).abs().max()) < 1e-3
        torch.testing.assert_close(matrix.diagonal().sqrt(), sd, rtol=1e-3, atol=0.0)


def test_flat_priors_of_any_scale_are_no_obstacle():
    """A regression whose coefficients are 60,000 and 1,000, by least squares."""
    torch.manual_seed(0)
    height = 66 + 4 * torch.randn(200)
    x = torch.stack([torch.ones(200), height], 1)
    y = x @ torch.tensor([-60_000.0, 1_250.0]) + 19_000 * torch.randn(200)

    def model():
        beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
        with pyro.plate("n", 200):
            pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)

    found, _ = followed(model)
    solution = torch.linalg.lstsq(x, y.unsqueeze(1)).solution.squeeze(1)
    residual = (y - x @ solution).square().sum()
    inverse = torch.linalg.inv(x.T @ x)
    # In log sigma, with its Jacobian, the mode is at sigma^2 = residual / (n - 1).
    sigma = (residual / 199).sqrt()
    expected = torch.cat([solution, sigma.log().reshape(1)])
    sd = torch.cat([sigma * inverse.diagonal().sqrt(), torch.tensor([(2 * 199) ** -0.5])])
    for loc, factor in zip(found.loc, found.factor, strict=True):
        # The bound is largest near the mode, not at it.
        assert float(((loc - expected) / sd).abs().max()) < 0.5
        got = (factor @ factor.mT).diagonal().sqrt()
        torch.testing.assert_close(got, sd, rtol=0.2, atol=0.0)


def test_a_datum_of_its_own_has_a_path_of_its_own():
    x = torch.tensor([-30.0, 0.0, 2.0, 500.0])

    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 10.0))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    found, _ = followed(model)
    variance = 1 / (1 / 100 + 1 / 0.01)
    assert found.loc.shape[1:] == (4, 1)
    expected = (x / 0.01 * variance).expand(len(found.loc), 4)
    torch.testing.assert_close(found.loc.squeeze(-1), expected, rtol=1e-5, atol=1e-5)
    sd = torch.full_like(expected, variance**0.5)
    torch.testing.assert_close(found.factor[..., 0, 0], sd, rtol=1e-4, atol=0.0)


def test_the_neck_of_a_funnel_is_left_for_where_the_mass_is():
    """The density of a scale and its children rises to infinity where they vanish together."""

    def model():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("children", 6):
            child = pyro.sample("child", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(child, 3.0), obs=torch.zeros(6))

    torch.manual_seed(0)
    found, _ = followed(model)
    # With all children at zero the density is largest at a log scale of -6, six prior sds away.
    assert float(found.loc[:, 0].max()) > -4.0
    assert float(found.loc[:, 0].max()) < 1.0


def test_any_number_of_values_is_evaluated():
    exact = linear_gaussian_dag(0)
    found, paths = followed(exact.model, *exact.args)
    value = found.loc[:1] + torch.randn(2 * NUM_PARTICLES + 3, found.loc.shape[-1])
    together = paths.log_density(value)
    apart = torch.cat([paths.log_density(row.unsqueeze(0)) for row in value[::50]])
    torch.testing.assert_close(together[::50], apart)


def test_starts_are_denser_than_draws():
    exact = linear_gaussian_dag(1)
    engine = DCPC(exact.model, num_particles=NUM_PARTICLES)
    problem = joint_problem(engine.bind(*exact.args))
    assert problem is not None
    (group,) = problem.division.groups
    prior = group.pack(problem.draw_from_prior(problem.density).latents).squeeze(-2)
    paths = Paths(problem.density, NUM_PARTICLES)
    for is_improper in (False, True):
        starts = choose_starts(paths, prior, is_improper=is_improper)
        assert starts.shape == (10, *prior.shape[1:])
        assert float(paths.log_density(starts).min()) > float(paths.log_density(prior).median())


def test_differences_of_any_size_give_a_finite_factor():
    """Far from the posterior, differences in single precision are of any size."""
    generator = torch.Generator().manual_seed(0)
    shape = (50, 20, 20)
    exponent = torch.randint(-30, 37, shape, generator=generator).float()
    entries = torch.randn(shape, generator=generator, dtype=torch.float32) * 10.0**exponent
    entries = entries.where(torch.rand(shape, generator=generator) < 0.3, 0.0)
    curvature = 0.5 * (entries + entries.mT)
    _, factor = _inverse_factor(curvature, torch.zeros(50, 20, dtype=torch.float32))
    assert factor.dtype == torch.float32
    assert bool(factor.isfinite().all())


def test_the_factor_is_that_of_the_inverse_of_the_absolute_value():
    generator = torch.Generator().manual_seed(1)
    vectors, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    values = torch.tensor([2.0, -1.0, 1.5, 0.5, -0.7, 3.0], dtype=torch.float64)
    scale = torch.tensor([1.0, 10.0, 0.1, 2.0, 5.0, 1.0], dtype=torch.float64)
    unit = (vectors * values) @ vectors.mT
    root = unit.diagonal().abs().sqrt()
    curvature = unit / (scale[:, None] * scale)
    _, factor = _inverse_factor(curvature[None], torch.zeros(1, 6, dtype=torch.float64))
    # The absolute value is that of the matrix whose diagonal is one.
    relative = unit / (root[:, None] * root)
    found, own = torch.linalg.eigh(relative)
    expected = (own / found.abs()) @ own.mT * (scale / root)[:, None] * (scale / root)
    torch.testing.assert_close(factor[0] @ factor[0].mT, expected)


def test_a_place_where_arithmetic_breaks_down_is_no_mode():
    """In a corner, the log-density is as large as its argument's last digits make it."""

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(), 0.5), obs=y)
        noise = (z[0] * 1e15).sin()
        pyro.factor("broken", torch.where(z[0] > 1.5, 1e4 * z[0] * noise.abs(), 0.0))

    gaussians, _ = followed(model, torch.tensor(0.3))
    assert bool((gaussians.loc[..., 0] < 1.5).all())


def test_log_densities_beyond_all_precision_do_not_take_the_particles():
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(), 0.5), obs=y)
        pyro.factor("broken", torch.where(z[0] > 1.5, 1e300 * z[0], 0.0))

    y = torch.tensor(0.3)
    posterior = DCPC(model, num_particles=400).run(y, num_sweeps=200, seed=0, progress=False)
    table = posterior.statistics()["z"]
    exact = y / (2 + 0.25) * torch.ones(2)  # of a posterior that the corner hardly cuts
    assert bool(((table["mean"] - exact).abs() < 0.1).all())
    assert float(posterior.samples["z"][:, 0].max()) <= 1.5
