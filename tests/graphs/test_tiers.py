"""What a recording is compared by, before it takes the place of a function."""

import pytest
import torch

from dcpc.graphs.recording import record
from dcpc.graphs.tiers import are_results, pays_to_compile


def inverse(settled, moving):
    """Entries of the order of 1e12, of which rounding leaves some four digits."""
    return {"inverse": torch.linalg.inv(moving["matrix"])}


@pytest.fixture
def ill_conditioned():
    base = torch.ones(2, 2, dtype=torch.float64)
    return {"matrix": base + 1e-12 * torch.eye(2, dtype=torch.float64)}


def test_what_rounding_explains_is_the_same(ill_conditioned):
    nearby = {"matrix": ill_conditioned["matrix"] * (1 + 4e-16 * torch.eye(2, dtype=torch.float64))}
    other = inverse({}, nearby)
    exact = inverse({}, ill_conditioned)
    assert float((other["inverse"] / exact["inverse"] - 1).abs().max()) > 1e-4
    assert are_results(other, inverse, {}, ill_conditioned)


@pytest.mark.parametrize("factor", [1.3, -1.0, float("nan")])
def test_what_rounding_does_not_explain_is_not(ill_conditioned, factor):
    wrong = {"inverse": factor * inverse({}, ill_conditioned)["inverse"]}
    assert not are_results(wrong, inverse, {}, ill_conditioned)


def test_well_conditioned_results_may_not_differ():
    matrix = {"matrix": torch.eye(3, dtype=torch.float64)}
    wrong = {"inverse": 1.01 * inverse({}, matrix)["inverse"]}
    assert not are_results(wrong, inverse, {}, matrix)


def test_the_comparison_draws_nothing_from_the_generator(ill_conditioned):
    torch.manual_seed(0)
    wrong = {"inverse": 2.0 * inverse({}, ill_conditioned)["inverse"]}
    are_results(wrong, inverse, {}, ill_conditioned)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize(("size", "pays"), [(1_000, False), (1_000_000, True)])
def test_the_same_operators_pay_on_tensors_that_go_through_memory(size, pays):
    def function(settled, moving):
        value = moving["u"]
        for _ in range(20):
            value = value.sin().square()
        return [value]

    recording = record(function, {}, {"u": torch.rand(size)}, is_exact=False)
    assert pays_to_compile(recording, "auto", num_expected=300) == pays
    assert pays_to_compile(recording, True, num_expected=1)
    assert not pays_to_compile(recording, "auto", num_expected=1)
