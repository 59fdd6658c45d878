"""Log-factors in unconstrained space against the Jacobian by autograd, for every support."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to

from dcpc.divide import Arguments, divide, read_sites
from dcpc.divide.model import constrain, log_factors, unconstrain

pytestmark = pytest.mark.usefixtures("float64")


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Flat(dist.TorchDistribution):
    """A density `exp(-|z|^2 / 2)`, unnormalised, on any support."""

    def __init__(self, support, shape: tuple[int, ...]) -> None:
        self._support = support
        super().__init__(event_shape=torch.Size(shape))

    @property
    def support(self):
        return self._support

    arg_constraints = {}  # noqa: RUF012

    def sample(self, sample_shape=()):
        transform = biject_to(self.support)
        return transform(torch.randn(transform.inverse_shape(self.event_shape)))

    def log_prob(self, value):
        return -0.5 * value.square().sum(tuple(range(-len(self.event_shape), 0)))

    def expand(self, batch_shape, _instance=None):
        return self


def lower(matrix: Tensor, offset: int = 0) -> Tensor:
    rows, columns = torch.tril_indices(*matrix.shape[-2:], offset)
    return matrix[rows, columns]


ENTRIES = {
    "vector": lambda z: z.reshape(-1),
    "simplex": lambda z: z[:-1],
    "strictly_lower": lambda z: lower(z, -1),
}
"""Free coordinates of a constrained value, with respect to which densities are taken."""

DISTRIBUTIONS = {
    "real": (lambda: dist.Normal(vector(0.3)[0], 2.0), "vector"),
    "positive": (lambda: dist.Gamma(vector(2.0)[0], 1.5), "vector"),
    "half_line": (lambda: dist.HalfCauchy(vector(2.0)[0]), "vector"),
    "greater_than": (lambda: dist.Pareto(vector(1.5)[0], 3.0), "vector"),
    "unit_interval": (lambda: dist.Beta(vector(2.0)[0], 3.0), "vector"),
    "interval": (lambda: dist.Uniform(vector(-2.0)[0], 5.0), "vector"),
    "real_vector": (lambda: dist.MultivariateNormal(vector(0.0, 1.0, 2.0), eye(3)), "vector"),
    "positive_vector": (lambda: dist.LogNormal(vector(0.0, 1.0), 1.0).to_event(1), "vector"),
    "simplex": (lambda: dist.Dirichlet(vector(1.0, 2.0, 0.7, 1.0)), "simplex"),
    "corr_cholesky": (lambda: dist.LKJCholesky(4, 1.5), "strictly_lower"),
    "corr_matrix": (lambda: Flat(constraints.corr_matrix, (3, 3)), "strictly_lower"),
    "concatenated": (
        lambda: Flat(
            constraints.cat([constraints.positive, constraints.real], lengths=[1, 2]), (3,)
        ),
        "vector",
    ),
    "less_than": (lambda: Flat(constraints.less_than(1.0), ()), "vector"),
    "nonnegative": (lambda: Flat(constraints.nonnegative, ()), "vector"),
    "greater_than_eq": (lambda: Flat(constraints.greater_than_eq(2.0), ()), "vector"),
    "half_open_interval": (lambda: Flat(constraints.half_open_interval(-1.0, 2.0), ()), "vector"),
    "softplus_positive": (lambda: Flat(constraints.softplus_positive, ()), "vector"),
    "ordered": (lambda: Flat(constraints.ordered_vector, (4,)), "vector"),
    "positive_ordered": (lambda: Flat(constraints.positive_ordered_vector, (4,)), "vector"),
    "batch_of_intervals": (
        lambda: Flat(
            constraints.independent(
                constraints.interval(vector(0.0, 1.0, -5.0), vector(1.0, 4.0, 5.0)), 1
            ),
            (3,),
        ),
        "vector",
    ),
    "stacked": (
        lambda: Flat(constraints.stack([constraints.positive, constraints.real], dim=-1), (2,)),
        "vector",
    ),
}
supports = pytest.mark.parametrize("support", DISTRIBUTIONS)


def model_of(support: str):
    make, _ = DISTRIBUTIONS[support]

    def model():
        z = pyro.sample("z", make())
        pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=torch.tensor(0.0))

    return model


@supports
def test_factor_in_unconstrained_space_is_log_prob_plus_log_determinant(support):
    make, entries = DISTRIBUTIONS[support]
    model = model_of(support)
    sites = read_sites(model, (), {})
    for seed in range(3):
        torch.manual_seed(seed)
        u = 0.7 * torch.randn(sites["z"].unconstrained_shape)

        def free(flat, shape=u.shape):
            return ENTRIES[entries](biject_to(make().support)(flat.reshape(shape)))

        jacobian = torch.autograd.functional.jacobian(free, u.reshape(-1))
        jacobian = jacobian.reshape(-1, u.numel())
        assert jacobian.shape[0] == jacobian.shape[1]
        z = biject_to(make().support)(u)
        expected = make().log_prob(z) + torch.linalg.slogdet(jacobian).logabsdet
        got = log_factors(model, {"z": u}, (), {}, sites)["z"]
        torch.testing.assert_close(got, expected.reshape(got.shape), rtol=1e-9, atol=1e-9)


@supports
def test_unconstrained_values_go_there_and_back(support):
    model = model_of(support)
    sites = read_sites(model, (), {})
    u = 0.7 * torch.randn(sites["z"].unconstrained_shape)
    z = constrain(model, {"z": u}, (), {})["z"]
    back = unconstrain(model, {"z": z}, (), {}, {"z"})["z"]
    torch.testing.assert_close(back, u, rtol=1e-8, atol=1e-8)


@supports
def test_every_support_is_divided_and_evaluated_by_the_captured_graph(support):
    model = model_of(support)
    arguments = Arguments((), {})
    sites = read_sites(model, (), {})
    division = divide(model, arguments, sites, 3)
    assert division.program.name == "graph"
    (unit,) = division.units
    assert unit.size == sites["z"].unconstrained_shape.numel()
    latents = {"z": 0.7 * torch.randn(3, *sites["z"].unconstrained_shape)}
    (group,) = division.groups
    evaluation = group.evaluate(group.pack(latents), latents, ())
    step = 1e-6
    for index in range(unit.size):
        ends = []
        for sign in (1, -1):
            u = latents["z"][0].clone()
            u.view(-1)[index] += sign * step
            ends.append(sum(float(v) for v in log_factors(model, {"z": u}, (), {}, sites).values()))
        expected = (ends[0] - ends[1]) / (2 * step)
        got = float(evaluation.score[0].reshape(-1)[index])
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    "support", ["real", "positive", "half_line", "greater_than", "unit_interval", "interval"]
)
def test_density_in_unconstrained_space_integrates_to_one(support):
    model = model_of(support)
    sites = read_sites(model, (), {})
    grid = torch.linspace(-60.0, 60.0, 60001)
    values = torch.vmap(lambda u: log_factors(model, {"z": u}, (), {}, sites)["z"])(grid)
    assert torch.trapezoid(values.exp(), grid).item() == pytest.approx(1.0, abs=2e-6)


def test_density_on_a_support_that_depends_on_a_latent_integrates_to_one():
    def model():
        top = pyro.sample("top", dist.Gamma(2.0, 1.0))
        z = pyro.sample("z", dist.Uniform(0.0, top))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.3))

    sites = read_sites(model, (), {})
    axis = torch.linspace(-30.0, 30.0, 601)
    grid = torch.cartesian_prod(axis, axis)

    def joint(u: Tensor, names: tuple[str, ...]) -> Tensor:
        factors = log_factors(model, {"top": u[0], "z": u[1]}, (), {}, sites)
        return sum(factors[name] for name in names)

    prior = torch.vmap(lambda u: joint(u, ("top", "z")))(grid).exp()
    cell = float(axis[1] - axis[0]) ** 2
    assert float(prior.sum()) * cell == pytest.approx(1.0, abs=1e-6)
    evidence = torch.vmap(lambda u: joint(u, ("top", "z", "x")))(grid).exp()
    # z has the density of Exp(1): the mixture of Uniform(0, t) over t ~ Gamma(2, 1).
    z = torch.linspace(0.0, 40.0, 400001)
    density = (-z).exp() * dist.Normal(z, 1.0).log_prob(torch.tensor(0.3)).exp()
    expected = float(torch.trapezoid(density, z))
    assert float(evidence.sum()) * cell == pytest.approx(expected, rel=1e-5)


def test_flat_prior_has_the_jacobian_and_nothing_else():
    def model():
        z = pyro.sample("z", dist.ImproperUniform(constraints.positive, (), ()))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.3))

    sites = read_sites(model, (), {})
    assert sites["z"].is_improper
    u = torch.tensor(0.7)
    assert float(log_factors(model, {"z": u}, (), {}, sites)["z"]) == pytest.approx(0.7)


def test_masked_prior_is_improper_too():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.3))

    assert read_sites(model, (), {})["z"].is_improper
