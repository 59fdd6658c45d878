"""Completion of images: infer from the visible pixels only, and score the hidden ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from dcpc.divide.handlers import is_random
from dcpc.divide.model import Model
from dcpc.errors import DataError, ModelError, OptionError
from dcpc.evaluation.batches import BATCH_SIZE, batches, gradients_allowed
from dcpc.evaluation.evidence.held_out import held_out_inference
from dcpc.evaluation.generation.samples import matching_site
from dcpc.evaluation.intensities import IntensityRange, cross_entropy, to_unit
from dcpc.seeding import derived_seed

__all__ = ["Completion", "MaskedModel", "bottom_half", "complete"]


@dataclass(frozen=True)
class Completion:
    """Images completed from their visible pixels.

    Attributes:
        hidden_cross_entropy: `- sum_i x_i log m_i + (1 - x_i) log(1 - m_i)` over the hidden pixels
            `i`, with `m` the reconstruction, both scaled to [0, 1], `(N,)`. A score of one
            prediction; the pixels' joint predictive density is another quantity.
        hidden_mse: Mean over the hidden pixels of `(x_i - m_i)^2`, both scaled to [0, 1], `(N,)`.
        ess_percent: Effective sample size of the particles' weights, in percent of K, `(N,)`.
        completions: The visible pixels as they are and the hidden ones as predicted,
            `(N, *shape)`, in the data's own intensities.
        reconstructions: The decoder's mean, averaged over particles that have seen the visible
            pixels only, `(N, *shape)`.
        visible: Which pixels were seen, `(N, *shape)`.
    """

    hidden_cross_entropy: Tensor
    hidden_mse: Tensor
    ess_percent: Tensor
    completions: Tensor
    reconstructions: Tensor
    visible: Tensor


class MaskedModel(nn.Module):
    """A model that sees some of the pixels only: a Pyro program of `(x, visible)`.

        log p(x_visible | z) = sum over visible i of log p(x_i | z)

    The log-likelihood of hidden pixels is left out, for which the likelihood must factor over the
    pixels given the latents.

    Args:
        model: A Pyro program of `x`, unmodified.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, visible: Tensor) -> Any:
        """Runs the model on the visible pixels.

        Args:
            x: Images, `(B, *shape)`.
            visible: Boolean, `(B, *shape)`.

        Raises:
            ModelError: The likelihood does not factor over the pixels.
            DataError: No observed site of the model is `x`.
        """
        with _MaskObserved(visible) as masked:
            result = self.model(x)
        if not masked.sites:
            raise DataError(
                f"no observed site of the model has as many elements as the data, "
                f"{tuple(x.shape)}, so there are no pixels to hide"
            )
        return result


def bottom_half(image_shape: Sequence[int]) -> Tensor:
    """The mask that shows the lower half of the rows, `(*image_shape)`, boolean.

    Args:
        image_shape: `[..., height, width]`; of an odd height the middle row is shown.
    """
    if len(image_shape) < 2 or min(image_shape) < 1:
        raise OptionError(
            f"image_shape must be [..., height, width], got {list(image_shape)}; flat images have "
            "no lower half"
        )
    visible = torch.zeros(*image_shape, dtype=torch.bool)
    visible[..., image_shape[-2] // 2 :, :] = True
    return visible


def complete(
    model: Model,
    x: Tensor,
    visible: Tensor,
    *,
    num_particles: int = 16,
    num_temperatures: int = 400,
    seed: int = 0,
    intensity_range: IntensityRange = (0.0, 1.0),
    batch_size: int = BATCH_SIZE,
    particle_batch_size: int | None = None,
) -> Completion:
    """Infers latents by annealing on the visible pixels, and predicts the hidden ones.

    Costs `2 num_temperatures` sweeps. The model is given black in place of the hidden pixels, so
    that nothing of them can leak. The global random state is left as it was.

    Args:
        model: A Pyro program of `x`, unmodified; its likelihood factors over the pixels.
        x: Images, `(N, *shape)`.
        visible: Boolean, `(*shape)` for all images, or `(N, *shape)`.
        num_particles: K.
        num_temperatures: Length of the annealing ladder.
        seed: Seed of the annealing.
        intensity_range: The data's intensities of black and of white.
        batch_size: Images completed at once.
        particle_batch_size: Particles of an image that the model is evaluated for at once; None for
            all of them.

    Raises:
        ModelError: The likelihood does not factor over the pixels.
        DataError: No observed site of the model is `x`.
        OptionError: A mask of another shape or type, or that hides nothing of an image.
    """
    visible = _checked_mask(visible, x)
    inference = held_out_inference(
        MaskedModel(model), num_particles, particle_batch_size=particle_batch_size
    )
    means, ess = [], []
    with gradients_allowed():
        shown = torch.where(visible, x, intensity_range[0])
        parts = zip(batches(shown, batch_size), batches(visible, batch_size), strict=True)
        for number, part in enumerate(parts):
            annealed = inference.anneal(
                *part, num_temperatures=num_temperatures, seed=derived_seed(seed, number)
            )
            predicted = inference.bind(*part).observation_means(annealed.state)
            means.append(matching_site(predicted, part[0]).detach())
            ess.append(annealed.state.log_weight.ess())
    mean, hidden = torch.cat(means), ~visible.flatten(1)
    pixels, prediction = (to_unit(v, intensity_range).flatten(1) for v in (x, mean))
    squares = (pixels - prediction).square()
    return Completion(
        hidden_cross_entropy=(cross_entropy(pixels, prediction) * hidden).sum(1),
        hidden_mse=(squares * hidden).sum(1) / hidden.sum(1),
        ess_percent=100.0 * torch.cat(ess) / num_particles,
        completions=torch.where(visible, x, mean),
        reconstructions=mean,
        visible=visible,
    )


class _MaskObserved(Messenger):
    """Masks the log-likelihood of the observed sites that hold the data, pixel by pixel."""

    def __init__(self, visible: Tensor) -> None:
        super().__init__()
        self.visible = visible
        self.sites: list[str] = []

    def _pyro_sample(self, msg: Any) -> None:
        value = msg["value"]
        if not msg["is_observed"] or not is_random(msg) or value.numel() != self.visible.numel():
            return
        fn, event_dim = msg["fn"], msg["fn"].event_dim
        while isinstance(fn, torch.distributions.Independent):
            fn = fn.base_dist
        if fn.event_dim > 0 or fn.batch_shape != value.shape:
            raise ModelError(
                f"site '{msg['name']}': completion hides single pixels, so the likelihood must "
                f"factor over them; got {type(fn).__name__} with batch shape "
                f"{tuple(fn.batch_shape)} and event shape {tuple(fn.event_shape)} for data of "
                f"shape {tuple(value.shape)}. Write it as a distribution of one pixel, with "
                ".to_event(n) over the pixels"
            )
        masked: dist.TorchDistribution = fn.mask(self.visible.reshape(value.shape))
        msg["fn"] = masked.to_event(event_dim)
        self.sites.append(msg["name"])


def _checked_mask(visible: Tensor, x: Tensor) -> Tensor:
    """The mask of every image, `(N, *shape)`."""
    if visible.dtype != torch.bool or visible.shape not in (x.shape, x.shape[1:]):
        raise OptionError(
            f"visible must be a boolean mask of shape {tuple(x.shape[1:])} or {tuple(x.shape)}, "
            f"got {visible.dtype} of shape {tuple(visible.shape)}"
        )
    visible = visible.to(x.device).expand(x.shape)
    whole = visible.flatten(1).all(1)
    if bool(whole.any()):
        raise OptionError(
            f"visible must hide at least one pixel of every image, but shows all of image "
            f"{int(whole.nonzero()[0])}; leave such images out"
        )
    return visible
