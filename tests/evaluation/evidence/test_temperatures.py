from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal

from dcpc.errors import OptionError
from dcpc.evaluation import Setting, TemperatureStudy, temperature_study


@pytest.fixture(scope="module")
def study() -> TemperatureStudy:
    # By hand: one datum gains a nat on doubling temperatures, the other two; particles do nothing.
    return TemperatureStudy(
        {
            Setting(100, 8): torch.tensor([10.0, 20.0]),
            Setting(200, 8): torch.tensor([9.0, 18.0]),
            Setting(100, 16): torch.tensor([10.0, 20.0]),
        }
    )


def test_the_differences_are_paired(study: TemperatureStudy) -> None:
    change = study.on_more_temperatures(Setting(100, 8))
    assert change.mean == -1.5
    # Standard deviation of (-1, -2) is sqrt(1/2); by two data, sqrt(1/4).
    assert change.standard_error == pytest.approx(0.5)
    assert study.nll(Setting(100, 8)) == (15.0, pytest.approx(5.0))
    assert study.on_more_particles(Setting(100, 8)) == (0.0, 0.0)
    assert study.on_more_temperatures(Setting(200, 8)) is None


def test_the_table_shows_every_setting_and_the_changes_that_were_measured(
    study: TemperatureStudy,
) -> None:
    lines = study.format().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[2] == ["100", "8", "15.00 ± 5.00", "-1.50 ± 0.50", "0.00 ± 0.00"]
    assert rows[3] == ["200", "8", "13.50 ± 4.50", "", ""]
    assert len(rows) == 5


def test_longer_ladders_come_closer_to_the_evidence_from_above(shifted_gaussian: type) -> None:
    torch.manual_seed(0)
    x = 3 * torch.randn(50, 4)
    result = temperature_study(
        shifted_gaussian(4),
        x,
        num_temperatures=(2, 32),
        num_particles=(4, 8),
        seed=1,
        batch_size=30,
    )
    exact = -Normal(0.0, math.sqrt(2.0)).log_prob(x).sum(1)
    errors = {s: nll - exact for s, nll in result.evidence_nll.items()}
    assert {tuple(s) for s in errors} == {(2, 4), (32, 4), (2, 8), (32, 8)}
    short, long = errors[Setting(2, 4)], errors[Setting(32, 8)]
    assert float(short.mean()) > 4 * float(short.std()) / math.sqrt(50)
    # Half its variance is the bias of a log of an unbiased estimate.
    noise = float(long.std())
    assert abs(float(long.mean()) - noise**2 / 2) < 4 * noise / math.sqrt(50)
    assert float(long.mean()) < float(short.mean())


def test_no_setting_and_an_impossible_one_are_refused(shifted_gaussian: type) -> None:
    model, x = shifted_gaussian(4), torch.zeros(2, 4)
    with pytest.raises(OptionError, match="at least one number each"):
        temperature_study(model, x, num_temperatures=())
    with pytest.raises(OptionError, match=r"num_temperatures must be at least 1, got 0"):
        temperature_study(model, x, num_temperatures=(0,))
