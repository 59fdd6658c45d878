"""An image from its label and a style: an ordinary Pyro program."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcpc.errors import OptionError, require_at_least
from dcpc.models.pixels import Likelihood, check_likelihood, pixels

__all__ = ["LabelledStyle"]


class LabelledStyle(nn.Module):
    """A class and a style, independent of each other, that generate an image together.

        label ~ Categorical(1 / C, ..., 1 / C)
        style ~ N(0, I)
        x     ~ ContinuousBernoulli(logits = f(style, label))

    `f` has one hidden layer of rectified units. Labels that are not seen are discrete latents,
    drawn from their conditionals. The class is a cause of the image, so that
    `pyro.do(model, {"label": ...})` asks for an image as another class. The generative model M2 of
    Kingma, Rezende, Mohamed & Welling (2014), "Semi-supervised learning with deep generative
    models".

    Args:
        style_size: Size of the style.
        image_shape: Shape of one image, for example `[1, 8, 8]`.
        num_classes: C, number of classes.
        hidden_size: Width of the hidden layer.
        likelihood: `continuous_bernoulli`, a density on intensities in [0, 1], or `bernoulli`,
            whose log-probability of an intensity is a cross-entropy and no density.

    Raises:
        OptionError: A size out of range, or an unknown likelihood.
    """

    def __init__(
        self,
        style_size: int,
        image_shape: Sequence[int],
        num_classes: int = 10,
        hidden_size: int = 256,
        likelihood: Likelihood = "continuous_bernoulli",
    ) -> None:
        super().__init__()
        require_at_least("style_size", style_size, 1)
        require_at_least("num_classes", num_classes, 2)
        require_at_least("hidden_size", hidden_size, 1)
        if not image_shape or min(image_shape) < 1:
            raise OptionError(f"image_shape must hold positive sizes, got {list(image_shape)}")
        check_likelihood(likelihood)
        self.style_size = style_size
        self.num_classes = num_classes
        self.image_shape = tuple(image_shape)
        self.likelihood = likelihood
        self.from_style = nn.Linear(style_size, hidden_size)
        self.from_class = nn.Linear(num_classes, hidden_size, bias=False)
        self.pixels = nn.Linear(hidden_size, math.prod(image_shape))

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
        pyro.module("labelled_style", self)
        num_images = num_images if x is None else len(x)
        with pyro.plate("images", num_images):
            loc = next(self.parameters()).new_zeros(num_images, self.style_size)
            style = pyro.sample("style", dist.Normal(loc, 1.0).to_event(1))
            uniform = dist.Categorical(logits=loc.new_zeros(self.num_classes))
            label = pyro.sample("label", uniform, obs=label, obs_mask=seen)  # type: ignore[arg-type]
            known = F.one_hot(label, self.num_classes).to(loc)
            hidden = torch.relu(self.from_style(style) + self.from_class(known))
            logits = self.pixels(hidden)
            observed = None if x is None else x.flatten(1)
            return pyro.sample("x", pixels(logits, self.likelihood), obs=observed)
