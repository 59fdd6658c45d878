"""The data of a batch as a model's arguments: one tensor, several, or several by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from dcpc.errors import DataError

__all__ = [
    "Observed",
    "as_arguments",
    "call",
    "check_signature",
    "main_tensor",
    "mapped",
    "named_tensors",
    "num_data",
    "split",
]

Observed = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]
"""Tensors `(B, ...)`. The model is called with one as its only argument, with a tuple in its order,
with a mapping by the names of its arguments."""

Data = TypeVar("Data", bound=Observed)


def as_arguments(data: Observed) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Positional and keyword arguments of the model."""
    if isinstance(data, Tensor):
        return (data,), {}
    if isinstance(data, Mapping):
        return (), dict(data)
    return tuple(data), {}


def check_signature(model: Callable[..., Any], data: Observed) -> None:
    """Compares data with the arguments that a model takes.

    Raises:
        DataError: The model cannot be called with them.
    """
    function = model.forward if isinstance(model, nn.Module) else model
    args, kwargs = as_arguments(data)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a function that is not Python's
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        names = list(kwargs) or f"{len(args)} without names"
        raise DataError(
            f"a batch has the data {names}, but the model takes the arguments {signature} "
            f"({error}); name the model's arguments so, or choose other data"
        ) from error


def call(function: Callable[..., Any], data: Observed, *args: Any, **kwargs: Any) -> Any:
    """Calls a function of some arguments and of a model's."""
    positional, named = as_arguments(data)
    return function(*args, *positional, **named, **kwargs)


def named_tensors(data: Observed) -> list[tuple[str, Tensor]]:
    """The tensors, by the names of their arguments; those of a tuple by their places."""
    if isinstance(data, Tensor):
        return [("", data)]
    if isinstance(data, Mapping):
        return list(data.items())
    return [(str(place), values) for place, values in enumerate(data)]


def main_tensor(data: Observed) -> Tensor:
    """The first of the tensors: what is reconstructed, compared and shown.

    Raises:
        DataError: There is none.
    """
    tensors = named_tensors(data)
    if not tensors:
        raise DataError("a batch holds no data; it must be a tensor, a tuple or a mapping of some")
    return tensors[0][1]


def num_data(data: Observed) -> int:
    """Number of data B."""
    return len(main_tensor(data))


def mapped(function: Callable[[Tensor], Tensor], data: Data) -> Data:
    """The data with every tensor changed."""
    changed: Any
    if isinstance(data, Tensor):
        changed = function(data)
    elif isinstance(data, Mapping):
        changed = {name: function(values) for name, values in data.items()}
    else:
        changed = tuple(function(values) for values in data)
    return changed


def split(data: Data, size: int) -> list[Data]:
    """Parts of at most `size` data."""
    return [
        mapped(lambda values, start=start: values[start : start + size], data)  # type: ignore[misc]
        for start in range(0, num_data(data), size)
    ]
