"""A deep latent Gaussian model of images: an ordinary Pyro program.

Sennesh, Wu & Salvatori (2024), section 5, after Rezende, Mohamed & Wierstra (2014).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from dcpc.distributions import SharedScaleNormal
from dcpc.models.encoders import MLPEncoder, TopDownEncoder
from dcpc.models.pixels import Likelihood, check_likelihood, pixels

__all__ = ["DeepLatentGaussian", "ScaleTril"]


class ScaleTril(nn.Module):
    """A learned lower-triangular scale `(size, size)`, the identity at first.

    The diagonal is a floor plus the exponential of a parameter, so that it stays positive and a
    gradient step changes it by a factor.
    """

    def __init__(self, size: int, floor: float = 0.0) -> None:
        super().__init__()
        self.floor = floor
        self.raw = nn.Parameter(math.log(1.0 - floor) * torch.eye(size))

    def forward(self) -> Tensor:
        return self.raw.tril(-1) + (self.floor + self.raw.diagonal().exp()).diag()


class DeepLatentGaussian(nn.Module):
    """Layers of Gaussian latents, each a linear map of the rectified layer above, then pixels.

        z_1     ~ N(0, I)
        z_{l+1} ~ N(W_l relu(z_l) + b_l, L_l L_l^T)
        x       ~ ContinuousBernoulli(logits = W relu(z_L) + b)

    With hidden layers a map is that of a network on `z_l` itself, with SiLU between its layers.

    Args:
        latent_sizes: Sizes of `z_1, ..., z_L`, top layer first.
        image_shape: Shape of one image, for example `[1, 8, 8]`.
        likelihood: `continuous_bernoulli`, a density on intensities in [0, 1], or `bernoulli`,
            whose log-probability of an intensity is a cross-entropy and no density.
        min_scale: Floor of the diagonals of the `L_l`. Point estimates of latents (`pc`, `ipc`)
            need one: residuals that vanish under scales that vanish have an unbounded density.
        hidden_sizes: Widths of hidden layers below each of `z_1, ..., z_L`, for example
            `[[], [400, 400]]` for two of them between `z_2` and the pixels; null for none.
    """

    def __init__(
        self,
        latent_sizes: Sequence[int],
        image_shape: Sequence[int],
        likelihood: Likelihood = "continuous_bernoulli",
        min_scale: float = 0.0,
        hidden_sizes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        if not latent_sizes or min(latent_sizes) < 1:
            raise ValueError(
                f"latent_sizes must hold at least one positive size, got {list(latent_sizes)}"
            )
        if not image_shape or min(image_shape) < 1:
            raise ValueError(f"image_shape must hold positive sizes, got {list(image_shape)}")
        check_likelihood(likelihood)
        if not 0.0 <= min_scale < 1.0:
            raise ValueError(f"min_scale must be at least 0 and below 1, got {min_scale}")
        hidden = [[] for _ in latent_sizes] if hidden_sizes is None else hidden_sizes
        if len(hidden) != len(latent_sizes) or any(size < 1 for own in hidden for size in own):
            raise ValueError(
                f"hidden_sizes must be null or a list of positive widths for each of the "
                f"{len(latent_sizes)} latents, top layer first, got {hidden_sizes}; [] is a linear "
                "map"
            )
        self.latent_sizes = tuple(latent_sizes)
        self.image_shape = tuple(image_shape)
        self.likelihood = likelihood
        sizes = (*latent_sizes, math.prod(image_shape))
        self.layers = nn.ModuleList(
            _network((above, *own, below)) if own else nn.Linear(above, below)
            for (above, below), own in zip(itertools.pairwise(sizes), hidden, strict=True)
        )
        self.scales = nn.ModuleList(ScaleTril(size, min_scale) for size in latent_sizes[1:])

    def forward(self, x: Tensor | None = None, num_images: int = 1) -> Tensor:
        """The Pyro program.

        Args:
            x: Observed images `(num_images, *image_shape)` in [0, 1]; None to draw them.
            num_images: Number of images to draw.

        Returns:
            The images as rows of pixels, `(num_images, pixels)`.
        """
        pyro.module("deep_latent_gaussian", self)
        num_images = num_images if x is None else len(x)
        with pyro.plate("images", num_images):
            loc = next(self.parameters()).new_zeros(num_images, self.latent_sizes[0])
            z = pyro.sample("z1", dist.Normal(loc, 1.0).to_event(1))
            for number in range(1, len(self.latent_sizes)):
                z = pyro.sample(f"z{number + 1}", self.prior(number, z))
            likelihood = pixels(self._below(len(self.scales), z), self.likelihood)
            return pyro.sample("x", likelihood, obs=None if x is None else x.flatten(1))

    def prior(self, number: int, above: Tensor) -> SharedScaleNormal:
        """Distribution of a latent given the one above it.

        Args:
            number: Of the latent, counted from zero; the first has none above it.
            above: `(num_images, size)`.
        """
        return SharedScaleNormal(self._below(number - 1, above), self.scales[number - 1]())

    def encoder(self, top_down: bool = False) -> MLPEncoder | TopDownEncoder:
        """A guide for this model, with its shapes.

        Args:
            top_down: Whether latents are drawn given those above them, by the model's own layers.
        """
        if top_down:
            return TopDownEncoder(self)
        return MLPEncoder(self.latent_sizes, self.image_shape)

    def _below(self, index: int, z: Tensor) -> Tensor:
        """The prediction for the layer below a latent."""
        layer = self.layers[index]
        return layer(torch.relu(z) if isinstance(layer, nn.Linear) else z)


def _network(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers with SiLU between them."""
    layers: list[nn.Module] = []
    for above, below in itertools.pairwise(sizes):
        layers += [nn.Linear(above, below), nn.SiLU()]
    return nn.Sequential(*layers[:-1])
