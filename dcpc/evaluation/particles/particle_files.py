"""Files of particles: checkpoints of `dcpc fit`, and the small ones that are shipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcpc.errors import DCPCError, FileError, OptionError
from dcpc.io import check_entries, describe_misfit, not_finite, read_tensors, write_tensors

__all__ = ["FrozenParticlesError", "SavedParticles", "load_parameters", "read", "write"]

FORMAT = "dcpc-frozen-particles-1"
PREFIX = "model."
"""Of the model's parameters in a checkpoint of `dcpc fit`."""


class FrozenParticlesError(DCPCError):
    """A file of particles cannot be read, or its particles are those of another model."""


@dataclass(frozen=True)
class SavedParticles:
    """Content of such a file; the data come first, as they lie in the file.

    Attributes:
        parameters: Parameters of the model, by name.
        latents: Unconstrained values `(N, K, *event)` by site.
        log_weight: `(N, K)`.
        index: Which data these are, `(N,)`.
        originals: The data themselves, `(N, *shape)`, if they came along.
        labels: Their labels, `(N,)`, if they came along.
        noncentred: Sites whose unconstrained values are standardised errors.
    """

    parameters: Mapping[str, Tensor]
    latents: Mapping[str, Tensor]
    log_weight: Tensor
    index: Tensor
    originals: Tensor | None = None
    labels: Tensor | None = None
    noncentred: Sequence[str] = ()

    def take(self, index: Tensor | None, path: str | Path) -> SavedParticles:
        """Copies the particles of some data, or of all of them, out of the file.

        Raises:
            FrozenParticlesError: There are none of a datum that was asked for.
        """
        rows = torch.arange(len(self.index)) if index is None else self._rows(index, path)
        return replace(
            self,
            latents={name: u[rows] for name, u in self.latents.items()},
            log_weight=self.log_weight[rows],
            index=self.index[rows],
            originals=None if self.originals is None else self.originals[rows],
            labels=None if self.labels is None else self.labels[rows],
        )

    def _rows(self, index: Tensor, path: str | Path) -> Tensor:
        row_of = {datum: row for row, datum in enumerate(self.index.tolist())}
        absent = [datum for datum in index.tolist() if datum not in row_of]
        if absent:
            raise FrozenParticlesError(
                f"'{path}' holds no particles of the data {absent[:5]}; it holds those of "
                f"{len(row_of)} data with indices from {min(row_of)} to {max(row_of)}"
            )
        return torch.tensor([row_of[datum] for datum in index.tolist()], dtype=torch.long)


def read(path: str | Path) -> SavedParticles:
    """Reads either kind of file without running pickled code; particles stay on disk until used.

    Raises:
        FrozenParticlesError: There is no such file, or it is truncated, or holds no particles.
    """
    try:
        content = read_tensors(path)
    except FileNotFoundError as error:
        raise FrozenParticlesError(f"{error} to read particles from") from None
    if content is None:
        raise FrozenParticlesError(
            f"'{path}' ({Path(path).stat().st_size:,} bytes) is truncated, or is no file of tensors"
        )
    try:
        check_entries(path)
    except FileError as error:
        raise FrozenParticlesError(str(error)) from error
    entry = not_finite(content)
    if entry is not None:
        raise FrozenParticlesError(
            f"'{path}': its entry '{entry}' holds numbers that are not finite; use another file"
        )
    if content.get("format") == FORMAT:
        return SavedParticles(**{key: content[key] for key in content if key != "format"})
    return _of_checkpoint(content, path)


def write(saved: SavedParticles, path: str | Path, half_precision: bool) -> None:
    """Writes a small file of plain tensors; its folder is made.

    Args:
        half_precision: Whether latents are rounded to half precision, eleven binary digits: half
            the size. Parameters and weights never are.

    Raises:
        OptionError: A latent is too large for half precision.
        FileError: The disk is full, or the folder cannot be written to; what was there stays.
    """
    latents = {name: u.half() if half_precision else u for name, u in saved.latents.items()}
    large = [name for name, u in latents.items() if not bool(u.isfinite().all())]
    if large:
        raise OptionError(
            f"site(s) {large} hold values that are not finite or, in half precision, beyond 65504; "
            "save with half_precision=False"
        )
    content: dict[str, Any] = {
        "format": FORMAT,
        "parameters": _copies(saved.parameters),
        "latents": _copies(latents),
        "log_weight": _copy(saved.log_weight),
        "index": _copy(saved.index),
    }
    for key, value in (("originals", saved.originals), ("labels", saved.labels)):
        if value is not None:
            content[key] = _copy(value)
    if saved.noncentred:
        content["noncentred"] = list(saved.noncentred)
    write_tensors(content, path)


def load_parameters(model: nn.Module, parameters: Mapping[str, Tensor], path: str | Path) -> None:
    """Gives a model the parameters of a file.

    Raises:
        FrozenParticlesError: A parameter is missing or has another shape.
    """
    misfit = describe_misfit(parameters, model.state_dict())
    if misfit is not None:
        raise FrozenParticlesError(
            f"'{path}' belongs to another model: {misfit}; make the model with the arguments that "
            "it was trained with"
        )
    model.load_state_dict(dict(parameters))


def _of_checkpoint(content: Mapping[str, Any], path: str | Path) -> SavedParticles:
    particles = (content.get("dcpc") or {}).get("particles")
    if "state_dict" not in content or not particles:
        raise FrozenParticlesError(
            f"'{path}' holds no particles: it is neither a checkpoint of dcpc fit of an algorithm "
            "that keeps particles, nor a file of FrozenParticles.save"
        )
    if not bool(particles["visited"].any()):
        raise FrozenParticlesError(
            f"'{path}' holds no particles yet: the run had not swept any when it was saved; train "
            "for longer, or lower model.start.warm_up_epochs"
        )
    visited = particles["visited"]
    has_all_rows = len(particles["log_weight"]) == len(visited)  # or those of visited data only
    saved = SavedParticles(
        parameters={
            name.removeprefix(PREFIX): value
            for name, value in content["state_dict"].items()
            if name.startswith(PREFIX)
        },
        latents=particles["latents"],
        log_weight=particles["log_weight"],
        index=torch.arange(len(visited)) if has_all_rows else visited.nonzero().squeeze(1),
        noncentred=particles.get("noncentred", ()),
    )
    return saved.take(visited.nonzero().squeeze(1), path) if has_all_rows else saved


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _copy(tensor) for name, tensor in tensors.items()}


def _copy(tensor: Tensor) -> Tensor:
    """A copy of its own: a view would take all that it was cut from along into the file."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
