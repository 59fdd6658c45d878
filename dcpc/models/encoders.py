"""Encoders: amortised Pyro guides that draw all latents of a model from its images.

The same program is the guide of a variational autoencoder (`pyro.infer.SVI` with `Trace_ELBO`) and
the warm start of particles (`DCPC(model, guide)`). Every latent has a diagonal normal whose
location and scale are functions of the image: Kingma and Welling, "Auto-encoding variational
Bayes", ICLR 2014.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from dcpc.divide.supports.standardised import standardised

__all__ = [
    "ConvolutionalEncoder",
    "EmbeddingEncoder",
    "GaussianHead",
    "MLPEncoder",
    "TopDownEncoder",
]

MIN_SCALE = 1e-4
"""Floor of every scale: a latent that collapses onto a point has no usable density."""


class TopDown(Protocol):
    """A model of layers of latents, as `DeepLatentGaussian` is."""

    latent_sizes: tuple[int, ...]
    image_shape: tuple[int, ...]

    def prior(self, number: int, above: Tensor) -> dist.Distribution:
        """Distribution of a latent other than the first, given the one above it."""


class GaussianHead(nn.Module):
    """A diagonal normal from features: `(B, num_features)` to an event of `(size,)`.

    The scale is `softplus(raw) + MIN_SCALE`, one half at first.
    """

    def __init__(self, num_features: int, size: int) -> None:
        super().__init__()
        self.loc = nn.Linear(num_features, size)
        self.raw_scale = nn.Linear(num_features, size)
        nn.init.zeros_(self.raw_scale.weight)
        nn.init.constant_(self.raw_scale.bias, math.log(math.expm1(0.5)))

    def forward(self, features: Tensor) -> dist.Distribution:
        scale = nn.functional.softplus(self.raw_scale(features)) + MIN_SCALE
        return dist.Normal(self.loc(features), scale).to_event(1)


class _LayeredEncoder(nn.Module):
    """An encoder with a hidden layer for each latent, from the image up."""

    activation: Callable[[Tensor], Tensor]

    def __init__(
        self, latent_sizes: Sequence[int], image_shape: Sequence[int], hidden_size: int = 256
    ) -> None:
        super().__init__()
        _require_sizes("latent_sizes", latent_sizes)
        _require_sizes("image_shape", image_shape)
        _require_sizes("hidden_size", [hidden_size])
        self.latent_sizes = tuple(latent_sizes)
        self.image_shape = tuple(image_shape)
        widths = [math.prod(image_shape)] + [hidden_size] * (len(latent_sizes) - 1)
        self.layers = nn.ModuleList(nn.Linear(width, hidden_size) for width in widths)

    def features(self, x: Tensor) -> list[Tensor]:
        """Hidden layers `(B, hidden_size)`, the one next to the image first."""
        found = [x.flatten(1)]
        for layer in self.layers:
            found.append(self.activation(layer(found[-1])))
        return found[1:]


class MLPEncoder(_LayeredEncoder):
    """Draws `z1, ..., zL` of a `DeepLatentGaussian`, from the bottom up.

        h_L     = relu(V_L x + c_L)
        h_{l-1} = relu(V_{l-1} h_l + c_{l-1})
        z_l     ~ N(m_l(h_l), diag s_l(h_l)^2),   all independent given x

    Args:
        latent_sizes: Sizes of `z_1, ..., z_L`, top layer first, as the model has them.
        image_shape: Shape of one image, for example `[1, 28, 28]`.
        hidden_size: Width of every hidden layer.
    """

    activation = staticmethod(torch.relu)

    def __init__(
        self, latent_sizes: Sequence[int], image_shape: Sequence[int], hidden_size: int = 256
    ) -> None:
        super().__init__(latent_sizes, image_shape, hidden_size)
        self.heads = nn.ModuleList(GaussianHead(hidden_size, size) for size in latent_sizes[::-1])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The Pyro program.

        Args:
            x: Images `(B, *image_shape)`.

        Returns:
            By name, `z1` to `zL`, each `(B, size)`.
        """
        pyro.module("encoder", self)
        hidden, latents = self.features(x), {}
        with pyro.plate("images", len(x)):
            for depth, (feature, head) in enumerate(zip(hidden, self.heads, strict=True)):
                name = f"z{len(self.latent_sizes) - depth}"
                latents[name] = pyro.sample(name, head(feature))
        return latents


class TopDownEncoder(_LayeredEncoder):
    """Draws `z1, ..., zL` of a `DeepLatentGaussian` from the top down, by their errors.

        h_L     = silu(V_L x + c_L)
        h_{l-1} = silu(V_{l-1} h_l + c_{l-1})
        e_l     ~ N(m_l(h_l, z_{l-1}), diag s_l(h_l, z_{l-1})^2)
        z_l     = loc_l(z_{l-1}) + L_l e_l

    with the model's own prediction `loc_l` and scale `L_l`: what the image says is what the layer
    above has not predicted; with a standard normal `e_l` the draw is that of the prior. The
    gradient of a bound reaches the model's parameters through `z` as well. Sonderby, Raiko, Maaloe,
    Sonderby & Winther, "Ladder variational autoencoders", NeurIPS 2016; Vahdat & Kautz, "NVAE",
    NeurIPS 2020.

    Args:
        model: The model, whose layers are used, and not learned where it is frozen.
        hidden_size: Width of every hidden layer.
    """

    activation = staticmethod(nn.functional.silu)

    def __init__(self, model: TopDown, hidden_size: int = 256) -> None:
        super().__init__(model.latent_sizes, model.image_shape, hidden_size)
        above = [0, *self.latent_sizes[:-1]]
        self.joints = nn.ModuleList(nn.Linear(hidden_size + size, hidden_size) for size in above)
        self.heads = nn.ModuleList(GaussianHead(hidden_size, size) for size in self.latent_sizes)
        self._model = (model,)  # not a part of this module: its parameters are its own

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The Pyro program.

        Args:
            x: Images `(B, *image_shape)`.

        Returns:
            By name, `z1` to `zL`, each `(B, size)`.
        """
        pyro.module("encoder", self)
        features, latents = self.features(x)[::-1], dict[str, Tensor]()
        with pyro.plate("images", len(x)):
            above = x.new_zeros(len(x), 0)
            for number, (feature, joint) in enumerate(zip(features, self.joints, strict=True)):
                hidden = self.activation(joint(torch.cat([feature, above], -1)))
                error, name = self.heads[number](hidden), f"z{number + 1}"
                if number:
                    prior = standardised(self._model[0].prior(number, above))
                    assert prior is not None
                    error = dist.TransformedDistribution(error, prior.transform)
                above = latents[name] = pyro.sample(name, error)
        return latents


class ConvolutionalEncoder(nn.Module):
    """Draws the latent `z` of a convolutional generator.

    Convolutions of stride two halve the image down to at most 4 x 4 while the number of channels
    doubles, then one hidden layer; SiLU throughout, and no normalisation, so that every image is
    encoded by itself.

    Args:
        latent_size: Size of `z`.
        image_shape: `[channels, height, width]`.
        num_channels: Channels after the first convolution.
        hidden_size: Width of the hidden layer.
    """

    def __init__(
        self,
        latent_size: int,
        image_shape: Sequence[int],
        num_channels: int = 32,
        hidden_size: int = 256,
    ) -> None:
        super().__init__()
        _require_sizes("latent_size", [latent_size])
        _require_sizes("image_shape", image_shape)
        _require_sizes("num_channels", [num_channels])
        _require_sizes("hidden_size", [hidden_size])
        if len(image_shape) != 3:
            raise ValueError(
                f"image_shape must be [channels, height, width], got {list(image_shape)}"
            )
        self.latent_size = latent_size
        self.image_shape = tuple(image_shape)
        self.network = nn.Sequential(*_halvings(self.image_shape, num_channels, hidden_size))
        self.head = GaussianHead(hidden_size, latent_size)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The Pyro program.

        Args:
            x: Images `(B, *image_shape)`.

        Returns:
            `z`, `(B, latent_size)`, by its name.
        """
        pyro.module("encoder", self)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", self.head(self.network(x.reshape(-1, *self.image_shape))))
        return {"z": z}


class EmbeddingEncoder(nn.Module):
    """Draws the latent `z` of a `LabelledEmbedding` from an image, whatever is known of its label.

        h     = relu(V x + c)
        z     ~ N(m(h), diag s(h)^2)
        noise ~ N(0, I), its prior

    Args:
        latent_size: Size of `z`.
        image_shape: Shape of one image, for example `[1, 28, 28]`.
        hidden_size: Width of the hidden layer.
        class_scale: As the model has it; 0 where there is no `noise`.
    """

    def __init__(
        self,
        latent_size: int,
        image_shape: Sequence[int],
        hidden_size: int,
        class_scale: float = 0.0,
    ) -> None:
        super().__init__()
        _require_sizes("latent_size", [latent_size])
        _require_sizes("image_shape", image_shape)
        _require_sizes("hidden_size", [hidden_size])
        self.class_scale = class_scale
        self.layer = nn.Linear(math.prod(image_shape), hidden_size)
        self.head = GaussianHead(hidden_size, latent_size)

    def forward(
        self, x: Tensor, label: Tensor | None = None, seen: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The Pyro program.

        Args:
            x: Images `(B, *image_shape)`.
            label: As the model takes it; not used.
            seen: Likewise.

        Returns:
            `z`, `(B, latent_size)`, by its name.
        """
        pyro.module("encoder", self)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", self.head(torch.relu(self.layer(x.flatten(1)))))
            draw_view(z, self.class_scale)
        return {"z": z}


def draw_view(z: Tensor, scale: float) -> Tensor:
    """An embedding with noise of a standard deviation, the site `noise`; `z` itself without."""
    if not scale:
        return z
    noise = pyro.sample("noise", dist.Normal(torch.zeros_like(z), 1.0).to_event(1))
    return pyro.deterministic("view", z + scale * noise, event_dim=1)


def _halvings(image_shape: tuple[int, ...], num_channels: int, hidden: int) -> Iterable[nn.Module]:
    channels, height, width = image_shape
    while max(height, width) > 4:
        yield nn.Conv2d(channels, num_channels, kernel_size=3, stride=2, padding=1)
        yield nn.SiLU()
        channels, num_channels = num_channels, 2 * num_channels
        height, width = (height + 1) // 2, (width + 1) // 2
    yield nn.Flatten()
    yield nn.Linear(channels * height * width, hidden)
    yield nn.SiLU()


def _require_sizes(name: str, sizes: Sequence[int]) -> None:
    if not sizes or min(sizes) < 1:
        raise ValueError(f"{name} must hold at least one positive size, got {list(sizes)}")
