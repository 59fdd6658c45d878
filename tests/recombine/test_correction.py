"""Corrections against short independent implementations, on a move of two units in a plate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from dcpc.conquer import Diagonal, Langevin, Start, WayBack
from dcpc.divide import ScoredDensity
from dcpc.errors import OptionError
from dcpc.recombine import LogWeights, multinomial, systematic
from dcpc.recombine.correction import (
    CORRECTIONS,
    Metropolis,
    ProposedMove,
    Resample,
    Uncorrected,
    Weight,
)

pytestmark = pytest.mark.usefixtures("float64")

K, CELLS, ROWS, N, D = 4, 3, 2, 2, 2
"""Particles, population, another plate, units, values per unit."""

ETA = torch.tensor([0.2, 0.05], dtype=torch.float64)
SCALE = (torch.arange(CELLS * ROWS * N * D, dtype=torch.float64) * 0.37 % 1 + 0.5).reshape(
    CELLS, ROWS, N, D
)
"""Step sizes of the units, and the root of a diagonal preconditioner."""


class Group:
    """What a correction asks of a group: its name and how to sum to population cells."""

    name = "z"

    def __init__(self, population: int) -> None:
        self.population = population

    def over_population(self, value: Tensor) -> Tensor:
        return value.flatten(1 + self.population).sum(-1)


@dataclass
class Unit:
    """Complete conditionals without a model."""

    group: Group
    evaluate: Callable[[Tensor], ScoredDensity]
    active: Tensor | None = None

    def evaluate_raw(self, value: Tensor) -> ScoredDensity:
        return self.evaluate(value)

    def usable(self, evaluation: ScoredDensity) -> ScoredDensity:
        return evaluation

    def log_density(self, value: Tensor) -> Tensor:
        return self.evaluate(value).log_density

    def score(self, value: Tensor) -> Tensor:
        return self.evaluate(value).score


def log_density(value: Tensor) -> Tensor:
    return (-0.25 * value**4 + value).sum(-1)


def evaluate(value: Tensor) -> ScoredDensity:
    return ScoredDensity(log_density(value), -(value**3) + 1)


def proposed(population: int = 1, resampler=systematic, seed: int = 0, spoil=None) -> ProposedMove:
    torch.manual_seed(seed)
    value = torch.randn(K, CELLS, ROWS, N, D)
    before = evaluate(value)
    start = Start(value, before.score, ETA, Diagonal(SCALE), lambda u: evaluate(u).score)
    proposal = Langevin().propose(start)
    cells = (CELLS,) if population else ()
    after = evaluate if spoil is None else spoil
    return ProposedMove(
        Unit(Group(population), after),
        value,
        before,
        proposal,
        LogWeights(torch.randn(K, *cells)),
        resampler,
    )


def transition(start: Tensor, end: Tensor) -> Tensor:
    """`log q(end | start)` by torch's Normal, `(K, *plates, n)`."""
    mean = start + ETA[:, None] * SCALE**2 * (-(start**3) + 1)
    return Normal(mean, (2 * ETA[:, None]).sqrt() * SCALE).log_prob(end).sum(-1)


def ratio_of(move: ProposedMove) -> Tensor:
    u, v = move.value, move.proposal.value
    return log_density(v) + transition(v, u) - log_density(u) - transition(u, v)


@pytest.mark.parametrize("population", [0, 1])
def test_metropolis_accepts_elementwise_with_the_ratio_of_hastings(population):
    move = proposed(population)
    torch.manual_seed(7)
    outcome = Metropolis().apply(move)
    torch.manual_seed(7)
    uniform = torch.rand(K, CELLS, ROWS, N)
    ratio = ratio_of(move)
    accepted = uniform.log() < ratio
    assert 0 < int(accepted.sum()) < accepted.numel()
    expected = torch.where(accepted[..., None], move.proposal.value, move.value)
    assert torch.equal(outcome.value, expected)
    assert outcome.log_weight is None
    gained = log_density(expected) - log_density(move.value)
    axes = (2, 3) if population else (1, 2, 3)
    torch.testing.assert_close(outcome.log_joint, gained.sum(axes))
    torch.testing.assert_close(outcome.statistic, ratio.exp().clamp(max=1).mean((0, 1, 2)))


@pytest.mark.parametrize("population", [0, 1])
@pytest.mark.parametrize("bound", [0.0, 0.1, 1.0, 1e4])
def test_weight_accepts_up_to_its_bound_and_weighs_the_rest(population, bound):
    move = proposed(population)
    torch.manual_seed(7)
    outcome = Weight(bound=bound).apply(move)
    torch.manual_seed(7)
    uniform = torch.rand(K, CELLS, ROWS, N)
    ratio = ratio_of(move)
    there, back = ((bound + r).exp().clamp(max=1) for r in (ratio, -ratio))
    accepted = uniform < there
    assert bool(accepted.all()) == (bound == 1e4)
    expected = torch.where(accepted[..., None], move.proposal.value, move.value)
    assert torch.equal(outcome.value, expected)
    axes = (2, 3) if population else (1, 2, 3)
    increment = torch.where(accepted, ratio + back.log() - there.log(), 0.0)
    torch.testing.assert_close(outcome.log_weight, increment.sum(axes))
    gained = log_density(expected) - log_density(move.value)
    torch.testing.assert_close(outcome.log_joint, gained.sum(axes))


@pytest.mark.parametrize("bound", [0.0, 0.2, 1.0])
def test_bounded_weights_are_proper(bound):
    # Of draws from N(0, 1) moved by steps that are far too long, the weighted moments stay.
    eta, metric, count = torch.tensor([1.5]), Diagonal(torch.ones(1, 1, 1)), 400_000

    def normal(u: Tensor) -> ScoredDensity:
        return ScoredDensity(-0.5 * u.square().sum(-1), -u)

    torch.manual_seed(0)
    value = torch.randn(count, 1, 1, 1)
    before = normal(value)
    proposal = Langevin().propose(Start(value, before.score, eta, metric, lambda u: -u))
    move = replace(
        proposed(seed=1),
        unit=Unit(Group(1), normal),
        value=value,
        predicted=before,
        proposal=proposal,
        log_weight=LogWeights(torch.zeros(count, 1)),
    )
    outcome = Weight(bound=bound).apply(move)
    weight, moved = outcome.log_weight.exp().flatten(), outcome.value.flatten()
    assert bool((moved != value.flatten()).any())
    assert float(outcome.log_weight.abs().max()) <= bound
    for power, moment in ((0, 1.0), (2, 1.0), (4, 3.0)):
        terms = weight * moved**power
        assert abs(float(terms.mean()) - moment) <= 5 * float(terms.std()) / math.sqrt(count) + 1e-9


@pytest.mark.parametrize("bound", [-0.1, math.inf, math.nan])
def test_a_bound_that_bounds_nothing_is_refused(bound):
    with pytest.raises(OptionError, match=r"bound must be finite and at least 0, got"):
        Weight(bound=bound)


def test_weight_watches_the_conditional_ess_of_each_unit_and_its_acceptance():
    move = proposed(1)
    outcome = Weight(bound=1e4).apply(move)
    normal = move.log_weight.log_weight.exp()
    normal = normal / normal.sum(0)
    increment = ratio_of(move).sum(2).exp()  # (K, cells, n)
    first = (normal[..., None] * increment).sum(0)
    second = (normal[..., None] * increment**2).sum(0)
    torch.testing.assert_close(outcome.statistic, (first**2 / second).mean(0))
    metropolis = Weight(bound=0.0).apply(move).statistic  # all increments are zero
    torch.testing.assert_close(metropolis, ratio_of(move).exp().clamp(max=1).mean((0, 1, 2)))


@pytest.mark.parametrize("population", [0, 1])
@pytest.mark.parametrize("resampler", [systematic, multinomial])
def test_resample_is_lines_seven_to_eleven_of_algorithm_one(population, resampler):
    move = proposed(population, resampler)
    torch.manual_seed(11)
    outcome = Resample().apply(move)
    torch.manual_seed(11)
    v = move.proposal.value
    local = log_density(v) - transition(move.value, v)
    density = log_density(v)
    if population:
        local, density = local.sum(2), density.sum(2)  # (K, cells, n)
    else:
        local, density = local.sum((1, 2)), density.sum((1, 2))  # (K, n)
    ancestors = resampler(torch.softmax(local, 0))
    value = torch.empty_like(v)
    log_weight = torch.zeros(K, *((CELLS,) if population else ()))
    for k in range(K):
        for unit in range(N):
            for cell in range(CELLS):
                index = ancestors[k, cell, unit] if population else ancestors[k, unit]
                value[k, cell, :, unit] = v[index, cell, :, unit]
            if population:
                for cell in range(CELLS):
                    zhat = local[:, cell, unit].exp().mean().log()
                    log_weight[k, cell] += zhat - density[ancestors[k, cell, unit], cell, unit]
            else:
                zhat = local[:, unit].exp().mean().log()
                log_weight[k] += zhat - density[ancestors[k, unit], unit]
    torch.testing.assert_close(outcome.value, value)
    torch.testing.assert_close(outcome.log_weight, log_weight)
    assert outcome.statistic is None


def test_resample_weighs_the_sweep_by_the_joint():
    correction = Resample()
    old = LogWeights(torch.randn(K, CELLS))
    assert torch.equal(correction.begin(old).log_weight, torch.zeros(K, CELLS))
    joint = torch.randn(K, CELLS)
    torch.testing.assert_close(
        correction.end(old, lambda: joint).log_weight, old.log_weight + joint
    )


def test_uncorrected_keeps_the_proposal_and_touches_no_weight():
    move = proposed()
    outcome = Uncorrected().apply(move)
    assert torch.equal(outcome.value, move.proposal.value)
    assert outcome.log_weight is None
    assert outcome.statistic is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["metropolis", "weight", "resample"])
def test_log_densities_that_are_not_finite_have_zero_density_and_are_counted(name, bad):
    def spoil(value):
        after = evaluate(value)
        after.log_density[1, 2, 0, 1] = bad
        return after

    move = proposed(spoil=spoil)
    outcome = CORRECTIONS[name]().apply(move)
    assert int(outcome.num_bad) == 1
    if name in ("metropolis", "weight"):
        assert torch.equal(outcome.value[1, 2, 0, 1], move.value[1, 2, 0, 1])
        assert bool(outcome.log_joint.isfinite().all())
    if name == "weight":
        assert bool(outcome.log_weight.isfinite().all())
    if name == "resample":
        spoilt = move.proposal.value[1, 2, :, 1]
        assert not any(torch.equal(outcome.value[k, 2, :, 1], spoilt) for k in range(K))


@pytest.mark.parametrize("kind", [Metropolis, Weight])
def test_what_a_move_keeps_depends_on_whether_its_proposal_is_taken(kind):
    move = proposed()
    shape = move.value.shape
    kept, turned = torch.full(shape, 2.0), torch.full(shape, -1.0)

    def way_back(score: Tensor) -> WayBack:
        return WayBack(move.proposal.way_back(score).log_ratio, {"momentum": kept})

    proposal = replace(move.proposal, way_back=way_back, memory_if_rejected={"momentum": turned})
    outcome = kind().apply(replace(move, proposal=proposal))
    moved = (outcome.value != move.value).all(-1, keepdim=True).expand(shape)
    assert 0 < int(moved.sum()) < moved.numel()
    assert torch.equal(outcome.memory["momentum"], torch.where(moved, kept, turned))


def test_uncorrected_moves_keep_what_they_arrive_with():
    move = proposed()

    def way_back(score: Tensor) -> WayBack:
        return WayBack(torch.zeros(()), {"momentum": score})

    proposal = replace(
        move.proposal, way_back=way_back, memory_if_rejected={"momentum": move.value}
    )
    outcome = Uncorrected().apply(replace(move, proposal=proposal))
    assert torch.equal(outcome.memory["momentum"], evaluate(move.proposal.value).score)
