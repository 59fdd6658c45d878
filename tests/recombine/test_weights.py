"""Log-weights against the formulas of the definitions, written out in double precision."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from dcpc.errors import DCPCError, DegenerateWeightsError
from dcpc.recombine.weights import LogWeights, zero_density

POPULATIONS = [(), (3,), (2, 3)]
INF, NAN = math.inf, math.nan


def random_log_weight(population: tuple[int, ...], seed: int = 0, num_particles: int = 7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_particles, *population, dtype=torch.float64, generator=generator)


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor | list[float] | float, rtol: float = 1e-12
) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-12)


def test_density_that_is_not_finite_is_zero_and_is_counted():
    clean, bad = zero_density(torch.tensor([0.5, NAN, INF, -INF, -3.0]))
    assert clean.tolist() == [0.5, -INF, -INF, -INF, -3.0]
    assert bad.tolist() == [False, True, True, True, False]


def test_uniform_weights_have_the_shape_dtype_and_value_asked_for():
    weights = LogWeights.uniform(4, (2, 3), dtype=torch.float64)
    assert weights.log_weight.shape == (4, 2, 3)
    assert weights.log_weight.dtype == torch.float64
    assert weights.num_particles == 4
    assert weights.population == (2, 3)
    assert_close(weights.normalized(), torch.full((4, 2, 3), 0.25))
    assert_close(weights.log_mean(), torch.zeros(2, 3))
    assert_close(weights.ess(), torch.full((2, 3), 4.0))
    assert LogWeights.uniform(4).population == ()
    assert LogWeights.uniform(4).log_weight.dtype == torch.get_default_dtype()


@pytest.mark.parametrize("population", POPULATIONS)
def test_statistics_equal_their_definitions(population):
    log_weight = random_log_weight(population)
    increment = random_log_weight(population, seed=1)
    weights = LogWeights(log_weight)
    w, v = log_weight.exp(), increment.exp()
    normalized = w / w.sum(0)
    assert_close(weights.normalized(), normalized)
    assert_close(weights.normalized().sum(0), torch.ones(population))
    assert_close(weights.log_mean(), w.mean(0).log())
    assert_close(weights.ess(), w.sum(0) ** 2 / (w**2).sum(0))
    assert_close(
        weights.conditional_ess(increment),
        7 * (normalized * v).sum(0) ** 2 / (normalized * v**2).sum(0),
    )
    assert_close(weights.add(increment).normalized(), w * v / (w * v).sum(0))


@pytest.mark.parametrize("shift", [-1e6, -1e3, 1e3, 1e6])
def test_shifting_all_log_weights_shifts_the_log_mean_and_nothing_else(shift):
    # Powers of two and an integer shift: exact even in single precision.
    log_weight = torch.tensor([0.0, 1.0, 2.0, -3.0])
    here, there = LogWeights(log_weight), LogWeights(log_weight + shift)
    torch.testing.assert_close(there.log_mean(), here.log_mean() + shift)
    torch.testing.assert_close(there.normalized(), here.normalized())
    torch.testing.assert_close(there.ess(), here.ess())
    torch.testing.assert_close(
        here.conditional_ess(log_weight + shift), here.conditional_ess(log_weight)
    )
    torch.testing.assert_close(there.conditional_ess(log_weight), here.conditional_ess(log_weight))


def test_ess_counts_the_particles_that_share_the_weight():
    log_weight = torch.tensor([[0.0, 5.0, 0.0], [0.0, -INF, 0.0], [0.0, -INF, -INF]])
    assert_close(LogWeights(log_weight.double()).ess(), [3.0, 1.0, 2.0])


def test_conditional_ess_of_a_constant_increment_is_full_however_uneven_the_weights():
    weights = LogWeights(torch.tensor([0.0, -5.0, 9.0], dtype=torch.float64))
    assert_close(weights.conditional_ess(torch.full((3,), 2.5, dtype=torch.float64)), 3.0)


def test_conditional_ess_ignores_what_dead_particles_would_have_gained():
    weights = LogWeights(torch.tensor([0.0, 0.0, -INF, NAN]))
    increment = torch.tensor([0.0, math.log(3.0), 1e9, 1.0])
    assert_close(weights.conditional_ess(increment), 4 * 2.0**2 / 5.0, rtol=1e-6)


def test_conditional_ess_sees_a_particle_whose_normalised_weight_underflows():
    weights, increment = LogWeights(torch.tensor([0.0, -200.0])), torch.tensor([0.0, 300.0])
    # W v = (1, e^100) and W v^2 = (1, e^400): 2 e^-200 is left, not 2.
    assert_close(weights.conditional_ess(increment), 0.0)
    weights, increment = LogWeights(torch.tensor([0.0, -20.0])), torch.tensor([0.0, 22.0])
    expected = 2 * (1 + math.exp(2)) ** 2 / (1 + math.exp(24))
    assert_close(weights.conditional_ess(increment), expected, rtol=1e-4)


def test_effective_sample_sizes_of_dead_cells_are_zero():
    dead = LogWeights(torch.tensor([[0.0, -INF], [0.0, NAN]]))
    assert dead.ess().tolist() == [2.0, 0.0]
    assert dead.conditional_ess(torch.zeros(2, 2)).tolist() == [2.0, 0.0]
    assert dead.conditional_ess(torch.full((2, 2), -INF)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_bad_log_weight_is_zero_weight_from_the_constructor_and_from_an_increment(bad):
    built = LogWeights(torch.tensor([bad, 0.0, math.log(3.0)], dtype=torch.float64))
    added = LogWeights(torch.tensor([0.0, 0.0, math.log(3.0)], dtype=torch.float64)).add(
        torch.tensor([bad, 0.0, 0.0], dtype=torch.float64)
    )
    for weights in (built, added):
        assert weights.log_weight[0] == -INF
        assert_close(weights.normalized(), [0.0, 0.25, 0.75])
        assert_close(weights.log_mean(), math.log(4 / 3))
        assert weights.num_bad == 1


def test_dead_particle_stays_dead_whatever_it_gains():
    weights = LogWeights(torch.tensor([-INF, 0.0])).add(torch.tensor([INF, 0.0]))
    assert weights.log_weight.tolist() == [-INF, 0.0]


def test_cell_without_weight_has_evidence_zero_but_cannot_be_normalised():
    log_weight = torch.zeros(2, 2, 3)
    log_weight[:, 1, 0] = torch.tensor([NAN, -INF])
    weights = LogWeights(log_weight)
    assert weights.log_mean().tolist() == [[0.0, 0.0, 0.0], [-INF, 0.0, 0.0]]
    with pytest.raises(DegenerateWeightsError, match=r"all 2 .* 1 of 6 .* \(1, 0\)"):
        weights.normalized()
    with pytest.raises(DegenerateWeightsError, match='zero weight at site "z1"'):
        weights.normalized(site="z1")
    with pytest.raises(DegenerateWeightsError, match="all 1 particles"):
        LogWeights(torch.tensor([INF])).normalized()
    assert issubclass(DegenerateWeightsError, DCPCError)
    assert issubclass(DCPCError, ValueError)


@pytest.mark.parametrize("population", POPULATIONS)
def test_resetting_makes_weights_equal_and_keeps_the_log_mean(population):
    weights = LogWeights(random_log_weight(population))
    reset = weights.reset_to_mean()
    assert_close(reset.log_mean(), weights.log_mean())
    assert_close(reset.ess(), torch.full(population, 7.0))


def test_resetting_under_a_mask_leaves_the_other_cells_alone():
    weights = LogWeights(random_log_weight((3,)))
    mask = torch.tensor([True, False, True])
    reset = weights.reset_to_mean(mask)
    assert_close(reset.log_mean(), weights.log_mean())
    assert_close(reset.ess()[mask], [7.0, 7.0])
    assert reset.log_weight[:, 1].equal(weights.log_weight[:, 1])


def test_weights_are_immutable():
    source = torch.zeros(3)
    weights = LogWeights(source)
    with pytest.raises(dataclasses.FrozenInstanceError):
        weights.log_weight = source
    source[0] = 5.0
    weights.add(torch.ones(3))
    weights.reset_to_mean()
    assert weights.log_weight.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_keep_the_dtype(dtype):
    weights = LogWeights.uniform(3, (2,), dtype=dtype).add(torch.ones(3, 2, dtype=dtype))
    results = [
        weights.log_weight,
        weights.normalized(),
        weights.log_mean(),
        weights.ess(),
        weights.conditional_ess(torch.zeros(3, 2, dtype=dtype)),
        weights.reset_to_mean().log_weight,
    ]
    assert {result.dtype for result in results} == {dtype}


def test_increment_broadcasts_to_the_weights_but_never_widens_them():
    weights = LogWeights.uniform(2, (3,))
    increment = torch.tensor([[0.0], [1.0]])
    assert weights.add(increment).log_weight.tolist() == [[0.0] * 3, [1.0] * 3]
    with pytest.raises(ValueError, match=r"\(2, 3\), got shape \(4, 2, 3\)"):
        weights.add(torch.zeros(4, 2, 3))


@pytest.mark.parametrize(
    ("log_weight", "message"),
    [
        (torch.tensor(0.0), r"got shape \(\)"),
        (torch.zeros(0, 3), r"got shape \(0, 3\)"),
        (torch.zeros(2, dtype=torch.long), "got torch.int64"),
    ],
)
def test_what_is_not_a_weight_per_particle_is_refused(log_weight, message):
    with pytest.raises(ValueError, match=message):
        LogWeights(log_weight)
