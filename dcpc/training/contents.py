"""Entries of a checkpoint, and differences from those that it should have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dcpc.io import entries

__all__ = ["describe_change", "describe_difference", "manifest"]


def manifest(content: Mapping[str, Any]) -> dict[str, str]:
    """The entries in words: tensors by dtype and shape, everything else by its value."""
    return {name: _in_words(value) for name, value in entries(content)}


def describe_change(content: Mapping[str, Any], written: Any) -> str | None:
    """Says which entry is not as it was when its manifest was written; None if all are."""
    if not isinstance(written, Mapping):
        return "its list of entries is damaged"
    here = manifest(content)
    for name in [*written, *here]:
        if written.get(name) != here.get(name):
            was, now = (str(words.get(name, "missing"))[:60] for words in (written, here))
            return f"the entry '{name}' was {was} when it was written, and is {now}"
    return None


def describe_difference(saved: Any, expected: Any, name: str) -> str | None:
    """Says which entry of nested dictionaries is missing or another one; None if none is.

    Tensors are compared by dtype and shape, everything else but dictionaries is not. Further
    entries are no difference.
    """
    if isinstance(expected, Mapping):
        if not isinstance(saved, Mapping):
            return f"the entry '{name}' should be a dictionary, got {_in_words(saved):.60}"
        for key, value in expected.items():
            if key not in saved:
                return f"the entry '{name}.{key}' is missing"
            found = describe_difference(saved[key], value, f"{name}.{key}")
            if found is not None:
                return found
    elif isinstance(expected, Tensor) and _in_words(saved) != _in_words(expected):
        return f"the entry '{name}' should be {_in_words(expected)}, got {_in_words(saved):.60}"
    return None


def _in_words(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "an empty dictionary" if not value else "a dictionary"
    return repr(value)
