"""Weights of a network in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from dcpc.errors import DCPCError, FileError
from dcpc.io import check_entries, describe_misfit, not_finite, read_tensors, write_tensors

__all__ = ["WeightsError", "load_weights", "save_weights"]


class WeightsError(DCPCError):
    """A file that holds no weights, or those of another architecture."""


def save_weights(network: nn.Module, path: str | Path) -> None:
    """Saves parameters and buffers, without the values of nodes, under their names.

    Raises:
        FileError: The disk is full, or the folder cannot be written to; what was there stays.
    """
    write_tensors(network.state_dict(), path)


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Restores what `save_weights` wrote, bit for bit; changes nothing if it does not fit.

    A checkpoint of `dcpc fit` will do as well: then the weights are those of its network.

    Raises:
        WeightsError: There is no such file, it is broken, or its names or shapes are others.
    """
    try:
        saved = read_tensors(path)
    except FileNotFoundError as error:
        raise WeightsError(str(error)) from error
    if saved and "state_dict" in saved:
        saved = _of_network(saved["state_dict"])
    if not saved or not all(isinstance(value, Tensor) for value in saved.values()):
        raise WeightsError(f"'{path}' holds no weights, or is truncated")
    try:
        check_entries(path)
    except FileError as error:
        raise WeightsError(str(error)) from error
    entry = not_finite(saved)
    if entry is not None:
        raise WeightsError(f"'{path}': its weight '{entry}' holds numbers that are not finite")
    misfit = describe_misfit(saved, network.state_dict())
    if misfit is not None:
        raise WeightsError(f"'{path}' holds the weights of another network: {misfit}")
    network.load_state_dict(saved)


def _of_network(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A classifier's state without the name of its network."""
    prefix = "network."
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }
