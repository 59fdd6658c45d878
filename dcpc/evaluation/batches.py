"""Helpers of measurements over many data: batches, and gradients where they are switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dcpc.errors import OptionError, require_at_least
from dcpc.observed import Data, main_tensor, mapped, split

__all__ = ["BATCH_SIZE", "batches", "gradients_allowed"]

BATCH_SIZE = 250
"""Data that are measured at once: memory grows with it, and speed hardly does beyond it."""


@contextmanager
def gradients_allowed() -> Iterator[None]:
    """Scores need gradients, which the inference mode of a Lightning trainer forbids."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def batches(x: Data, batch_size: int) -> list[Data]:
    """Splits data into copies of its batches, which may be differentiated through.

    Raises:
        OptionError: An impossible batch size, or no data.
    """
    require_at_least("batch_size", batch_size, 1)
    shape = tuple(main_tensor(x).shape)
    if not shape or not shape[0]:
        raise OptionError(f"x must hold at least one datum, got shape {shape}")
    with gradients_allowed():
        return [mapped(torch.clone, part) for part in split(x, batch_size)]
