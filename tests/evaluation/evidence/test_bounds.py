"""x ~ N(0, 2 I) by z ~ N(0, I) and x ~ N(z, I), so that z | x ~ N(x / 2, I / 2)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from dcpc.errors import EvidenceError, ModelError, OptionError
from dcpc.evaluation import (
    ImportanceSampler,
    guide_bounds,
    prior_sample_estimate,
)
from dcpc.problem import Problem
from dcpc.sweep import SweepState

SIZE = 3


@pytest.fixture
def x() -> Tensor:
    return torch.randn(7, SIZE) * math.sqrt(2)


def log_evidence(x: Tensor) -> Tensor:
    return Normal(0.0, math.sqrt(2.0)).log_prob(x).sum(1)


def guide_of(variance: float, transform: Callable = lambda normal: normal) -> Callable:
    """The posterior where the variance is one half, and elsewhere wider or narrower than it."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", transform(dist.Normal(x / 2, math.sqrt(variance))).to_event(1))

    return guide


def test_the_posterior_as_a_guide_gives_the_evidence_from_any_number_of_samples(
    float64: None, shifted_gaussian: type, x: Tensor
) -> None:
    x = x.double()
    bounds = guide_bounds(
        shifted_gaussian(SIZE), guide_of(0.5), x, 3, 0, chunk_size=2, batch_size=5
    )
    for bound in bounds:
        assert torch.allclose(bound, log_evidence(x), atol=1e-10)


def test_the_elbo_falls_short_of_the_evidence_by_the_kullback_leibler_divergence(
    shifted_gaussian: type, x: Tensor
) -> None:
    # KL(N(m, v) || N(m, 1/2)) = v - 1/2 - log(2 v) / 2 in each dimension.
    divergence = SIZE * (1.0 - 0.5 - 0.5 * math.log(2.0))
    # log w = const - d(z)^2 (1 - 1/2), a square of a normal: its variance is 2 / 4 per dimension.
    x = x.repeat(100, 1)
    error = 4 * math.sqrt(SIZE * 0.5 / (40 * len(x)))
    result = guide_bounds(shifted_gaussian(SIZE), guide_of(1.0), x, 40, 1, batch_size=700).elbo
    assert float((result - log_evidence(x)).mean()) == pytest.approx(-divergence, abs=error)


@pytest.mark.parametrize(
    ("num_data", "num_samples", "chunks"),
    [(6, 10, 5 * [(2, 6)]), (1, 30, 3 * [(10, 1)]), (4, 9, 3 * [(3, 4)]), (1, 1, [(2, 1)])],
)
def test_a_small_batch_takes_more_samples_at_once_in_the_memory_of_a_whole_one(
    num_data: int,
    num_samples: int,
    chunks: list,
    shifted_gaussian: type,
    x: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twelve values of the latent, two samples of each of six data."""
    drawn, init = [], Problem.init

    def spy(problem: Problem) -> SweepState:
        state = init(problem)
        drawn.append(tuple(state.latents["z"].shape[:2]))
        return state

    monkeypatch.setattr(Problem, "init", spy)
    sampler = ImportanceSampler(shifted_gaussian(SIZE), chunk_size=2, batch_size=6)
    found = sampler.log_weights(x[:num_data], num_samples, 0)
    assert drawn == chunks
    assert found.shape == (num_samples, num_data)
    assert len(found.unique()) == found.numel()  # drawn afresh, each of them


def test_more_samples_close_the_gap_of_a_guide_that_is_too_wide(
    shifted_gaussian: type, x: Tensor
) -> None:
    model, x = shifted_gaussian(SIZE), x.repeat(20, 1)
    gaps = [
        float((log_evidence(x) - bounds.importance_weighted).mean())
        for bounds in (guide_bounds(model, guide_of(1.0), x, s, 2) for s in (1, 10, 100))
    ]
    # E w^2 / (E w)^2 = v / sqrt(2 v / 2 - 1/4) for proposal variance v = 1, target variance 1/2.
    variance = (1.0 / math.sqrt(0.75)) ** SIZE - 1
    assert gaps[0] > max(gaps[1:])
    assert abs(gaps[2] - variance / 200) < 4 * math.sqrt(variance / 100 / len(x))


def test_a_positive_latent_has_the_evidence_of_its_logarithm(float64: None, x: Tensor) -> None:
    def positive(normal: dist.Normal) -> dist.TransformedDistribution:
        return dist.LogNormal(normal.loc, normal.scale)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(torch.zeros_like(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.log(), 1.0).to_event(1), obs=x)

    x = x.double()
    bounds = guide_bounds(model, guide_of(0.5, positive), x, 2, seed=0)
    assert torch.allclose(bounds.importance_weighted, log_evidence(x), atol=1e-10)


def test_the_mean_likelihood_of_prior_samples_is_the_evidence_in_an_easy_model(
    shifted_gaussian: type, x: Tensor
) -> None:
    result = prior_sample_estimate(shifted_gaussian(SIZE), x, 4000, seed=3, chunk_size=1000)
    # E p(x|z)^2 / p(x)^2, by completing squares: (2/sqrt(3)) exp(x^2 / 6) in each dimension.
    relative = ((2 / math.sqrt(3)) ** SIZE * (x.square().sum(1) / 6).exp() - 1) / 4000
    assert bool(((result - log_evidence(x)).abs() < 5 * relative.sqrt() + relative).all())


def test_few_prior_samples_fall_below_the_evidence(shifted_gaussian: type) -> None:
    x = torch.randn(200, 8) * math.sqrt(2)
    short = prior_sample_estimate(shifted_gaussian(8), x, 5, seed=0) - log_evidence(x)
    assert float(short.mean()) < -4 * float(short.std()) / math.sqrt(200)


def test_the_same_seed_gives_the_same_samples_and_the_global_state_stays(
    shifted_gaussian: type, x: Tensor
) -> None:
    model, before = shifted_gaussian(SIZE), torch.get_rng_state()
    with torch.inference_mode():
        first, again, other = (prior_sample_estimate(model, x, 20, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_data_that_are_not_independent_have_no_bound_of_their_own(x: Tensor) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z - z.mean(0), 1.0).to_event(1), obs=x)

    with pytest.raises(ModelError, match="independent given the parameters"):
        prior_sample_estimate(model, x, 10)


def test_a_flat_prior_cannot_be_sampled(x: Tensor) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            flat = dist.ImproperUniform(dist.constraints.real, (), ())
            z = pyro.sample("z", flat)
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), torch.ones(SIZE)).to_event(1), obs=x)

    with pytest.raises(EvidenceError, match="'z'"):
        prior_sample_estimate(model, x, 10)


def test_a_number_of_samples_below_one_is_refused(shifted_gaussian: type, x: Tensor) -> None:
    with pytest.raises(OptionError, match="num_samples must be at least 1, got 0"):
        guide_bounds(shifted_gaussian(SIZE), guide_of(0.5), x, 0, seed=0)


def test_one_sampler_serves_all_batches_and_gives_both_bounds_from_the_same_samples(
    shifted_gaussian: type, x: Tensor
) -> None:
    sampler = ImportanceSampler(shifted_gaussian(SIZE), guide_of(1.0))
    sampler.bounds(x[:3], 15, seed=5)
    bounds, log_weights = sampler.bounds(x, 15, seed=4), sampler.log_weights(x, 15, seed=4)
    torch.testing.assert_close(bounds.elbo, log_weights.mean(0))
    mean = log_weights.logsumexp(0) - math.log(15)
    torch.testing.assert_close(bounds.importance_weighted, mean)
    assert bool((bounds.elbo < bounds.importance_weighted).all())  # Jensen, sample by sample
