"""Jumps to draws of a guide, against posteriors that are known."""

from __future__ import annotations

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from dcpc import DCPC
from dcpc.errors import OptionError
from dcpc.independence import jump_to_guide
from dcpc.recombine import LogWeights
from dcpc.reparam import NonCentred
from dcpc.start import draw_from_guide, guide_log_density

pytestmark = pytest.mark.usefixtures("float64")

X = torch.tensor([[0.3], [2.0], [-1.0]], dtype=torch.float64)


def model(x: Tensor) -> None:
    """`tau ~ LogNormal(0, .5)`, `z ~ N(1, 2^2)`, `x ~ N(z, tau)`."""
    with pyro.plate("data", len(x)):
        tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
        z = pyro.sample("z", dist.Normal(1.0, 2.0))
        pyro.sample("x", dist.Normal(z, tau).expand([len(x)]), obs=x[:, 0])


def guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("tau", dist.Gamma(3.0, 3.0).expand([len(x)]))
        pyro.sample("z", dist.Normal(x[:, 0], 1.5))


def exact() -> tuple[Tensor, Tensor]:
    """Posterior means of `log tau` and `z` by quadrature, `(3,)` each."""
    log_tau = torch.linspace(-4, 4, 801)[:, None, None]
    z = torch.linspace(-12, 12, 1201)[None, :, None]
    density = (
        dist.Normal(0.0, 0.5).log_prob(log_tau)
        + dist.Normal(1.0, 2.0).log_prob(z)
        + dist.Normal(z, log_tau.exp()).log_prob(X[:, 0])
    )
    mass = density.flatten(0, 1).softmax(0).reshape(density.shape)
    return (mass * log_tau).sum((0, 1)), (mass * z).sum((0, 1))


@pytest.mark.parametrize("coordinates", ["centred", "noncentred"])
def test_the_density_of_a_draw_is_that_of_values_and_jacobian(coordinates: str) -> None:
    held = NonCentred(model) if coordinates == "noncentred" else model
    problem = DCPC(held, guide, num_particles=5).bind(X)
    state = draw_from_guide(guide, problem.division, problem.arguments, 5)
    found = guide_log_density(guide, problem.division, problem.arguments, state.latents)
    torch.testing.assert_close(found, state.log_joint)
    u, v = state.latents["tau"], state.latents["z"]
    scale = 0.5 if coordinates == "noncentred" else 1.0
    z, slope = (1.0 + 2.0 * v, 2.0) if coordinates == "noncentred" else (v, 1.0)
    tau = (scale * u).exp()
    by_hand = dist.Gamma(3.0, 3.0).log_prob(tau) + (scale * u) + math.log(scale)
    by_hand = by_hand + dist.Normal(X[:, 0], 1.5).log_prob(z) + math.log(slope)
    torch.testing.assert_close(found, by_hand)


@pytest.mark.parametrize("coordinates", ["centred", "noncentred"])
def test_jumps_alone_reach_the_posterior_and_leave_it(coordinates: str) -> None:
    held = NonCentred(model) if coordinates == "noncentred" else model
    count = 20_000
    problem = DCPC(held, guide, num_particles=count, move="underdamped").bind(X)
    plain = DCPC(model, num_particles=count).bind(X)
    state = replace(problem.init(), log_weight=LogWeights(torch.zeros(count, 3)))
    state = replace(state, log_joint=problem.log_joint(state))
    rates = []
    for _ in range(25):
        state, rate = jump_to_guide(problem, state)
        rates.append(float(rate))
    assert 0.2 < rates[-1] < 1.0
    torch.testing.assert_close(state.log_joint, problem.log_joint(state))
    assert bool((state.log_weight.log_weight == 0).all())
    values = problem.constrain(state.latents)
    for name, expected in zip(("tau", "z"), exact(), strict=True):
        found = values[name].log() if name == "tau" else values[name]
        error = found.std(0) / math.sqrt(count)
        assert bool(((found.mean(0) - expected).abs() < 5 * error).all()), name
    assert set(state.memory) == {"momentum"}
    assert plain.division.latents == problem.division.latents


def test_particles_that_lag_start_anew_and_others_stay() -> None:
    problem = DCPC(model, guide, num_particles=2000).bind(X)
    state = problem.init()
    state.latents["z"][:1000], state.latents["tau"][:1000] = 10.0, 0.0
    state = replace(state, log_joint=problem.log_joint(state))
    state = replace(state, log_weight=LogWeights(torch.zeros(2000, 3)))
    moved, _ = jump_to_guide(problem, state)
    assert float((moved.latents["z"][:1000] == 10.0).double().mean()) < 0.1
    stayed = moved.latents["z"][1000:] == state.latents["z"][1000:]
    assert 0.05 < float(stayed.double().mean()) < 0.8


def test_jumps_need_a_guide_and_an_exact_algorithm() -> None:
    plain = DCPC(model, num_particles=2).bind(X)
    with pytest.raises(OptionError, match="there is no guide to jump to"):
        jump_to_guide(plain, plain.init())
    rival = DCPC(model, guide, num_particles=2, algorithm="pgd").bind(X)
    with pytest.raises(OptionError, match="algorithm 'pgd' does not leave posteriors invariant"):
        jump_to_guide(rival, rival.init())
