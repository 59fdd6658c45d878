"""Forecasts: infer from the first frames of sequences, and score the last ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from dcpc.divide.handlers import Until, is_random, running
from dcpc.divide.model import Model
from dcpc.errors import OptionError
from dcpc.evaluation.batches import BATCH_SIZE, batches, gradients_allowed
from dcpc.evaluation.evidence.held_out import held_out_inference
from dcpc.evaluation.generation.samples import decode, sites_of_frames
from dcpc.evaluation.images.completion import complete
from dcpc.evaluation.intensities import IntensityRange, to_unit
from dcpc.seeding import derived_seed, seeded

__all__ = ["Forecast", "forecast"]


@dataclass(frozen=True)
class Forecast:
    """Last frames of sequences, predicted from the first ones.

    Attributes:
        mse: Mean over the predicted frames' pixels of `(x_i - m_i)^2`, with `m` the posterior mean
            given the first frames alone, both scaled to [0, 1], `(N,)`.
        repeated_frame_mse: The same of the last frame seen, repeated: what to beat.
        frames: The first frames as they are and the last ones as predicted, `(N, T, *shape)`, in
            the data's own intensities.
        num_predicted: Number of predicted frames.
    """

    mse: Tensor
    repeated_frame_mse: Tensor
    frames: Tensor
    num_predicted: int


def forecast(
    model: Model,
    x: Tensor,
    num_predicted: int,
    *,
    intensity_range: IntensityRange = (0.0, 1.0),
    **options: Any,
) -> Forecast:
    """Infers latents by annealing on the first frames, and predicts the last ones.

    Where every frame is a site of its own, the program is run as far as the last frame that is
    seen; latents of later frames follow at their conditional means. Where one site holds all
    frames, the log-likelihood of those that are not seen is left out, by `complete`.

    Args:
        model: A Pyro program of `x`, unmodified; its likelihood factors over the pixels.
        x: Sequences, `(N, T, *shape)`.
        num_predicted: Number of last frames that the model does not see.
        intensity_range: The data's intensities of black and of white.
        **options: Further ones of `complete`.

    Raises:
        ModelError: The likelihood does not factor over the pixels.
        DataError: No observed sites of the model are `x`.
        OptionError: Sequences without so many frames and one more.
    """
    num_frames = x.shape[1] if x.dim() > 2 else 0
    if not 1 <= num_predicted < num_frames:
        raise OptionError(
            "the number of frames to predict must be at least 1 and leave one of each sequence "
            f"(N, T, ...) to infer from, got {num_predicted} for data of shape {tuple(x.shape)}"
        )
    num_seen = num_frames - num_predicted
    seen = torch.cat([x[:, :num_seen], torch.full_like(x[:, num_seen:], intensity_range[0])], 1)
    sites = _sites_of_frames(model, seen)
    if sites:
        frames = _rolled_on(model, seen, sites[:num_seen], **options)
    else:
        visible = torch.ones(x.shape[1:], dtype=torch.bool)
        visible[num_seen:] = False
        completed = complete(model, seen, visible, intensity_range=intensity_range, **options)
        frames = completed.completions
    last, hidden, predicted = (
        to_unit(part, intensity_range)
        for part in (x[:, num_seen - 1 : num_seen], x[:, num_seen:], frames[:, num_seen:])
    )
    return Forecast(
        mse=(hidden - predicted).square().flatten(1).mean(1),
        repeated_frame_mse=(hidden - last).square().flatten(1).mean(1),
        frames=torch.cat([x[:, :num_seen], frames[:, num_seen:]], 1),
        num_predicted=num_predicted,
    )


def _sites_of_frames(model: Model, x: Tensor) -> list[str]:
    """Observed sites that are one frame each, in order; none where one site holds all."""
    with seeded(0), torch.no_grad(), running(model, (x,), {}):
        nodes: dict[str, Any] = pyro.poutine.trace(model).get_trace(x).nodes
    observed = {
        name: site["value"]
        for name, site in nodes.items()
        if is_random(site) and site["is_observed"]
    }
    if any(value.numel() == x.numel() for value in observed.values()):
        return []
    return sites_of_frames(observed, x)


def _rolled_on(
    model: Model,
    x: Tensor,
    sites: Sequence[str],
    *,
    num_particles: int = 16,
    num_temperatures: int = 400,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    particle_batch_size: int | None = None,
) -> Tensor:
    """Means of all frames, averaged over particles that have seen the frames of some sites."""
    inference = held_out_inference(
        Until(sites)(model), num_particles, particle_batch_size=particle_batch_size
    )
    means = []
    for number, part in enumerate(batches(x, batch_size)):
        with gradients_allowed():
            annealed = inference.anneal(
                part, num_temperatures=num_temperatures, seed=derived_seed(seed, number)
            )
        weights = annealed.state.log_weight.normalized()
        particles = [
            decode(
                model,
                {name: u[k].detach() for name, u in annealed.state.latents.items()},
                part,
                seed,
                at_means=True,
            ).means
            for k in range(num_particles)
        ]
        rows = torch.stack(particles)
        means.append((weights.reshape(*weights.shape, *[1] * (x.dim() - 1)) * rows).sum(0))
    return torch.cat(means)
