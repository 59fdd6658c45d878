"""Convolutional generators of images in [-1, 1]: ordinary Pyro programs.

`ConvolutionalGenerator` is that of Sennesh, Wu & Salvatori (2024), `PGDGenerator` that of Kuntz,
Lim & Johansen (2023). Both draw one Gaussian latent per image and decode it to the location of
every pixel.

Normalisation. `group` (Wu & He, 2018) and `none` leave the images independent given the parameters.
`batch`, which both papers used, normalises by the statistics of the batch at hand, for each
particle by itself, in training and in evaluation alike. It ties `log p(x_i | z)` to the latents of
the whole batch, so that the images of a batch are *one* inference problem: where an algorithm
accepts, weighs or resamples, it does so per batch and not per image, which in so many
dimensions moves little and leaves one particle. `pgd`, `mpgd`, `lpc`, `mcpc`, `pc` and `ipc`,
which do none of that, sweep as usual. (There are no running averages: a program under `torch.vmap`
cannot update them in place, and with them evaluation would be of another model.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from dcpc.distributions import DiscretizedNormal
from dcpc.models.encoders import ConvolutionalEncoder

__all__ = ["ConvolutionalGenerator", "LearnedScale", "PGDGenerator", "Residual"]

Likelihood = Literal["normal", "discretized_normal"]
Norm = Literal["group", "batch", "none"]

WIDTHS = (256, 64, 64, 32, 32)
"""Channels before each of the transposed convolutions of `ConvolutionalGenerator`."""

CHANNELS_PER_GROUP = 8

INITIAL_SCALE = 0.3
MIN_SCALE = 1e-2
"""Floor of the learned scale of the pixels, about one of their 256 levels."""

PGD_SCALE = 0.01


class LearnedScale(nn.Module):
    """One positive number, `floor + exp(raw)`."""

    def __init__(self, initial: float = INITIAL_SCALE, floor: float = MIN_SCALE) -> None:
        super().__init__()
        self.floor = floor
        self.raw = nn.Parameter(torch.tensor(math.log(initial - floor)))

    def forward(self) -> Tensor:
        return self.floor + self.raw.exp()


class ConvolutionalGenerator(nn.Module):
    """A Gaussian latent, decoded by transposed convolutions, with a learned noise of the pixels.

        z ~ N(0, I)
        x ~ Normal(f(z), scale)   or   DiscretizedNormal(f(z), scale)

    `f`: a linear map to 256 channels of one pixel, a transposed convolution to `H/16 x W/16`
    pixels, and four of kernel four that double the image; channels 256-64-64-32-32-C;
    normalisation and SiLU between them, tanh at the end.

    The scale is one number for all pixels, `INITIAL_SCALE` at first and always above `MIN_SCALE`:
    the density of pixels that are fitted exactly has no upper bound, and would pull it to zero.

    Args:
        latent_size: Size of `z`.
        image_shape: `[channels, height, width]`, with height and width multiples of 16.
        likelihood: `normal`, a density of pixels, or `discretized_normal`, a probability of their
            256 levels.
        norm: `group`, `batch` or `none`; see this module's docstring.
    """

    def __init__(
        self,
        latent_size: int = 40,
        image_shape: Sequence[int] = (3, 32, 32),
        likelihood: Likelihood = "normal",
        norm: Norm = "group",
    ) -> None:
        super().__init__()
        _check_sizes(latent_size, image_shape, multiple=16)
        _check_name("likelihood", likelihood, Likelihood)
        _check_name("norm", norm, Norm)
        self.latent_size = latent_size
        self.image_shape = tuple(image_shape)
        self.likelihood = likelihood
        self.network = nn.Sequential(*self._layers(norm))
        self.scale = LearnedScale()

    def forward(self, x: Tensor | None = None, num_images: int = 1) -> Tensor:
        """The Pyro program.

        Args:
            x: Observed images `(num_images, *image_shape)` in [-1, 1]; None to draw them.
            num_images: Number of images to draw.

        Returns:
            The images, `(num_images, *image_shape)`.
        """
        pyro.module("convolutional_generator", self)
        num_images = num_images if x is None else len(x)
        with pyro.plate("images", num_images):
            loc = self.decode(_latent(self, num_images))
            kind = dist.Normal if self.likelihood == "normal" else DiscretizedNormal
            return pyro.sample("x", kind(loc, self.scale()).to_event(3), obs=x)

    def decode(self, z: Tensor) -> Tensor:
        """The pixels' locations `(B, *image_shape)` of latents `(B, latent_size)`."""
        return self.network(z)

    def encoder(self) -> ConvolutionalEncoder:
        """A guide for this model, with its shapes."""
        return ConvolutionalEncoder(self.latent_size, self.image_shape)

    def _layers(self, norm: Norm) -> Iterator[nn.Module]:
        channels, height, width = self.image_shape
        yield nn.Linear(self.latent_size, WIDTHS[0])
        yield _normalise_features(norm, WIDTHS[0])
        yield nn.SiLU()
        yield nn.Unflatten(1, (WIDTHS[0], 1, 1))
        for index, (above, below) in enumerate(itertools.pairwise((*WIDTHS, channels))):
            if index == 0:
                yield nn.ConvTranspose2d(above, below, (height // 16, width // 16))
            else:
                yield nn.ConvTranspose2d(above, below, kernel_size=4, stride=2, padding=1)
            if index < len(WIDTHS) - 1:
                yield _normalise_channels(norm, below)
                yield nn.SiLU()
        yield nn.Tanh()


class PGDGenerator(nn.Module):
    """The generator of the particle gradient descent paper, with its fixed noise of the pixels.

        z ~ N(0, I),   x ~ N(f(z), PGD_SCALE^2)

    `f`: a linear map to four channels of half the image's size, a transposed convolution to
    `num_channels`, two residual blocks, and a transposed convolution that doubles the image;
    GELU, and tanh at the end. Kuntz, Lim & Johansen, "Particle algorithms for maximum likelihood
    training of latent variable models", AISTATS 2023, section 3.3 and the authors' code
    (github.com/juankuntz/ParEM, torch/parem/models.py), which has `norm="batch"`.

    Args:
        latent_size: Size of `z`.
        image_shape: `[channels, height, width]`, with even height and width.
        norm: `group`, `batch` or `none`; see this module's docstring.
        num_channels: Channels of the hidden layers.
    """

    def __init__(
        self,
        latent_size: int = 64,
        image_shape: Sequence[int] = (3, 32, 32),
        norm: Norm = "group",
        num_channels: int = 64,
    ) -> None:
        super().__init__()
        _check_sizes(latent_size, image_shape, multiple=2)
        _check_name("norm", norm, Norm)
        if num_channels < 1:
            raise ValueError(f"num_channels must be positive, got {num_channels}")
        self.latent_size = latent_size
        self.image_shape = tuple(image_shape)
        channels, height, width = image_shape
        half = (4, height // 2, width // 2)
        self.network = nn.Sequential(
            nn.Linear(latent_size, math.prod(half)),
            _normalise_features(norm, math.prod(half)),
            nn.GELU(),
            nn.Unflatten(1, half),
            nn.ConvTranspose2d(4, num_channels, kernel_size=5, padding=2, bias=False),
            _normalise_channels(norm, num_channels),
            nn.GELU(),
            Residual(num_channels, norm),
            Residual(num_channels, norm),
            nn.ConvTranspose2d(num_channels, channels, kernel_size=4, stride=2, padding=1),
            nn.Tanh(),
        )

    def forward(self, x: Tensor | None = None, num_images: int = 1) -> Tensor:
        """The Pyro program, with the arguments and the result of `ConvolutionalGenerator`."""
        pyro.module("pgd_generator", self)
        num_images = num_images if x is None else len(x)
        with pyro.plate("images", num_images):
            loc = self.decode(_latent(self, num_images))
            return pyro.sample("x", dist.Normal(loc, PGD_SCALE).to_event(3), obs=x)

    def decode(self, z: Tensor) -> Tensor:
        """The pixels' locations `(B, *image_shape)` of latents `(B, latent_size)`."""
        return self.network(z)

    def encoder(self) -> ConvolutionalEncoder:
        """A guide for this model, with its shapes."""
        return ConvolutionalEncoder(self.latent_size, self.image_shape)


class Residual(nn.Module):
    """Two normalised convolutions of kernels five and three, added to their input."""

    def __init__(self, num_channels: int, norm: Norm) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(num_channels, num_channels, kernel_size=5, padding=2),
            _normalise_channels(norm, num_channels),
            nn.GELU(),
            nn.Conv2d(num_channels, num_channels, kernel_size=3, padding=1),
            _normalise_channels(norm, num_channels),
            nn.GELU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.network(x)


def _normalise_features(norm: Norm, size: int) -> nn.Module:
    """Normalisation of `(B, size)`; `group` takes all of an image's features as one group."""
    if norm == "batch":
        return nn.BatchNorm1d(size, track_running_stats=False)
    return nn.GroupNorm(1, size) if norm == "group" else nn.Identity()


def _normalise_channels(norm: Norm, num_channels: int) -> nn.Module:
    """Normalisation of `(B, num_channels, height, width)`."""
    if norm == "batch":
        return nn.BatchNorm2d(num_channels, track_running_stats=False)
    num_groups = max(1, num_channels // CHANNELS_PER_GROUP)
    return nn.GroupNorm(num_groups, num_channels) if norm == "group" else nn.Identity()


def _latent(model: ConvolutionalGenerator | PGDGenerator, num_images: int) -> Tensor:
    loc = next(model.parameters()).new_zeros(num_images, model.latent_size)
    return pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


def _check_sizes(latent_size: int, image_shape: Sequence[int], multiple: int) -> None:
    if latent_size < 1:
        raise ValueError(f"latent_size must be positive, got {latent_size}")
    fits = len(image_shape) == 3 and min(image_shape) >= 1
    if not fits or any(size % multiple for size in image_shape[1:]):
        raise ValueError(
            "image_shape must be [channels, height, width] with height and width multiples of "
            f"{multiple}, got {list(image_shape)}; resize or pad the images"
        )


def _check_name(argument: str, got: str, choices: object) -> None:
    names = get_args(choices)
    if got not in names:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, names))}, got {got!r}")
