"""Checkpoints, checked before they are used: readable, and of this model."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcpc.errors import DCPCError

__all__ = ["CheckpointError", "check_checkpoint", "read_checkpoint"]


class CheckpointError(DCPCError):
    """A checkpoint cannot be read, or belongs to another model."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint without running pickled code; particles stay on disk until used.

    Raises:
        CheckpointError: There is no such file, or it is truncated or no checkpoint.
    """
    if not Path(path).is_file():
        raise CheckpointError(
            f"--ckpt_path: there is no checkpoint '{path}'; train first, with dcpc fit"
        )
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError):
        checkpoint = None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(
            f"--ckpt_path: '{path}' ({Path(path).stat().st_size:,} bytes) is truncated or is not a "
            "checkpoint of dcpc fit; use another one, or train again"
        ) from None
    return checkpoint


def check_checkpoint(path: str | Path, module: nn.Module) -> None:
    """Checks that a checkpoint's parameters fit a module.

    Raises:
        CheckpointError: It cannot be read, or a parameter is missing or has another shape.
    """
    saved = {name: tuple(v.shape) for name, v in read_checkpoint(path)["state_dict"].items()}
    wanted = {name: tuple(v.shape) for name, v in module.state_dict().items()}
    for name in sorted({*saved, *wanted}):
        if saved.get(name) != wanted.get(name):
            raise CheckpointError(
                f"--ckpt_path: '{path}' is a checkpoint of another model: parameter '{name}' has "
                f"shape {saved.get(name)} there and {wanted.get(name)} in this model; give the "
                "--config and the options that it was trained with"
            )
