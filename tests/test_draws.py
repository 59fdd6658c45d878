"""Estimators of draws: against ArviZ, and against the mathematics of autoregressive chains."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dcpc.draws import (
    describe,
    design_effect,
    effective_sample_size,
    mixing,
    quantiles,
    r_hat,
    rank_normalised,
    superchains,
    weakest,
)
from dcpc.recombine import systematic

pytestmark = pytest.mark.usefixtures("float64")


def autoregressive(rho: float, count: int, num_particles: int, num_draws: int) -> Tensor:
    """Stationary chains `x_t = rho x_{t-1} + sqrt(1 - rho^2) e_t`, `(n, K, T)`."""
    noise = torch.randn(count, num_particles, num_draws)
    steps = [noise[..., 0]]
    for t in range(1, num_draws):
        steps.append(rho * steps[-1] + math.sqrt(1 - rho**2) * noise[..., t])
    return torch.stack(steps, -1)


def exact_ess(rho: float, num_particles: int, num_draws: int) -> float:
    """`S / (1 + 2 sum_t (1 - t / T) rho^t)`."""
    lags = torch.arange(1, num_draws)
    return float(num_particles * num_draws / (1 + 2 * ((1 - lags / num_draws) * rho**lags).sum()))


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_ess_mcse_and_quantiles_of_long_chains_are_arvizs(rho):
    arviz = pytest.importorskip("arviz")
    draws = autoregressive(rho, 3, 4, 1000).exp()  # skewed, so that ranks matter
    about = describe(draws, [0.5, 0.05])
    for index, value in enumerate(draws.numpy()):
        expected = {
            "ess_bulk": arviz.ess(value, method="bulk"),
            "ess_tail": arviz.ess(value, method="tail", prob=(0.05, 0.95)),
            "mcse": arviz.mcse(value, method="mean"),
        }
        for name, number in expected.items():
            assert float(about[name][index]) == pytest.approx(float(number), rel=0.05), name
    flat = draws.flatten(1)
    expected = flat.quantile(torch.tensor([0.5, 0.05]), dim=1)
    torch.testing.assert_close(about["quantiles"], expected)
    torch.testing.assert_close(quantiles(draws, [0.5, 0.05]), expected)
    torch.testing.assert_close(about["mean"], flat.mean(1))
    torch.testing.assert_close(about["std"], flat.std(1))


def test_ranks_are_averaged_over_ties_and_normalised_by_bloms_rule():
    draws = autoregressive(0.5, 2, 3, 40).mul(3).round()
    for index, value in enumerate(draws.numpy()):
        expected = torch.as_tensor(_z_scale(value))
        torch.testing.assert_close(rank_normalised(draws)[index], expected)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_r_hat_is_arvizs_of_the_four_superchains(shift):
    arviz = pytest.importorskip("arviz")
    draws = autoregressive(0.5, 2, 10, 40)
    draws[:, :5] += shift
    for index, value in enumerate(superchains(draws).numpy()):
        z, folded = _z_scale(value), _z_scale(abs(value - _median(value)))
        expected = max(float(arviz.rhat(part, method="identity")) for part in (z, folded))
        assert float(r_hat(draws)[index]) == pytest.approx(expected, abs=1e-9)


def _median(value):
    return torch.as_tensor(value).flatten().median().numpy()


def _z_scale(value):
    from scipy.stats import norm, rankdata

    rank = rankdata(value, method="average").reshape(value.shape)
    return norm.ppf((rank - 0.375) / (value.size + 0.25))


@pytest.mark.parametrize("rho", [0.0, 0.7, 0.9, 0.99])
def test_ess_of_many_short_chains_is_that_of_the_theory(rho):
    """Where ArviZ's is up to a third too small."""
    draws = autoregressive(rho, 20, 1000, 100)
    ess = effective_sample_size(draws)
    assert float(ess.median()) == pytest.approx(exact_ess(rho, 1000, 100), rel=0.15)


def test_ess_of_particles_that_never_move_is_their_number():
    draws = torch.randn(5, 200, 1).expand(5, 200, 60)
    torch.testing.assert_close(
        effective_sample_size(draws), torch.full((5,), 200.0), rtol=0.03, atol=0
    )


def test_mcse_is_the_standard_deviation_of_the_mean_over_repetitions():
    draws = autoregressive(0.8, 400, 20, 60)
    spread = draws.flatten(1).mean(1).std()
    printed = describe(draws, [0.5])["mcse"].mean()
    # The spread of 400 is known to 3.5 %.
    assert float(spread / printed) == pytest.approx(1.0, abs=0.12)


def resampled(count: int, num_particles: int, num_draws: int) -> Tensor:
    """Clouds of `x' = .8 x + .6 e`, resampled at every step by weights that mean nothing."""
    x, steps = torch.randn(num_particles, count), []
    for _ in range(num_draws):
        x = 0.8 * x + 0.6 * torch.randn(num_particles, count)
        steps.append(x)
        x = x.gather(0, systematic(torch.randn(num_particles, count).softmax(0)))
    return torch.stack(steps, -1).transpose(0, 1)


def test_mcse_of_a_cloud_that_is_resampled_is_near_the_spread_of_its_mean():
    draws = resampled(300, 40, 100)
    spread = draws.flatten(1).mean(1).std()
    printed = describe(draws, [0.5], is_chains=False)["mcse"].mean()
    as_chains = describe(draws, [0.5])["mcse"].mean()
    assert 0.9 < float(spread / printed) < 1.35
    assert float(spread / as_chains) > 2


# -- families ----------------------------------------------------------------------------------


def families_of_ten(count: int, num_particles: int) -> Tensor:
    return (torch.arange(num_particles) // 10 * 10).expand(count, num_particles)


def test_families_that_were_forgotten_cost_nothing():
    values = torch.randn(500, 200)
    effect = design_effect(values, families_of_ten(500, 200))
    assert float(effect.median()) == 1.0
    assert float(effect.mean()) < 1.15


def test_particles_that_are_copies_count_once():
    values = torch.randn(300, 40).repeat_interleave(10, 1)
    effect = design_effect(values, families_of_ten(300, 400))
    # The variance of a mean of 400 in 40 families is ten times that of 400 alone.
    assert float(effect.mean()) == pytest.approx(10.0, rel=0.05)


def test_mcse_of_families_that_are_alike_is_the_spread_of_their_mean():
    own = autoregressive(0.5, 200, 200, 100)
    inherited = 0.5 * torch.randn(200, 20, 1).repeat_interleave(10, 1)
    draws = own + inherited
    spread = draws.flatten(1).mean(1).std()
    families = families_of_ten(200, 200)
    assert float(spread / describe(draws, [0.5], families)["mcse"].mean()) == pytest.approx(
        1, abs=0.12
    )
    assert float(spread / describe(draws, [0.5])["mcse"].mean()) > 2


def test_weights_count_in_the_design_effect():
    """A family of ten with all the weight is one particle."""
    values = torch.tensor([[1.0, 1.0, 5.0, 7.0, 3.0, 2.0]])
    weights = torch.tensor([[0.25, 0.25, 0.125, 0.125, 0.125, 0.125]])
    families = torch.tensor([[0, 0, 2, 3, 4, 5]])
    deviation = weights * (values - (weights * values).sum())
    clustered = (deviation[:, :2].sum() ** 2 + deviation[:, 2:].square().sum()) / (
        1 - 0.25 - 0.0625
    )
    independent = deviation.square().sum() / (1 - weights.square().sum())
    excess = float(clustered / independent) - 1
    families_count = 1 / (0.25 + 0.0625)
    expected = 1 + max(0.0, excess * (1 - 2 / (families_count - 1) / excess**2))
    assert float(design_effect(values, families, weights)) == pytest.approx(expected)


@pytest.mark.parametrize("families", [None, torch.zeros(3, 8, dtype=torch.long)])
def test_a_single_family_has_nothing_to_compare_with(families):
    assert torch.equal(design_effect(torch.randn(3, 8), families), torch.ones(3))


def test_few_families_cannot_tell():
    values = torch.randn(3, 4).repeat_interleave(10, 1)
    assert torch.equal(design_effect(values, families_of_ten(3, 40)), torch.ones(3))


# -- R-hat -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_particles", [1, 4, 100, 1000])
def test_r_hat_of_draws_that_mix_is_rarely_above_its_limit(num_particles):
    num_draws = max(100, 4000 // num_particles)
    r = r_hat(autoregressive(0.5, 4000 // max(num_particles, 40), num_particles, num_draws))
    # ESS above 1,300: one value in 2,000.
    assert int((r > 1.01).sum()) <= 1


@pytest.mark.parametrize("fault", ["location", "scale", "time"])
def test_r_hat_notices_parts_that_disagree(fault):
    draws = autoregressive(0.5, 10, 100, 40)
    if fault == "location":  # one mode in a quarter of the particles
        draws[:, :25] += 2
    elif fault == "scale":
        draws[:, :50] *= 1.5
    else:
        draws += 0.5 * torch.linspace(-1, 1, 40)
    assert bool((r_hat(draws) > 1.01).all())


def test_r_hat_of_a_cloud_that_is_resampled_compares_quarters_of_the_sweeps():
    draws = autoregressive(0.5, 10, 100, 40)
    assert bool((r_hat(draws, is_chains=False) < 1.01).all())
    drifting = draws + 0.5 * torch.linspace(-1, 1, 40)
    assert bool((r_hat(drifting, is_chains=False) > 1.01).all())


# -- manners -----------------------------------------------------------------------------------


def test_values_that_are_constant_have_no_quality_but_are_known_exactly():
    draws = torch.full((2, 10, 20), 3.0)
    for is_chains in (True, False):
        about = describe(draws, [0.05], is_chains=is_chains)
        for name, expected in {"mean": 3.0, "std": 0.0, "mcse": 0.0}.items():
            assert torch.equal(about[name], torch.full((2,), expected))
        for name in ("ess_bulk", "ess_tail", "r_hat"):
            assert bool(about[name].isnan().all())


def test_one_particle_is_one_chain():
    about = describe(autoregressive(0.5, 50, 1, 400), [0.5], torch.zeros(50, 1, dtype=torch.long))
    assert float(about["ess_bulk"].median()) == pytest.approx(exact_ess(0.5, 1, 400), rel=0.2)
    assert bool((about["r_hat"] < 1.05).all())


def test_values_in_chunks_are_what_they_are_alone(monkeypatch):
    draws = autoregressive(0.5, 7, 10, 40)
    families = families_of_ten(7, 10) + torch.arange(10) // 5
    whole, alone = describe(draws, [0.5, 0.9], families), mixing(draws, families)
    monkeypatch.setattr("dcpc.draws.CHUNK", 800)
    for name, values in describe(draws, [0.5, 0.9], families).items():
        torch.testing.assert_close(values, whole[name])
    torch.testing.assert_close(mixing(draws, families), alone)
    torch.testing.assert_close(alone[0], whole["r_hat"])
    torch.testing.assert_close(alone[1], whole["ess_bulk"])


def test_the_weakest_values_are_found_without_sorting():
    draws = autoregressive(0.3, 50, 20, 40)
    draws[7] = autoregressive(0.99, 1, 20, 40)[0]
    draws[31, :10] += 3.0
    found = weakest(draws, 6).tolist()
    assert {7, 31} <= set(found)
    assert len(found) <= 6
    assert weakest(draws, 50).tolist() == list(range(50))


@pytest.mark.parametrize("is_chains", [True, False])
def test_a_value_that_never_changes_says_nothing_of_the_others(is_chains):
    draws = torch.randn(3, 20, 40, dtype=torch.float64)
    constant = draws.clone()
    constant[1] = 1.0
    alone, beside = (describe(d, (0.5,), None, is_chains) for d in (draws, constant))
    for name in ("mcse", "ess_bulk", "ess_tail", "r_hat"):
        torch.testing.assert_close(beside[name][[0, 2]], alone[name][[0, 2]])
        assert name == "mcse" or bool(beside[name][1].isnan())
