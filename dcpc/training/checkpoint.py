"""Checkpoints, checked before they are used: readable, and of this model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from dcpc.errors import DCPCError
from dcpc.tensor_files import describe_misfit, read_tensors

__all__ = ["CheckpointError", "check_checkpoint", "read_checkpoint"]


class CheckpointError(DCPCError):
    """A checkpoint cannot be read, or belongs to another model."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint without running pickled code; particles stay on disk until used.

    Raises:
        CheckpointError: There is no such file, or it is truncated or no checkpoint.
    """
    try:
        checkpoint = read_tensors(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"--ckpt_path: there is no checkpoint '{path}'; train first, with dcpc fit"
        ) from None
    if checkpoint is None or "state_dict" not in checkpoint:
        raise CheckpointError(
            f"--ckpt_path: '{path}' ({Path(path).stat().st_size:,} bytes) is truncated or is not a "
            "checkpoint of dcpc fit; use another one, or train again"
        )
    return checkpoint


def check_checkpoint(path: str | Path, module: nn.Module) -> None:
    """Checks that a checkpoint's parameters fit a module.

    Raises:
        CheckpointError: It cannot be read, or a parameter is missing or has another shape.
    """
    misfit = describe_misfit(read_checkpoint(path)["state_dict"], module)
    if misfit is not None:
        raise CheckpointError(
            f"--ckpt_path: '{path}' is a checkpoint of another model: {misfit}; give the --config "
            "and the options that it was trained with"
        )
