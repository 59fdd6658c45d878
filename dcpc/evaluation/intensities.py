"""Intensities of pixels, and how far a reconstruction is from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dcpc.errors import OptionError

__all__ = ["IntensityRange", "cross_entropy", "to_unit"]

IntensityRange = tuple[float, float]
"""The intensities of black and of white."""


def to_unit(values: Tensor, intensity_range: IntensityRange) -> Tensor:
    """Scales intensities so that black is 0 and white is 1; nothing is clamped.

    Raises:
        OptionError: Black is not below white.
    """
    black, white = intensity_range
    if not -math.inf < black < white < math.inf:
        raise OptionError(
            "intensity_range must be (black, white) with black < white, for example (0.0, 1.0) or "
            f"(-1.0, 1.0), got {intensity_range}"
        )
    if (black, white) == (0.0, 1.0):
        return values
    return (values - black) / (white - black)


def cross_entropy(x: Tensor, mean: Tensor) -> Tensor:
    """`-x log m - (1 - x) log(1 - m)` in nats, pixel by pixel.

    `m` is the mean, clamped to [eps, 1 - eps] with the rounding unit of its type, so that the
    result is finite for every mean.

    Args:
        x: Intensities in [0, 1].
        mean: Predicted mean, of the same shape.
    """
    eps = torch.finfo(mean.dtype).eps
    mean = mean.clamp(eps, 1 - eps)
    return -(x * mean.log() + (1 - x) * torch.log1p(-mean))
