"""Forecasts: infer from the first frames of sequences, and score the last ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dcpc.divide.model import Model
from dcpc.errors import OptionError
from dcpc.evaluation.images.completion import complete
from dcpc.evaluation.intensities import IntensityRange, to_unit

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
    visible = torch.ones(x.shape[1:], dtype=torch.bool)
    visible[-num_predicted:] = False
    completed = complete(model, x, visible, intensity_range=intensity_range, **options)
    last, hidden = (
        to_unit(frames, intensity_range)
        for frames in (x[:, -num_predicted - 1].unsqueeze(1), x[:, -num_predicted:])
    )
    return Forecast(
        mse=completed.hidden_mse,
        repeated_frame_mse=(hidden - last).square().flatten(1).mean(1),
        frames=completed.completions,
        num_predicted=num_predicted,
    )
