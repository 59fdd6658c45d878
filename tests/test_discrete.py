"""Discrete latents against enumeration, forward-backward and closed forms."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from discrete_models import Discrete, models
from oracles import Enumerated, enumerate_posterior

from dcpc import DCPC, Posterior
from dcpc.divide.elimination import gumbel_like
from dcpc.errors import OptionError

pytestmark = pytest.mark.usefixtures("float64")

NAMES = [case.name for case in models()]
NUM_PARTICLES = 4000


@pytest.fixture
def case(request, float64) -> Discrete:
    return next(case for case in models() if case.name == request.param)


def exact_draws(case: Discrete, exact: Enumerated, count: int) -> dict[str, torch.Tensor]:
    """Independent draws of the posterior, from its table."""
    index = torch.multinomial(exact.weights, count, replacement=True)
    return {name: value[index].double() for name, value in exact.assignments.items()}


def largest_z(
    drawn: torch.Tensor, values: list[torch.Tensor], shares: torch.Tensor, keep: torch.Tensor
) -> float:
    """Largest deviation of frequencies from probabilities, in standard errors.

    Probabilities under 1e-3 are left out, where a count is not normal.
    """
    found = torch.stack(
        [(drawn == value).double().mean(0) for value in torch.unique(torch.stack(values))], -1
    )
    error = (shares * (1 - shares) / len(drawn)).sqrt()
    z = ((found - shares).abs() / error).masked_fill(shares <= 1e-3, 0.0)
    return float(z[keep].max())


@pytest.mark.parametrize("case", NAMES, indirect=True)
@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-smc"])
def test_draws_of_the_posterior_stay_draws_of_the_posterior(case, algorithm):
    """One sweep on exact draws, all frequencies of which must stay what they are."""
    exact = enumerate_posterior(case.model, case.args, case.values)
    engine = DCPC(case.model, num_particles=NUM_PARTICLES, algorithm=algorithm, **case.options)
    problem = engine.bind(*case.args)
    latents = exact_draws(case, exact, NUM_PARTICLES)
    log_joint = problem.density.log_joint(latents)
    state = replace(problem.init(), latents=latents, log_joint=log_joint)
    moved, _ = problem.sweep(state)
    torch.testing.assert_close(moved.log_joint, problem.density.log_joint(moved.latents))
    torch.testing.assert_close(moved.log_weight.log_weight, state.log_weight.log_weight)
    for name, values in case.values.items():
        z, shares = moved.latents[name], exact.probabilities[name]
        unseen = ~masked(case, name)
        assert largest_z(z, values, shares, unseen) < 4.5
        assert not torch.equal(moved.latents[name], state.latents[name])


@pytest.mark.parametrize("case", NAMES, indirect=True)
@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-smc"])
def test_posterior_and_evidence_are_those_of_enumeration(case, algorithm):
    exact = enumerate_posterior(case.model, case.args, case.values)
    engine = DCPC(case.model, num_particles=200, algorithm=algorithm, **case.options)
    posterior = engine.run(*case.args, num_sweeps=400, seed=1, progress=False)
    error = float(posterior.log_evidence_se.square().sum().sqrt())
    assert error < 0.3
    assert abs(float(posterior.log_evidence.sum()) - exact.log_evidence) < 4 * error + 1e-6
    for name, shares in exact.probabilities.items():
        found = posterior.probabilities(name)
        if case.name == "one_hot":  # probabilities of the entries, not of zero and one in each
            shares = shares[..., 1]
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]))
        seen = min(found.shape[-1], shares.shape[-1])
        off = (found[..., :seen] - shares[..., :seen]).abs()
        assert float(off[~masked(case, name)].max()) < 0.02
        assert float(shares[..., seen:].sum()) < 1e-2


def masked(case: Discrete, name: str) -> torch.Tensor:
    """Elements that are data, and no part of the posterior."""
    return case.args[1] if name.endswith("_unobserved") else torch.tensor(False)


# -- what users see --------------------------------------------------------------------------------


def counts_and_categories(x):
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    m = pyro.sample("m", dist.Multinomial(4, p))
    c = pyro.sample("c", dist.OneHotCategorical(p))
    n = pyro.sample("n", dist.Poisson(3.0))
    with pyro.plate("data", 3):
        k = pyro.sample("k", dist.Categorical(p))
        pyro.sample("x", dist.Normal(1.0 * k + n, 1.0), obs=x)
    pyro.sample("y", dist.Normal(m, 1.0).to_event(1), obs=x)
    pyro.sample("z", dist.Normal(c, 0.5).to_event(1), obs=x)


@pytest.fixture(scope="module")
def posterior():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.tensor([2.0, 1.0, 1.0])
        engine = DCPC(counts_and_categories, num_particles=100)
        return engine.run(x, num_sweeps=60, seed=0, progress=False)


def test_a_summary_lists_modes_and_probabilities(posterior):
    text = posterior.format_summary()
    labels = ["m[0]", "m[1]", "m[2]", "c", "n", "k[0]", "k[1]", "k[2]"]
    assert any({"mode", "probabilities"} <= set(line.split()) for line in text.splitlines())
    words = [line.split() for line in text.splitlines()]
    found = {line[0]: line[1] for line in words if line and line[0] in labels}
    modes = [*posterior.mode("m").tolist(), posterior.mode("c").item(), posterior.mode("n").item()]
    modes += posterior.mode("k").tolist()
    assert [found[label] for label in labels] == [str(mode) for mode in modes]
    assert "mean" not in "".join(line for line in text.splitlines() if line.startswith("k["))


def test_probabilities_agree_with_the_draws(posterior):
    """Within five standard errors of the frequencies of the kept draws."""
    for name in ("n", "k"):
        shares, mcse = posterior.probabilities(name), posterior.statistics()[name]["mcse"]
        values = torch.arange(shares.shape[-1], dtype=torch.float32)
        mean = (shares * values).sum(-1)
        assert bool(((mean - posterior.mean()[name]).abs() < 5 * mcse + 1e-6).all())
    for name in ("c", "m", "k"):
        total = posterior.probabilities(name).sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total))


def test_a_posterior_with_discrete_latents_is_saved(posterior, tmp_path):
    posterior.save(tmp_path / "posterior.pt")
    again = Posterior.load(tmp_path / "posterior.pt")
    assert again.format_summary() == posterior.format_summary()
    assert torch.equal(again.probabilities("k"), posterior.probabilities("k"))


def test_values_that_are_masked_out_keep_their_draws_of_the_prior():
    def model(seen):
        with pyro.plate("data", 3), pyro.poutine.mask(mask=seen):
            z = pyro.sample("z", dist.Bernoulli(0.15))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor([0.2, 3.0, 1.0]))

    engine = DCPC(model, num_particles=500)
    posterior = engine.run(torch.tensor([True, False, False]), num_sweeps=20, progress=False)
    found = posterior.probabilities("z")[1:, 1]
    torch.testing.assert_close(found, posterior.mean()["z"][1:])
    assert bool(((found - 0.15).abs() < 4.5 * (0.15 * 0.85 / 500) ** 0.5).all())


def test_arviz_gets_integers(posterior):
    assert posterior.to_arviz().posterior["k"].dtype == "int64"


def test_probabilities_of_a_continuous_latent_are_refused(posterior):
    with pytest.raises(OptionError, match=r"'p' is not a discrete latent.*'m', 'c', 'n', 'k'"):
        posterior.probabilities("p")


@pytest.mark.parametrize("algorithm", ["dcpc-paper", "pgd", "lpc", "mcpc", "pc", "ipc"])
def test_inexact_presets_move_discrete_latents(algorithm):
    """Without noise, to the most probable value: of `1.9 ~ N(2 z, 1)` that is one."""

    def model(x):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)
        pyro.sample("y", dist.Normal(loc, 1.0), obs=x)

    count = 1 if algorithm in ("mcpc", "pc", "ipc") else 400
    engine = DCPC(model, num_particles=count, algorithm=algorithm)
    problem = engine.bind(torch.tensor(1.9))
    state = problem.init()
    shares = []
    for _ in range(20):
        state, info = problem.sweep(state)
        shares.append(info.probabilities["z"][1])
    odds = 0.3 / 0.7 * math.exp(-0.5 * 0.1**2 + 0.5 * 1.9**2)
    torch.testing.assert_close(shares[-1], torch.tensor(odds / (1 + odds)))
    if algorithm in ("pc", "ipc"):
        assert state.latents["z"].tolist() == [1.0]
    elif count > 1:
        found = float((state.log_weight.normalized() * state.latents["z"]).sum())
        assert abs(found - odds / (1 + odds)) < 0.1


def test_gumbel_numbers_are_finite_where_a_uniform_one_is_zero(monkeypatch):
    """Zero comes once in 2^24 numbers; the impossible must stay impossible then."""
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    assert bool(gumbel_like(torch.zeros(3, dtype=torch.float32)).isfinite().all())


def test_a_one_hot_vector_of_many_categories_is_enumerated():
    logits = torch.linspace(0.0, 3.0, 300)

    def model(x):
        z = pyro.sample("z", dist.OneHotCategorical(logits=logits))
        pyro.sample("x", dist.Normal(z @ logits, 1.0), obs=x)

    problem = DCPC(model, num_particles=3).bind(torch.tensor(1.0))
    _, info = problem.sweep(problem.init())
    exact = (logits + dist.Normal(logits, 1.0).log_prob(torch.tensor(1.0))).softmax(0)
    torch.testing.assert_close(info.probabilities["z"], exact)


def test_a_single_category_keeps_all_counts():
    def model(x):
        z = pyro.sample("z", dist.Multinomial(7, torch.ones(1)))
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.sum(-1) + loc, 1.0), obs=x)

    problem = DCPC(model, num_particles=5).bind(torch.tensor(1.0))
    state, _ = problem.sweep(problem.init())
    assert state.latents["z"].tolist() == [[7.0]] * 5
