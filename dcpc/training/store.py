"""Every training datum's particles, in memory-mapped files.

A datum is visited once per epoch; between two visits its particles rest here. They are addressed
by the datum's index in the training set, so that any batching and any shuffling will do.
"""

from __future__ import annotations

import math
import shutil
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dcpc.errors import DCPCError
from dcpc.io import allocate, own_folder
from dcpc.recombine import LogWeights
from dcpc.sweep import SweepState

__all__ = ["ParticleStore", "StoreError"]

PREFIX = "particles-"
"""Of the names of stores' own folders."""

CHUNK = 4096
"""Data that are copied at once."""

Entry = tuple[str, str]
"""A latent, and what is kept of it: its value (the empty name), or an entry of a move's memory."""


class StoreError(DCPCError):
    """The particle store cannot be created, or holds particles of something else."""


class ParticleStore:
    """Particles of `num_data` data: latents, weights, and the log-joint that the weights refer to.

    The files are made when shapes are known, by `reserve` or at the first write, and take their
    space on the disk at once. What outlives a run is the checkpoint, which holds `state_dict()`.

    Processes on one machine may share a store: each reads and writes its own data.

    Args:
        folder: Where the store's own folder is made; created if missing. What killed processes have
            left there is removed.
        num_data: Number of data, N.
        shared: The own folder of another process's store, to be shared with it.
        checkpoints: Where checkpoints go, which need as much space again; None for `folder`.

    Attributes:
        folder: The store's own folder. It disappears with the store that made it, or when that is
            closed.

    Raises:
        StoreError: `folder` cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        num_data: int,
        shared: str | Path | None = None,
        checkpoints: str | Path | None = None,
    ) -> None:
        self.num_data = num_data
        self.checkpoints = Path(folder if checkpoints is None else checkpoints)
        self._own: weakref.finalize | None = None
        if shared is None:
            try:
                self.folder, lock = own_folder(folder, PREFIX)
            except OSError as error:
                raise StoreError(
                    f"the particle store cannot write to the folder '{folder}': {error.strerror}; "
                    "choose another one with trainer.default_root_dir or model.store_folder"
                ) from error
            self._own = weakref.finalize(self, _remove, self.folder, lock)
        else:
            self.folder = Path(shared)
        self._values: dict[Entry, Tensor] = {}
        self._log_weight = self._log_joint = torch.empty(0)
        self._visited = self._map("visited", (num_data,), torch.bool)
        self._fits_model = False

    def reserve(self, state: SweepState, axes: Mapping[str, int]) -> None:
        """Makes the files for particles such as these, unless they are there.

        Args:
            state: Particles of some data.
            axes: By latent, the axis of its value that runs over the data.

        Raises:
            StoreError: The disk is too small for the particles, or for a checkpoint of them.
        """
        if self._log_weight.numel() == 0:
            self._create(state, axes)

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

        Of a datum with numbers that are not finite, the particles stay as they were.

        Args:
            index: Indices of the data in the training set, `(B,)`.
            state: Their particles.
            axes: By latent, the axis of its value that runs over the data.

        Raises:
            StoreError: As `read`; or the disk is too small.
        """
        index = self._check_index(index)
        self.reserve(state, axes)
        self._check(state, axes)
        if not _is_finite(state):
            usable = _usable(state, axes)
            state, index = _select(state, usable, axes), index[usable]
        for entry, value in _values(state).items():
            stored = self._values[entry]
            stored[index] = value.detach().movedim(axes[entry[0]], 0).to(stored)
        log_weight = state.log_weight.log_weight.detach()
        normalised = torch.log_softmax(log_weight, 0) + math.log(len(log_weight))
        self._log_weight[index] = normalised.T.to(self._log_weight)
        self._log_joint[index] = state.log_joint.detach().T.to(self._log_joint)
        self._visited[index] = True

    def mark(self, index: Tensor) -> None:
        """Remembers data as visited, of which no particles are kept."""
        self._visited[self._check_index(index)] = True

    def visited(self, index: Tensor) -> Tensor:
        """Data of a batch that have particles, boolean `(B,)`."""
        return self._visited[self._check_index(index)]

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, for a checkpoint; latents `(n, K, ...)`, weights `(n, K)`.

        Row by row these are the `n` data that are `visited`, `(N,)`. What the move keeps of the
        particles is below `memory`, by its name and by latent. All of it lies in files, so that it
        takes no memory.
        """
        rows = self._visited.nonzero().squeeze(1)
        latents, memory = _sorted(
            {entry: self._compact(value, rows) for entry, value in self._values.items()}
        )
        return {
            "latents": latents,
            "memory": memory,
            "log_weight": self._compact(self._log_weight, rows),
            "log_joint": self._compact(self._log_joint, rows),
            "visited": self._visited.clone(),
        }

    def load_state_dict(self, saved: Mapping[str, Any], *, is_filled: bool = False) -> None:
        """Fills the store from a checkpoint's `state_dict()`.

        Args:
            saved: The `state_dict()`.
            is_filled: Whether the process that made the files has done so already.

        Raises:
            StoreError: The checkpoint's training set has another size, or the disk is too small.
        """
        visited = saved["visited"]
        if len(visited) != self.num_data:
            raise StoreError(
                f"the checkpoint has particles of {len(visited)} data, but the training "
                f"set has {self.num_data}; resume with the data settings of the first run"
            )
        if not is_filled:
            self._visited.copy_(visited)
        self._fits_model = False
        if saved["log_weight"].numel() == 0:
            return
        particles = SweepState(
            saved["latents"],
            LogWeights(saved["log_weight"]),
            saved["log_joint"],
            memory=saved.get("memory", {}),
        )
        values = _values(particles)
        self._allocate({entry: value[0] for entry, value in values.items()}, particles.log_joint[0])
        if is_filled:
            return
        for entry, value in values.items():
            self._fill(self._values[entry], value)
        self._fill(self._log_weight, saved["log_weight"])
        self._fill(self._log_joint, saved["log_joint"])

    def close(self) -> None:
        """Removes the files, if the store is not another process's; they stay readable here."""
        if self._own is not None:
            self._own()

    def particles(self, index: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Latents `(B, K, ...)` and log-weights `(B, K)` of some data that have been visited."""
        rows = self._check_index(index)
        latents, _ = _sorted({entry: value[rows] for entry, value in self._values.items()})
        return latents, self._log_weight[rows]

    def _create(self, state: SweepState, axes: Mapping[str, int]) -> None:
        values = _values(state)
        rows = {entry: value.movedim(axes[entry[0]], 0)[0] for entry, value in values.items()}
        self._allocate(rows, state.log_joint.T[0])

    def _allocate(self, rows: Mapping[Entry, Tensor], joint: Tensor) -> None:
        """Makes the files, given what they hold of one datum."""
        self._values = {
            entry: self._map(f"value-{number}", (self.num_data, *row.shape), row.dtype)
            for number, (entry, row) in enumerate(rows.items())  # names may hold any characters
        }
        shape = (self.num_data, *joint.shape)
        self._log_weight = self._map("log_weight", shape, joint.dtype)
        self._log_joint = self._map("log_joint", shape, joint.dtype)
        needed, free = self._num_bytes(), shutil.disk_usage(self.checkpoints).free
        if free < needed:
            raise StoreError(
                f"a checkpoint of the particles needs {needed / 1e6:,.0f} MB, but the disk of "
                f"'{self.checkpoints}' has {free / 1e6:,.0f} MB left; lower model.num_particles or "
                "choose another trainer.default_root_dir"
            )

    def _num_bytes(self) -> int:
        return sum(t.nbytes for t in (*self._values.values(), self._log_weight, self._log_joint))

    def _map(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor that lives in a file, of zeros if the file is new."""
        size = torch.Size(shape).numel()
        path = self.folder / f"{name}.bin"
        try:
            allocate(path, size * dtype.itemsize)
        except OSError as error:
            free = shutil.disk_usage(self.folder).free
            raise StoreError(
                f"the particles of {self.num_data} data need {size * dtype.itemsize / 1e6:,.0f} MB "
                f"for '{name}', but the disk of '{self.folder}' has {free / 1e6:,.0f} MB left "
                f"({error.strerror}); lower model.num_particles or choose another "
                "model.store_folder"
            ) from error
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype).reshape(shape)

    def _compact(self, value: Tensor, rows: Tensor) -> Tensor:
        """Some rows of a file's tensor, in a file of their own, or the tensor if these are all."""
        if len(rows) == len(value) or not len(value):  # nothing is kept
            return value
        if len(rows) == 0:
            return torch.empty((0, *value.shape[1:]), dtype=value.dtype)
        if not self.folder.exists():  # the store has been closed
            return value[rows]
        path = self.folder / f"compact-{value.data_ptr()}.bin"
        path.unlink(missing_ok=True)  # of a checkpoint before
        compact = self._map(path.stem, (len(rows), *value.shape[1:]), value.dtype)
        for start in range(0, len(rows), CHUNK):
            compact[start : start + CHUNK] = value[rows[start : start + CHUNK]]
        path.unlink()  # the mapping keeps it for as long as it is needed
        return compact

    def _fill(self, target: Tensor, values: Tensor) -> None:
        """Writes the rows of visited data, or those of all data."""
        rows = torch.arange(self.num_data)
        if len(values) != self.num_data:
            rows = self._visited.nonzero().squeeze(1)
        for start in range(0, len(rows), CHUNK):
            target[rows[start : start + CHUNK]] = values[start : start + CHUNK]

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


def _remove(folder: Path, lock: BinaryIO) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()


def _rows(stored: Tensor, index: Tensor, axis: int) -> Tensor:
    """Rows `(B, ...)` of the store, with the data moved to `axis`."""
    # A captured program takes the layout that it was captured with.
    return stored[index].movedim(0, axis).contiguous()


def _is_finite(state: SweepState) -> bool:
    """Whether all numbers are finite; a sum that overflows is not, which does no harm."""
    numbers = (*_values(state).values(), state.log_weight.log_weight, state.log_joint)
    return bool(torch.stack([value.sum().double() for value in numbers]).isfinite().all())


def _usable(state: SweepState, axes: Mapping[str, int]) -> Tensor:
    """Data whose particles are finite, boolean `(B,)`; weights of zero are, but not of all."""
    weights = state.log_weight.log_weight
    usable = (~weights.isnan() & state.log_joint.isfinite()).all(0) & weights.isfinite().any(0)
    for (name, _), value in _values(state).items():
        usable &= value.movedim(axes[name], 0).flatten(1).isfinite().all(1)
    return usable.cpu()


def _select(state: SweepState, chosen: Tensor, axes: Mapping[str, int]) -> SweepState:
    """The particles of some data, chosen by booleans `(B,)`."""
    rows = chosen.nonzero().squeeze(1)
    values = {
        entry: value.index_select(axes[entry[0]], rows.to(value.device))
        for entry, value in _values(state).items()
    }
    weights, joint = state.log_weight.log_weight, state.log_joint
    return _state(values, weights[:, rows], joint[:, rows])


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
