"""Files of tensors and of JSON, written whole or not at all; none is pickled code.

Those of tensors are `torch.save`'s, as Lightning's checkpoints are: safetensors would be a second
format, and holds no nested dictionaries. Such a file is a zip archive, with a checksum of every
tensor.
"""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import re
import secrets
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dcpc.errors import FileError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "allocate",
    "check_entries",
    "describe_misfit",
    "entries",
    "not_finite",
    "num_bytes",
    "own_folder",
    "read_tensors",
    "remove_stale",
    "write_json",
    "write_tensors",
]

NAME = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.incomplete", re.DOTALL)
"""Names of files that are being written: the target's, the process and a random number."""

BUFFER_BYTES = 1 << 20

LOCK = "lock"
"""File that says by its lock that a folder has an owner."""


def write_tensors(content: Mapping[str, Any], path: str | Path) -> None:
    """Writes a dictionary with `torch.save`, so that the file is there as a whole or as it was.

    It is written into a file beside the target, which it then replaces; both survive a crash of the
    machine. Tensors go to the disk one by one, without a copy of all in memory, but for those of an
    accelerator: a machine without one is to read them. A view takes all that it was cut from along:
    copy it first.

    Args:
        content: What `torch.load(..., weights_only=True)` reads: tensors, numbers, strings, and
            lists and dictionaries of these.
        path: The file; its folder is made.

    Raises:
        FileError: The disk is full, or the folder cannot be written to. What was there stays.
    """
    target = Path(path).resolve()  # of a link, the file that it points to
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_space(content, target)
        with _replacing(target) as file:
            _allocate(file, num_bytes(content))
            torch.save(_on_cpu(content), file)
            file.truncate()
    except (OSError, RuntimeError) as error:
        raise FileError(_describe(_cause(error), content, path)) from error


def write_json(content: Mapping[str, Any], path: str | Path) -> None:
    """Writes a dictionary as strict JSON, so that the file is there as a whole or as it was.

    Args:
        content: Numbers, strings, and lists and dictionaries of these. Numbers that are not finite,
            which JSON does not have, become null.
        path: The file; its folder is made.

    Raises:
        FileError: The disk is full, or the folder cannot be written to. What was there stays.
    """
    target = Path(path).resolve()
    text = json.dumps(_finite(content), indent=2, allow_nan=False, ensure_ascii=False)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(target) as file:
            file.write(f"{text}\n".encode())
    except OSError as error:
        raise FileError(_describe(error, content, path)) from error


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


def check_entries(path: str | Path) -> None:
    """Compares every entry of a file of `torch.save` with its checksum; reads all of it.

    Raises:
        FileError: There is no such file, it is truncated or no file of tensors, or an entry has
            changed since it was written.
    """
    if not Path(path).is_file():
        raise FileError(f"there is no file '{path}'")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError):
        raise FileError(
            f"'{path}' ({Path(path).stat().st_size:,} bytes) is truncated, or is no file of "
            "tensors; take another copy, or write it again"
        ) from None
    except OSError as error:
        raise FileError(f"'{path}' cannot be read: {error.strerror or error}") from error
    if damaged is not None:
        raise FileError(
            f"'{path}' is damaged: its entry '{damaged}' does not have the checksum that it was "
            "written with; take another copy, or write it again"
        )


def remove_stale(folder: str | Path) -> list[Path]:
    """Removes what killed processes have left of files that they were writing.

    A file that is being written is locked by its process, on whichever machine the file system
    keeps locks for, and stays; so does every file where there are no locks.

    Args:
        folder: Where `write_tensors` has written, if it is there at all; other folders inside are
            not looked into.

    Returns:
        The files that were removed.
    """
    removed = []
    for path in sorted(Path(folder).glob(".*.incomplete")):
        if not NAME.fullmatch(path.name):
            continue
        with suppress(OSError), path.open("r+b") as file:  # some locks are for writers only
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                removed.append(path)
    return removed


def own_folder(parent: str | Path, prefix: str) -> tuple[Path, BinaryIO]:
    """Makes a folder for temporary files, and removes those of the same prefix without an owner.

    Returns:
        The folder, and the lock that says that it has an owner: a file that stays open for as long.

    Raises:
        OSError: `parent` cannot be written to.
    """
    Path(parent).mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(parent).glob(f"{prefix}*/{LOCK}")):
        with suppress(OSError), path.open("rb") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    path, lock = _locked_file(folder / LOCK)
    path.rename(folder / LOCK)  # never there without being locked
    return folder, lock


def allocate(path: Path, size: int) -> None:
    """Makes a file of so many bytes, zeros where it is new, that take their space at once.

    Raises:
        OSError: The disk is full, or the folder cannot be written to.
    """
    with path.open("ab") as file:
        _allocate(file, size)
        if os.fstat(file.fileno()).st_size < size:
            file.truncate(size)


def entries(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in nested dictionaries and lists that is neither, and the empty ones, by name."""
    if isinstance(content, Mapping) and content:
        for key, value in content.items():
            yield from entries(value, f"{name}.{key}" if name else str(key))
    elif isinstance(content, list | tuple) and content:
        for position, value in enumerate(content):
            yield from entries(value, f"{name}[{position}]")
    else:
        yield name, content


def not_finite(content: Any) -> str | None:
    """The first tensor in nested dictionaries and lists that holds a NaN or an infinity.

    A log-weight may be minus infinity: that of a particle without weight.
    """
    for name, value in entries(content):
        is_number = isinstance(value, Tensor) and value.is_floating_point()
        if is_number and not _is_finite(value, lowest=name.endswith("log_weight")):
            return name
    return None


def _is_finite(tensor: Tensor, lowest: bool) -> bool:
    """Whether all numbers are finite, or minus infinity; takes no memory of the tensor's size."""
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()  # NaN if there is one
    return bool(high.isfinite() & (low.isfinite() | (lowest & low.isneginf())))


def num_bytes(content: Any) -> int:
    """Memory of all tensors in nested dictionaries and lists; what they share counts once."""
    # Tensors of other layouts have no storage to look at.
    tensors = [
        t for _, t in entries(content) if isinstance(t, Tensor) and t.layout == torch.strided
    ]
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


def describe_misfit(there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> str | None:
    """The first parameter that is missing, or has another shape; None if all fit.

    Args:
        there: Parameters of a file.
        here: Those of the model, as its `state_dict()`.
    """
    for name in sorted({*there, *here}):
        if name not in here:
            return f"parameter '{name}' is in the file, but not in this model"
        if name not in there:
            return f"parameter '{name}' of this model is not in the file"
        shapes = tuple(there[name].shape), tuple(here[name].shape)
        if shapes[0] != shapes[1]:
            return f"parameter '{name}' has shape {shapes[0]} there and {shapes[1]} in this model"
    return None


def _finite(content: Any) -> Any:
    """The same with None in the place of numbers that are not finite."""
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _on_cpu(content: Any) -> Any:
    tensors = [value for _, value in entries(content) if isinstance(value, Tensor)]
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return content
    return pytree.tree_map_only(Tensor, Tensor.cpu, content)


@contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    """A locked file beside the target that takes its place at the end; removed on any failure."""
    path, file = _locked_file(target)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows moves no open files
            os.replace(path, target)  # while it is locked
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _locked_file(target: Path) -> tuple[Path, BinaryIO]:
    while True:
        name = f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.incomplete"
        path = target.with_name(name)
        file = path.open("xb", buffering=BUFFER_BYTES)
        if fcntl is None:
            return path, file
        with suppress(OSError):  # not all file systems have locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return path, file
        file.close()  # `remove_stale` was faster than the lock


def _check_space(content: Mapping[str, Any], target: Path) -> None:
    if shutil.disk_usage(target.parent).free < num_bytes(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _allocate(file: BinaryIO, size: int) -> None:
    """Takes the space at once, where the file system can: a full disk shows before any work."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def _sync_folder(folder: Path) -> None:
    """Has the new name of a file survive a crash; not all systems can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _cause(error: BaseException) -> BaseException:
    """The operating system's error behind one of torch's, where there is one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def _describe(error: BaseException, content: Mapping[str, Any], path: str | Path) -> str:
    if not isinstance(error, OSError):
        return f"cannot write '{path}': {str(error).splitlines()[0]}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        folder = Path(path).resolve().parent
        free = shutil.disk_usage(folder).free
        return (
            f"cannot write '{path}': the disk is full ({num_bytes(content) / 1e6:,.1f} MB of "
            f"tensors, {free / 1e6:,.1f} MB free in '{folder}', quotas aside); free some space, or "
            "give another path"
        )
    return (
        f"cannot write '{path}': {error.strerror or error}; give a path in a folder that can be "
        "written to"
    )
