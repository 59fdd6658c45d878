"""Checkpoints, checked before they are used: readable, and of this model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from dcpc.errors import DCPCError
from dcpc.io import describe_misfit, read_tensors

__all__ = ["CheckpointError", "read_checkpoint"]


class CheckpointError(DCPCError):
    """A checkpoint cannot be read, or belongs to another model."""


def read_checkpoint(path: str | Path, module: nn.Module | None = None) -> dict[str, Any]:
    """Reads a checkpoint without running pickled code; particles stay on disk until used.

    Args:
        path: Path of a checkpoint of `dcpc fit`.
        module: The parameters in the checkpoint must fit it, if it is given.

    Raises:
        CheckpointError: There is no such file, it is truncated or no checkpoint, or a parameter is
            missing or has another shape than in the module.
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
    misfit = None if module is None else describe_misfit(checkpoint["state_dict"], module)
    if misfit is not None:
        raise CheckpointError(
            f"--ckpt_path: '{path}' is a checkpoint of another model: {misfit}; give the --config "
            "and the options that it was trained with"
        )
    return checkpoint
