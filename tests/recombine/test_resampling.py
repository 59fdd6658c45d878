"""Resampling schemes against the mean, variance and range of their offspring counts."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dcpc.errors import DegenerateWeightsError
from dcpc.recombine.resampling import RESAMPLERS, Resampler, take_particles
from dcpc.recombine.weights import LogWeights

REPLICATES = 20_000
ALMOST_ONE = 1 - 2.0**-53

WEIGHTS = {
    "general": [0.11, 0.02, 0.43, 0.07, 0.29, 0.08],
    "zeros within": [0.3, 0.0, 0.25, 0.0, 0.15, 0.3],
    "zeros at both ends": [0.0, 0.0, 0.35, 0.65, 0.0, 0.0],
    "all on the first": [1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    "all on the last": [0.0, 0.0, 0.0, 0.0, 0.0, 1.0],
    "mostly on the last": [0.02, 0.03, 0.01, 0.04, 0.0, 0.9],
    "mostly on the first": [0.9, 0.02, 0.03, 0.01, 0.04, 0.0],
    "uniform": [1 / 6] * 6,
}

# Variances of the offspring counts of four particles of weights (3/8, 1/4, 3/8, 0), by hand.
# Boundaries in units of slots: 1.5, 2.5, 4. Particle 1 owns the second half of slot 1 and the first
# half of slot 2: one uniform always hits exactly one of the two, two uniforms hit Binomial(2, 1/2).
VARIANCES = {
    "systematic": [0.25, 0.0, 0.25, 0.0],
    "stratified": [0.25, 0.5, 0.25, 0.0],
    "residual": [0.25, 0.0, 0.25, 0.0],
    "multinomial": [0.9375, 0.75, 0.9375, 0.0],
}


@pytest.fixture(params=sorted(RESAMPLERS))
def scheme(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(20)
    return request.param


@pytest.fixture
def resample(scheme: str) -> Resampler:
    return RESAMPLERS[scheme]


def double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def offspring_counts(ancestors: Tensor) -> Tensor:
    counts = torch.zeros(ancestors.shape, dtype=torch.float64)
    return counts.scatter_add_(0, ancestors, torch.ones_like(counts))


def replicate(resample: Resampler, weights: Tensor) -> Tensor:
    """Offspring counts of many independent resamplings, shape `(K, REPLICATES)`."""
    return offspring_counts(resample(weights.unsqueeze(-1).expand(-1, REPLICATES)))


def assert_within_standard_errors(counts: Tensor, weights: Tensor) -> None:
    """Mean counts are `K w` within five of multinomial's standard errors, the largest."""
    num_particles = weights.shape[0]
    standard_error = (num_particles * weights * (1 - weights) / counts.shape[1]).sqrt()
    deviation = (counts.mean(1) - num_particles * weights).abs()
    assert (deviation <= 5 * standard_error + 1e-12).all(), (deviation, standard_error)


def fix_uniforms(monkeypatch: pytest.MonkeyPatch, value: float) -> Callable[[], int]:
    """Make torch's uniforms all equal to `value`; the result tells how often they were drawn."""
    calls = []

    def constant_like(like: Tensor) -> Tensor:
        calls.append(like.shape)
        return torch.full_like(like, value)

    monkeypatch.setattr(torch, "rand_like", constant_like)
    return lambda: len(calls)


def test_names_of_the_schemes():
    assert set(RESAMPLERS) == {"systematic", "stratified", "multinomial", "residual"}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_mean_offspring_is_k_times_the_weight(resample, weights):
    weights = double(weights)
    assert_within_standard_errors(replicate(resample, weights), weights)


def test_each_population_cell_is_resampled_by_its_own_weights(resample):
    weights = double(list(WEIGHTS.values())).T
    ancestors = resample(weights.unsqueeze(1).expand(-1, REPLICATES, -1))
    assert ancestors.shape == (6, REPLICATES, len(WEIGHTS))
    counts = offspring_counts(ancestors)
    for cell in range(len(WEIGHTS)):
        assert_within_standard_errors(counts[..., cell], weights[:, cell])


def test_population_cells_are_resampled_independently(resample):
    weights = double(WEIGHTS["general"]).view(-1, 1, 1).expand(-1, 2, REPLICATES)
    counts = offspring_counts(resample(weights))
    for particle in range(6):
        if counts[particle].std() > 0:
            correlation = torch.corrcoef(counts[particle])[0, 1]
            assert abs(correlation) < 5 / math.sqrt(REPLICATES)


def test_variance_of_offspring_is_the_schemes_own(scheme, resample):
    counts = replicate(resample, double([0.375, 0.25, 0.375, 0.0]))
    squares = (counts - double([1.5, 1.0, 1.5, 0.0]).unsqueeze(1)).square()
    standard_error = squares.std(1) / math.sqrt(REPLICATES)
    deviation = (squares.mean(1) - double(VARIANCES[scheme])).abs()
    assert (deviation <= 5 * standard_error + 1e-12).all()


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_offspring_stay_within_the_bounds_of_theory(weights):
    weights = double(weights)
    expected = 6 * weights.unsqueeze(1)
    floor, ceil = torch.floor(expected + 1e-9), torch.ceil(expected - 1e-9)
    torch.manual_seed(0)
    counts = {name: replicate(scheme, weights) for name, scheme in RESAMPLERS.items()}
    assert ((counts["systematic"] == floor) | (counts["systematic"] == ceil)).all()
    assert (counts["residual"] >= floor).all()
    assert ((counts["stratified"] - expected).abs() < 2).all()
    assert all((count.sum(0) == 6).all() for count in counts.values())


def test_multinomial_slots_are_independent():
    torch.manual_seed(0)
    weights = double([0.3, 0.7]).unsqueeze(1).expand(-1, REPLICATES)
    first, second = RESAMPLERS["multinomial"](weights)
    frequency = torch.bincount(2 * first + second, minlength=4) / REPLICATES
    expected = torch.tensor([0.09, 0.21, 0.21, 0.49])
    standard_error = (expected * (1 - expected) / REPLICATES).sqrt()
    assert ((frequency - expected).abs() < 5 * standard_error).all()


@pytest.mark.parametrize("name", ["systematic", "stratified", "residual"])
@pytest.mark.parametrize("num_particles", [1, 2, 7, 49, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_weights_keep_every_particle_once(name, num_particles, dtype):
    torch.manual_seed(0)
    weights = LogWeights.uniform(num_particles, (5,), dtype=dtype).normalized()
    ancestors = RESAMPLERS[name](weights)
    assert (offspring_counts(ancestors) == 1).all()


def test_one_particle_is_its_own_ancestor(resample):
    assert (resample(torch.ones(1, 1000)) == 0).all()
    assert resample(torch.ones(1)).tolist() == [0]


def test_both_of_two_particles_survive(resample):
    counts = replicate(resample, double([0.4, 0.6]))
    assert (counts.sum(1) > REPLICATES / 2).all()


def test_weights_that_do_not_sum_to_one_are_normalised(resample):
    counts = replicate(resample, 7 * double(WEIGHTS["general"]))
    assert_within_standard_errors(counts, double(WEIGHTS["general"]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_particle_of_bad_log_weight_has_no_offspring(resample, bad):
    log_weight = torch.tensor([bad, 0.3, -0.2, bad, 1.0, bad]).unsqueeze(1).expand(-1, 5000)
    ancestors = resample(LogWeights(log_weight).normalized())
    assert set(ancestors.unique().tolist()) == {1, 2, 4}


@pytest.mark.parametrize("uniform", [0.0, 1e-300, 0.5, ALMOST_ONE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_uniform_draws_a_zero_weight(monkeypatch, resample, uniform, dtype):
    num_draws = fix_uniforms(monkeypatch, uniform)
    for num_zeros in (0, 1, 40):
        zeros = torch.zeros(num_zeros, 8, dtype=dtype)
        weights = torch.cat([zeros, torch.rand(60, 8, dtype=dtype), zeros])
        # Sums of single-precision thirds fall short of one, or exceed it.
        weights = weights / weights.sum(0) * torch.tensor([1, 1 / 3, 0.1, 3, 1e-6, 1e6, 1, 1])
        ancestors = resample(weights)
        assert ancestors.min() >= 0
        assert ancestors.max() < len(weights)
        assert (weights.gather(0, ancestors) > 0).all()
    assert num_draws() == 3


@pytest.mark.parametrize(("uniform", "weights"), [(0.0, [0, 0, 1]), (ALMOST_ONE, [1, 0, 0])])
def test_extreme_uniforms_find_the_only_particle(monkeypatch, resample, uniform, weights):
    fix_uniforms(monkeypatch, uniform)
    assert resample(double(weights)).tolist() == [weights.index(1)] * 3


def test_many_single_precision_particles_stay_in_range(resample):
    num_particles = 100_000
    log_weight = torch.randn(num_particles)
    log_weight[-100:] = -math.inf
    log_weight[:100] = -math.inf
    weights = LogWeights(log_weight).normalized()
    ancestors = resample(weights)
    assert ancestors.min() >= 100
    assert ancestors.max() < num_particles - 100
    # The mean weight of the second half must not suffer from rounding in the running sum.
    share = (ancestors >= num_particles // 2).double().mean()
    expected = weights[num_particles // 2 :].double().sum()
    assert abs(share - expected) < 5 * 0.5 / math.sqrt(num_particles)


def test_single_precision_running_sums_do_not_bias_systematic_resampling():
    num_particles = 100_000
    weights = torch.rand(num_particles).softmax(0)
    expected = num_particles * weights.double() / weights.double().sum()
    counts = offspring_counts(RESAMPLERS["systematic"](weights))
    assert ((counts.cumsum(0) - expected.cumsum(0)).abs() < 1 + 1e-6).all()


def test_ancestors_are_integers_of_the_weights_shape(resample):
    for shape in [(5,), (5, 2), (5, 2, 3), (5, 0)]:
        ancestors = resample(torch.full(shape, 0.2))
        assert ancestors.shape == shape
        assert ancestors.dtype == torch.long


def test_randomness_is_torchs_global_generators(resample):
    weights = double(WEIGHTS["general"]).unsqueeze(1).expand(-1, 50)
    torch.manual_seed(1)
    first, second = resample(weights), resample(weights)
    torch.manual_seed(1)
    assert resample(weights).equal(first)
    assert not second.equal(first)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_cell_that_cannot_be_resampled_is_an_error(resample, bad):
    weights = torch.full((3, 2), 1 / 3)
    weights[:, 1] = bad
    with pytest.raises(DegenerateWeightsError, match="all zero or not finite"):
        resample(weights)


@pytest.mark.parametrize(
    ("shape", "population_axes"),
    [
        ((4,), ()),
        ((4, 5, 2), ()),
        ((4, 3), (1,)),
        ((4, 3, 5), (1,)),
        ((4, 5, 3), (2,)),
        ((4, 3, 0), (1,)),
        ((4, 3, 2), (1, 2)),
        ((4, 3, 2, 5, 6), (1, 2)),
        ((4, 5, 3, 6, 2), (2, 4)),
        ((4, 2, 3, 5), (2, 1)),
    ],
)
def test_taking_particles_copies_each_cell_from_its_ancestor(shape, population_axes):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(shape, generator=generator)
    population = tuple(shape[axis] for axis in population_axes)
    ancestors = torch.randint(4, (4, *population), generator=generator)
    taken = take_particles(value, ancestors, population_axes)
    assert taken.shape == value.shape
    for index in torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape)).tolist():
        cell = tuple(index[axis] for axis in population_axes)
        source = (int(ancestors[(index[0], *cell)]), *index[1:])
        assert taken[tuple(index)] == value[source]


@pytest.mark.parametrize(
    ("shape", "population_axes"), [((4, 2, 5), (1,)), ((3, 3), (1,)), ((4, 3), ())]
)
def test_taking_particles_of_another_population_is_refused(shape, population_axes):
    with pytest.raises(ValueError, match=r"shape \(4, 3\) of the ancestors"):
        take_particles(torch.zeros(shape), torch.zeros(4, 3, dtype=torch.long), population_axes)


@pytest.mark.gpu
def test_parallel_sums_draw_no_zero_weight(resample):
    weights = torch.rand(100_000, 2, device="cuda")
    weights[torch.rand_like(weights) < 0.5] = 0
    ancestors = resample(weights / weights.sum(0))
    assert ancestors.device == weights.device
    assert (weights.gather(0, ancestors) > 0).all()
