"""Particles in both coordinates of a model: the same posterior, evidence and learning."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
import zoo
from oracles import Exact, gaussian_chain, kalman, linear_gaussian_dag
from torch import Tensor, nn

from dcpc import DCPC
from dcpc.coordinates import transported
from dcpc.distributions import SharedScaleNormal
from dcpc.errors import ModelError
from dcpc.recombine import LogWeights
from dcpc.reparam import NonCentred
from dcpc.sweep import SweepState, retarget

pytestmark = pytest.mark.usefixtures("float64")


class Chain(nn.Module):
    """`z1 ~ N(m, I)`, `z2 ~ N(W z1 + b, L L^T)`, `x ~ N(z2, s^2)`, all with parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([0.3, -0.2]))
        self.weight = nn.Parameter(torch.tensor([[0.8, -0.3], [0.5, 1.1]]))
        self.bias = nn.Parameter(torch.tensor([0.1, 0.4]))
        self.tril = nn.Parameter(torch.tensor([[0.5, 0.0], [0.2, 0.7]]))
        self.log_noise = nn.Parameter(torch.tensor(-0.4))

    def forward(self, x: Tensor) -> None:
        pyro.module("chain", self)
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(self.mean.expand(len(x), 2), 1.0).to_event(1))
            loc = z1 @ self.weight.mT + self.bias
            z2 = pyro.sample("z2", SharedScaleNormal(loc, self.tril.tril()))
            pyro.sample("x", dist.Normal(z2, self.log_noise.exp()).to_event(1), obs=x)

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean `(4,)`, covariance of `(z1, z2)`, and covariance of `x`."""
        eye, tril = torch.eye(2), self.tril.tril()
        mean = torch.cat([self.mean, self.weight @ self.mean + self.bias])
        forward = torch.cat([torch.cat([eye, 0 * eye], 1), torch.cat([self.weight, tril], 1)], 0)
        covariance = forward @ forward.mT
        return mean, covariance, covariance[2:, 2:] + (2 * self.log_noise).exp() * eye

    def log_evidence(self, x: Tensor) -> Tensor:
        mean, _, of_x = self.moments()
        return dist.MultivariateNormal(mean[2:], of_x).log_prob(x)

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """Of `(z1, z2)`, `(B, 4)`."""
        mean, covariance, of_x = self.moments()
        gain = torch.linalg.solve(of_x, covariance[2:]).mT
        return dist.MultivariateNormal(
            mean + (x - mean[2:]) @ gain.mT, covariance - gain @ covariance[2:]
        )


def change(model: Chain) -> None:
    """Other parameters, of every kind."""
    with torch.no_grad():
        model.mean += 0.15
        model.weight += torch.tensor([[-0.2, 0.1], [0.1, -0.1]])
        model.bias -= 0.2
        model.tril += torch.tensor([[0.15, 0.0], [-0.3, 0.1]])
        model.log_noise += 0.2


X = torch.tensor([[0.5, -1.0], [2.0, 0.3], [-0.4, 0.6]], dtype=torch.float64)

COORDINATES = ("centred", "noncentred")


def engine(model: nn.Module, coordinates: str, **options: object) -> DCPC:
    return DCPC(NonCentred(model) if coordinates == "noncentred" else model, **options)


def exact_particles(model: Chain, there: DCPC) -> SweepState:
    """Draws of the exact posterior, all of weight one."""
    count = there.num_particles
    with torch.no_grad():
        z1, z2 = model.posterior(X).sample((count,)).split(2, -1)
    plain = DCPC(model, num_particles=count)
    start = plain.init(X)
    weights = LogWeights(torch.zeros(count, len(X)))
    state = replace(start, latents={"z1": z1, "z2": z2}, log_weight=weights)
    state = replace(state, log_joint=plain.bind(X).log_joint(state))
    return transported(state, plain.bind(X), there.bind(X))


def assert_close_to(model: Chain, values: dict[str, Tensor], mass: Tensor, num: float) -> None:
    """Means and second moments within 4.5 standard errors of exact ones, for `num` draws."""
    z = torch.cat([values["z1"], values["z2"]], -1)
    exact = model.posterior(X)
    with torch.no_grad():
        white = torch.linalg.solve_triangular(
            torch.linalg.cholesky(exact.covariance_matrix),
            (z - exact.mean).unsqueeze(-1),
            upper=False,
        ).squeeze(-1)
    mean = (mass[..., None] * white).sum(0)
    second = torch.einsum("kb,kbi,kbj->bij", mass, white, white)
    assert float(mean.abs().max()) < 4.5 / math.sqrt(num)
    assert float((second - torch.eye(4)).abs().max()) < 4.5 * math.sqrt(2.0 / num)


def with_discrete_latents() -> tuple[Callable, tuple, dict]:
    def model(x: Tensor) -> None:
        kind = pyro.sample("kind", dist.Bernoulli(0.3))
        weight = pyro.sample("weight", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("data", len(x)):
            count = pyro.sample("count", dist.Categorical(torch.ones(3)))
            z = pyro.sample("z", dist.Normal(kind + count, 0.5))
            pyro.sample("x", dist.Normal(z + weight[0], 1.0), obs=x)

    return model, (X[:, 0],), {}


@pytest.mark.parametrize(
    "build",
    [with_discrete_latents, *(case.build for case in zoo.CASES)],
    ids=lambda build: build.__name__,
)
def test_particles_go_there_and_back(build: Callable[[], tuple[Callable, tuple, dict]]) -> None:
    """Values stay, and log-joints differ by the Jacobian, of plain runs of either model."""
    model, args, kwargs = build()
    options = {"num_particles": 3, "certify": True, "blocks": ()}
    one, other = (engine(model, c, **options).bind(*args, **kwargs) for c in COORDINATES)
    start = one.init()
    state = replace(start, log_joint=one.log_joint(start))
    there = transported(state, one, other)
    torch.testing.assert_close(other.log_joint(there), there.log_joint)
    values = one.constrain(state.latents)
    for name, value in other.constrain(there.latents).items():
        torch.testing.assert_close(value, values[name], msg=name)
    back = transported(there, other, one)
    torch.testing.assert_close(back.latents, state.latents)
    torch.testing.assert_close(back.log_joint, state.log_joint)


@pytest.mark.parametrize("backend", ["vmap", "loop"])
def test_slower_backends_carry_particles_alike(backend: str) -> None:
    model = Chain()
    options = {"num_particles": 3}
    fast = [engine(model, c, **options).bind(X) for c in COORDINATES]
    slow = [engine(model, c, **options, backend=backend).bind(X) for c in COORDINATES]
    state = fast[0].init()
    expected, found = transported(state, *fast), transported(state, *slow)
    torch.testing.assert_close(found.latents, expected.latents)
    torch.testing.assert_close(found.log_joint, expected.log_joint)


@pytest.mark.parametrize("blocks", [(), "auto"], ids=["units", "found blocks"])
@pytest.mark.parametrize(
    "exact",
    [
        gaussian_chain(),
        kalman(torch.tensor([0.4, -1.0, 0.3])),
        *map(linear_gaussian_dag, (1, 4, 6)),
    ],
    ids=["chain", "kalman", "dag 1", "dag 4", "dag 6"],
)
def test_posterior_and_evidence_of_gaussian_graphs(exact: Exact, blocks: object) -> None:
    posterior = DCPC(exact.model, num_particles=400, reparam="noncentred", blocks=blocks).run(
        *exact.args, num_sweeps=400, seed=1, progress=False
    )
    assert posterior.unit_of.keys() == set(exact.names)
    error = float(posterior.log_evidence) - exact.log_evidence
    assert abs(error) < 4.0 * float(posterior.log_evidence_se) + 1e-3
    table = posterior.statistics()
    mean = torch.cat([table[name]["mean"].reshape(-1) for name in exact.names])
    mcse = torch.cat([table[name]["mcse"].reshape(-1) for name in exact.names])
    sd = torch.cat([table[name]["std"].reshape(-1) for name in exact.names])
    assert float(((mean - exact.mean).abs() / mcse).max()) < 5.0
    torch.testing.assert_close(sd, exact.covariance.diagonal().sqrt(), rtol=0.08, atol=0.0)


@pytest.mark.parametrize("correction", ["metropolis", "weight"])
def test_the_mean_of_the_evidence_estimate_is_the_evidence(correction: str) -> None:
    """Over 3,000 cells of eight particles, in errors, within 4 standard errors."""
    exact = gaussian_chain(population=3000)
    problem = DCPC(
        exact.model, num_particles=8, reparam="noncentred", correction=correction, blocks=()
    ).bind(*exact.args)
    ratio = (problem.anneal(8).log_evidence - exact.log_evidence).exp()
    assert abs(float(ratio.mean()) - 1.0) < 4.0 * float(ratio.std()) / math.sqrt(3000)


@pytest.mark.parametrize("keep", COORDINATES)
def test_weights_under_other_parameters_are_the_ratios_of_densities(keep: str) -> None:
    """Proper weights: their mean is the ratio of the evidences, their moments the new ones."""
    model, count = Chain(), 200_000
    there = engine(model, keep, num_particles=count)
    state = exact_particles(model, there)
    with torch.no_grad():
        before = model.log_evidence(X)
        change(model)
        ratio = (model.log_evidence(X) - before).exp()
    weighed = retarget(there.bind(X).density, state).log_weight
    weights = weighed.log_weight.exp()
    assert bool(((weights.mean(0) - ratio).abs() < 4.5 * weights.std(0) / count**0.5).all())
    assert bool((weighed.ess() < 0.9 * count).all())  # there was something to weigh
    values = there.bind(X).constrain(state.latents)
    assert_close_to(model, values, weighed.normalized(), float(weighed.ess().min()))


@pytest.mark.parametrize("correction", ["metropolis", "weight"])
@pytest.mark.parametrize("move", COORDINATES)
@pytest.mark.parametrize("keep", COORDINATES)
def test_particles_follow_parameters_that_change(keep: str, move: str, correction: str) -> None:
    """One sweep per change, as in training: the weighted particles stay those of the posterior."""
    model, count = Chain(), 4000
    options = {"num_particles": count, "correction": correction, "blocks": ()}
    kept_in, moved_in = (engine(model, c, **options) for c in (keep, move))
    state = exact_particles(model, kept_in)
    with torch.no_grad():
        before = model.log_evidence(X)
        for _ in range(12):
            for parameter in model.parameters():
                parameter += 0.03
            there = kept_in.bind(X), moved_in.bind(X)
            moved, _ = there[1].sweep(transported(state, *there))
            state = transported(moved, *reversed(there))
            state = replace(state, adaptation=moved.adaptation)
        gained = model.log_evidence(X) - before
    values = kept_in.bind(X).constrain(state.latents)
    mass = state.log_weight.normalized()
    # Resampling and few sweeps leave fewer draws than particles.
    assert_close_to(model, values, mass, float(state.log_weight.ess().min()) / 4)
    assert float((state.log_weight.log_mean() - gained).abs().max()) < 0.12


def test_what_learns_holds_fixed_what_it_says() -> None:
    """Gradients of `-log p(x, T(e))`, written out, and of `-log p(x, z)`; their means alike."""
    model, count, parts = Chain(), 1000, 40
    parameters = list(model.parameters())

    def gradient(loss: Tensor) -> Tensor:
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in grads])

    centred, noncentred = (engine(model, c, num_particles=count).bind(X) for c in COORDINATES)
    means: dict[str, list[Tensor]] = {c: [] for c in COORDINATES}
    for _ in range(parts):
        state = exact_particles(model, DCPC(model, num_particles=count))
        means["centred"].append(gradient(centred.loss(state)))
        found = gradient(noncentred.loss(transported(state, centred, noncentred)))
        means["noncentred"].append(found)

        z1, z2 = state.latents["z1"], state.latents["z2"]
        above = z1 @ model.weight.mT + model.bias
        e1 = (z1 - model.mean).detach()
        e2 = ((z2 - above) @ torch.linalg.inv(model.tril.tril()).mT).detach()
        bottom = (model.mean + e1) @ model.weight.mT + model.bias + e2 @ model.tril.tril().mT
        by_hand = -dist.Normal(bottom, model.log_noise.exp()).log_prob(X).sum() / count
        torch.testing.assert_close(found, gradient(by_hand))
    exact = gradient(-model.log_evidence(X).sum())
    for coordinates, parts_of in means.items():
        stacked = torch.stack(parts_of)
        error = stacked.std(0) / math.sqrt(parts)
        off = (stacked.mean(0) - exact).abs()
        assert bool((off < 4.5 * error + 1e-9).all()), coordinates


def test_an_error_relative_to_what_is_summed_out_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            kind = pyro.sample(
                "kind", dist.Categorical(torch.ones(2) / 2), infer={"enumerate": "parallel"}
            )
            z = pyro.sample("z", dist.Normal(3.0 * kind, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    one, other = (engine(model, c, num_particles=3).bind(X[:, 0]) for c in COORDINATES)
    with pytest.raises(ModelError, match=r"\['z'\] cannot be held non-centred: .*\['kind'\]"):
        transported(one.init(), one, other)


def test_all_continuous_latents_are_one_block_whatever_their_names() -> None:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        kind = pyro.sample("kind", dist.Bernoulli(0.3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu + kind, tau))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    for coordinates in COORDINATES:
        dcpc = engine(model, coordinates, num_particles=2, blocks="all")
        assert [unit.sites for unit in dcpc.units(X[:, 0])] == [("mu", "tau", "z"), ("kind",)]
        assert "blocks='all'" in repr(dcpc)
    alone = DCPC(
        gaussian_chain().model, num_particles=2, algorithm="dcpc", schedule="joint", blocks="all"
    )
    assert [unit.sites for unit in alone.units(torch.tensor(2.0))] == [("z1", "z2")]
