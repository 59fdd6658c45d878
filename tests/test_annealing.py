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
from dcpc.annealing import anneal, genealogical_standard_error, spaced_ladder
from dcpc.conquer import Langevin
from dcpc.divide import Reference, Target
from dcpc.errors import EvidenceError, OptionError
from dcpc.recombine import LogWeights

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


@pytest.mark.parametrize("seed", [1, 5])
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
    """Two families of equal particles are two samples, however large the families."""
    families = torch.tensor([0.0] * 50 + [1.0] * 50, dtype=torch.float64)
    eve = torch.tensor([0] * 50 + [1] * 50)
    w = torch.softmax(families, 0).reshape(2, 50).sum(1)
    expected = (float(w.square().sum()) - 0.01) * 100 / 99
    got = genealogical_standard_error(LogWeights(families), eve)
    assert got.item() == pytest.approx(math.sqrt(expected))


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
def test_adaptive_ladder_keeps_the_conditional_ess_that_was_asked_for():
    exact = linear_gaussian_dag(0)
    engine = DCPC(exact.model, num_particles=500)
    torch.manual_seed(0)
    state = engine.init()
    division = engine.division()
    annealed = anneal(division, state, engine.parts, (), conditional_ess=0.8)
    first = annealed.ladder[0].temperature
    factors = division.log_factors(state.latents, ())
    likelihood = sum(v for name, v in factors.items() if division.sites[name].is_observed)
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
    state, division = engine.init(*chain.args), engine.division(*chain.args)
    factors = division.log_factors(state.latents, chain.args)
    z1 = state.latents["z1"]
    start = dist.Normal(0.4, 1.5).log_prob(z1)
    references = {"z1": Reference(torch.tensor(0.4), 1.5)}
    for beta in (0.0, 0.3, 0.9, 1.0):
        got = Target(beta, references).weigh(factors, state.latents, division.sites)
        torch.testing.assert_close(got["z1"], (1 - beta) * start + beta * factors["z1"])
        torch.testing.assert_close(got["z2"], factors["z2"])
        torch.testing.assert_close(got["x"], beta * factors["x"])


def test_second_annealing_run_has_the_pilots_ladder_and_frozen_proposals(monkeypatch):
    """What the estimate's particles move by must not depend on them."""
    results = []

    def spy(*args, **kwargs):
        results.append(anneal(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr("dcpc.run.anneal", spy)
    exact = linear_gaussian_dag(1)
    DCPC(exact.model, num_particles=50).anneal(seed=0)
    pilot, second = results
    assert len(pilot.ladder) == len(second.ladder)
    for learned, used in zip(pilot.ladder, second.ladder, strict=True):
        assert used.temperature == learned.temperature
        for name in learned.adaptation:
            for part in ("preconditioner", "step_size"):
                before = getattr(learned.adaptation[name], part)
                after = getattr(used.adaptation[name], part)
                assert all(torch.equal(after[key], value) for key, value in before.items())


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
