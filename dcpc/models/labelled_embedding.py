"""An embedding with two likelihoods, of an image and of its label: an ordinary Pyro program."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from dcpc.errors import OptionError, require_at_least
from dcpc.models.encoders import EmbeddingEncoder, draw_view
from dcpc.models.pixels import Likelihood, check_likelihood, pixels

__all__ = ["LabelledEmbedding"]


class LabelledEmbedding(nn.Module):
    """An embedding that generates an image and, where it has one, its label.

        z     ~ N(0, I)
        noise ~ N(0, I),  view = z + class_scale * noise
        label ~ Categorical(logits = g(view))
        x     ~ ContinuousBernoulli(logits = f(z))

    `f` and `g` have one hidden layer of rectified units each. Few labels are learned by heart; the
    noise of the view keeps `g` smooth. Labels that are not seen are discrete latents; nothing
    depends on them, so that inference leaves them out, and an image without a label shapes the
    embedding all the same.

    Args:
        latent_size: Size of `z`.
        image_shape: Shape of one image, for example `[1, 8, 8]`.
        num_classes: Number of classes.
        hidden_size: Width of `f`'s hidden layer; 0 for a linear map.
        class_hidden_size: Width of `g`'s, likewise.
        likelihood: `continuous_bernoulli`, a density on intensities in [0, 1], or `bernoulli`,
            whose log-probability of an intensity is a cross-entropy and no density.
        class_scale: Standard deviation of the noise with which classes are read off the embedding;
            0 for none, without the sites `noise` and `view`.

    Raises:
        OptionError: A size out of range, or an unknown likelihood.
    """

    def __init__(
        self,
        latent_size: int,
        image_shape: Sequence[int],
        num_classes: int = 10,
        hidden_size: int = 256,
        class_hidden_size: int = 64,
        likelihood: Likelihood = "continuous_bernoulli",
        class_scale: float = 0.0,
    ) -> None:
        super().__init__()
        require_at_least("latent_size", latent_size, 1)
        require_at_least("num_classes", num_classes, 2)
        require_at_least("hidden_size", hidden_size, 0)
        require_at_least("class_hidden_size", class_hidden_size, 0)
        if not 0.0 <= class_scale < math.inf:
            raise OptionError(f"class_scale must be at least 0, got {class_scale}")
        if not image_shape or min(image_shape) < 1:
            raise OptionError(f"image_shape must hold positive sizes, got {list(image_shape)}")
        check_likelihood(likelihood)
        self.latent_size = latent_size
        self.image_shape = tuple(image_shape)
        self.hidden_size = hidden_size
        self.class_scale = class_scale
        self.likelihood = likelihood
        self.pixels = _network(latent_size, hidden_size, math.prod(image_shape))
        self.classes = _network(latent_size, class_hidden_size, num_classes)

    def forward(
        self,
        x: Tensor | None = None,
        label: Tensor | None = None,
        seen: Tensor | None = None,
        num_images: int = 1,
    ) -> Tensor:
        """The Pyro program.

        Args:
            x: Observed images `(num_images, *image_shape)` in [0, 1]; None to draw them.
            label: Their labels, `(num_images,)`; None to draw them.
            seen: Which labels are observed, boolean `(num_images,)`; None for all that are given.
            num_images: Number of images to draw.

        Returns:
            The images as rows of pixels, `(num_images, pixels)`.
        """
        pyro.module("labelled_embedding", self)
        num_images = num_images if x is None else len(x)
        with pyro.plate("images", num_images):
            loc = next(self.parameters()).new_zeros(num_images, self.latent_size)
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            view = draw_view(z, self.class_scale)
            classes = dist.Categorical(logits=self.classes(view))
            pyro.sample("label", classes, obs=label, obs_mask=seen)  # type: ignore[arg-type]
            observed = None if x is None else x.flatten(1)
            return pyro.sample("x", pixels(self.pixels(z), self.likelihood), obs=observed)

    def encoder(self) -> EmbeddingEncoder:
        """A guide for this model, with its shapes; one hidden layer, as wide as that of `f`."""
        width = self.hidden_size or self.latent_size
        return EmbeddingEncoder(self.latent_size, self.image_shape, width, self.class_scale)


def _network(num_inputs: int, hidden_size: int, num_outputs: int) -> nn.Module:
    if not hidden_size:
        return nn.Linear(num_inputs, num_outputs)
    return nn.Sequential(
        nn.Linear(num_inputs, hidden_size), nn.ReLU(), nn.Linear(hidden_size, num_outputs)
    )
