"""posteriordb's reference posteriors.

The reference draws are Stan's (10 chains of 1000 thinned draws each), or NUTS's. With default
settings and at most joint blocks, means must lie within .15 reference standard deviations and
standard deviations within 15 % on the well-behaved ones. On all of them, the vague and the ridged
included, a default run whose means are off by more than .25 must say so.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch

from dcpc import DCPC
from tests.posteriordb import CASES, FILES, FOLDER, HARD, by_label
from tests.posteriordb import references as read_references

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all((FOLDER / name).exists() for name in FILES),
        reason=f"needs the reference posteriors {FILES} in {FOLDER}",
    ),
]


@cache
def references() -> dict[str, dict[str, Any]]:
    return read_references()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_means_and_standard_deviations_are_those_of_the_reference(case):
    reference = references()[case.name]
    engine = DCPC(case.model, num_particles=1000, blocks=case.blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the next test is about warnings
        posterior = engine.run(reference["data"], seed=0, progress=False)
    draws = by_label(posterior.resample())
    for name, mean in reference["mean"].items():
        sd = reference["sd"][name]
        assert abs(float(draws[name].mean()) - mean) < 0.15 * sd, name
        assert 0.85 < float(draws[name].std()) / sd < 1.15, name


HEAVY_TAILED = {"sigma_a": 1.3}
"""Largest ratio of standard deviations of what has draws sixty of them from its mean."""


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("num_particles", [500, 1000])
@pytest.mark.parametrize("case", HARD, ids=lambda case: case.name)
def test_default_runs_of_the_hard_ones_are_those_of_the_reference(case, num_particles):
    reference = references()[case.name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        posterior = DCPC(case.model, num_particles=num_particles).run(
            reference["data"], seed=0, progress=False
        )
    draws = by_label({name: value.flatten(0, 1) for name, value in posterior.history.items()})
    for name, mean in reference["mean"].items():
        sd = reference["sd"][name]
        assert abs(float(draws[name].mean()) - mean) < 0.15 * sd, name
        ratio = float(draws[name].std()) / sd
        assert 0.9 < ratio < HEAVY_TAILED.get(name, 1.1), name
    assert max(float(t["r_hat"].max()) for t in posterior.statistics().values()) <= 1.01


def test_every_reference_has_a_model():
    assert set(references()) == {case.name for case in (*CASES, *HARD)}


@pytest.mark.parametrize("precision", [torch.float32, torch.float64], ids=["single", "double"])
@pytest.mark.parametrize("case", [*CASES, *HARD], ids=lambda case: case.name)
def test_a_default_run_is_right_or_says_that_it_is_not(case, precision):
    torch.set_default_dtype(precision)
    reference = references()[case.name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = DCPC(case.model, num_particles=1000)
        posterior = engine.run(reference["data"], seed=0, progress=False)
    draws = by_label(posterior.resample())
    off = {
        name: abs(float(draws[name].double().mean()) - mean) / reference["sd"][name]
        for name, mean in reference["mean"].items()
    }
    said = any(warning.category.__name__ == "ConvergenceWarning" for warning in caught)
    wrong = {name: round(error, 2) for name, error in off.items() if not error < 0.25}
    assert said or not wrong, wrong
