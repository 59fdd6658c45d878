"""An embedding of images and labels, against its densities in closed form."""

from __future__ import annotations

import pyro
import pytest
import torch
from torch.nn import functional as F

from dcpc import DCPC
from dcpc.errors import DCPCError
from dcpc.models import LabelledEmbedding

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("hidden_size", [0, 7])
def test_the_density_is_that_of_both_likelihoods(hidden_size):
    torch.manual_seed(0)
    model = LabelledEmbedding(3, [1, 2, 2], 4, hidden_size, hidden_size, "bernoulli").double()
    x = torch.randint(0, 2, (5, 1, 2, 2)).double()
    label = torch.tensor([0, 3, 1, 2, 0])
    seen = torch.tensor([True, False, True, True, False])
    problem = DCPC(model, num_particles=6).bind(x, label, seen)
    state = problem.init()
    assert list(state.latents) == ["z"]
    z = state.latents["z"]
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    pixels = -F.binary_cross_entropy_with_logits(
        model.pixels(z), x.flatten(1).expand(6, -1, -1), reduction="none"
    ).sum(-1)
    told = model.classes(z).log_softmax(-1)[:, torch.arange(5), label]
    expected = prior + pixels + torch.where(seen, told, 0.0)
    torch.testing.assert_close(problem.log_joint(state), expected)


def test_classes_are_read_off_a_view_with_noise():
    torch.manual_seed(0)
    model = LabelledEmbedding(3, [1, 2, 2], 4, 7, 7, "bernoulli", class_scale=0.3).double()
    x, label = torch.rand(5, 1, 2, 2), torch.tensor([0, 3, 1, 2, 0])
    problem = DCPC(model, num_particles=6).bind(x, label, torch.ones(5, dtype=torch.bool))
    state = problem.init()
    z, noise = state.latents["z"], state.latents["noise"]
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(torch.stack([z, noise])).sum((0, -1))
    expected = expected - F.binary_cross_entropy_with_logits(
        model.pixels(z), x.flatten(1).expand(6, -1, -1), reduction="none"
    ).sum(-1)
    told = model.classes(z + 0.3 * noise).log_softmax(-1)[:, torch.arange(5), label]
    torch.testing.assert_close(problem.log_joint(state), (expected + told).detach())
    # The encoder draws the noise from its prior.
    drawn = pyro.poutine.trace(model.encoder().double()).get_trace(x).nodes["noise"]
    assert torch.equal(drawn["fn"].base_dist.loc, torch.zeros(5, 3))
    assert bool((drawn["fn"].base_dist.scale == 1.0).all())


def test_it_draws_images_and_labels():
    model = LabelledEmbedding(3, [1, 2, 2], 4)
    trace = pyro.poutine.trace(model).get_trace(num_images=7)
    assert trace.nodes["x"]["value"].shape == (7, 4)
    assert trace.nodes["label"]["value"].shape == (7,)
    assert model.image_shape == (1, 2, 2)


def test_its_encoder_draws_the_embedding_whatever_is_known_of_the_label():
    torch.manual_seed(0)
    encoder = LabelledEmbedding(3, [1, 2, 2], 4).double().encoder().double()
    x = torch.rand(5, 1, 2, 2)
    traces = []
    for known in ((), (torch.zeros(5).long(), torch.zeros(5).bool())):
        pyro.set_rng_seed(0)
        traces.append(pyro.poutine.trace(encoder).get_trace(x, *known))
    z, with_label = (trace.nodes["z"]["value"] for trace in traces)
    assert z.shape == (5, 3)
    assert torch.equal(z, with_label)
    h = torch.relu(x.flatten(1) @ encoder.layer.weight.T + encoder.layer.bias)
    loc = h @ encoder.head.loc.weight.T + encoder.head.loc.bias
    torch.testing.assert_close(traces[0].nodes["z"]["fn"].base_dist.loc, loc)


@pytest.mark.parametrize(
    "options",
    [
        {"latent_size": 0},
        {"num_classes": 1},
        {"hidden_size": -1},
        {"image_shape": []},
        {"likelihood": "normal"},
        {"class_scale": -0.1},
    ],
)
def test_impossible_sizes_are_refused(options):
    (name,) = options
    with pytest.raises(DCPCError, match=name):
        LabelledEmbedding(**{"latent_size": 2, "image_shape": [1, 2, 2], **options})
