"""Discrete latents in numbers: cost, and posteriors of larger models (slow)."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dcpc import DCPC
from dcpc.divide.discrete_unit import DiscreteGroup

pytestmark = pytest.mark.usefixtures("float64")


class Operators(TorchDispatchMode):
    """Counts the operators that are run."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def hidden_markov(x, move, loc):
    z = 0
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(move[z]))
        pyro.sample(f"x_{t}", dist.Normal(loc[z], 1.0), obs=x[t])


def chain(length, seed=0):
    """Data, transition matrix and levels of a chain of four states."""
    torch.manual_seed(seed)
    move = 0.3 * dist.Dirichlet(torch.ones(4)).sample((4,)) + 0.7 * torch.eye(4)
    loc, z, x = torch.tensor([-2.0, 0.0, 1.0, 3.0]), 0, []
    for _ in range(length):
        z = int(dist.Categorical(move[z]).sample())
        x.append(loc[z] + torch.randn(()))
    return torch.stack(x), move, loc


def forward_backward(x, move, loc):
    """Marginal probabilities of the states, and the evidence."""
    likelihood = dist.Normal(loc, 1.0).log_prob(x[:, None])
    forward = [move[0].log() + likelihood[0]]
    for row in likelihood[1:]:
        forward.append((forward[-1][:, None] + move.log()).logsumexp(0) + row)
    backward = [torch.zeros(4)]
    for row in likelihood[1:].flip(0):
        backward.append((move.log() + row + backward[-1]).logsumexp(1))
    joint = torch.stack(forward) + torch.stack(backward).flip(0)
    return joint.softmax(1), forward[-1].logsumexp(0)


def test_a_unit_of_seven_values_is_evaluated_seven_times(monkeypatch):
    """And only its own factors are: the second likelihood never is."""
    seen = []
    original = DiscreteGroup.log_terms_at

    def watched(self, values, *args):
        seen.append((self.touched, len(values)))
        return original(self, values, *args)

    monkeypatch.setattr(DiscreteGroup, "log_terms_at", watched)

    def model(x):
        z = pyro.sample("z", dist.Categorical(torch.ones(7)))
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=x)
        pyro.sample("y", dist.Normal(loc, 1.0), obs=x)

    problem = DCPC(model, num_particles=5).bind(torch.tensor(0.5))
    state = problem.init()
    seen.clear()
    problem.sweep(state, retargets=False)
    assert seen == [(["z", "x"], 7)]


def test_a_sweep_of_a_chain_is_linear_in_its_length():
    counts = []
    for length in (8, 16, 32):
        data = chain(length)
        problem = DCPC(hidden_markov, num_particles=3, certify=False).bind(*data)
        state, _ = problem.sweep(problem.init())
        with Operators() as operators:
            problem.sweep(state)
        counts.append(operators.count)
    assert counts[2] - counts[1] < 2.2 * (counts[1] - counts[0])


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-smc"])
def test_a_chain_of_a_hundred_states(algorithm):
    data = chain(100)
    marginals, log_evidence = forward_backward(*data)
    engine = DCPC(hidden_markov, num_particles=200, algorithm=algorithm)
    posterior = engine.run(*data, num_sweeps=20, seed=0, progress=False)
    assert abs(posterior.log_evidence - log_evidence) < 3 * posterior.log_evidence_se
    assert posterior.log_evidence_se < 0.5
    for t in range(100):
        torch.testing.assert_close(posterior.probabilities(f"z_{t}"), marginals[t])
        found = torch.bincount(posterior.history[f"z_{t}"].flatten(), minlength=4)
        assert float((found / found.sum() - marginals[t]).abs().max()) < 0.04


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-smc"])
def test_a_belief_network_of_fifteen_units(algorithm):
    torch.manual_seed(0)
    weights, loading = torch.randn(4, 11), torch.randn(11, 6)
    x = torch.randn(6)

    def model(x):
        with pyro.plate("top", 4):
            h = pyro.sample("h", dist.Bernoulli(0.4))
        with pyro.plate("bottom", 11):
            g = pyro.sample("g", dist.Bernoulli(logits=h @ weights - 0.3))
        with pyro.plate("data", 6):
            pyro.sample("x", dist.Normal(g @ loading, 1.0), obs=x)

    bits = torch.tensor(list(itertools.product((0.0, 1.0), repeat=15)))
    h, g = bits[:, :4], bits[:, 4:]
    log_joint = (
        dist.Bernoulli(0.4).log_prob(h).sum(1)
        + dist.Bernoulli(logits=h @ weights - 0.3).log_prob(g).sum(1)
        + dist.Normal(g @ loading, 1.0).log_prob(x).sum(1)
    )
    shares = (log_joint.softmax(0)[:, None] * bits).sum(0)
    engine = DCPC(model, num_particles=500, algorithm=algorithm)
    posterior = engine.run(x, num_sweeps=400, seed=0, progress=False)
    found = torch.cat([posterior.probabilities(name)[:, 1] for name in "hg"])
    assert float((found - shares).abs().max()) < 0.02
    error = posterior.log_evidence_se
    assert error < 0.3
    assert abs(posterior.log_evidence - log_joint.logsumexp(0)) < 3 * error


@pytest.mark.slow
def test_a_mixture_of_five_hundred_points():
    """Unknown centres, against importance sampling around one of the six equal modes."""
    torch.manual_seed(0)
    truth = torch.tensor([[-2.0, 0.0], [1.5, 1.5], [1.0, -2.0]])
    x = truth[torch.randint(3, (500,))] + torch.randn(500, 2)

    def model(x):
        with pyro.plate("components", 3):
            loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample(
                "z", dist.Categorical(torch.ones(3) / 3), infer={"enumerate": "parallel"}
            )
            pyro.sample("x", dist.Normal(loc[z], 1.0).to_event(1), obs=x)

    def terms(loc):
        """`log p(z) p(x | z)`, `(..., 500, 3)`."""
        return dist.Normal(loc.unsqueeze(-3), 1.0).log_prob(x[:, None]).sum(-1) - math.log(3)

    def log_joint(flat):
        loc = flat.unflatten(-1, (3, 2))
        prior = dist.Normal(0.0, 5.0).log_prob(flat).sum(-1)
        return prior + terms(loc).logsumexp(-1).sum(-1)

    mode = truth.flatten().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([mode], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -log_joint(mode)
        loss.backward()
        return loss

    optimizer.step(closure)
    hessian = torch.autograd.functional.hessian(log_joint, mode.detach())
    proposal = torch.distributions.MultivariateNormal(mode.detach(), 1.2 * (-hessian).inverse())
    draws = proposal.sample((4000,))
    log_weight = torch.cat([log_joint(d) for d in draws.split(200)]) - proposal.log_prob(draws)
    weights = log_weight.softmax(0)
    assert weights.square().sum().reciprocal() > 2000
    log_evidence = log_weight.logsumexp(0) - math.log(len(draws)) + math.log(6)
    centres = draws.unflatten(-1, (3, 2))
    mean = (weights[:, None, None] * centres).sum(0)
    spread = (weights[:, None, None] * (centres - mean).square()).sum(0).sqrt()
    labels = sum(w * terms(c).softmax(-1) for w, c in zip(weights, centres, strict=True))

    posterior = DCPC(model, num_particles=300).run(x, num_sweeps=300, seed=0, progress=False)
    assert posterior.log_evidence_se < 0.6
    assert abs(posterior.log_evidence - log_evidence) < 3 * posterior.log_evidence_se
    found = posterior.history["loc"].flatten(0, 1)
    distance = (found[:, :, None] - truth).square().sum(-1)
    order = distance.argmin(1)  # which component is nearest to each of the three centres
    rows = torch.arange(len(found))[:, None]
    sorted_centres = found[rows, order]
    assert float(((sorted_centres.mean(0) - mean) / spread).abs().max()) < 0.15
    assert float((sorted_centres.std(0) / spread - 1).abs().max()) < 0.1
    z = posterior.history["z"].flatten(0, 1)
    for component in range(3):
        share = (z == order[:, component, None]).double().mean(0)
        assert float((share - labels[:, component]).abs().max()) < 0.02
