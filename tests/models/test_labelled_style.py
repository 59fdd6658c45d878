"""An image from its label and a style, against sums and densities in closed form."""

from __future__ import annotations

import pyro
import pytest
import torch
from torch.nn import functional as F

from dcpc import DCPC
from dcpc.errors import DCPCError
from dcpc.models import LabelledStyle

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def model() -> LabelledStyle:
    torch.manual_seed(0)
    return LabelledStyle(1, [1, 2, 2], 3, hidden_size=5, likelihood="bernoulli").double()


def log_likelihood(model: LabelledStyle, x: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
    """Of one image by style `(S, 1)` and class, `(S, C)`."""
    with torch.no_grad():
        from_class = model.from_class(torch.eye(3))
        logits = model.pixels(torch.relu(model.from_style(style)[:, None] + from_class))
    losses = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
    return -losses.sum(-1)


def test_the_posterior_of_label_and_style_is_that_of_a_fine_grid(model):
    with torch.no_grad():  # classes and styles that the pixels tell apart
        model.from_class.weight.mul_(3.0)
        model.pixels.weight.mul_(3.0)
    x = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]])
    label, seen = torch.tensor([0, 2]), torch.tensor([False, True])
    posterior = DCPC(model, num_particles=1000).run(
        x.reshape(2, 1, 2, 2), label, seen, num_sweeps=200, seed=0
    )
    grid = torch.linspace(-6, 6, 4001)[:, None]
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(grid)
    joint = prior + log_likelihood(model, x[0], grid)
    told = posterior.probabilities("label_unobserved")[0]
    torch.testing.assert_close(told, joint.logsumexp(0).softmax(0), atol=0.02, rtol=0)
    joint_seen = prior[:, 0] + log_likelihood(model, x[1], grid)[:, 2]
    mean = float((joint_seen.softmax(0) * grid[:, 0]).sum())
    assert abs(float(posterior.mean()["style"][1, 0]) - mean) < 0.05
    step = float(grid[1] - grid[0])
    evidence = (
        torch.stack([joint.flatten().logsumexp(0), joint_seen.logsumexp(0)])
        + torch.tensor(step / 3).log()
    )
    assert bool(((posterior.log_evidence - evidence).abs() < 0.05).all())


def test_another_label_changes_the_class_and_keeps_the_style(model):
    style = torch.randn(4, 1)
    images = {}
    for number in range(3):
        changed = pyro.do(model, data={"label": torch.full((4,), number)})
        told = pyro.condition(changed, data={"style": style})
        trace = pyro.poutine.trace(told).get_trace(num_images=4)
        images[number] = trace.nodes["x"]["fn"].base_dist.logits
    hidden = model.from_style(style)
    for number, logits in images.items():
        expected = model.pixels(torch.relu(hidden + model.from_class.weight[:, number]))
        torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"style_size": 0},
        {"num_classes": 1},
        {"hidden_size": 0},
        {"image_shape": []},
        {"likelihood": "normal"},
    ],
)
def test_impossible_sizes_are_refused(options):
    (name,) = options
    with pytest.raises(DCPCError, match=name):
        LabelledStyle(**{"style_size": 2, "image_shape": [1, 2, 2], **options})
