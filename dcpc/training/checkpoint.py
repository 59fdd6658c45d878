"""Checkpoints: written whole or not at all, and checked before they are used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import nn

from dcpc.errors import DCPCError, FileError
from dcpc.evaluation.particles.particle_files import FORMAT as PARTICLES_FORMAT
from dcpc.io import (
    check_entries,
    describe_misfit,
    not_finite,
    read_tensors,
    remove_stale,
    write_tensors,
)
from dcpc.training.contents import describe_change, manifest

__all__ = [
    "CheckpointError",
    "DurableFiles",
    "check_parameters",
    "load_initial_weights",
    "read_checkpoint",
]


CKPT_PATH, INIT_FROM = "--ckpt_path", "--init_from"
"""Options that name a file."""

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
        entry = _not_finite(checkpoint)
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
        return _read(path, CKPT_PATH)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint without running pickled code; particles stay on disk until used.

    Args:
        path: Path of a checkpoint of `dcpc fit`.

    Raises:
        CheckpointError: There is no such file, it is truncated, damaged or no checkpoint, or a
            number in it is not finite.
    """
    checkpoint = _read(path, CKPT_PATH)
    if not isinstance(checkpoint.get("state_dict"), Mapping):
        raise _not_ours(path, CKPT_PATH)
    return checkpoint


def check_parameters(checkpoint: Mapping[str, Any], module: nn.Module, path: str | Path) -> None:
    """Checks that a checkpoint's parameters are those of a module.

    Raises:
        CheckpointError: A parameter is missing or has another shape.
    """
    misfit = describe_misfit(checkpoint["state_dict"], module.state_dict())
    if misfit is not None:
        raise CheckpointError(
            f"--ckpt_path: '{path}' is a checkpoint of another model: {misfit}; give the --config "
            "and the options that it was trained with"
        )


def load_initial_weights(path: str | Path, module: nn.Module) -> list[str]:
    """Gives a module the weights of a file, and nothing else that is in it.

    Args:
        path: A checkpoint of `dcpc fit`, or a small file of particles, as in `checkpoints/`.
        module: The module; a part of it that the file has not, such as a guide, stays as it is.

    Returns:
        The parts that were loaded, `model`, `guide` or `network`.

    Raises:
        CheckpointError: As `read_checkpoint`, or the file has none of the module's parts.
    """
    content = _read(path, INIT_FROM)
    saved = content.get("state_dict")
    if content.get("format") == PARTICLES_FORMAT:
        saved = {f"model.{name}": value for name, value in content["parameters"].items()}
    if not isinstance(saved, Mapping):
        raise _not_ours(path, INIT_FROM)
    own = module.state_dict()
    parts = [part for part in _parts(own) if part in _parts(saved)]
    if not parts:
        raise CheckpointError(
            f"{INIT_FROM}: '{path}' has weights of {_parts(saved)}, but {type(module).__name__} of "
            f"{_parts(own)}; choose a file of the same kind of model"
        )
    there, here = ({n: v for n, v in all_.items() if _part(n) in parts} for all_ in (saved, own))
    misfit = describe_misfit(there, here)
    if misfit is not None:
        raise CheckpointError(
            f"{INIT_FROM}: '{path}' has the weights of another model: {misfit}; give the model the "
            "arguments that it was trained with, or leave --init_from out"
        )
    module.load_state_dict(there, strict=False)
    return parts


def _parts(state: Mapping[str, Any]) -> list[str]:
    return sorted({_part(name) for name in state}, reverse=True)  # the model before its guide


def _part(name: str) -> str:
    return name.partition(".")[0]


def _read(path: str | Path, option: str) -> dict[str, Any]:
    """The content of a file that is whole, unchanged and finite."""
    try:
        checkpoint = read_tensors(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{option}: there is no checkpoint '{path}'; train first, with dcpc fit"
        ) from None
    if not checkpoint:
        raise _not_ours(path, option)
    try:
        check_entries(path)
    except FileError as error:
        raise CheckpointError(f"{option}: {error}") from error
    written = checkpoint.pop(MANIFEST, {})  # early checkpoints have none
    changed = describe_change(checkpoint, written) if written != {} else None
    if changed is not None:
        raise CheckpointError(
            f"{option}: '{path}' was changed: {changed}; take another copy, or train again"
        )
    entry = _not_finite(checkpoint)
    if entry is not None:
        raise CheckpointError(
            f"{option}: '{path}': its entry '{entry}' holds numbers that are not finite; use an "
            "earlier checkpoint"
        )
    return checkpoint


def _not_finite(checkpoint: Mapping[str, Any]) -> str | None:
    """As `not_finite`, of all but callbacks, whose best value before the first is an infinity."""
    return not_finite({name: entry for name, entry in checkpoint.items() if name != "callbacks"})


def _not_ours(path: str | Path, option: str) -> CheckpointError:
    return CheckpointError(
        f"{option}: '{path}' ({Path(path).stat().st_size:,} bytes) is truncated or is not a "
        "checkpoint of dcpc fit; use another one, or train again"
    )


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path)
