"""Helpers of measurements over many data: batches, and gradients where they are switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dcpc.errors import OptionError, require_at_least

__all__ = ["BATCH_SIZE", "batches", "gradients_allowed"]

BATCH_SIZE = 250
"""Data that are measured at once: memory grows with it, and speed hardly does beyond it."""


@contextmanager
def gradients_allowed() -> Iterator[None]:
    """Scores need gradients, which the inference mode of a Lightning trainer forbids."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def batches(x: Tensor, batch_size: int) -> list[Tensor]:
    """Splits data into copies of its batches, which may be differentiated through.

    Raises:
        OptionError: An impossible batch size, or no data.
    """
    require_at_least("batch_size", batch_size, 1)
    if x.dim() == 0 or len(x) == 0:
        raise OptionError(f"x must hold at least one datum, got shape {tuple(x.shape)}")
    with gradients_allowed():
        return [part.clone() for part in x.split(batch_size)]
