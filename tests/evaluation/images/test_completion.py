"""x = W z + noise with correlated pixels: the hidden half given the visible one is Gaussian."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.poutine import trace
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional

from dcpc.errors import DataError, ModelError, OptionError
from dcpc.evaluation import MaskedModel, bottom_half, complete
from dcpc.models import ConvolutionalGenerator, DeepLatentGaussian

NOISE = 0.5


class FactorAnalysis(nn.Module):
    """z ~ N(0, I) of size 2, x ~ N(W z, NOISE^2 I) of shape 1 x 2 x 2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            mean = (z @ self.weight.T).reshape(x.shape)
            pyro.sample("x", dist.Normal(mean, NOISE).to_event(3), obs=x)


def conditional_mean(weight: Tensor, x: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """E[W z | x_visible] and its variances, by conditioning the joint Gaussian of pixels."""
    covariance = weight @ weight.T
    seen = visible.flatten().nonzero().squeeze(1)
    within = covariance[seen][:, seen] + NOISE**2 * torch.eye(len(seen))
    gain = covariance[:, seen] @ torch.linalg.inv(within)
    return x.flatten(1)[:, seen] @ gain.T, (covariance - gain @ covariance[seen]).diagonal()


def test_completions_are_the_gaussian_conditional_of_the_hidden_half() -> None:
    model, visible = FactorAnalysis(), bottom_half([1, 2, 2])
    x = torch.rand(50, 1, 2, 2)
    result = complete(model, x, visible, num_particles=64, num_temperatures=20, batch_size=30)
    expected, variance = conditional_mean(model.weight.detach(), x, visible)
    error = result.reconstructions.flatten(1) - expected
    # Of the 64 particles' mean; weights and moves that are correlated leave fewer to count.
    assert bool((error.square().mean(0) < 3 * variance / 64).all())
    assert bool((error.mean(0).abs() < 5 * (3 * variance / 64 / 50).sqrt()).all())
    assert torch.equal(result.completions[:, :, 1], x[:, :, 1])
    assert torch.equal(result.completions[:, :, 0], result.reconstructions[:, :, 0])
    assert bool((result.ess_percent <= 100.01).all())


def test_errors_are_those_of_the_hidden_pixels_only() -> None:
    x = 2 * torch.rand(3, 1, 2, 2) - 1
    result = complete(
        FactorAnalysis(),
        x,
        bottom_half([1, 2, 2]),
        num_particles=4,
        num_temperatures=2,
        intensity_range=(-1.0, 1.0),
    )
    pixels, mean = ((v[:, 0, 0] + 1) / 2 for v in (x, result.reconstructions))
    eps = torch.finfo(torch.float32).eps
    entropy = functional.binary_cross_entropy(mean.clamp(eps, 1 - eps), pixels, reduction="none")
    assert torch.allclose(result.hidden_mse, (pixels - mean).square().mean(1))
    assert torch.allclose(result.hidden_cross_entropy, entropy.sum(1), rtol=1e-4)


class Brightness(FactorAnalysis):
    """Pixels around the images' own brightness, which the model reads off its data."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            mean = (z @ self.weight.T + x.flatten(1).mean(1, keepdim=True)).reshape(x.shape)
            pyro.sample("x", dist.Normal(mean, NOISE).to_event(3), obs=x)


@pytest.mark.parametrize("kind", [FactorAnalysis, Brightness])
def test_hidden_pixels_change_nothing(kind: type[FactorAnalysis]) -> None:
    model, visible = kind(), bottom_half([1, 2, 2])
    x = torch.rand(4, 1, 2, 2)
    other = torch.where(visible, x, torch.rand(4, 1, 2, 2))
    one, two = (
        complete(model, v, visible, num_particles=4, num_temperatures=3) for v in (x, other)
    )
    assert torch.equal(one.reconstructions, two.reconstructions)


def test_every_image_may_have_a_mask_of_its_own() -> None:
    model, x = FactorAnalysis(), torch.rand(2, 1, 2, 2)
    visible = torch.zeros(2, 1, 2, 2, dtype=torch.bool)
    visible[1] = bottom_half([1, 2, 2])
    result = complete(model, x, visible, num_particles=256, num_temperatures=20)
    weight = model.weight.detach()
    for image in range(2):
        mean, variance = conditional_mean(weight, x[image : image + 1], visible[image])
        error = result.reconstructions[image].flatten() - mean[0]
        assert bool((error.abs() < 5 * (3 * variance / 256).sqrt()).all())


def test_a_masked_model_has_the_log_likelihood_of_the_visible_pixels() -> None:
    model, x = FactorAnalysis(), torch.rand(3, 1, 2, 2)
    visible = bottom_half([1, 2, 2]).expand(3, 1, 2, 2)
    run = trace(MaskedModel(model)).get_trace(x, visible)
    run.compute_log_prob()
    mean = run.nodes["z"]["value"] @ model.weight.T
    expected = Normal(mean, NOISE).log_prob(x.flatten(1))[:, 2:].sum(1)
    assert torch.allclose(run.nodes["x"]["log_prob"], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "shape", "intensity_range"),
    [
        (lambda: DeepLatentGaussian((2, 3), (1, 4, 4), "bernoulli"), (1, 4, 4), (0.0, 1.0)),
        (lambda: DeepLatentGaussian((2, 3), (1, 4, 4)), (1, 4, 4), (0.0, 1.0)),
        (
            lambda: ConvolutionalGenerator(2, (1, 16, 16), "discretized_normal"),
            (1, 16, 16),
            (-1.0, 1.0),
        ),
    ],
    ids=["bernoulli", "continuous bernoulli", "discretised normal"],
)
def test_the_experiments_models_complete_images(model, shape, intensity_range) -> None:
    levels = torch.randint(0, 256, (3, *shape)) / 255
    black, white = intensity_range
    x = black + (white - black) * levels
    result = complete(
        model(),
        x,
        bottom_half(shape),
        num_particles=2,
        num_temperatures=2,
        intensity_range=intensity_range,
    )
    assert bool(result.hidden_cross_entropy.isfinite().all())
    assert bool((result.hidden_mse > 0).all())


def test_a_likelihood_of_dependent_pixels_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 4), 1.0).to_event(1))
            pyro.sample("x", dist.MultivariateNormal(z, torch.eye(4)), obs=x)

    with pytest.raises(ModelError, match=r"site 'x'.*factor.*MultivariateNormal"):
        complete(model, torch.rand(2, 4), torch.tensor([True, False, True, True]))


def test_masks_that_fit_no_image_are_refused() -> None:
    model, x = FactorAnalysis(), torch.rand(2, 1, 2, 2)
    with pytest.raises(OptionError, match="boolean mask of shape"):
        complete(model, x, torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(OptionError, match="boolean mask of shape"):
        complete(model, x, torch.zeros(1, 2, 2))
    with pytest.raises(
        OptionError, match="hide at least one pixel of every image, but shows all of image 0"
    ):
        complete(model, x, torch.ones(1, 2, 2, dtype=torch.bool))
    with pytest.raises(OptionError, match="height, width"):
        bottom_half([4])


def test_a_model_that_does_not_observe_the_images_has_no_pixels_to_hide(
    shifted_gaussian: type,
) -> None:
    model = shifted_gaussian(2)
    with pytest.raises(DataError, match="no pixels to hide"):
        complete(lambda x: model(x[:, :2]), torch.rand(3, 4), torch.arange(4) > 1)
    assert math.prod(bottom_half([3, 5, 2]).shape) == 30
    assert int(bottom_half([1, 5, 2]).sum()) == 6
