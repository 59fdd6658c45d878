"""The comparison on few labels: its autoencoder against quadrature, and its table."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from experiments import half_labelled


@pytest.fixture
def model(float64) -> half_labelled.Autoencoder:
    torch.manual_seed(0)
    return half_labelled.Autoencoder(4, 6, 1, "bernoulli").double().requires_grad_(False)


def log_evidence(model, x, label):
    """`log p(x, label)` by quadrature over the style, which is a number."""
    grid = torch.linspace(-8, 8, 2001)[:, None]
    known = F.one_hot(label, half_labelled.NUM_CLASSES).to(x)
    logits = model.pixels(torch.cat([grid, known.expand(len(grid), -1)], -1))
    pixels = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
    joint = pixels.sum(-1) + torch.distributions.Normal(0.0, 1.0).log_prob(grid[:, 0])
    return joint.logsumexp(0) + math.log(16 / 2000) - math.log(half_labelled.NUM_CLASSES)


def test_the_bound_is_below_the_evidence_by_the_divergence_of_its_guide(model):
    x, label = torch.tensor([[1.0, 0.0, 1.0, 1.0]]), torch.tensor([3])
    draws = torch.cat([model.bound(x, label) for _ in range(4000)])
    exact = log_evidence(model, x[0], label[0])
    known = F.one_hot(label, half_labelled.NUM_CLASSES).to(x)
    loc, raw = model.style(torch.cat([x, known], -1)).chunk(2, -1)
    guide = torch.distributions.Normal(loc[0, 0], F.softplus(raw[0, 0]) + 1e-4)
    style = guide.sample((4000,))
    logits = model.pixels(torch.cat([style[:, None], known.expand(4000, -1)], -1))
    pixels = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(style)
    gap = guide.log_prob(style) - (pixels.sum(-1) + prior - math.log(10) - exact)
    error = math.hypot(float(draws.std()), float(gap.std())) / math.sqrt(4000)
    assert float(draws.mean()) == pytest.approx(float(exact - gap.mean()), abs=4.5 * error)
    assert float(draws.mean()) < float(exact)


def test_labels_that_are_not_seen_are_summed_out(model):
    """With a certain encoder, the loss is the bound of the label that it is certain of."""
    model.label[-1].weight.zero_()
    model.label[-1].bias.copy_(torch.tensor([0.0, 80.0] + [0.0] * 8))
    x, label = torch.ones(2000, 4), torch.ones(2000, dtype=torch.long)
    unseen = torch.zeros(2000, dtype=torch.bool)
    summed, known = model.loss(x, label, unseen, 0.0), -model.bound(x, label).mean()
    error = float(model.bound(x, label).std()) / math.sqrt(1000)
    assert float(summed) == pytest.approx(float(known), abs=4.5 * error)


def test_the_table_has_a_row_for_every_seed(capsys):
    half_labelled.main(
        [
            "--only",
            "classifier",
            "autoencoder",
            "--seeds",
            "2",
            "--classifier-epochs",
            "60",
            "--autoencoder-epochs",
            "1",
        ]
    )
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line][2:]
    assert [row[1].strip() for row in rows] == ["classifier"] * 2 + ["autoencoder"] * 2
    assert all(float(row[3]) < 15 for row in rows[:2])  # 90 % are wrong by chance
