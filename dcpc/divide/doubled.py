"""Single-precision programs run in double precision, to compare what rounding would hide."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class NotDoubledError(Exception):
    """A program cannot be run in double precision."""


class _Doubled(TorchFunctionMode):
    """Gives every function double tensors for single ones, constants and parameters included."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = getattr(func, "__name__", "").split(".")[0]
        writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if writes and args and isinstance(args[0], Tensor) and args[0].dtype == torch.float32:
            raise NotDoubledError(f"{name} would write to a copy")
        if func is Tensor.float:
            func = Tensor.double
        return func(*doubled(args), **doubled(kwargs or {}))


def doubled(value: Any) -> Any:
    """A single-precision tensor, or the dtype itself, in double precision; others as they are.

    In tuples, lists and dictionaries too.
    """
    if isinstance(value, Tensor):
        return value.double() if value.dtype == torch.float32 else value
    if type(value) in (tuple, list):
        return type(value)(map(doubled, value))
    if type(value) is dict:
        return {key: doubled(item) for key, item in value.items()}
    return torch.float64 if value is torch.float32 else value


@contextmanager
def double_precision() -> Iterator[None]:
    """A block of code in which single-precision tensors are taken for double ones.

    Raises:
        NotDoubledError: In the block, where a single-precision tensor is written to.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubled():
            yield
    finally:
        torch.set_default_dtype(before)
