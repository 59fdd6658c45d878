"""Predicted labels: their posterior, error and calibration."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from dcpc import DCPC
from dcpc.errors import DataError, ModelError
from dcpc.evaluation import calibration, class_probabilities

pytestmark = pytest.mark.usefixtures("float64")


def test_calibration_of_a_table_made_by_hand():
    """Two bins: four predictions of .75, three of them right; two of .95, one right."""
    rows = [[0.75, 0.25]] * 4 + [[0.05, 0.95]] * 2
    labels = torch.tensor([0, 0, 0, 1, 1, 0])
    told = calibration(torch.tensor(rows), labels, num_bins=10)
    torch.testing.assert_close(told.confidence, torch.tensor([0.75, 0.95]))
    torch.testing.assert_close(told.accuracy, torch.tensor([0.75, 0.5]))
    assert told.count.tolist() == [4, 2]
    assert told.error_rate == pytest.approx(2 / 6)
    assert told.expected_error == pytest.approx(2 / 6 * 0.45)
    log_loss = -(3 * math.log(0.75) + math.log(0.25) + math.log(0.95) + math.log(0.05)) / 6
    assert told.log_loss == pytest.approx(log_loss)


def test_probabilities_that_labels_are_drawn_from_are_calibrated():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(20_000, 4, generator=generator).mul(2).softmax(1)
    labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    assert calibration(probabilities, labels).expected_error < 0.02
    sharper = probabilities.square() / probabilities.square().sum(1, keepdim=True)
    assert calibration(sharper, labels).expected_error > 0.05


def test_certain_and_wrong_predictions_have_a_finite_loss():
    told = calibration(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert math.isfinite(told.log_loss)
    assert told.expected_error == 1.0


def test_a_label_that_is_no_class_is_refused():
    with pytest.raises(DataError, match=r"datum 1 has the label 2.*0 to 1"):
        calibration(torch.full((2, 2), 0.5), torch.tensor([0, 2]))


def class_first(x, label, seen):
    """The label is the parent of everything: drawn, not left out."""
    with pyro.plate("data", len(x)):
        shares = torch.tensor([0.2, 0.3, 0.5])
        label = pyro.sample("label", dist.Categorical(shares), obs=label, obs_mask=seen)
        pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(torch.tensor([-1.0, 0.0, 2.0])[label], 1.0), obs=x)


def test_the_posterior_of_a_label_is_bayes_rule():
    x = torch.tensor([-0.5, 1.0, 3.0])
    problem = DCPC(class_first, num_particles=200).bind(
        x, torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.bool)
    )
    joint = dist.Normal(torch.tensor([-1.0, 0.0, 2.0]), 1.0).log_prob(x[:, None])
    expected = (joint + torch.tensor([0.2, 0.3, 0.5]).log()).softmax(1)
    annealed = problem.anneal(20)
    found = class_probabilities(problem, annealed.state, "label", seed=0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0.0)


def test_a_site_that_is_no_discrete_latent_is_refused():
    seen = torch.zeros(2, dtype=torch.bool)
    problem = DCPC(class_first, num_particles=4).bind(torch.zeros(2), seen.long(), seen)
    with pytest.raises(ModelError, match=r"label_site='z'.*\['label_unobserved'\]"):
        class_probabilities(problem, problem.init(), "z", seed=0)
