"""Files of tensors, read without running pickled code and compared with a module's parameters.

They are `torch.save`'s, as Lightning's checkpoints are: safetensors would be a second format, and
holds no nested dictionaries.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["describe_misfit", "read_tensors"]


def read_tensors(path: str | Path) -> dict[str, Any] | None:
    """The dictionary in a file of `torch.save`; its tensors stay on disk until used.

    Returns:
        An empty one where the file holds anything else; None where it is truncated, or no file of
        tensors.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file '{path}'")
    try:
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError):
        return None
    return content if isinstance(content, dict) else {}


def describe_misfit(parameters: Mapping[str, Tensor], module: nn.Module) -> str | None:
    """Says which parameter a module lacks, or has in another shape; None if all of them fit."""
    got = {name: tuple(value.shape) for name, value in parameters.items()}
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    for name in sorted({*got, *wanted}):
        if got.get(name) != wanted.get(name):
            return (
                f"parameter '{name}' has shape {got.get(name)} there and {wanted.get(name)} in "
                "this model"
            )
    return None
