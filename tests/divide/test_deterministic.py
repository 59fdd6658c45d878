"""Stochastic computation graphs: deterministic values between latents, at any depth."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import condition_gaussian
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor, nn

from dcpc import DCPC, Posterior

pytestmark = pytest.mark.usefixtures("float64")

DEPTH, WIDTH = 5, 2
WITHOUT = "without deterministic sites"


class DeepLinear:
    """`h_l = W_l z_l + c_l`, `z_{l+1} ~ N(V_l h_l, .7^2)`, `x ~ N(h_L, .5^2)`, all of width 2."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        shape = (DEPTH, WIDTH, WIDTH)
        self.first = torch.randn(shape, generator=generator)
        self.second = 0.6 * torch.randn(shape, generator=generator)
        self.offset = torch.randn(DEPTH, WIDTH, generator=generator)
        self.x = torch.randn(WIDTH, generator=generator)

    def __call__(self) -> None:
        loc = torch.zeros(WIDTH)
        for level in range(DEPTH):
            z = pyro.sample(f"z{level}", dist.Normal(loc, 0.7).to_event(1))
            value = self.first[level] @ z + self.offset[level]
            value = pyro.deterministic(f"h{level}", value, event_dim=1)
            loc = pyro.deterministic(f"loc{level}", self.second[level] @ value)
        pyro.sample("x", dist.Normal(value, 0.5).to_event(1), obs=self.x)

    def exact(self) -> tuple[Tensor, Tensor, float]:
        """Mean and covariance of the stacked latents given `x`, and the log evidence."""
        step = self.second @ self.first
        mean, covariance = torch.zeros(WIDTH), 0.49 * torch.eye(WIDTH)
        means, rows = [mean], [[covariance]]  # rows[l][j] = cov(z_l, z_j), j <= l
        for level in range(DEPTH - 1):
            mean = step[level] @ mean + self.second[level] @ self.offset[level]
            means.append(mean)
            row = [step[level] @ block for block in rows[-1]]
            rows.append([*row, row[-1] @ step[level].T + 0.49 * torch.eye(WIDTH)])
        full = torch.zeros(DEPTH * WIDTH, DEPTH * WIDTH)
        for i, row in enumerate(rows):
            for j, block in enumerate(row):
                here, there = slice(WIDTH * i, WIDTH * i + 2), slice(WIDTH * j, WIDTH * j + 2)
                full[here, there], full[there, here] = block, block.T
        design = torch.zeros(WIDTH, DEPTH * WIDTH)
        design[:, -WIDTH:] = self.first[-1]
        noise = torch.full((WIDTH,), 0.25)
        data = self.x - self.offset[-1]
        return condition_gaussian(torch.cat(means), full, design, noise, data)


def test_a_deep_linear_network_has_its_exact_posterior_and_evidence() -> None:
    model = DeepLinear()
    mean, covariance, log_evidence = model.exact()
    dcpc = DCPC(model, num_particles=2000)
    posterior = dcpc.run(num_sweeps=200, seed=0, progress=False)
    z = torch.cat([posterior.samples[f"z{level}"] for level in range(DEPTH)], 1)
    sd = covariance.diagonal().sqrt()
    error = 4.5 / 2000**0.5  # of means in units of the sd; correlated draws are counted by K alone
    assert float(((z.mean(0) - mean) / sd).abs().max()) < error
    got = torch.cov(z.T)
    assert float(((got - covariance) / torch.outer(sd, sd)).abs().max()) < error * 2**0.5
    spread = 4.5 * float(posterior.log_evidence_se)
    assert float(posterior.log_evidence) == pytest.approx(log_evidence, abs=spread)
    for level in range(DEPTH):
        value = posterior.samples[f"z{level}"] @ model.first[level].T + model.offset[level]
        torch.testing.assert_close(posterior.samples[f"h{level}"], value)
        loc = value @ model.second[level].T
        torch.testing.assert_close(posterior.samples[f"loc{level}"], loc)


class Network(nn.Module):
    """Three latents, between them rectified networks of several values each, in a plate.

    Args:
        site: `pyro.deterministic`, or a function that leaves the value as it is.
    """

    def __init__(self, site: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.site = site
        self.first, self.second = nn.Linear(2, 7), nn.Linear(7, 3)
        self.third, self.last = nn.Linear(3, 4), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            hidden = self.site("hidden", torch.relu(self.first(z1)), event_dim=1)
            largest = self.site("largest", hidden.max(-1).values)  # a number per datum
            loc = self.site("loc", self.second(hidden), event_dim=1)
            chained = self.site("chained", torch.tanh(loc) + largest[:, None], event_dim=1)
            z2 = pyro.sample("z2", dist.Normal(chained, 0.5).to_event(1))
            active = self.site("active", z2 > 0, event_dim=1)
            count = self.site("count", active.sum(-1))  # an integer per datum
            rate = torch.exp(0.1 * z2[:, 0]) + count
            z3 = pyro.sample("z3", dist.Gamma(2.0, rate))
            mean = self.third(z2 * active) + self.last(hidden) + z3[:, None]
            mean = self.site("mean", mean, event_dim=1)
            pyro.sample("x", dist.Normal(mean, 0.8).to_event(1), obs=x)
            pyro.sample("sum", dist.Normal(mean.sum(-1), 1.0), obs=x.sum(-1))
        self.site("total", z3.sum())  # of all data


def plain(name: str, value: Tensor, event_dim: int | None = None) -> Tensor:
    return value


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(5))


def sampled(model: nn.Module, x: Tensor, **options: object) -> Posterior:
    dcpc = DCPC(model, **{"num_particles": 20, **options})
    return dcpc.run(x, num_sweeps=30, seed=2, progress=False)


def test_deterministic_sites_change_no_unit_and_no_density(x: Tensor) -> None:
    with_sites, without = (
        DCPC(Network(site), num_particles=6) for site in (pyro.deterministic, plain)
    )
    units = {unit.name: (unit.sites, unit.children) for unit in with_sites.division(x).units}
    assert units == {unit.name: (unit.sites, unit.children) for unit in without.division(x).units}
    assert units["z1"][1] == {"z2", "x", "sum"}
    ours, theirs = with_sites.bind(x), without.bind(x)
    state = theirs.init()
    torch.testing.assert_close(ours.log_joint(state), theirs.log_joint(state), rtol=1e-12, atol=0)
    trace = poutine.trace(
        poutine.condition(
            Network(plain), {n: v[0] for n, v in ours.constrain(state.latents).items()}
        )
    ).get_trace(x)
    jacobian = state.latents["z3"][0].sum()  # z3 = exp(u)
    expected = trace.log_prob_sum() + jacobian
    torch.testing.assert_close(ours.log_joint(state)[0].sum(), expected)


@pytest.mark.filterwarnings("ignore::dcpc.ConvergenceWarning")
@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-smc", "mcpc"])
def test_deterministic_sites_change_no_draw(x: Tensor, algorithm: str) -> None:
    options = {"algorithm": algorithm}
    if algorithm == "mcpc":
        options |= {"num_particles": 1, "step_size": 1e-3, "schedule": "sequential"}
    ours, theirs = (sampled(Network(site), x, **options) for site in (pyro.deterministic, plain))
    for name in ("z1", "z2", "z3"):
        assert torch.equal(ours.samples[name], theirs.samples[name])
    assert torch.equal(ours.log_weight, theirs.log_weight)


@pytest.mark.filterwarnings("ignore::dcpc.ConvergenceWarning")
def test_the_posterior_has_the_values_that_predictive_has(x: Tensor) -> None:
    model = Network(pyro.deterministic)
    posterior = sampled(model, x)
    latents = {name: posterior.samples[name] for name in ("z1", "z2", "z3")}
    names = ["hidden", "largest", "loc", "chained", "active", "count", "mean"]
    told = Predictive(model, posterior_samples=latents, return_sites=names)(x)
    for name in names:
        value = posterior.samples[name]
        assert value.dtype == told[name].dtype
        expected = told[name].reshape(value.shape)  # Predictive aligns batches to the right
        torch.testing.assert_close(value, expected)
    assert posterior.samples["active"].dtype == torch.bool
    # Weights are those of single data, so that a value of all data has none; the particles that
    # are resampled datum by datum have one.
    assert "total" not in posterior.samples
    equal = posterior.resample()
    total = Predictive(model, posterior_samples=equal, return_sites=["total"])(x)["total"]
    torch.testing.assert_close(total.reshape(20), equal["z3"].reshape(20, 4).sum(1))


@pytest.mark.filterwarnings("ignore::dcpc.ConvergenceWarning")
def test_the_gradient_of_parameters_passes_through_deterministic_sites(x: Tensor) -> None:
    gradients = []
    for site in (pyro.deterministic, plain):
        model = Network(site)
        problem = DCPC(model, num_particles=5).bind(x)
        torch.manual_seed(0)
        state = problem.init()
        problem.loss(state).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])
    assert float(gradients[0]["first.weight"].norm()) > 0
