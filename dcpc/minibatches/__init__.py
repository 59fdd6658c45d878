"""Runs over minibatches, for models whose plate subsamples beside global latents."""

from dcpc.minibatches.length import LOCAL_SWEEPS, Length
from dcpc.minibatches.run import run_over
from dcpc.minibatches.source import (
    Drawn,
    Loaded,
    Minibatch,
    Source,
    Subsampled,
    drawn_subsamples,
)

__all__ = [
    "LOCAL_SWEEPS",
    "Drawn",
    "Length",
    "Loaded",
    "Minibatch",
    "Source",
    "Subsampled",
    "drawn_subsamples",
    "run_over",
]
