from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from dcpc.errors import OptionError
from dcpc.evaluation import decode, latent_traversal, prior_samples
from dcpc.models import DeepLatentGaussian


@pytest.fixture
def model() -> DeepLatentGaussian:
    return DeepLatentGaussian((2, 3), (1, 2, 2), "bernoulli")


def pixels_of(model: DeepLatentGaussian, z1: Tensor) -> Tensor:
    """The decoder's mean with z2 at its conditional mean, written out."""
    z2 = torch.relu(z1) @ model.layers[0].weight.T + model.layers[0].bias
    logits = torch.relu(z2) @ model.layers[1].weight.T + model.layers[1].bias
    return torch.sigmoid(logits).reshape(-1, 1, 2, 2).detach()


def test_the_decoder_is_given_the_latents_and_the_others_take_their_means(model) -> None:
    z1 = torch.randn(5, 2)
    decoded = decode(model, {"z1": z1}, torch.zeros(5, 1, 2, 2), seed=0, at_means=True)
    assert torch.allclose(decoded.means, pixels_of(model, z1), atol=1e-6)
    assert set(decoded.samples.unique().tolist()) <= {0.0, 1.0}


def test_latents_below_the_given_ones_are_drawn(shifted_gaussian: type, model) -> None:
    z = torch.full((4000, 3), 2.0)
    decoded = decode(shifted_gaussian(3), {"z": z}, torch.zeros(4000, 3), seed=1)
    assert torch.equal(decoded.means, z)
    assert torch.allclose(decoded.samples.mean(0), z[0], atol=4 / math.sqrt(4000))
    assert torch.allclose(decoded.samples.var(0), torch.ones(3), rtol=4 * math.sqrt(2 / 4000))
    spread = decode(model, {"z1": torch.zeros(9, 2)}, torch.zeros(9, 1, 2, 2), seed=1).means
    assert float(spread.std(0).min()) > 0


def test_latents_are_given_unconstrained() -> None:
    def positive(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            scale = pyro.sample("scale", dist.LogNormal(torch.zeros(len(x)), 1.0))
            loc = scale.unsqueeze(-1).expand(x.shape)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    means = decode(positive, {"scale": torch.tensor([0.0, 1.0])}, torch.zeros(2, 3), seed=0).means
    assert torch.allclose(means, torch.tensor([1.0, math.e]).unsqueeze(1).expand(2, 3))


def test_a_traversal_moves_one_coordinate(model) -> None:
    z1 = torch.randn(3, 2)
    result = latent_traversal(model, {"z1": z1}, "z1", 1, [-2.0, 3.0], torch.zeros(3, 1, 2, 2))
    assert result.shape == (3, 2, 1, 2, 2)
    for position, value in enumerate((-2.0, 3.0)):
        moved = torch.stack([z1[:, 0], torch.full((3,), value)], 1)
        assert torch.allclose(result[:, position], pixels_of(model, moved), atol=1e-6)


def test_the_same_seed_draws_the_same_and_the_global_state_stays(model) -> None:
    x, before = torch.zeros(4, 1, 2, 2), torch.get_rng_state()
    z1 = torch.zeros(4, 2)
    first, again, other = (decode(model, {"z1": z1}, x, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.means, again.means)
    assert not torch.equal(first.means, other.means)
    assert torch.equal(before, torch.get_rng_state())


def test_latents_that_the_model_does_not_have_are_refused(model) -> None:
    x = torch.zeros(4, 1, 2, 2)
    with pytest.raises(OptionError, match=r"no latent 'z9'.*'z1', 'z2'"):
        decode(model, {"z9": torch.zeros(4, 2)}, x, seed=0)
    with pytest.raises(OptionError, match=r"must have shape \(4, 2\) for 4 data, got \(4, 3\)"):
        decode(model, {"z1": torch.zeros(4, 3)}, x, seed=0)
    with pytest.raises(OptionError, match="dim must lie in"):
        latent_traversal(model, {"z1": torch.zeros(4, 2)}, "z1", 2, [0.0], x)
    with pytest.raises(OptionError, match="one of the given latents"):
        latent_traversal(model, {"z1": torch.zeros(4, 2)}, "z2", 0, [0.0], x)


def test_deterministic_values_within_a_plate_are_computed_and_not_drawn() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            centre = pyro.deterministic("centre", 3.0 * z)
            pyro.sample("x", dist.Normal(centre, 0.01), obs=x)

    given = torch.tensor([1.0, -2.0, 0.5])
    drawn = decode(model, {"z": given}, torch.zeros(3), seed=0)
    torch.testing.assert_close(drawn.means, 3 * given)
    assert prior_samples(model, torch.zeros(3), seed=0).samples.shape == (3,)
