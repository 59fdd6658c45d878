"""Python state that a captured program has baked in, and whether it is still the same.

A capture holds tensors and parameters by reference, and sees them change in place. It does not
see that one was replaced by another, nor that a number, a list or an attribute that the model
looks at has changed. A `Snapshot` lists all of those that can be reached from the model: its
closure, defaults and globals, attributes, submodules, and the objects among its arguments.
"""

from __future__ import annotations

import datetime
import enum
import functools
import pathlib
import re
import sys
import types
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

MAX_ENTRIES = 20_000
"""Length of a snapshot; what is larger is not looked at piece by piece."""

MAX_ARRAY_BYTES = 1 << 18
"""Size of a numpy array whose contents are kept for comparison."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, range, torch.Size)
_CONSTANT = (
    torch.dtype,
    torch.device,
    torch.Generator,
    type,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.GetSetDescriptorType,
    re.Pattern,
    pathlib.PurePath,
    datetime.date,
    datetime.timedelta,
    np.generic,
    np.dtype,
)
_LIBRARIES = frozenset(sys.stdlib_module_names) | {
    "dcpc",
    "functorch",
    "networkx",
    "numpy",
    "opt_einsum",
    "pandas",
    "pyro",
    "pyroapi",
    "pytorch_lightning",
    "scipy",
    "sklearn",
    "torch",
    "tqdm",
}
_MODULE_STATE = ("_parameters", "_buffers", "_modules", "training")
_MODULE_INTERNALS = frozenset(vars(torch.nn.Module())) | {"_pyro_context", "_pyro_name"}


def is_plain(value: Any) -> bool:
    """Whether a value is compared by value: a number, a string, None, a tensor, a small array."""
    return isinstance(value, (*_PLAIN, *_CONSTANT, Tensor)) or (
        isinstance(value, np.ndarray) and value.dtype != object and value.nbytes <= MAX_ARRAY_BYTES
    )


def plain_key(value: Any) -> Any:
    """A hashable stand-in for a plain value, which differs where the values do."""
    if isinstance(value, np.ndarray):
        return np.ndarray, value.shape, value.dtype, value.tobytes()
    if isinstance(value, float) and value != value:
        return float, "nan"
    try:
        hash(value)
    except TypeError:
        return type(value), id(value)
    return type(value), value


class Snapshot:
    """The Python state that can be reached from a model and the objects among its arguments.

    Attributes:
        modes: Training modes of the modules in it; captures are kept apart by them.
        is_complete: Whether everything was understood. If not, only a plain run of the model
            tells whether something has changed.
    """

    def __init__(self, model: Any, objects: Sequence[Any] = ()) -> None:
        self.is_complete = True
        self._entries: list[Any] = []
        self._modes: list[bool] = []
        self._seen: set[int] = set()
        self._holds: list[Any] = []
        for root in (model, *objects):
            self._visit(root)
        for name, value in pyro.get_param_store()._params.items():
            self._entries += (name, _Same(value))
        self.modes = tuple(self._modes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snapshot) and self._entries == other._entries

    __hash__ = None  # type: ignore[assignment]

    def _visit(self, value: Any) -> None:
        if len(self._entries) > MAX_ENTRIES:
            self.is_complete = False
        elif isinstance(value, _PLAIN):
            self._entries.append(plain_key(value))
        elif isinstance(value, Tensor):
            self._entries.append(_Same(value))
        elif isinstance(value, np.ndarray) and is_plain(value):
            self._entries.append(plain_key(value))
        elif isinstance(value, _CONSTANT) or id(value) in self._seen:
            self._entries.append(_Same(value))
        else:
            self._seen.add(id(value))
            self._open(value)

    def _open(self, value: Any) -> None:
        """An object with contents."""
        self._entries.append(type(value))
        if isinstance(value, dict):
            self._entries.append(len(value))
            for key, item in value.items():
                self._visit(key)
                self._visit(item)
        elif isinstance(value, list | tuple | set | frozenset):
            self._entries.append(len(value))
            for item in value:
                self._visit(item)
        elif isinstance(value, torch.nn.Module):
            self._visit_module(value)
        elif isinstance(value, types.FunctionType):
            self._visit_function(value)
        elif isinstance(value, types.MethodType):
            self._visit(value.__self__)
            self._visit(value.__func__)
        elif isinstance(value, functools.partial):
            self._visit(value.func)
            self._visit(value.args)
            self._visit(value.keywords)
        elif isinstance(value, property):
            self._visit(value.fget)
        elif isinstance(value, staticmethod | classmethod):
            self._visit(value.__func__)
        elif isinstance(value, types.ModuleType):
            self._entries.append(_Same(value))
        elif hasattr(value, "__dict__") and _is_python(type(value)):  # type: ignore[arg-type]
            self._visit_class(type(value))
            self._visit_attributes(vars(value))
        else:
            self._entries.append(_Same(value))
            self.is_complete = False

    def _visit_module(self, module: torch.nn.Module) -> None:
        self._visit_class(type(module))
        state = module.__dict__
        self._modes.append(state["training"])
        for table in _MODULE_STATE[:-1]:
            for name, item in state[table].items():
                self._entries.append(name)
                self._visit(item)
        self._visit_attributes(
            {name: item for name, item in state.items() if name not in _MODULE_INTERNALS}
        )

    def _visit_attributes(self, attributes: dict[str, Any]) -> None:
        for name, item in attributes.items():
            self._entries.append(name)
            self._visit(item)

    def _visit_class(self, kind: type) -> None:
        """Attributes of the classes that users wrote, and what their methods refer to."""
        if id(kind) in self._seen:
            return
        self._seen.add(id(kind))
        for base in kind.__mro__:
            if not _is_library(base.__module__):
                self._visit_attributes(
                    {k: v for k, v in vars(base).items() if not k.startswith("__") or callable(v)}
                )

    def _visit_function(self, function: types.FunctionType) -> None:
        self._entries.append(_Same(function.__code__))
        self._visit(function.__defaults__)
        self._visit(function.__kwdefaults__)
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is not None:
            self._visit(wrapped)
        for cell in function.__closure__ or ():
            try:
                self._visit(cell.cell_contents)
            except ValueError:  # a cell that is still empty
                self._entries.append("empty")
        if _is_library(function.__module__):
            return
        for name in _names(function.__code__):
            if name in function.__globals__:
                self._entries.append(name)
                self._visit_global(function.__globals__[name], _names(function.__code__))

    def _visit_global(self, value: Any, names: Sequence[str]) -> None:
        if not isinstance(value, types.ModuleType):
            self._visit(value)
        elif not _is_library(value.__name__):
            self._visit_attributes({k: vars(value)[k] for k in names if k in vars(value)})


class _Same:
    """An object that is compared by identity, and kept alive so that the identity is its own."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Global and attribute names that a function and those inside of it refer to."""

    def nested(code: types.CodeType) -> Iterator[str]:
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                yield from nested(constant)

    return tuple(dict.fromkeys(nested(code)))


@functools.lru_cache(maxsize=4096)
def _is_library(module: str | None) -> bool:
    return module is not None and module.split(".")[0] in _LIBRARIES


@functools.lru_cache(maxsize=4096)
def _is_python(kind: Hashable) -> bool:
    """Whether all state of a class's instances is in their `__dict__`."""
    return all(
        base is object or (base.__flags__ & (1 << 9) and "__slots__" not in vars(base))
        for base in kind.__mro__  # type: ignore[attr-defined]
    )
