"""Weights of a network in a file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dcpc.errors import DCPCError
from dcpc.tensor_files import describe_misfit, read_tensors

__all__ = ["WeightsError", "load_weights", "save_weights"]


class WeightsError(DCPCError):
    """A file that holds no weights, or those of another architecture."""


def save_weights(network: nn.Module, path: str | Path) -> None:
    """Saves parameters and buffers, without the values of nodes, under their names."""
    target = Path(path)
    unfinished = target.with_name(f"{target.name}.tmp")
    torch.save(network.state_dict(), unfinished)
    unfinished.rename(target)


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Restores what `save_weights` wrote, bit for bit; changes nothing if it does not fit.

    Raises:
        WeightsError: There is no such file, it is broken, or its names or shapes are others.
    """
    try:
        saved = read_tensors(path)
    except FileNotFoundError as error:
        raise WeightsError(str(error)) from error
    if not saved:
        raise WeightsError(f"'{path}' holds no weights, or is truncated")
    misfit = describe_misfit(saved, network)
    if misfit is not None:
        raise WeightsError(f"'{path}' holds the weights of another network: {misfit}")
    network.load_state_dict(saved)
