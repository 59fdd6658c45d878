"""Discrete latents that are summed out, against sums over all assignments run through Pyro."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import plain_trace
from pyro.infer import config_enumerate
from torch.distributions import biject_to

from dcpc import DCPC, Posterior
from dcpc.errors import ModelError, OptionError

pytestmark = pytest.mark.usefixtures("float64")

SERIES = torch.tensor([0.5, -1.2, 1.4, 0.8], dtype=torch.float64)


def mixture(x):
    """Assignments in a plate."""
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(share), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(loc[z.long()], 1.0), obs=x)


def hidden_markov(x):
    """A chain whose transition matrix is a latent, in Pyro's style of annotation."""
    with pyro.plate("rows", 2):
        move = pyro.sample("move", dist.Dirichlet(torch.ones(2)))
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    z = 0
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(move[z]))
        pyro.sample(f"x_{t}", dist.Normal(loc[z], 1.0), obs=x[t])


def sequences(x):
    """Chains side by side in a plate, with a second likelihood."""
    stay = pyro.sample("stay", dist.Beta(3.0, 2.0))
    with pyro.plate("sequences", 2):
        z = torch.zeros(2)
        for t in pyro.markov(range(2)):
            z = pyro.sample(f"z_{t}", dist.Bernoulli(torch.where(z == 1, stay, 1 - stay)))
            pyro.sample(f"x_{t}", dist.Normal(2 * z, 1.0), obs=x.reshape(2, 2)[t])
            pyro.sample(f"y_{t}", dist.Poisson(1.0 + z), obs=torch.tensor([1.0, 3.0]))


def with_a_count(x):
    """A binomial count, and a continuous latent that nothing discrete touches."""
    rate = pyro.sample("rate", dist.LogNormal(0.0, 0.5))
    n = pyro.sample("n", dist.Binomial(6, torch.tensor(0.4)))
    pyro.sample("x", dist.Normal(rate * n, 1.0), obs=x[0])


CASES = {
    "mixture": (mixture, {"z": ((4,), 2)}, torch.float64),
    "hidden_markov": (
        config_enumerate(hidden_markov),
        {f"z_{t}": ((), 2) for t in range(4)},
        torch.long,
    ),
    "sequences": (
        config_enumerate(sequences),
        {f"z_{t}": ((2,), 2) for t in range(2)},
        torch.float64,
    ),
    "with_a_count": (config_enumerate(with_a_count), {"n": ((), 7)}, torch.float64),
}


def assignments(shapes, dtype):
    """All values of the discrete latents."""
    options = []
    for shape, count in shapes.values():
        rows = itertools.product(range(count), repeat=math.prod(shape))
        options.append([torch.tensor(row, dtype=dtype).reshape(shape) for row in rows])
    return [dict(zip(shapes, choice, strict=True)) for choice in itertools.product(*options)]


def exact(name, latents):
    """Log of the summed joint of one particle, and the probabilities of all assignments."""
    model, shapes, dtype = CASES[name]
    values, log_joint = assignments(shapes, dtype), []
    for assignment in values:
        conditioned = pyro.poutine.condition(model, data=assignment)
        trace = plain_trace(conditioned, latents, (SERIES,))
        total = trace.log_prob_sum()
        for latent, u in latents.items():
            node = trace.nodes[latent]
            total = (
                total + biject_to(node["fn"].support).log_abs_det_jacobian(u, node["value"]).sum()
            )
        log_joint.append(total)
    stacked = torch.stack(log_joint)
    return stacked.logsumexp(0), stacked.softmax(0), values


@pytest.mark.parametrize("backend", ["graph", "vmap", "loop"])
@pytest.mark.parametrize("name", CASES)
def test_density_and_score_are_those_of_the_sum(name, backend):
    model, shapes, _ = CASES[name]
    problem = DCPC(model, num_particles=3, backend=backend).bind(SERIES)
    state = problem.init()
    assert set(state.latents).isdisjoint(shapes)
    for k in range(3):
        particle = {n: u[k].clone().requires_grad_() for n, u in state.latents.items()}
        total, _, _ = exact(name, particle)
        torch.testing.assert_close(problem.log_joint(state)[k], total.detach())
        gradients = torch.autograd.grad(total, list(particle.values()))
        expected = {n: g[None] for n, g in zip(particle, gradients, strict=True)}
        for group in problem.division.groups:
            score = group.evaluate(
                group.pack(state.latents), state.latents, problem.density.tensors
            ).score[k]
            torch.testing.assert_close(score, group.pack(expected)[0])


@pytest.mark.parametrize("name", CASES)
def test_values_are_drawn_from_their_conditional(name):
    """Conditional probabilities exactly, and frequencies of draws within their error."""
    model, shapes, _ = CASES[name]
    count = 4000
    problem = DCPC(model, num_particles=count).bind(SERIES)
    one = problem.init()
    same = {n: u[:1].expand_as(u) for n, u in one.latents.items()}
    drawn, probabilities = problem.completed(same)
    _, shares, values = exact(name, {n: u[0] for n, u in same.items()})
    for latent in shapes:
        stacked = torch.stack([value[latent] for value in values])
        for number in range(probabilities[latent].shape[-1]):
            weight = shares.reshape(-1, *(1,) * (stacked.dim() - 1))
            expected = (weight * (stacked == number)).sum(0)
            torch.testing.assert_close(probabilities[latent][0][..., number], expected)
            found = (drawn[latent] == number).double().mean(0)
            error = (expected * (1 - expected) / count).sqrt()
            assert bool(((found - expected).abs() <= 4.5 * error + 1e-12).all())
    together = torch.stack([drawn[latent].reshape(count, -1) for latent in shapes], 1).flatten(1)
    for share, value in zip(shares, values, strict=True):
        row = torch.cat([value[latent].flatten() for latent in shapes])
        found = (together == row).all(1).double().mean()
        assert abs(found - share) <= 4.5 * (share * (1 - share) / count).sqrt() + 1e-12


def test_a_posterior_holds_draws_and_probabilities_of_what_was_summed_out(tmp_path):
    """Evidence and probabilities on a grid over the one continuous latent."""

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc + 2 * z, 1.0), obs=x)
        pyro.deterministic("total", z.sum())

    grid = torch.linspace(-6, 6, 4001)
    normal = torch.distributions.Normal
    terms = torch.stack(
        [
            normal(grid[:, None] + 2 * z, 1.0).log_prob(SERIES) + math.log(0.3 if z else 0.7)
            for z in (0, 1)
        ],
        -1,
    )
    log_joint = normal(0.0, 1.0).log_prob(grid) + terms.logsumexp(-1).sum(-1)
    weights = log_joint.softmax(0)
    shares = (weights[:, None] * terms.softmax(-1)[..., 1]).sum(0)
    posterior = DCPC(model, num_particles=200).run(SERIES, num_sweeps=300, seed=1, progress=False)
    log_evidence = log_joint.logsumexp(0) + math.log(float(grid[1] - grid[0]))
    assert abs(posterior.log_evidence - log_evidence) < 4 * posterior.log_evidence_se
    assert float((posterior.probabilities("z")[:, 1] - shares).abs().max()) < 0.02
    assert float((posterior.mean()["z"] - shares).abs().max()) < 0.02
    assert abs(float(posterior.mean()["total"] - shares.sum())) < 0.04
    torch.testing.assert_close(posterior.history["total"], posterior.history["z"].sum(-1))
    assert posterior.mode("z").tolist() == (shares > 0.5).long().tolist()
    posterior.save(tmp_path / "posterior.pt")
    again = Posterior.load(tmp_path / "posterior.pt")
    assert torch.equal(again.probabilities("z"), posterior.probabilities("z"))


def test_what_continuous_latents_depend_on_is_drawn():
    def model(x):
        z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        loc = pyro.sample("loc", dist.Normal(2 * z, 1.0))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    problem = DCPC(model, num_particles=3).bind(SERIES[0])
    assert "z" in problem.init().latents


def test_latents_of_a_plate_are_summed_out_beside_others_that_are_drawn():
    """A global latent and those of a plate share a factor; one of the two can be summed out."""

    def model(x):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.6, 0.4])))
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(loc + z * (1.0 + k), 1.0), obs=x)

    problem = DCPC(config_enumerate(model), num_particles=4).bind(SERIES)
    state = problem.init()
    assert list(state.latents) == ["k", "loc"]
    normal = torch.distributions.Normal
    for k, loc, found in zip(
        state.latents["k"], state.latents["loc"], problem.log_joint(state), strict=True
    ):
        each = torch.stack(
            [
                normal(loc + z * (1.0 + k), 1.0).log_prob(SERIES) + math.log(0.3 if z else 0.7)
                for z in (0, 1)
            ]
        )
        prior = normal(0.0, 1.0).log_prob(loc) + math.log(0.4 if k else 0.6)
        torch.testing.assert_close(found, prior + each.logsumexp(0).sum())


def test_latents_are_drawn_where_none_would_be_left():
    def model(x):
        z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "sequential"})
        pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)

    problem = DCPC(model, num_particles=3).bind(SERIES[0])
    assert list(problem.init().latents) == ["z"]


def test_a_scaled_prior_is_not_summed_out_and_refused_like_others():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.poutine.scale(scale=0.5):
            z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(loc + 2 * z, 1.0), obs=x)

    with pytest.raises(ModelError, match=r"'z'.*handler"):
        DCPC(model, num_particles=3).run(SERIES[0], num_sweeps=2, progress=False)


def test_an_enumeration_without_end_is_refused():
    def model(x):
        n = pyro.sample("n", dist.Poisson(3.0), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(n, 1.0), obs=x)

    with pytest.raises(ModelError, match=r"'n'.*no end.*annotation away"):
        DCPC(model, num_particles=3).bind(SERIES[0])


def test_an_enumeration_that_costs_too_much_names_the_cost():
    def model(x):
        a = pyro.sample("a", dist.Categorical(torch.ones(40)))
        b = pyro.sample("b", dist.Categorical(torch.ones(50)))
        pyro.sample("x", dist.Normal(a + b + 0.0, 1.0), obs=x)

    with pytest.raises(ModelError, match=r"\['a', 'b'\].*2,000 evaluations.*256"):
        DCPC(config_enumerate(model), num_particles=3).bind(SERIES[0])
    with pytest.raises(OptionError, match=r"\('a', 'b'\).*2,000 evaluations.*split"):
        DCPC(model, num_particles=3, blocks=[("a", "b")]).bind(SERIES[0])


def half_labelled(x, label, seen):
    """A label that nothing depends on, and that is seen of some data: two likelihoods of `z`."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        logits = torch.stack([z, -z, 0.3 * torch.ones_like(z)], -1)
        pyro.sample("label", dist.Categorical(logits=logits), obs=label, obs_mask=seen)
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def test_labels_that_are_not_seen_are_left_out_and_have_exact_probabilities():
    x, label = torch.tensor([0.4, -1.0, 1.5, 0.2]), torch.tensor([1, 0, 2, 0])
    seen = torch.tensor([True, False, True, False])
    grid = torch.linspace(-8, 8, 4001)
    logits = torch.stack([grid, -grid, 0.3 * torch.ones_like(grid)], -1)
    told = logits.log_softmax(-1)  # (grid, classes)
    joint = dist.Normal(0.0, 1.0).log_prob(grid) + dist.Normal(grid, 0.5).log_prob(x[:, None])
    joint = joint + torch.where(seen[:, None], told.T[label], 0.0)
    log_evidence = joint.logsumexp(1) + (grid[1] - grid[0]).log()
    weight = joint.softmax(1)
    engine = DCPC(half_labelled, num_particles=1000)
    assert list(engine.bind(x, label, seen).init().latents) == ["z"]
    posterior = engine.run(x, label, seen, num_sweeps=200, seed=0, progress=False)
    error = (posterior.log_evidence - log_evidence) / posterior.log_evidence_se
    assert bool((error.abs() < 4).all())
    table = posterior.statistics()["z"]
    assert bool(((table["mean"] - weight @ grid).abs() < 4 * table["mcse"]).all())
    found = posterior.probabilities("label_unobserved")[~seen]
    torch.testing.assert_close(found, (weight @ told.exp())[~seen], atol=0.01, rtol=0.0)
    drawn = posterior.samples["label"]
    assert bool((drawn[:, seen] == label[seen]).all())
    assert posterior.num_masked == {"label_unobserved": 2}


def test_what_a_mask_takes_out_keeps_its_prior_given_the_others():
    """As in Pyro, where a mask takes a density away and not the draw."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)
        with pyro.plate("n", 4), pyro.poutine.mask(mask=torch.arange(4) < 2):
            k = pyro.sample("k", dist.Bernoulli(logits=z))
        pyro.deterministic("total", k.sum(-1))

    posterior = DCPC(model, num_particles=500).run(
        torch.tensor(1.0), num_sweeps=200, seed=0, progress=False
    )
    z = torch.distributions.Normal(0.8, math.sqrt(0.2)).sample((200_000,))
    exact = float(z.sigmoid().mean())
    found = posterior.probabilities("k")[:, 1]
    torch.testing.assert_close(found, torch.full((4,), exact), atol=0.02, rtol=0.0)
    assert float(posterior.mean()["total"]) == pytest.approx(4 * exact, abs=0.05)


def test_a_barren_latent_that_others_depend_on_is_no_barren_one():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("w", dist.Bernoulli(0.2 + 0.5 * z))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    problem = DCPC(model, num_particles=3).bind(SERIES[0])
    assert problem.division.summed_out == ["w"]  # and `z` hangs on it


def test_a_guide_may_draw_what_the_model_leaves_out():
    def guide(x, label, seen):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.7))
            pyro.sample("label_unobserved", dist.Categorical(torch.ones(3) / 3))

    x, label = torch.tensor([0.4, -1.0]), torch.tensor([1, 0])
    seen = torch.tensor([True, False])
    one, other = (
        DCPC(half_labelled, g, num_particles=4000).run(
            x, label, seen, num_sweeps=4, seed=0, progress=False
        )
        for g in (None, guide)
    )
    error = (one.log_evidence_se.square() + other.log_evidence_se.square()).sqrt()
    assert bool(((one.log_evidence - other.log_evidence).abs() < 4 * error).all())
