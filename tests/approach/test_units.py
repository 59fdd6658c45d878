"""Starts of models whose latents are too many for one unit: rough pilots, roots, and blocks."""

from __future__ import annotations

import signal
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import Exact, condition_gaussian, kalman

from dcpc import DCPC, Posterior, approach
from dcpc.approach.blocks import find_blocks
from dcpc.approach.roots import determined_roots
from dcpc.divide.tempering import Reference
from dcpc.progress import ProgressBar
from dcpc.recombine import LogWeights

pytestmark = pytest.mark.usefixtures("float64")

NUM_PARTICLES = 96
"""Particles that know the shape of 24 values, and no more."""

NUM_GROUPS = 24


def groups(num_groups: int = NUM_GROUPS, shift: float = 3.0) -> Exact:
    """A vague line through groups with effects of their own, in the order a, b, effects.

    The line is far from the origin, so that its coefficients are correlated.
    """
    torch.manual_seed(0)
    group = torch.arange(6 * num_groups) % num_groups
    x = torch.randn(len(group)) + shift
    design = torch.cat([torch.ones(len(x), 1), x[:, None], torch.eye(num_groups)[group]], 1)
    prior = torch.tensor([100.0, 100.0] + [0.5] * num_groups)
    y = design @ torch.cat([torch.tensor([4.0, -1.0]), 0.5 * torch.randn(num_groups)])
    y = y + 0.3 * torch.randn(len(x))

    def model(x, group, y):
        a = pyro.sample("a", dist.Normal(0.0, 100.0))
        b = pyro.sample("b", dist.Normal(0.0, 100.0))
        with pyro.plate("groups", num_groups):
            effect = pyro.sample("effect", dist.Normal(0.0, 0.5))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(a + b * x + effect[group], 0.3), obs=y)

    mean, covariance, log_evidence = condition_gaussian(
        torch.zeros(len(prior)), prior.square().diag(), design, torch.full_like(y, 0.09), y
    )
    return Exact(model, ["a", "b", "effect"], mean, covariance, log_evidence, (x, group, y))


def run(exact: Exact, num_particles: int = NUM_PARTICLES, num_sweeps: int = 200, **options):
    engine = DCPC(exact.model, num_particles=num_particles, **options)
    return engine.run(*exact.args, num_sweeps=num_sweeps, seed=0, progress=False)


def assert_is(posterior: Posterior, exact: Exact) -> None:
    """Means within 4.5 Monte Carlo errors, and sds within what as many draws tell."""
    index = 0
    for name in exact.names:
        table = posterior.statistics()[name]
        mean, sd, mcse = (table[column].reshape(-1) for column in ("mean", "std", "mcse"))
        ess = torch.minimum(table["ess_bulk"], table["ess_tail"]).reshape(-1)
        part = slice(index, index + len(mean))
        exact_sd = exact.covariance.diagonal()[part].sqrt()
        assert bool(((mean - exact.mean[part]).abs() < 4.5 * mcse).all())
        assert bool(((sd / exact_sd - 1).abs() < 4.5 / (2 * ess.clamp(min=100)).sqrt()).all())
        index += len(mean)


def test_correlated_coefficients_move_jointly_beside_effects_of_their_own():
    exact = groups()
    posterior = run(exact, num_sweeps=600)
    assert list(posterior.joined) == ["a+b"]
    assert "'a'" in posterior.joined["a+b"]
    assert "'b'" in posterior.joined["a+b"]
    assert "correlated (-0." in posterior.joined["a+b"]
    assert posterior.unit_of == {"a": "a+b", "b": "a+b", "effect": "effect"}
    assert not posterior.warnings
    assert_is(posterior, exact)
    assert abs(float(posterior.log_evidence) - exact.log_evidence) < 4 * float(
        posterior.log_evidence_se
    )


def test_blocks_that_are_given_are_those_of_the_run():
    posterior = run(groups(), num_sweeps=4, blocks=())
    assert not posterior.joined
    assert set(posterior.unit_of.values()) == {"a", "b", "effect"}


def test_blocks_of_a_chain_are_bounded_and_right():
    torch.manual_seed(2)
    exact = kalman(torch.randn(28).cumsum(0), decay=1.0, process=0.3, noise=0.7)
    posterior = run(exact)
    sizes = [unit.count("+") + 1 for unit in posterior.joined]
    assert max(sizes) <= NUM_PARTICLES // 4
    assert sum(sizes) > 20  # of 28
    assert_is(posterior, exact)


def test_uncorrelated_latents_stay_apart():
    exact = groups(shift=0.0)
    problem = DCPC(exact.model, num_particles=4000).bind(*exact.args)
    draws = torch.randn(4000, 2 + NUM_GROUPS)
    state = problem.init()
    latents = {"a": draws[:, 0], "b": draws[:, 1], "effect": draws[:, 2:]}
    state = type(state)(latents, LogWeights.uniform(4000), state.log_joint)
    assert not find_blocks(problem, state)
    latents["b"] = 0.5 * draws[:, 0] + draws[:, 1]
    (block,) = find_blocks(problem, state)
    assert block.sites == ("a", "b")
    assert block.reason.startswith("'a' and 'b' are correlated (0.4")


def test_what_depends_on_a_latent_with_a_reference_is_drawn_given_it():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 100.0))
        tau = pyro.sample("tau", dist.HalfNormal(5.0))
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    problem = DCPC(model, num_particles=20_000).bind(torch.zeros(3))
    references = {
        "mu": Reference(torch.tensor(-7.0), 0.3),
        "tau": Reference(torch.tensor(-1.0), torch.tensor(0.2)),
    }
    torch.manual_seed(0)
    state = problem.draw_from_prior(problem.density.at(1.0, references))
    error = (state.latents["z"].T - state.latents["mu"]) / state.latents["tau"].exp()
    for value, loc, scale in (
        (error, 0.0, 1.0),
        (state.latents["mu"], -7.0, 0.3),
        (state.latents["tau"], -1.0, 0.2),
    ):
        assert abs(float(value.mean()) - loc) < 4.5 * scale / value.numel() ** 0.5
        assert abs(float(value.std()) / scale - 1) < 4.5 / (2 * value.numel()) ** 0.5


def test_evidence_from_initial_values_of_a_parent_is_that_of_the_model():
    """The start refers to the distribution that it was drawn from, children included."""
    torch.manual_seed(0)
    y = 2.0 + torch.randn(20)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Normal(mu, 0.5))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    covariance = 1.25 * torch.eye(len(y)) + 9.0
    exact = dist.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y)
    for num_particles in (60, 400):
        posterior = DCPC(model, num_particles=num_particles).run(
            y, initial_values={"mu": torch.tensor(2.0)}, num_sweeps=2, seed=1, progress=False
        )
        error = float(posterior.log_evidence_se)
        assert abs(float(posterior.log_evidence) - float(exact)) < 4 * error < 2.0


def test_roots_that_data_determine_are_those_with_a_narrow_posterior_and_no_parents():
    def model(y):
        wide = pyro.sample("wide", dist.Normal(0.0, 100.0))
        weak = pyro.sample("weak", dist.Normal(0.0, 1.0))
        child = pyro.sample("child", dist.Normal(wide, 100.0))
        pyro.sample("y", dist.Normal(wide + weak + child, 1.0), obs=y)

    problem = DCPC(model, num_particles=1000).bind(torch.zeros(()))
    torch.manual_seed(0)
    start = problem.draw_from_prior(problem.density)
    latents = {
        "wide": 5.0 + 0.1 * torch.randn(1000),
        "weak": 0.7 * torch.randn(1000),
        "child": 0.1 * torch.randn(1000),
    }
    weights = LogWeights(torch.where(torch.arange(1000) < 500, 0.0, -torch.inf))
    found = determined_roots(problem, start, type(start)(latents, weights, start.log_joint))
    assert list(found) == ["wide"]
    half = latents["wide"][:500]
    torch.testing.assert_close(found["wide"].loc, half.mean())
    torch.testing.assert_close(found["wide"].scale, 1.5 * half.std(correction=0))


def test_a_run_with_blocks_goes_on_bit_for_bit_and_tells_them(monkeypatch, tmp_path):
    exact = groups()
    expected = run(exact, num_sweeps=40)
    original, calls = ProgressBar.advance, []

    def counting(self, info):
        original(self, info)
        calls.append(info)
        if len(calls) == 27:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ProgressBar, "advance", counting)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job may ignore Ctrl-C
    try:
        partial = run(exact, num_sweeps=40)
    finally:
        signal.signal(signal.SIGINT, before)
    assert partial.is_partial
    partial.save(tmp_path / "partial.pt")
    partial = Posterior.load(tmp_path / "partial.pt")
    engine = DCPC(exact.model, num_particles=NUM_PARTICLES)
    resumed = engine.resume(partial, *exact.args, progress=False)
    assert resumed.joined == partial.joined == expected.joined
    assert all(torch.equal(u, expected.samples[name]) for name, u in resumed.samples.items())


def test_the_posterior_and_the_engine_tell_what_was_joined(capsys):
    exact = groups()
    engine = DCPC(exact.model, num_particles=NUM_PARTICLES)
    assert [unit.name for unit in engine.units(*exact.args)] == ["a", "b", "effect"]
    posterior = engine.run(*exact.args, num_sweeps=4, seed=0, progress=False)
    posterior.summary()
    sentence = f"a+b moved jointly: {posterior.joined['a+b']}"
    assert sentence in capsys.readouterr().out
    units = engine.units(*exact.args)
    assert {unit.name for unit in units} == {"a+b", "effect"}
    assert str(units).endswith(sentence)
    assert "&#x27;a&#x27;" in units._repr_html_()


def test_latents_stay_apart_where_moving_as_one_forgets_nothing(monkeypatch):
    tuned = approach.tuned

    def stuck(problem, state, *, jumps):
        return replace(tuned(problem, state, jumps=jumps), left=1.0)

    monkeypatch.setattr(approach, "tuned", stuck)
    exact = groups(num_groups=4)
    posterior = run(exact, num_particles=200, num_sweeps=600)
    assert not posterior.joined
    assert set(posterior.unit_of.values()) == {"a", "b", "effect"}
    assert_is(posterior, exact)
    monkeypatch.undo()
    assert run(exact, num_particles=200, num_sweeps=20).joined
