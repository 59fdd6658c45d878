"""Checkpoints: written whole or not at all, and checked before they are used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import nn

from dcpc.errors import DCPCError, FileError
from dcpc.io import (
    check_entries,
    describe_misfit,
    not_finite,
    read_tensors,
    remove_stale,
    write_tensors,
)
from dcpc.training.contents import describe_change, manifest

__all__ = ["CheckpointError", "DurableFiles", "read_checkpoint"]


MANIFEST = "dcpc_manifest"
"""Entry that says what all others are."""


class CheckpointError(DCPCError):
    """A checkpoint cannot be read, is damaged, or belongs to another model or run."""


class DurableFiles(TorchCheckpointIO):
    """Checkpoints as files that are replaced in one step, after they have reached the disk.

    What was there stays until the new one is whole; a full disk is an error before anything is
    lost. Where a file is on another machine (`s3://...`), it is left to Lightning.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Writes a checkpoint.

        Raises:
            CheckpointError: A number in it is not finite; the file that was there stays.
            FileError: The disk is full, or the folder cannot be written to; likewise.
        """
        if _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        entry = not_finite(checkpoint)
        if entry is not None:
            raise CheckpointError(
                f"'{path}' was not written: its entry '{entry}' would hold numbers that are not "
                "finite; resume from the checkpoint before with a lower model.learning_rate or "
                "model.step_size"
            )
        remove_stale(Path(path).parent)
        write_tensors({**checkpoint, MANIFEST: manifest(checkpoint)}, path)

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Reads a checkpoint, or another file that Lightning has written by this class.

        Raises:
            CheckpointError: As `read_checkpoint`.
        """
        if _is_remote(path):
            return super().load_checkpoint(path, *arguments, **options)
        return _read(path)


def read_checkpoint(path: str | Path, module: nn.Module | None = None) -> dict[str, Any]:
    """Reads a checkpoint without running pickled code; particles stay on disk until used.

    Args:
        path: Path of a checkpoint of `dcpc fit`.
        module: The parameters in the checkpoint must fit it, if it is given.

    Raises:
        CheckpointError: There is no such file, it is truncated, damaged or no checkpoint, a number
            in it is not finite, or a parameter is missing or has another shape than in the module.
    """
    checkpoint = _read(path)
    if not isinstance(checkpoint.get("state_dict"), Mapping):
        raise _not_ours(path)
    misfit = None if module is None else describe_misfit(checkpoint["state_dict"], module)
    if misfit is not None:
        raise CheckpointError(
            f"--ckpt_path: '{path}' is a checkpoint of another model: {misfit}; give the --config "
            "and the options that it was trained with"
        )
    return checkpoint


def _read(path: str | Path) -> dict[str, Any]:
    """The content of a file that is whole, unchanged and finite."""
    try:
        checkpoint = read_tensors(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"--ckpt_path: there is no checkpoint '{path}'; train first, with dcpc fit"
        ) from None
    if not checkpoint:
        raise _not_ours(path)
    try:
        check_entries(path)
    except FileError as error:
        raise CheckpointError(f"--ckpt_path: {error}") from error
    written = checkpoint.pop(MANIFEST, {})  # early checkpoints have none
    changed = describe_change(checkpoint, written) if written != {} else None
    if changed is not None:
        raise CheckpointError(
            f"--ckpt_path: '{path}' was changed: {changed}; take another copy, or train again"
        )
    entry = not_finite(checkpoint)
    if entry is not None:
        raise CheckpointError(
            f"--ckpt_path: '{path}': its entry '{entry}' holds numbers that are not finite; use an "
            "earlier checkpoint"
        )
    return checkpoint


def _not_ours(path: str | Path) -> CheckpointError:
    return CheckpointError(
        f"--ckpt_path: '{path}' ({Path(path).stat().st_size:,} bytes) is truncated or is not a "
        "checkpoint of dcpc fit; use another one, or train again"
    )


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path)
