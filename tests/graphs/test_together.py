"""Like operators run as one: the numbers of each on its own, from a number that does not grow."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from dcpc import DCPC
from dcpc.graphs.recording import Recording, record
from dcpc.graphs.stages import Stages
from dcpc.graphs.trees import leaves_of

pytestmark = pytest.mark.usefixtures("float64")

NUM_PARTICLES = 37
"""A number that no register's width divides: the ends of tensors are rounded by other code."""


def scores(log_density):
    """Log-density and scores of particles whose latents are tensors by time."""

    def function(settled, moving):
        with torch.enable_grad():
            z = [u.detach().requires_grad_() for u in moving["z"]]
            value = log_density(settled, z)
            gradient = torch.autograd.grad(value.sum(), z)
        return {"value": value.detach(), "scores": list(gradient)}

    return function


def normal(x: Tensor, loc: Tensor, scale: Tensor | float) -> Tensor:
    return torch.distributions.Normal(loc, scale, validate_args=False).log_prob(x)


def walk(settled, z):
    """A random walk that is observed in noise."""
    total = normal(z[0], torch.zeros(()), 1.0).sum(-1)
    for before, now in itertools.pairwise(z):
        total = total + normal(now, before, 0.3).sum(-1)
    for t, now in enumerate(z):
        total = total + normal(settled["x"][t], now, 1.0).sum(-1)
    return total


def volatility(settled, z):
    """Stochastic volatility."""
    total = normal(z[0], torch.zeros(()), 1.0).sum(-1)
    for before, now in itertools.pairwise(z):
        total = total + normal(now, 0.9 * before, 0.3).sum(-1)
    for t, now in enumerate(z):
        total = total + normal(settled["x"][t], torch.zeros(()), (0.5 * now).exp()).sum(-1)
    return total


def transitions(settled, z):
    """States that a network takes to the next ones."""
    weight, bias = settled["weight"], settled["bias"]
    total = normal(z[0], torch.zeros(()), 1.0).sum(-1)
    for before, now in itertools.pairwise(z):
        hidden = torch.nn.functional.linear(before, weight, bias).tanh()
        total = total + normal(now, hidden @ weight, 0.3).sum(-1)
    return total


def correlated(settled, z):
    """States with correlated noise, observed in their sum."""
    tril = settled["weight"].tril(-1) + torch.eye(2)
    total = normal(z[0], torch.zeros(()), 1.0).sum(-1)
    for before, now in itertools.pairwise(z):
        step = torch.distributions.MultivariateNormal(before, scale_tril=tril, validate_args=False)
        total = total + step.log_prob(now)
    for t, now in enumerate(z):
        total = total + normal(settled["x"][t], now.mean(-1), 0.7)
    return total


def classes(settled, z):
    """Labels that depend on states."""
    total = normal(z[0], torch.zeros(()), 1.0).sum(-1)
    for before, now in itertools.pairwise(z):
        total = total + normal(now, before, 0.3).sum(-1)
    for t, now in enumerate(z):
        label = settled["label"][t].expand(len(now))
        logits = now.log_softmax(-1) - now.logsumexp(-1, keepdim=True)
        total = total + logits.gather(-1, label.unsqueeze(-1)).squeeze(-1) + now.amax(-1)
    return total


def both_ways(settled, z):
    """Sites that depend on one of a few, and on all of them."""
    hubs, rest = z[:4], z[4:]
    mean = torch.stack(hubs, -1).mean(-1)
    total = sum(normal(hub, torch.zeros(()), 1.0).sum(-1) for hub in hubs)
    for i, leaf in enumerate(rest):
        total = total + normal(leaf, hubs[i % 4] * mean, 1.5).sum(-1)
    return total


def squares(settled, z):
    """Products of a value with itself and with another one, which are alike."""
    total = normal(z[0], torch.zeros(()), 1.0).sum(-1)
    for before, now in itertools.pairwise(z):
        total = total + (before * now - now * now - before * before * now.exp()).sum(-1)
    return total


def reduced(settled, z):
    """Largest elements of everything, and solves of matrices that broadcast."""
    tril = settled["weight"].tril(-1) + 2.0 * torch.eye(2)
    total = torch.zeros(())
    for now in z:
        solved = torch.linalg.solve_triangular(
            tril, now.unsqueeze(-1).expand(-1, -1, 3), upper=False
        )
        total = total + (now * now.amax() - solved.square().sum(-1)).sum(-1) + now.amin()
    return total


CHAINS = [walk, volatility, transitions, correlated, classes, both_ways]
MODELS = [*CHAINS, squares, reduced]


def inputs(length: int, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    settled = {
        "x": torch.randn(length, dtype=dtype),
        "weight": torch.randn(2, 2, dtype=dtype),
        "bias": torch.randn(2, dtype=dtype),
        "label": torch.arange(length) % 2,
    }
    return settled, {"z": [torch.randn(NUM_PARTICLES, 2, dtype=dtype) for _ in range(length)]}


def recorded(model, length: int, *, is_exact: bool, dtype=torch.float64) -> Recording:
    return record(scores(model), *inputs(length, dtype), is_exact=is_exact)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
def test_numbers_are_those_of_every_operator_on_its_own_bit_for_bit(model, dtype):
    torch.set_default_dtype(dtype)
    recording = recorded(model, 20, is_exact=True, dtype=dtype)
    settled, moving = inputs(20, dtype)
    moving["z"] = [u.flip(0) for u in moving["z"]]
    got, expected = recording(settled, moving), scores(model)(settled, moving)
    assert torch.equal(got["value"], expected["value"])
    assert all(map(torch.equal, got["scores"], expected["scores"]))


@pytest.mark.parametrize("model", MODELS)
def test_numbers_are_those_of_every_operator_but_for_rounding(model):
    recording = recorded(model, 20, is_exact=False)
    settled, moving = inputs(20)
    moving["z"] = [u.flip(0) for u in moving["z"]]
    got, expected = recording(settled, moving), scores(model)(settled, moving)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def num_operators(recording: Recording) -> int:
    """Operators, but for sums of terms one after the other and for views of single rows."""
    names = [str(n.target) for n in recording.graph.nodes if n.op == "call_function"]
    return sum("add" not in name and "getitem" not in name for name in names)


@pytest.mark.parametrize("model", CHAINS)
def test_the_number_of_operators_does_not_grow_with_the_number_of_sites(model):
    short, long = (recorded(model, length, is_exact=False) for length in (24, 96))
    assert num_operators(long) <= num_operators(short) + 2


def test_few_operators_that_are_alike_stay_as_they_are():
    recording = recorded(walk, 3, is_exact=True)
    assert not any("unbind" in str(n.target) for n in recording.graph.nodes)


def test_rows_of_a_large_tensor_are_not_copied():
    def function(settled, moving):
        return [moving["u"][:, t].square() for t in range(10)]

    recording = record(function, {}, {"u": torch.randn(5, 1000)}, is_exact=False)
    assert recording.num_elements() <= 4 * 5 * 10


def test_stages_wait_for_their_own_inputs():
    """What comes later is not computed with what comes first, however much it is like it."""

    def function(settled, moving):
        first = [u.square() for u in moving["z"]]
        later = [u.square() for u in moving["later"]]
        return torch.stack(first).sum(0), torch.stack(later).sum(0)

    moving = {name: [torch.randn(3) for _ in range(10)] for name in ("z", "later")}
    run = Stages(record(function, {}, moving, is_exact=True)).start()
    empty = {**moving, "later": [torch.full((3,), float("nan")) for _ in range(10)]}
    for index, given in enumerate((empty, moving)):
        got = run.stage(index, leaves_of(({}, given)))
        assert torch.equal(got, function({}, moving)[index])


def chain(x: Tensor) -> None:
    z = torch.zeros(())
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z{t}", dist.Normal(z, 0.3))
        pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[t])


def test_sweeps_of_a_chain_are_those_as_written_bit_for_bit():
    x = torch.randn(40)
    states = {}
    for compile in (False, "auto"):
        engine = DCPC(chain, num_particles=NUM_PARTICLES, blocks=(), compile=compile)
        torch.manual_seed(1)
        state = engine.init(x)
        for _ in range(14):
            state, _ = engine.sweep(state, x)
        states[compile] = state
    assert all(
        torch.equal(u, states[False].latents[name]) for name, u in states["auto"].latents.items()
    )
