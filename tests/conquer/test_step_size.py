"""Dual averaging against the algorithm as printed, and on a known acceptance curve."""

from __future__ import annotations

import math

import pytest
import torch

from dcpc.conquer import DualAveraging

pytestmark = pytest.mark.usefixtures("float64")


def hoffman_gelman(start: float, errors: list[float], gamma=0.05, t0=10.0, kappa=0.75):
    """Hoffman & Gelman (2014), eq. 6, with plain Python numbers and `mu = log start`."""
    mu, h, average = math.log(start), 0.0, math.log(start)
    current = mu
    for t, error in enumerate(errors, 1):
        h = (1 - 1 / (t + t0)) * h + error / (t + t0)
        current = mu - math.sqrt(t) / gamma * h
        weight = t**-kappa
        average = weight * current + (1 - weight) * average
    return math.exp(current), math.exp(average)


def test_updates_equal_the_printed_algorithm():
    rule = DualAveraging()
    errors = [0.4, -0.1, 0.05, -0.3, 0.2, 0.0, 0.1]
    state = rule.init(torch.tensor([0.5, 2.0]))
    for error in errors:
        state = rule.update(state, torch.tensor([error, -error]))
    for index, (start, sign) in enumerate([(0.5, 1), (2.0, -1)]):
        current, average = hoffman_gelman(start, [sign * e for e in errors])
        assert rule.step_size(state, True)[index].item() == pytest.approx(current)
        assert rule.step_size(state, False)[index].item() == pytest.approx(average)


def test_step_size_before_any_update_is_the_initial_one():
    rule = DualAveraging()
    state = rule.init(torch.tensor([0.3]))
    assert rule.step_size(state, True).item() == pytest.approx(0.3)
    assert rule.step_size(state, False).item() == pytest.approx(0.3)


@pytest.mark.parametrize("start", [0.01, 1.0, 30.0])
def test_reaches_the_target_of_a_known_acceptance_curve(start):
    """Acceptance `exp(-eta)` is .574 at `eta = -log .574`."""
    rule = DualAveraging()
    generator = torch.Generator().manual_seed(0)
    state = rule.init(torch.tensor([start]))
    for _ in range(2000):
        accept = (-rule.step_size(state, True)).exp()
        noise = 0.05 * torch.randn(1, generator=generator)
        state = rule.update(state, 0.574 - (accept + noise).clamp(0, 1))
    assert math.exp(-rule.step_size(state, False).item()) == pytest.approx(0.574, abs=0.03)


def test_statistics_that_are_nan_do_not_move_the_step():
    rule = DualAveraging()
    state = rule.update(rule.init(torch.tensor([0.3])), torch.tensor([math.nan]))
    assert rule.step_size(state, True).item() == pytest.approx(0.3)


def test_restart_begins_at_the_present_step_and_forgets_the_rest():
    rule = DualAveraging()
    state = rule.init(torch.tensor([0.3]))
    for error in (0.3, 0.2, -0.1):
        state = rule.update(state, torch.tensor([error]))
    now = rule.step_size(state, True)
    again = rule.restart(state)
    fresh = rule.init(now)
    assert all(torch.allclose(again[key], fresh[key]) for key in fresh)
