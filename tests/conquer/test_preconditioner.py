"""Preconditioners against their formulas, and against the precision of a Gaussian."""

from __future__ import annotations

import math

import pytest
import torch

from dcpc.conquer import (
    PRECONDITIONERS,
    Adapted,
    Dense,
    DenseSecondMoment,
    Identity,
    ParticleVariance,
    SecondMoment,
)
from dcpc.conquer.preconditioner import MAX_OUTLIER

pytestmark = pytest.mark.usefixtures("float64")


def matrix(metric, size: int) -> torch.Tensor:
    """P as a full matrix."""
    if isinstance(metric, Dense):
        return metric.factor @ metric.factor.mT
    return metric.scale.square().diag_embed().expand(*metric.scale.shape, size)


def moderate(*shape: int) -> torch.Tensor:
    """Scores between one and two in size, none of which is an outlier."""
    return (1 + torch.rand(shape)) * torch.randn(shape).sign()


def learn(preconditioner, scores, population: int = 0):
    state = preconditioner.init(scores[0], population)
    for score in scores:
        state = preconditioner.update(state, score, population)
    return preconditioner.metric(state, scores[-1]), state


def test_identity_is_the_identity():
    score = torch.randn(5, 3, 2, 4)
    metric = Identity().metric({}, score)
    assert torch.equal(metric.colour(score), score)
    assert torch.equal(metric.whiten_score(score), score)
    assert float(metric.half_log_det().abs().max()) == 0.0


def test_particle_variance_is_the_papers_formula():
    """`P_j = 1 / (Var_k[score_j] + 1/K)` over its mean, per population cell and unit."""
    torch.manual_seed(0)
    score = torch.randn(5, 3, 2, 4) * torch.tensor([1.0, 2.0, 0.1, 5.0])
    metric = ParticleVariance().metric({}, score)
    for cell in range(3):
        for unit in range(2):
            rows = score[:, cell, unit]
            variance = ((rows - rows.mean(0)) ** 2).mean(0)
            p = 1 / (variance + 1 / 5)
            torch.testing.assert_close(metric.scale[cell, unit] ** 2, p / p.mean())


def test_particle_variance_of_one_particle_is_the_identity_and_not_nan():
    metric = ParticleVariance().metric({}, torch.randn(1, 2, 4))
    torch.testing.assert_close(metric.scale, torch.ones(2, 4))


def test_only_particle_variance_looks_at_the_current_scores():
    assert {n for n, p in PRECONDITIONERS.items() if p.uses_current_scores} == {"particle_variance"}
    torch.manual_seed(0)
    for name, kind in PRECONDITIONERS.items():
        if name == "particle_variance":
            continue
        scores = [torch.randn(50, 1, 3) for _ in range(3)]
        metric, state = learn(kind(), scores)
        again = kind().metric(state, 100 * torch.randn(50, 1, 3))
        torch.testing.assert_close(matrix(again, 3), matrix(metric, 3))


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_second_moment_is_the_bias_corrected_exponential_average(exponent):
    torch.manual_seed(0)
    decay = 0.8
    scores = [moderate(7, 3, 2, 4) for _ in range(5)]
    metric, _ = learn(SecondMoment(exponent, decay), scores)
    moment, mass = 0.0, 0.0
    for score in scores:
        moment = decay * moment + (1 - decay) * score.square().mean(0)
        mass = decay * mass + (1 - decay)
    torch.testing.assert_close(metric.scale**2, (moment / mass) ** -exponent)


def test_population_shares_one_estimate_and_other_plates_do_not():
    torch.manual_seed(0)
    scores = [moderate(7, 3, 2, 1, 4)]
    metric, _ = learn(SecondMoment(), scores, population=1)
    assert metric.scale.shape == (1, 2, 1, 4)
    torch.testing.assert_close(metric.scale[0] ** -2, scores[0].square().mean((0, 1)))


@pytest.mark.parametrize("population", [0, 1])
def test_dense_second_moment_is_the_inverse_of_the_average_outer_product(population):
    torch.manual_seed(0)
    decay = 0.9
    scores = [moderate(40, 3, 2, 4) for _ in range(4)]
    metric, _ = learn(DenseSecondMoment(decay), scores, population)
    moment, mass = 0.0, 0.0
    axes = tuple(range(1 + population))
    for score in scores:
        outer = score[..., :, None] * score[..., None, :]
        moment = decay * moment + (1 - decay) * outer.mean(axes, keepdim=True)[0]
        mass = decay * mass + (1 - decay)
    expected = torch.linalg.inv(moment / mass)
    torch.testing.assert_close(metric.factor @ metric.factor.mT, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "preconditioner",
    [SecondMoment(), DenseSecondMoment(), Adapted()],
    ids=lambda p: type(p).__name__,
)
def test_scores_of_a_gaussian_at_equilibrium_recover_its_precision(preconditioner):
    """For `N(0, S)` the score at equilibrium has the second moment `S^-1`, so P becomes S."""
    torch.manual_seed(0)
    factor = torch.tensor([[2.0, 0.0, 0.0], [0.5, 0.3, 0.0], [-1.0, 0.2, 1.0]])
    precision = torch.linalg.inv(factor @ factor.T)
    count = 4000
    scores = [-(torch.randn(count, 1, 3) @ factor.T) @ precision for _ in range(40)]
    metric, _ = learn(preconditioner, scores)
    got = matrix(metric, 3)[0]
    if isinstance(preconditioner, SecondMoment):
        expected = torch.diag(1 / precision.diagonal())
    else:
        expected = factor @ factor.T
    # The average remembers about 20 sweeps of 4000 particles: relative error sqrt(2 / 80000).
    assert float(((got - expected).abs() / expected.abs().max()).max()) < 5 * math.sqrt(2 / 80_000)


def test_adapted_is_dense_for_small_units_only():
    small, large = torch.randn(100, 1, 3), torch.randn(100, 1, 40)
    assert "factor" in Adapted().init(small, 0)
    assert "factor" not in Adapted().init(large, 0)
    assert "factor" not in Adapted().init(torch.randn(100, 1, 1), 0)
    assert "factor" not in Adapted().init(torch.randn(2, 1, 10), 0)


@pytest.mark.parametrize("kind", [SecondMoment, DenseSecondMoment])
def test_one_outlier_does_not_freeze_a_unit(kind):
    torch.manual_seed(0)
    scores = [torch.randn(100, 1, 2) for _ in range(20)]
    calm, _ = learn(kind(), scores)
    wild = [score.clone() for score in scores]
    wild[-1][0] = 1e6
    shaken, _ = learn(kind(), wild)
    ratio = matrix(shaken, 2)[0].diagonal() / matrix(calm, 2)[0].diagonal()
    # A single particle of 100, cut at MAX_OUTLIER of the mean, with weight 1 - decay.
    assert float(ratio.min()) > 1 / (1 + 2 * 0.05 * 2 * MAX_OUTLIER / 100) - 0.05


@pytest.mark.parametrize("name", ["second_moment", "dense", "adapted"])
def test_scores_of_zero_give_a_finite_metric(name):
    metric, _ = learn(PRECONDITIONERS[name](), [torch.zeros(100, 1, 2)])
    assert bool(matrix(metric, 2).isfinite().all())


@pytest.mark.parametrize("name", ["second_moment", "dense", "adapted"])
def test_metric_before_any_update_is_the_identity(name):
    preconditioner = PRECONDITIONERS[name]()
    score = torch.randn(100, 1, 2)
    metric = preconditioner.metric(preconditioner.init(score, 0), score)
    torch.testing.assert_close(matrix(metric, 2).reshape(-1, 2, 2)[0], torch.eye(2))


@pytest.mark.parametrize("name", list(PRECONDITIONERS))
def test_updating_leaves_the_old_state_as_it_was(name):
    preconditioner = PRECONDITIONERS[name]()
    score = torch.randn(100, 1, 2)
    state = preconditioner.init(score, 0)
    before = {key: value.clone() for key, value in state.items()}
    preconditioner.update(state, score, 0)
    assert all(torch.equal(state[key], before[key]) for key in before)
