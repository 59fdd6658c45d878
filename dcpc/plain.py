"""Dataclasses of tensors as plain dictionaries, which files hold without pickled classes, and back.

The types of a dataclass's fields say what its dictionary has to look like.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from dcpc.io import entries

__all__ = ["Misfit", "build", "count_not_finite", "plain"]


class Misfit(Exception):
    """A plain value is not what a field's type asks for; says which one, and what it is."""


def plain(value: Any) -> Any:
    """Dataclasses as dictionaries, tuples as lists, tensors without what they were cut from.

    Tensors keep their bits and strides; they are copied where they lie on another device, or are a
    part of something larger.
    """
    if isinstance(value, Tensor):
        return _whole(value)
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def build(kind: Any, value: Any, entry: str, device: torch.device | str = "cpu") -> Any:
    """A value of some type from a plain one; tensors are copied.

    Args:
        kind: A dataclass, or the type of one of its fields.
        value: The plain value.
        entry: Its name, for errors.
        device: Where its tensors are to be.

    Raises:
        Misfit: It does not fit.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        options = [option for option in inner if option is not types.NoneType]
        assert len(options) == 1, f"{kind} has several alternatives"
        return None if value is None else build(options[0], value, entry, device)
    if is_dataclass(kind):
        return _build_dataclass(kind, value, entry, device)
    if origin is tuple:
        _check(isinstance(value, list), entry, "a list", value)
        return tuple(build(inner[0], v, f"{entry}[{i}]", device) for i, v in enumerate(value))
    if origin is not None:  # a mapping from names
        _check(isinstance(value, dict), entry, "a dictionary", value)
        _check(all(type(key) is str for key in value), entry, "a dictionary of names", value)
        return {key: build(inner[1], v, f"{entry}.{key}", device) for key, v in value.items()}
    _check(type(value) is kind, entry, f"a {kind.__name__}", value)
    return value.to(device, copy=True) if kind is Tensor else value


def count_not_finite(value: Any, entry: str) -> dict[str, int]:
    """By the name of each tensor in a plain value, how many numbers are NaN or infinite, if any."""
    tensors = {name: part for name, part in entries(value, entry) if isinstance(part, Tensor)}
    counts = {name: int((~tensor.isfinite()).sum()) for name, tensor in tensors.items()}
    return {name: count for name, count in counts.items() if count}


def _build_dataclass(kind: Any, value: Any, entry: str, device: torch.device | str) -> Any:
    _check(isinstance(value, dict), entry, "a dictionary", value)
    hints = typing.get_type_hints(kind)
    names = [f.name for f in fields(kind)]
    for name in names:
        _check(name in value, f"{entry}.{name}", "there", "none")
    for name in value:
        _check(name in names, entry, f"one of {', '.join(names)} in every name", name)
    try:
        return kind(**{n: build(hints[n], value[n], f"{entry}.{n}", device) for n in names})
    except ValueError as error:
        raise Misfit(f"entry '{entry}': {error}") from error


def _check(holds: bool, entry: str, expected: str, value: Any) -> None:
    if not holds:
        got = repr(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}"
        raise Misfit(f"entry '{entry}' must be {expected}, got {got}")


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().as_subclass(Tensor).cpu()
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.preserve_format)
