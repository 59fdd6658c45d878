"""The way from pilots' references: right where annealing from the prior is lost, and unbiased."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import conjugate_pairs, gaussian_chain, linear_gaussian_dag

from dcpc import DCPC
from dcpc.approach import joint
from dcpc.approach.joint import MIN_PARTICLES, follow, joint_problem, send_pilots
from dcpc.divide import Density
from dcpc.divide.joint_reference import HalfPrior, StudentMixture
from dcpc.progress import ProgressBar

pytestmark = pytest.mark.usefixtures("float64")


def run(model, *args, num_particles=400, num_sweeps=100, **options):
    engine = DCPC(model, num_particles=num_particles)
    return engine.run(*args, num_sweeps=num_sweeps, seed=0, progress=False, **options)


def vague_regression(dtype=torch.float64):
    """A line far from the origin, with priors a hundred thousand times as wide as its posterior."""
    torch.manual_seed(1)
    x = torch.stack([torch.ones(40), 50 + 5 * torch.randn(40)], 1)
    y = x @ torch.tensor([3.0, -0.5]) + torch.randn(40)
    precision = x.T @ x + torch.eye(2) / 1000.0**2
    covariance = torch.linalg.inv(precision)
    marginal = dist.MultivariateNormal(torch.zeros(40), 1000.0**2 * x @ x.T + torch.eye(40))

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1000.0))
        b = pyro.sample("b", dist.Normal(0.0, 1000.0))
        with pyro.plate("n", 40):
            pyro.sample("y", dist.Normal(a + b * x[:, 1].to(dtype), 1.0), obs=y.to(dtype))

    return model, covariance @ x.T @ y, covariance, float(marginal.log_prob(y))


def test_vague_priors_and_a_ridge():
    model, mean, covariance, log_evidence = vague_regression()
    posterior = run(model)
    assert not posterior.warnings
    assert set(posterior.unit_of.values()) == {"a+b"}
    annealed = DCPC(model, num_particles=400).anneal(seed=1)
    for estimate, se in (
        (posterior.log_evidence, posterior.log_evidence_se),
        (annealed.log_evidence, annealed.log_evidence_se),
    ):
        assert abs(float(estimate) - log_evidence) < 4 * float(se) < 0.4
    for index, name in enumerate("ab"):
        table, sd = posterior.statistics()[name], float(covariance[index, index]) ** 0.5
        assert abs(float(table["mean"]) - float(mean[index])) < 4.5 * float(table["mcse"])
        assert float(table["std"]) == pytest.approx(sd, rel=0.05)
    draws = torch.stack([posterior.draws(name)[0].flatten() for name in "ab"])
    expected = float(covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt())
    assert float(torch.corrcoef(draws)[0, 1]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("options", [{"algorithm": "dcpc-smc"}, {"particle_batch_size": 150}])
def test_other_engines_start_there_too(options):
    model, mean, covariance, log_evidence = vague_regression()
    engine = DCPC(model, num_particles=400, **options)
    posterior = engine.run(num_sweeps=100, seed=0, progress=False)
    error = abs(float(posterior.log_evidence) - log_evidence)
    assert error < 4 * float(posterior.log_evidence_se) < 0.4
    for index, name in enumerate("ab"):
        table, sd = posterior.statistics()[name], float(covariance[index, index]) ** 0.5
        assert abs(float(table["mean"]) - float(mean[index])) < 4.5 * float(table["mcse"])
        assert float(table["std"]) == pytest.approx(sd, rel=0.1)


def test_single_precision():
    """The model computes in single precision; the oracle does not."""
    model, mean, covariance, log_evidence = vague_regression(torch.float32)
    torch.set_default_dtype(torch.float32)
    posterior = run(model)
    assert posterior.samples["a"].dtype == torch.float32
    error = abs(float(posterior.log_evidence) - log_evidence)
    assert error < 4 * float(posterior.log_evidence_se) < 0.4
    for index, name in enumerate("ab"):
        table, sd = posterior.statistics()[name], float(covariance[index, index]) ** 0.5
        assert abs(float(table["mean"]) - float(mean[index])) < 0.1 * sd
        assert float(table["std"]) == pytest.approx(sd, rel=0.05)


def test_a_centred_hierarchy_against_its_marginal_likelihood():
    """`y_j ~ N(theta_j, 1)`, `theta_j ~ N(mu, tau^2)`: mu and theta out by hand, tau on a grid."""
    torch.manual_seed(5)
    count = 12
    y = 7 + 2 * torch.randn(count) + torch.randn(count)
    log_tau = torch.linspace(-7, 5, 6001)
    tau = log_tau.exp()
    spread = tau**2 + 1.0
    log_det = (count - 1) * spread.log() + (spread + 1e4 * count).log()
    square = y.square().sum() / spread - 1e4 * y.sum() ** 2 / (spread * (spread + 1e4 * count))
    log_density = -0.5 * (count * math.log(2 * math.pi) + log_det + square)
    log_density = log_density + dist.HalfCauchy(5.0).log_prob(tau) + log_tau
    log_evidence = float(log_density.logsumexp(0)) + math.log(float(log_tau[1] - log_tau[0]))
    mean = float((torch.softmax(log_density, 0) * tau).sum())

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 100.0))
        scale = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("groups", count):
            theta = pyro.sample("theta", dist.Normal(mu, scale))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    posterior = run(model, num_particles=1000)
    assert not posterior.warnings
    error = abs(float(posterior.log_evidence) - log_evidence)
    assert error < 4 * float(posterior.log_evidence_se) < 0.4
    table = posterior.statistics()["tau"]
    assert abs(float(table["mean"]) - mean) < 4.5 * float(table["mcse"])


def test_every_datum_has_a_reference_of_its_own():
    """Two latents on a ridge for every datum; the evidence is that of a normal."""
    torch.manual_seed(3)
    x = 8 * torch.randn(6)

    def model():
        with pyro.plate("data", 6):
            a = pyro.sample("a", dist.Normal(0.0, 10.0))
            b = pyro.sample("b", dist.Normal(0.0, 10.0))
            pyro.sample("x", dist.Normal(a + b, 0.1), obs=x)

    posterior = run(model)
    exact = dist.Normal(0.0, (200 + 0.01) ** 0.5).log_prob(x)
    error = (posterior.log_evidence - exact).abs()
    assert posterior.log_evidence.shape == (6,)
    assert bool((error < 4 * posterior.log_evidence_se).all())
    assert float(posterior.log_evidence_se.max()) < 0.15
    table = posterior.statistics()["a"]
    assert bool(((table["mean"] - x / 2.0001).abs() < 4.5 * table["mcse"]).all())
    torch.testing.assert_close(table["std"], torch.full((6,), 50.0**0.5), rtol=0.1, atol=0.0)


def test_modes_far_apart_keep_their_weights():
    """Weights .3 and .7 of two Gaussians in five dimensions, eleven sds apart."""
    centre = torch.tensor([[4.0], [-4.0]]) * torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(5), 10.0).to_event(1))
        distance = (z.unsqueeze(-2) - centre).square().sum(-1)
        weights = torch.tensor([0.3, 0.7]).log()
        pyro.factor("x", (weights - distance / (2 * 0.7**2)).logsumexp(-1))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = run(model, num_particles=1000)
    share = float((posterior.samples["z"][:, 0] > 0).to(torch.float64).mean())
    assert share == pytest.approx(0.3, abs=4 * (0.21 / 1000) ** 0.5)
    volume = 5 / 2 * math.log(2 * math.pi * 0.7**2)
    exact = volume + float(dist.Normal(0.0, (100 + 0.49) ** 0.5).log_prob(centre[0]).sum())
    error = abs(float(posterior.log_evidence) - exact)
    assert error < 4 * float(posterior.log_evidence_se) < 0.4


def test_zhat_from_a_fixed_pilot_is_unbiased_over_independent_populations():
    """A thousand populations, each from a reference of its own, that nothing but a pilot ties."""
    chain = gaussian_chain(1000)
    problem = joint_problem(DCPC(chain.model, num_particles=MIN_PARTICLES).bind(*chain.args))
    assert problem is not None
    bar = ProgressBar(False)
    pilot = send_pilots(problem, 0.9, bar)
    check_unbiased([follow(problem, pilot, 0.9, bar)], chain.log_evidence, (0.8, 1.25))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_zhat_from_a_fixed_pilot_is_unbiased(seed):
    torch.manual_seed(seed)
    exact = linear_gaussian_dag(seed)
    problem = joint_problem(DCPC(exact.model, num_particles=MIN_PARTICLES).bind(*exact.args))
    assert problem is not None
    bar = ProgressBar(False)
    pilot = send_pilots(problem, 0.9, bar)
    runs = [follow(problem, pilot, 0.9, bar) for _ in range(60)]
    check_unbiased(runs, exact.log_evidence, (0.6, 1.8))


def check_unbiased(runs, log_evidence, honest):
    """Mean of `Zhat / Z` over runs with fresh draws; the reported errors are their spread."""
    estimates = torch.stack([r.log_evidence for r in runs]).flatten()
    ratio = (estimates - log_evidence).exp()
    spread = float(ratio.std())
    assert float(ratio.mean()) == pytest.approx(1.0, abs=4 * spread / len(ratio) ** 0.5)
    reported = torch.stack([r.log_evidence_se for r in runs]).square().mean().sqrt()
    assert honest[0] < float(reported) / spread < honest[1]


@pytest.mark.parametrize("pair", conjugate_pairs(), ids=lambda pair: pair.name)
def test_every_kind_of_support(pair):
    posterior = run(pair.model)
    error = abs(float(posterior.log_evidence) - pair.log_evidence)
    assert error < 4 * float(posterior.log_evidence_se) < 0.2
    table = posterior.statistics()["z"]
    assert bool(((table["mean"] - pair.mean).abs() < 4.5 * table["mcse"]).all())


def test_the_bridge_leads_from_the_reference_to_the_joint():
    """`(1 - beta) log r(u) + beta log p(u, x)`, in the unit's density and in the whole one's."""
    exact = linear_gaussian_dag(0)
    problem = joint_problem(DCPC(exact.model, num_particles=MIN_PARTICLES).bind(*exact.args))
    assert problem is not None
    latents = problem.draw_from_prior(problem.density).latents
    (group,) = problem.division.groups
    value = group.pack(latents)
    other = StudentMixture(torch.zeros(1, group.size), torch.eye(group.size).unsqueeze(0))
    log_joint = problem.density.log_joint(latents)
    log_prior = problem.density.at(0.0).log_joint(latents)
    for reference in (other, HalfPrior(other)):
        start = reference.log_prob(value.squeeze(-2), log_prior)
        density: Density = problem.density.starting_from(reference)
        for beta in (0.0, 0.3, 1.0):
            expected = (1 - beta) * start + beta * log_joint
            tempered = density.at(beta)
            torch.testing.assert_close(tempered.log_joint(latents), expected)
            evaluation = tempered.conditional(group, latents).evaluate(value)
            torch.testing.assert_close(evaluation.log_density.squeeze(-1), expected)
            evaluations, total = tempered.evaluate_leading(latents)
            torch.testing.assert_close(total, expected)
            assert set(evaluations) == {group.name}
        torch.testing.assert_close(density.slope(latents), log_joint - start)


def pilot_of_one_mode(monkeypatch, prior):
    """A pilot whose references are fitted to one mode of two by mistake, and its problem."""
    centre = torch.tensor([4.0, -4.0])

    def model():
        z = pyro.sample("z", prior)
        pyro.factor("x", (-0.5 * (z.unsqueeze(-1) - centre).square() / 0.01).logsumexp(-1))

    def one_mode(problem, state):
        return StudentMixture(torch.full((1, 1), 4.0), torch.full((1, 1, 1), 0.1))

    monkeypatch.setattr(joint, "_fitted", one_mode)
    torch.manual_seed(0)
    problem = joint_problem(DCPC(model, num_particles=500).bind())
    assert problem is not None
    return problem, send_pilots(problem, 0.9, ProgressBar(False))


def test_what_a_fitted_reference_misses_the_prior_beside_it_finds(monkeypatch):
    problem, pilot = pilot_of_one_mode(monkeypatch, dist.Normal(0.0, 10.0))
    assert isinstance(pilot.reference, HalfPrior)
    annealed = follow(problem, pilot, 0.9, ProgressBar(False))
    exact = math.log(2 * (2 * math.pi * 0.01) ** 0.5)
    exact += float(dist.Normal(0.0, (100 + 0.01) ** 0.5).log_prob(torch.tensor(4.0)))
    error = abs(float(annealed.log_evidence) - exact)
    assert error < 4 * float(annealed.log_evidence_se) < 0.8


def test_a_reference_that_misses_what_the_first_pilot_saw_is_not_taken(monkeypatch):
    """Where there is no prior to find it, the pilots' evidence tells, of which half is missing."""
    _, pilot = pilot_of_one_mode(monkeypatch, dist.ImproperUniform(dist.constraints.real, (), ()))
    assert isinstance(pilot.reference, StudentMixture)
    assert len(pilot.reference.loc) > 1


def test_the_neck_of_a_funnel_is_part_of_the_evidence():
    """`log_scale ~ N(0, 2^2)`, `z_j ~ N(0, scale^2)`, `x_j ~ N(z_j, 1)` of eight, by quadrature.

    Half of the posterior has a scale below .6, where z is narrow.
    """
    x = torch.tensor([1.4, -0.6, 0.3, 1.1, -1.3, 0.2, -0.9, 0.5])
    log_scale = torch.linspace(-16, 16, 8001)
    spread = (log_scale.exp().square() + 1).sqrt().unsqueeze(-1)
    density = dist.Normal(0.0, 2.0).log_prob(log_scale)
    density = density + dist.Normal(0.0, spread).log_prob(x).sum(-1)
    exact = float(density.logsumexp(0) + torch.log(log_scale[1] - log_scale[0]))

    def model():
        log_scale = pyro.sample("log_scale", dist.Normal(0.0, 2.0))
        with pyro.plate("n", 8):
            z = pyro.sample("z", dist.Normal(0.0, log_scale.exp()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    engine = DCPC(model, num_particles=500)
    runs = [engine.anneal(seed=seed) for seed in range(6)]
    errors = torch.stack([r.log_evidence for r in runs]) - exact
    reported = torch.stack([r.log_evidence_se for r in runs])
    assert float(errors.mean().abs()) < 4 * float(reported.mean()) / 6**0.5
    assert bool((errors.abs() < 4 * reported).all())
    assert float(reported.max()) < 0.2


def test_what_is_not_moved_as_one_unit():
    """Too many values, too few particles, discrete latents, values that a mask takes out."""

    def wide(size):
        z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=torch.tensor(1.0))

    def mixed():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z + k, 1.0), obs=torch.tensor(1.0))

    def masked():
        with pyro.plate("n", 2), pyro.poutine.mask(mask=torch.tensor([True, False])):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(2))

    def found(model, *args, num_particles=MIN_PARTICLES, **options):
        engine = DCPC(model, num_particles=num_particles, **options)
        return joint_problem(engine.bind(*args)) is not None

    assert found(wide, MIN_PARTICLES // 4)
    assert not found(wide, MIN_PARTICLES // 4 + 1)
    assert not found(wide, 2, num_particles=MIN_PARTICLES - 1)
    assert not found(wide, 129, num_particles=1000)
    assert not found(wide, 2, backend="loop")
    assert not found(mixed)
    assert not found(masked)


def test_blocks_are_found_given_or_left():
    model = vague_regression()[0]
    for blocks, units in (("auto", {"a+b"}), ((), {"a", "b"}), ([("a", "b")], {"a+b"})):
        engine = DCPC(model, num_particles=200, blocks=blocks)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            posterior = engine.run(num_sweeps=4, seed=0, progress=False)
        assert set(posterior.unit_of.values()) == units
