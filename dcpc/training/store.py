"""Every training datum's particles, in memory-mapped files.

A datum is visited once per epoch; between two visits its particles rest here. They are addressed
by the datum's index in the training set, so that any batching and any shuffling will do.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcpc.errors import DCPCError
from dcpc.recombine import LogWeights
from dcpc.sweep import SweepState

__all__ = ["ParticleStore", "StoreError"]

Entry = tuple[str, str]
"""A latent, and what is kept of it: its value (the empty name), or an entry of a move's memory."""


class StoreError(DCPCError):
    """The particle store cannot be created, or holds particles of something else."""


class ParticleStore:
    """Particles of `num_data` data: latents, weights, and the log-joint that the weights refer to.

    The files are made at the first write, when shapes are known, in a fresh folder below `folder`
    that disappears with the store or when it is closed; what outlives a run is the checkpoint,
    which holds `state_dict()`. Pages that nobody has touched take neither memory nor disk space.

    Args:
        folder: Where the store's own folder is made; created if missing.
        num_data: Number of data, N.

    Raises:
        StoreError: `folder` cannot be written.
    """

    def __init__(self, folder: str | Path, num_data: int) -> None:
        self.num_data = num_data
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix="particles-", dir=folder))
        except OSError as error:
            raise StoreError(
                f"the particle store cannot write to the folder '{folder}': {error.strerror}; "
                "choose another one with trainer.default_root_dir or model.store_folder"
            ) from error
        self._remove = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._values: dict[Entry, Tensor] = {}
        self._log_weight = self._log_joint = torch.empty(0)
        self._visited = torch.zeros(num_data, dtype=torch.bool)
        self._fits_model = False

    def read(
        self, index: Tensor, draw: Callable[[], SweepState], axes: Mapping[str, int]
    ) -> SweepState:
        """The particles of a batch: the stored ones, and fresh ones where there are none yet.

        Args:
            index: Indices of the data in the training set, `(B,)`.
            draw: Draws particles `(K, *batch, *event)` to start unvisited data from; not called
                where there are none.
            axes: By latent, the axis of its value that runs over the data.

        Raises:
            StoreError: The index is outside the data, or the store holds other shapes.
        """
        device, index = index.device, self._check_index(index)
        visited = self._visited[index]
        if not bool(visited.any()):
            return draw()
        stored = _state(
            {
                (name, kind): _rows(value, index, axes.get(name, 1)).to(device)
                for (name, kind), value in self._values.items()
            },
            log_weight=_rows(self._log_weight, index, 1).to(device),
            log_joint=_rows(self._log_joint, index, 1).to(device),
        )
        if self._fits_model and bool(visited.all()):
            return stored
        fresh = draw()
        self._check(fresh, axes)
        return _merge(visited, stored, fresh, axes)

    def write(self, index: Tensor, state: SweepState, axes: Mapping[str, int]) -> None:
        """Stores the particles of a batch, with weights of mean one, so that nothing drifts.

        Args:
            index: Indices of the data in the training set, `(B,)`.
            state: Their particles.
            axes: By latent, the axis of its value that runs over the data.

        Raises:
            StoreError: As `read`; or the disk is too small.
        """
        index = self._check_index(index)
        if self._log_weight.numel() == 0:
            self._create(state, axes)
        self._check(state, axes)
        for entry, value in _values(state).items():
            stored = self._values[entry]
            stored[index] = value.detach().movedim(axes[entry[0]], 0).to(stored)
        log_weight = state.log_weight.log_weight.detach()
        normalised = torch.log_softmax(log_weight, 0) + math.log(len(log_weight))
        self._log_weight[index] = normalised.T.to(self._log_weight)
        self._log_joint[index] = state.log_joint.detach().T.to(self._log_joint)
        self._visited[index] = True

    def visited(self, index: Tensor) -> Tensor:
        """Data of a batch that have particles, boolean `(B,)`."""
        return self._visited[self._check_index(index)]

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, for a checkpoint; latents `(N, K, ...)`, weights `(N, K)`.

        What the move keeps of the particles is below `memory`, by its name and by latent.
        """
        latents, memory = _sorted(self._values)
        return {
            "latents": latents,
            "memory": memory,
            "log_weight": self._log_weight,
            "log_joint": self._log_joint,
            "visited": self._visited,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Fills the store from a checkpoint's `state_dict()`.

        Raises:
            StoreError: The checkpoint's training set has another size.
        """
        if len(saved["visited"]) != self.num_data:
            raise StoreError(
                f"the checkpoint has particles of {len(saved['visited'])} data, but the training "
                f"set has {self.num_data}; resume with the data settings of the first run"
            )
        self._visited = saved["visited"].clone()
        self._fits_model = False
        if saved["log_weight"].numel() == 0:
            return
        particles = SweepState(
            saved["latents"],
            LogWeights(saved["log_weight"]),
            saved["log_joint"],
            memory=saved.get("memory", {}),
        )
        self._values = {entry: self._fill(value) for entry, value in _values(particles).items()}
        self._log_weight = self._fill(saved["log_weight"])
        self._log_joint = self._fill(saved["log_joint"])

    def close(self) -> None:
        """Removes the files; the particles stay readable while the store lives."""
        self._remove()

    def _create(self, state: SweepState, axes: Mapping[str, int]) -> None:
        values = _values(state)
        rows = {entry: value.movedim(axes[entry[0]], 0)[0] for entry, value in values.items()}
        joint = state.log_joint.T[0]
        needed = self.num_data * sum(row.nbytes for row in (*rows.values(), joint, joint))
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise StoreError(
                f"the particles of {self.num_data} data need {needed / 1e6:,.0f} MB, but the disk "
                f"of '{self.folder}' has {free / 1e6:,.0f} MB left; lower model.num_particles or "
                "choose another model.store_folder"
            )
        self._values = {
            entry: self._map((self.num_data, *row.shape), row.dtype) for entry, row in rows.items()
        }
        self._log_weight = self._map((self.num_data, *joint.shape), joint.dtype)
        self._log_joint = self._map((self.num_data, *joint.shape), joint.dtype)

    def _map(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros that lives in a file."""
        # Site names may hold characters that file names may not.
        path = self.folder / f"{len(list(self.folder.iterdir()))}.bin"
        size = torch.Size(shape).numel()
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype).reshape(shape)

    def _fill(self, values: Tensor) -> Tensor:
        mapped = self._map(tuple(values.shape), values.dtype)
        mapped.copy_(values)
        return mapped

    def _check_index(self, index: Tensor) -> Tensor:
        index = index.cpu()
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.num_data:
            raise StoreError(
                f"the batch has datum indices {int(index.min())} to {int(index.max())}, but the "
                f"store holds {self.num_data} data; a batch is (x, label, index), with the index "
                "counted from 0 in the training set"
            )
        return index

    def _check(self, state: SweepState, axes: Mapping[str, int]) -> None:
        values = _values(state)
        for entry in {**self._values, **values}:
            name, kind = entry
            stored = tuple(self._values[entry].shape[1:]) if entry in self._values else None
            got = None
            if entry in values:
                got = tuple(values[entry].movedim(axes[name], 0).shape[1:])
            if stored != got:
                what = f"site '{name}', {kind}" if kind else f"site '{name}'"
                raise StoreError(
                    f"{what}: the store has particles of shape {stored} per datum, but the "
                    f"model asks for {got} (particles first); these are particles of another "
                    "model, of another model.num_particles or another model.move. Resume with the "
                    "settings of the first run, or start afresh without --ckpt_path"
                )
        self._fits_model = True


def _rows(stored: Tensor, index: Tensor, axis: int) -> Tensor:
    """Rows `(B, ...)` of the store, with the data moved to `axis`."""
    # A captured program takes the layout that it was captured with.
    return stored[index].movedim(0, axis).contiguous()


def _merge(
    visited: Tensor, stored: SweepState, fresh: SweepState, axes: Mapping[str, int]
) -> SweepState:
    """The stored particles of the visited data, and fresh ones of the others."""

    def choose(old: Tensor, new: Tensor, axis: int) -> Tensor:
        shape = [1] * new.dim()
        shape[axis] = len(visited)
        return torch.where(visited.to(new.device).reshape(shape), old, new)

    old = _values(stored)
    values = {
        entry: choose(old[entry], new, axes[entry[0]]) for entry, new in _values(fresh).items()
    }
    weights = choose(stored.log_weight.log_weight, fresh.log_weight.log_weight, 1)
    return _state(values, weights, choose(stored.log_joint, fresh.log_joint, 1))


def _values(state: SweepState) -> dict[Entry, Tensor]:
    """The latents of a state, and what the move keeps of them."""
    values = {(name, ""): u for name, u in state.latents.items()}
    for kind, by_latent in state.memory.items():
        values |= {(name, kind): value for name, value in by_latent.items()}
    return values


def _state(values: Mapping[Entry, Tensor], log_weight: Tensor, log_joint: Tensor) -> SweepState:
    """The state that `_values` takes apart."""
    latents, memory = _sorted(values)
    return SweepState(latents, LogWeights(log_weight), log_joint, memory=memory)


def _sorted(
    values: Mapping[Entry, Tensor],
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Latents by name, and what the move keeps of them, by its name and by latent."""
    latents: dict[str, Tensor] = {}
    memory: dict[str, dict[str, Tensor]] = {}
    for (name, kind), value in values.items():
        (memory.setdefault(kind, {}) if kind else latents)[name] = value
    return latents, memory
