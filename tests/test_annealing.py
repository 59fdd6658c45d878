"""Evidence by annealing: unbiased, with an honest standard error, refused where undefined."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import conjugate_pairs, gaussian_chain, linear_gaussian_dag
from torch.distributions import constraints

from dcpc import DCPC
from dcpc.annealing import (
    MAX_CORRELATION,
    MIN_DECORRELATED_FAMILIES,
    MIN_FAMILIES,
    NUM_PROBES,
    Annealed,
    anneal,
    effective_families,
    genealogical_standard_error,
    importance_evidence,
    spaced_ladder,
)
from dcpc.conquer import Langevin
from dcpc.divide import Reference
from dcpc.errors import EvidenceError, OptionError
from dcpc.recombine import LogWeights
from dcpc.seeding import seeded
from dcpc.sweep import SweepState, sweep

CELLS = 3000


@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-smc"])
@pytest.mark.parametrize(("num_temperatures", "steps"), [(None, 1), (6, 1), (6, 4)])
def test_zhat_is_unbiased_over_independent_populations(algorithm, num_temperatures, steps):
    """The mean of `Zhat / Z` over 3000 populations of 8 particles is one, within 4 errors.

    The ladder and the proposals are fixed in a pilot run, so that the populations of the second
    run are independent.
    """
    chain = gaussian_chain(CELLS)
    engine = DCPC(chain.model, num_particles=8, algorithm=algorithm, move=Langevin(steps))
    annealed = engine.anneal(*chain.args, num_temperatures=num_temperatures, seed=0)
    ratio = (annealed.log_evidence.double() - chain.log_evidence).exp()
    assert ratio.shape == (CELLS,)
    error = float(ratio.std()) / CELLS**0.5
    assert error < 0.03
    assert abs(float(ratio.mean()) - 1) < 4 * error


@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-smc"])
def test_resampling_on_the_way_keeps_zhat_unbiased(algorithm):
    """Always resample: the weights must be reset to their mean, no more and no less."""
    chain = gaussian_chain(CELLS)
    engine = DCPC(chain.model, num_particles=8, algorithm=algorithm, resample_threshold=1.0)
    annealed = engine.anneal(*chain.args, num_temperatures=8, seed=1)
    ratio = (annealed.log_evidence.double() - chain.log_evidence).exp()
    error = float(ratio.std()) / CELLS**0.5
    assert error < 0.03
    assert abs(float(ratio.mean()) - 1) < 4 * error


@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-smc"])
def test_particles_after_annealing_are_weighted_properly(algorithm):
    """`E[Zhat f] = Z E_posterior[f]`, over independent populations."""
    chain = gaussian_chain(CELLS)
    engine = DCPC(chain.model, num_particles=8, algorithm=algorithm)
    state = engine.anneal(*chain.args, seed=2).state
    weight = (state.log_weight.log_weight.double() - chain.log_evidence).exp()
    for index, name in enumerate(chain.names):
        z = state.latents[name].double()
        centred = z - chain.mean[index]
        for values in (centred, centred**2 - chain.covariance[index, index]):
            cells = (weight * values).mean(0)
            assert abs(float(cells.mean())) < 4.5 * float(cells.std()) / CELLS**0.5


@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-smc"])
def test_standard_error_is_calibrated(algorithm):
    """The reported error against the spread of `log Zhat` over independent populations."""
    chain = gaussian_chain(400)
    engine = DCPC(chain.model, num_particles=64, algorithm=algorithm)
    annealed = engine.anneal(*chain.args, seed=3)
    empirical = float(annealed.log_evidence.std())
    reported = float(annealed.log_evidence_se.square().mean().sqrt())
    assert 0.5 < reported / empirical < 2.5


@pytest.mark.parametrize("seed", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_standard_error_is_calibrated_for_a_single_problem(seed):
    exact = linear_gaussian_dag(seed)
    engine = DCPC(exact.model, num_particles=200)
    runs = [engine.anneal(seed=s) for s in range(12)]
    errors = torch.stack([run.log_evidence for run in runs]) - exact.log_evidence
    reported = torch.stack([run.log_evidence_se for run in runs]).square().mean().sqrt()
    empirical = errors.square().mean().sqrt()
    # Twelve runs know the empirical error to about 20 %.
    assert 0.4 < float(reported / empirical) < 3.0


def test_genealogical_error_without_resampling_is_that_of_a_mean():
    torch.manual_seed(0)
    log_weight = 0.3 * torch.randn(500, 2, dtype=torch.float64)
    eve = torch.arange(500)[:, None].expand(500, 2)
    w = log_weight.exp()
    expected = w.std(0) / w.mean(0) / 500**0.5
    got = genealogical_standard_error(LogWeights(log_weight), eve)
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0)


def test_genealogical_error_counts_families_as_one():
    """Twenty families of equal particles are twenty samples, however large the families."""
    torch.manual_seed(0)
    families = torch.randn(20, dtype=torch.float64) / 4
    log_weight = families.repeat_interleave(5)
    eve = torch.arange(20).repeat_interleave(5)
    w = torch.softmax(log_weight, 0).reshape(20, 5).sum(1)
    expected = (float(w.square().sum()) - 0.01) * 100 / 99
    got = genealogical_standard_error(LogWeights(log_weight), eve)
    assert got.item() == pytest.approx(math.sqrt(expected))


def test_effective_families_are_those_that_would_be_as_uneven():
    """Cells of 6 particles: all alive; three families of two; two thirds and one third."""
    eve = torch.tensor([[0, 0, 1], [1, 0, 1], [2, 2, 1], [3, 2, 1], [4, 5, 4], [5, 5, 4]])
    got = effective_families(LogWeights(torch.zeros(6, 3)), eve)
    torch.testing.assert_close(got, torch.tensor([6.0, 3.0, 9 / 5]))


def test_families_without_resampling_are_the_ess_of_the_weights():
    torch.manual_seed(0)
    weights = LogWeights(torch.randn(50, 4, dtype=torch.float64))
    eve = torch.arange(50)[:, None].expand(50, 4)
    torch.testing.assert_close(effective_families(weights, eve), weights.ess())


@pytest.mark.parametrize("least", [MIN_FAMILIES, MIN_DECORRELATED_FAMILIES])
def test_too_few_families_make_the_error_infinite(least):
    """A cell with one family more than are asked for, one with one less, one with a single one."""
    count = int(least)
    size = (count + 1) * (count - 1)
    eve = torch.stack([torch.arange(size) % n for n in (count + 1, count - 1, 1)], -1)
    got = genealogical_standard_error(LogWeights(torch.zeros(size, 3)), eve, least)
    excess = 1 / (count + 1) - 1 / size
    assert got[0].item() == pytest.approx(math.sqrt(excess * size / (size - 1)), rel=1e-4)
    assert got[1:].tolist() == [math.inf, math.inf]


@pytest.mark.parametrize("num_particles", [2, 3, 4, 8, 16])
def test_half_of_few_particles_have_to_have_descendants(num_particles):
    everybody = torch.arange(num_particles)
    nobody_else = torch.zeros(num_particles).long()
    half = everybody // 2
    eve = torch.stack([everybody, nobody_else, half], -1)
    got = genealogical_standard_error(LogWeights(torch.zeros(num_particles, 3)), eve)
    assert got[0].item() == pytest.approx(0.0, abs=1e-3)
    assert got[1].item() == math.inf
    # Three particles in families of two and one make 9/5 families, of two asked for.
    assert got[2].item() == math.inf


def test_evidence_by_importance_is_unreliable_where_few_weights_count():
    """Equal weights, and those of which one is `e^8` times the others."""
    log_weight = torch.zeros(200, 2)
    log_weight[3, 1] = 8.0
    state = SweepState({}, LogWeights(log_weight), torch.zeros(200, 2))
    log_evidence, error = importance_evidence(state)
    expected = torch.tensor([0.0, math.log((199 + math.exp(8)) / 200)])
    torch.testing.assert_close(log_evidence, expected, atol=1e-5, rtol=1e-5)
    assert error[0].item() == pytest.approx(0.0, abs=1e-3)
    assert error[1].item() == math.inf


def test_one_particle_has_no_standard_error():
    got = genealogical_standard_error(LogWeights(torch.zeros(1, 3)), torch.zeros(1, 3).long())
    assert bool(got.isnan().all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_temperatures": 0}, "num_temperatures must be at least 1, got 0"),
        ({"conditional_ess": 1.0}, r"conditional_ess must lie in \(0, 1\), got 1.0"),
    ],
)
def test_ladders_that_cannot_be_are_refused(options, message):
    exact = linear_gaussian_dag(2)
    with pytest.raises(OptionError, match=message):
        DCPC(exact.model, num_particles=2).anneal(**options)


def test_spaced_ladder_rises_to_one():
    temperatures = [rung.temperature for rung in spaced_ladder(7)]
    assert temperatures == sorted(temperatures)
    assert len(temperatures) == 7
    assert temperatures[-1] == 1.0
    assert temperatures[0] == pytest.approx(1 / 343)


@pytest.mark.usefixtures("float64")
def test_adaptive_ladder_keeps_the_conditional_ess_that_was_asked_for(monkeypatch):
    monkeypatch.setattr("dcpc.annealing.MAX_SWEEPS", 1)
    exact = linear_gaussian_dag(0)
    engine = DCPC(exact.model, num_particles=100)
    torch.manual_seed(0)
    state = engine.init()
    density = engine.bind().density
    annealed = anneal(density, state, engine.parts, conditional_ess=0.8)
    first = annealed.ladder[0].temperature
    factors, sites = density.log_factors(state.latents), density.division.sites
    likelihood = sum(v for name, v in factors.items() if sites[name].is_observed)
    w = (first * likelihood).exp()
    kept = float(w.mean() ** 2 / w.square().mean())
    assert kept == pytest.approx(0.8, abs=1e-3)
    temperatures = [rung.temperature for rung in annealed.ladder]
    assert temperatures == sorted(temperatures)
    assert temperatures[-1] == 1.0


@pytest.mark.usefixtures("float64")
def test_reference_distributions_change_the_path_and_not_the_evidence():
    """From `N(loc, 1)` in unconstrained space to the posterior, for every kind of support."""
    for pair in conjugate_pairs():
        if pair.name not in ("gamma-poisson", "dirichlet-categorical"):
            continue
        engine = DCPC(pair.model, num_particles=300)
        posterior = engine.run(
            initial_values={"z": pair.mean}, num_sweeps=2, progress=False, seed=0
        )
        error = float(posterior.log_evidence) - pair.log_evidence
        assert abs(error) < 0.02 + 4 * float(posterior.log_evidence_se), pair.name


@pytest.mark.usefixtures("float64")
def test_reference_density_is_a_normal_summed_over_the_event():
    loc, u = torch.randn(3, 2), torch.randn(5, 3, 2)
    expected = dist.Normal(loc, 1.5).log_prob(u)
    got = Reference(loc, 1.5).log_prob(u, batch_dims=1)
    torch.testing.assert_close(got, expected.sum(-1))
    torch.testing.assert_close(Reference(loc, 1.5).log_prob(u, batch_dims=2), expected)


@pytest.mark.usefixtures("float64")
def test_reference_hands_over_to_the_prior_as_the_temperature_rises():
    """`r(u)^(1 - beta) p(u)^beta`, and the likelihood to the power of beta."""
    chain = gaussian_chain()
    engine = DCPC(chain.model, num_particles=6)
    state, density = engine.init(*chain.args), engine.bind(*chain.args).density
    factors = density.log_factors(state.latents)
    z1 = state.latents["z1"]
    start = dist.Normal(0.4, 1.5).log_prob(z1)
    references = {"z1": Reference(torch.tensor(0.4), 1.5)}
    for beta in (0.0, 0.3, 0.9, 1.0):
        got = density.at(beta, references).log_factors(state.latents)
        torch.testing.assert_close(got["z1"], (1 - beta) * start + beta * factors["z1"])
        torch.testing.assert_close(got["z2"], factors["z2"])
        torch.testing.assert_close(got["x"], beta * factors["x"])


@pytest.mark.parametrize("way", ["anneal", "run"])
def test_second_annealing_run_has_the_pilots_ladder_and_frozen_proposals(way, monkeypatch):
    """What the estimate's particles move by must not depend on them."""
    results = []

    def spy(*args, **kwargs):
        results.append(anneal(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr("dcpc.problem.anneal", spy)
    monkeypatch.setattr("dcpc.approach.joint_problem", lambda problem: None)  # from the prior
    engine = DCPC(linear_gaussian_dag(1).model, num_particles=50, blocks=())
    if way == "anneal":
        engine.anneal(seed=0)
    else:
        engine.run(num_sweeps=1, seed=0, progress=False)
    pilot, second = results
    assert len(pilot.ladder) == len(second.ladder)
    for learned, used in zip(pilot.ladder, second.ladder, strict=True):
        assert used.temperature == learned.temperature
        assert used.num_sweeps == learned.num_sweeps
        for name in learned.adaptation:
            for part in ("preconditioner", "step_size"):
                before = getattr(learned.adaptation[name], part)
                after = getattr(used.adaptation[name], part)
                assert all(torch.equal(after[key], value) for key, value in before.items())


def test_second_annealing_run_makes_the_sweeps_of_the_pilot(monkeypatch):
    """As many at every temperature, of which the first alone reweights, in both runs."""
    made = []

    def spy(density, *args, **kwargs):
        temperature = density.tempering.temperature
        made.append((kwargs["adapt"], temperature, kwargs["retargets"]))
        return sweep(density, *args, **kwargs)

    monkeypatch.setattr("dcpc.annealing.sweep", spy)
    exact = linear_gaussian_dag(1)
    annealed = DCPC(exact.model, num_particles=50).anneal(seed=0)
    expected = [
        (rung.temperature, index == 0)
        for rung in annealed.ladder[:-1]
        for index in range(rung.num_sweeps)
    ]
    assert max(rung.num_sweeps for rung in annealed.ladder) > 1
    for adapts in (True, False):
        assert [about for adapt, *about in made if adapt is adapts] == [list(e) for e in expected]


def many_latents(size):
    """`z ~ N(0, I)`, `x ~ N(z, I)` in many dimensions; x, and the exact log evidence."""

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = 2**0.5 * torch.randn(size, generator=torch.Generator().manual_seed(0))
    return model, x, float(dist.Normal(0.0, 2**0.5).log_prob(x.double()).sum())


def anneal_many_latents(size, num_particles, seed) -> tuple[Annealed, float]:
    """An adaptive ladder from the prior, and the error of its log-evidence."""
    model, x, log_evidence = many_latents(size)
    with seeded(seed):
        annealed = DCPC(model, num_particles=num_particles).bind(x).anneal()
    return annealed, float(annealed.log_evidence) - log_evidence


@pytest.mark.parametrize("seed", [0, 1])
def test_evidence_of_two_hundred_latents_is_within_its_error(seed):
    annealed, error = anneal_many_latents(200, 100, seed)
    assert float(annealed.log_evidence_se) < 0.5
    assert abs(error) < 4 * float(annealed.log_evidence_se)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "num_particles"), [(200, 1000), (2000, 100)])
def test_evidence_of_many_latents_is_right(size, num_particles):
    """Within the error that the families tell, which is reported where they are enough."""
    annealed, error = anneal_many_latents(size, num_particles, seed=4)
    families = float(annealed.effective_families)
    told = (num_particles / (num_particles - 1) * (1 / families - 1 / num_particles)) ** 0.5
    assert abs(error) < 4 * told
    assert math.isinf(float(annealed.log_evidence_se)) == (families < MIN_DECORRELATED_FAMILIES)


def test_too_few_moves_are_reported_as_unreliable():
    """Ten temperatures of one sweep for 200 latents: a single family is left."""
    model, x, log_evidence = many_latents(200)
    annealed = DCPC(model, num_particles=100).anneal(x, num_temperatures=10, seed=0)
    assert abs(float(annealed.log_evidence) - log_evidence) > 4
    assert float(annealed.effective_families) < MIN_FAMILIES
    assert float(annealed.log_evidence_se) == math.inf


def test_rungs_are_swept_until_the_particles_have_decorrelated():
    annealed, _ = anneal_many_latents(50, 200, seed=0)
    *rungs, last = annealed.ladder
    assert all(rung.correlation <= MAX_CORRELATION for rung in rungs)
    counts = [rung.num_sweeps for rung in rungs]
    # Fifty dimensions take some 2 50^(1/3) = 7 Langevin moves.
    assert 3 < sum(counts) / len(counts) < 14
    assert last.temperature == 1.0


@pytest.mark.parametrize("num_temperatures", [1, 5])
def test_a_ladder_that_was_asked_for_has_one_sweep_per_rung(num_temperatures):
    chain = gaussian_chain()
    engine = DCPC(chain.model, num_particles=20)
    annealed = engine.anneal(*chain.args, num_temperatures=num_temperatures, seed=0)
    assert [rung.num_sweeps for rung in annealed.ladder] == [1] * num_temperatures


def test_a_single_particle_is_swept_once_per_rung():
    """It has nothing to be compared with."""
    chain = gaussian_chain(5)
    annealed = DCPC(chain.model, num_particles=1).anneal(*chain.args, seed=0)
    assert [rung.num_sweeps for rung in annealed.ladder] == [1] * len(annealed.ladder)
    assert bool(annealed.log_evidence_se.isnan().all())
    assert annealed.effective_families.tolist() == [1.0] * 5


@pytest.mark.usefixtures("float64")
def test_particles_that_cannot_move_stay_their_initial_ancestors():
    """With steps of nothing the final particles are the first ones, resampled cell by cell.

    Their slopes stay what they were, so that a rung gives up as soon as it may.
    """
    chain = gaussian_chain(7)
    engine = DCPC(chain.model, num_particles=30, step_size=1e-30)
    torch.manual_seed(0)
    start = engine.init(*chain.args)
    annealed = anneal(engine.bind(*chain.args).density, start, engine.parts)
    for name in chain.names:
        expected = start.latents[name].gather(0, annealed.eve)
        torch.testing.assert_close(annealed.state.latents[name], expected)
    assert bool((annealed.effective_families < 30).all())
    for rung in annealed.ladder[:-1]:
        assert rung.num_sweeps == NUM_PROBES
        assert rung.correlation == pytest.approx(1.0)


def test_particles_that_were_not_resampled_are_their_own_ancestors():
    chain = gaussian_chain(7)
    engine = DCPC(chain.model, num_particles=30, resample_threshold=0.0)
    annealed = engine.anneal(*chain.args, seed=0)
    assert torch.equal(annealed.eve, torch.arange(30)[:, None].expand(30, 7))
    torch.testing.assert_close(annealed.effective_families, annealed.state.log_weight.ess())


def vague_prior():
    """`z ~ N(0, 1000^2)` and 20 observations of standard deviation one."""
    x = 3 + torch.randn(20, generator=torch.Generator().manual_seed(1))

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1000.0))
        with pyro.plate("n", 20):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    covariance = torch.eye(20, dtype=torch.float64) + 1e6
    joint = torch.distributions.MultivariateNormal(covariance.new_zeros(20), covariance)
    return model, float(joint.log_prob(x.double()))


def correlated_prior():
    """Twenty latents of correlation `.9^|i - j|`, each observed with standard deviation .3."""
    x = torch.randn(20, generator=torch.Generator().manual_seed(2))
    index = torch.arange(20, dtype=torch.float64)
    prior = 0.9 ** (index[:, None] - index).abs()
    factor = torch.linalg.cholesky(prior).float()

    def model():
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(20), scale_tril=factor))
        pyro.sample("x", dist.Normal(z, 0.3).to_event(1), obs=x)

    covariance = prior + 0.09 * torch.eye(20, dtype=torch.float64)
    joint = torch.distributions.MultivariateNormal(covariance.new_zeros(20), covariance)
    return model, float(joint.log_prob(x.double()))


def gamma_poisson():
    pair = next(pair for pair in conjugate_pairs() if pair.name == "gamma-poisson")
    return pair.model, pair.log_evidence


@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-smc"])
@pytest.mark.parametrize(
    "problem",
    [
        gamma_poisson,
        pytest.param(vague_prior, marks=pytest.mark.slow),
        pytest.param(correlated_prior, marks=pytest.mark.slow),
    ],
)
def test_zhat_is_unbiased_and_its_error_calibrated_over_seeds(problem, algorithm):
    """Mean of `Zhat / Z` within 4 errors of one; spread of `log Zhat` half to twice as told."""
    model, log_evidence = problem()
    engine = DCPC(model, num_particles=100, algorithm=algorithm)
    runs = [engine.anneal(seed=seed) for seed in range(20)]
    errors = torch.stack([run.log_evidence for run in runs]).double() - log_evidence
    ratio = errors.exp()
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / len(runs) ** 0.5
    reported = torch.stack([run.log_evidence_se for run in runs])
    assert bool((errors.abs() < 4.5 * reported).all())
    finite = reported[reported.isfinite()]
    assert len(finite) > 15
    # Twenty runs know their spread to about 16 %.
    assert 0.5 < float(finite.square().mean().sqrt() / errors.std()) < 2.0


def flat_model(x):
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(mu, sigma), obs=x)


def test_flat_priors_have_a_posterior_and_no_evidence():
    """Posterior under `p(mu, sigma) = 1`: `mu` is Student with n - 2 degrees of freedom."""
    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(30)
    posterior = DCPC(flat_model, num_particles=1000).run(x, num_sweeps=100, seed=0, progress=False)
    n = len(x)
    sample_sd = float(((x - x.mean()) ** 2).sum() / (n - 2)) ** 0.5
    scale = sample_sd / n**0.5
    sd = scale * ((n - 2) / (n - 4)) ** 0.5
    assert float(posterior.mean()["mu"]) == pytest.approx(float(x.mean()), abs=4.5 * sd / 1000**0.5)
    assert float(posterior.std()["mu"]) == pytest.approx(sd, rel=0.12)
    with pytest.raises(EvidenceError, match=r"\['mu', 'sigma'\] is flat.*proper prior"):
        _ = posterior.log_evidence
    with pytest.raises(EvidenceError, match="flat"):
        _ = posterior.log_evidence_se


def test_annealing_refuses_flat_priors_and_inexact_algorithms():
    with pytest.raises(EvidenceError, match="'mu', 'sigma'"):
        DCPC(flat_model, num_particles=10).anneal(torch.randn(5))
    chain = gaussian_chain()
    with pytest.raises(EvidenceError, match="'pgd'"):
        DCPC(chain.model, num_particles=10, algorithm="pgd").anneal(*chain.args)
    posterior = DCPC(chain.model, num_particles=10, algorithm="dcpc-paper").run(
        *chain.args, num_sweeps=2, progress=False
    )
    with pytest.raises(EvidenceError, match="'dcpc-paper'"):
        _ = posterior.log_evidence


def test_evidence_that_was_switched_off_says_so():
    chain = gaussian_chain()
    posterior = DCPC(chain.model, num_particles=10).run(
        *chain.args, num_sweeps=2, evidence=False, progress=False
    )
    with pytest.raises(EvidenceError, match="evidence=False"):
        _ = posterior.log_evidence
