"""Seeing, doing and imagining on a small linear-Gaussian graph, against matrix algebra."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from torch import Tensor

from dcpc import DCPC, Posterior

pytestmark = pytest.mark.usefixtures("float64")

CHANCE = ("severity", "habit", "uptake", "luck")
DOSE = torch.tensor([0.8, 0.6, 0.0, 0.0], dtype=torch.float64)
REST = torch.tensor([-1.5, 0.0, 0.5, 0.4], dtype=torch.float64)
"""The outcome is 1.2 times the dose, plus this times the chance variables."""


def patient():
    severity, habit, uptake, luck = (pyro.sample(n, dist.Normal(0.0, 1.0)) for n in CHANCE)
    dose = pyro.deterministic("dose", 0.8 * severity + 0.6 * habit)
    level = pyro.deterministic("level", 1.2 * dose + 0.5 * uptake)
    outcome = pyro.deterministic("outcome", level - 1.5 * severity + 0.4 * luck)
    pyro.sample("dose_report", dist.Normal(dose, 0.1))
    pyro.sample("report", dist.Normal(outcome, 0.2))


def infer(model, **facts: float) -> Posterior:
    clamped = pyro.condition(model, data={name: torch.tensor(v) for name, v in facts.items()})
    engine = DCPC(clamped, num_particles=1000)
    return engine.run(num_sweeps=200, seed=0, progress=False)


def gaussian(rows: list[Tensor], noise: list[float], y: list[float]) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the chance variables given linear observations."""
    design, scale = torch.stack(rows), torch.tensor(noise).double()
    inverse = torch.linalg.inv(design @ design.mT + scale.square().diag())
    gain = design.mT @ inverse
    return gain @ torch.tensor(y).double(), torch.eye(4).double() - gain @ design


def treated(dose: float):
    return pyro.do(patient, data={"dose": torch.tensor(dose)})


def assert_is(posterior: Posterior, mean: Tensor, covariance: Tensor) -> None:
    for index, name in enumerate(CHANCE):
        about = posterior.statistics()[name]
        assert abs(float(about["mean"] - mean[index])) < 4.5 * float(about["mcse"])
        assert float(about["std"]) == pytest.approx(float(covariance[index, index].sqrt()), rel=0.1)


def test_seeing_a_dose_tells_of_what_led_to_it():
    assert_is(infer(patient, dose_report=1.5), *gaussian([DOSE], [0.1], [1.5]))


def test_seeing_an_outcome_tells_of_all_its_causes():
    found = infer(patient, report=-1.0)
    assert_is(found, *gaussian([1.2 * DOSE + REST], [0.2], [-1.0]))


def test_giving_a_dose_tells_nothing_of_severity_but_by_the_outcome():
    found = infer(treated(1.5), report=-1.0)
    exact = gaussian([REST], [0.2], [-1.0 - 1.2 * 1.5])
    assert_is(found, *exact)
    seen, _ = gaussian([DOSE, 1.2 * DOSE + REST], [1e-3, 0.2], [1.5, -1.0])
    assert abs(float(exact[0][0] - seen[0])) > 0.05  # the two differ


def test_another_dose_is_imagined_for_the_same_patient():
    posterior = infer(patient, dose_report=0.5, report=-1.0)
    mean, covariance = gaussian([DOSE, 1.2 * DOSE + REST], [0.1, 0.2], [0.5, -1.0])
    assert_is(posterior, mean, covariance)
    chance = {name: posterior.resample()[name] for name in CHANCE}
    outcome = Predictive(treated(1.5), chance)()["outcome"]
    sd = float((REST @ covariance @ REST).sqrt())
    assert float(outcome.mean()) == pytest.approx(float(1.8 + REST @ mean), abs=4.5 * sd / 30)
    assert float(outcome.std()) == pytest.approx(sd, rel=0.1)
