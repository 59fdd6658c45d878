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
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

MAX_ENTRIES = 20_000
"""Length of a snapshot; what is larger is not looked at piece by piece."""

MAX_ARRAY_BYTES = 1 << 18
"""Size of a numpy array whose contents are kept for comparison."""

_SIMPLE = frozenset((bool, int, str, bytes, type(None)))
_PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, range, torch.Size)
_CONSTANT = (
    torch.dtype,
    torch.device,
    torch.Generator,
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
    typing.TypeVar,
    typing.ParamSpec,
    typing.TypeVarTuple,
)
_KINDS: dict[str, tuple[type, ...]] = {
    "class": (type,),
    "tensor": (Tensor,),
    "identity": (*_CONSTANT, types.ModuleType),
    "plain": _PLAIN,
    "array": (np.ndarray,),
    "module": (torch.nn.Module,),
    "function": (types.FunctionType,),
    "dict": (dict,),
    "sequence": (list, tuple, set, frozenset),
    "method": (types.MethodType,),
    "partial": (functools.partial,),
    "property": (property,),
    "descriptor": (staticmethod, classmethod),
}
_HEAP_TYPE = 1 << 9  # of classes that are made by a class statement
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
_MODULE_INTERNALS = frozenset(vars(torch.nn.Module())) | {"_pyro_context", "_pyro_name"}


def is_plain(value: Any) -> bool:
    """Whether a value is compared by value: a number, a string, None, a tensor, a small array."""
    return isinstance(value, (*_PLAIN, *_CONSTANT, type, Tensor)) or (
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
        tensors: The tensors in it, which are compared by identity.
    """

    def __init__(self, model: Any, objects: Sequence[Any] = ()) -> None:
        self.is_complete = True
        self.tensors: list[Tensor] = []
        self._entries: list[Any] = []
        self._modes: list[bool] = []
        self._seen: set[int] = set()
        self._opened: set[int] = set()
        self._held: list[Any] = []
        for root in (model, *objects):
            self._visit(root)
        parameters = pyro.get_param_store()._params
        self._visit_tensors(parameters)
        self.modes = tuple(self._modes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snapshot) and self._entries == other._entries

    __hash__ = None  # type: ignore[assignment]

    def _visit(self, value: Any) -> None:
        kind = _kind(type(value))  # type: ignore[arg-type]
        if kind == "simple":
            self._entries += (type(value), value)
        elif kind == "tensor":
            self._entries.append(id(value))
            self.tensors.append(value)
        elif kind == "identity" or id(value) in self._seen:
            self._same(value)
        elif kind == "plain" or (kind == "array" and is_plain(value)):
            self._entries.append(plain_key(value))
        elif len(self._entries) > MAX_ENTRIES:
            self.is_complete = False
        else:
            self._seen.add(id(value))
            self._held.append(value)
            self._entries.append(id(type(value)) if kind != "opaque" else id(value))
            self._open(kind, value)

    def _same(self, value: Any) -> None:
        """An object that is compared by identity; held, so that its identity stays its own."""
        self._entries.append(id(value))
        self._held.append(value)

    def _open(self, kind: str, value: Any) -> None:
        """An object with contents."""
        if kind == "module":
            self._visit_module(value)
        elif kind == "function":
            self._visit_function(value)
        elif kind == "dict":
            self._entries.append(len(value))
            for key, item in value.items():
                self._visit(key)
                self._visit(item)
        elif kind == "sequence":
            self._entries.append(len(value))
            for item in value:
                self._visit(item)
        elif kind == "method":
            self._visit(value.__self__)
            self._visit(value.__func__)
        elif kind == "partial":
            self._visit((value.func, value.args, value.keywords))
        elif kind == "property":
            self._visit(value.fget)
        elif kind == "descriptor":
            self._visit(value.__func__)
        elif kind == "class":
            self._same(value)
            self._visit_class(value)
        elif kind == "object":
            self._visit_class(type(value))
            self._visit_attributes(vars(value))
        else:
            self.is_complete = False

    def _visit_module(self, module: torch.nn.Module) -> None:
        self._visit_class(type(module))
        state = module.__dict__
        self._modes.append(state["training"])
        for table in ("_parameters", "_buffers"):
            self._visit_tensors(state[table])
        self._visit_attributes(state["_modules"])
        for name, item in state.items():
            if name not in _MODULE_INTERNALS:
                self._entries.append(name)
                self._visit(item)

    def _visit_tensors(self, tensors: Mapping[str, Tensor | None]) -> None:
        self._entries += tensors
        self._entries += map(id, tensors.values())
        self.tensors += (value for value in tensors.values() if value is not None)

    def _visit_attributes(self, attributes: dict[str, Any]) -> None:
        for name, item in attributes.items():
            self._entries.append(name)
            self._visit(item)

    def _visit_class(self, cls: type) -> None:
        """Attributes of the classes that users wrote, and what their methods refer to."""
        if id(cls) in self._opened:
            return
        self._opened.add(id(cls))
        for base in cls.__mro__:
            if _is_library(base.__module__):
                continue
            for name, item in vars(base).items():
                if isinstance(item, types.FunctionType) or not name.startswith(("__", "_abc_")):
                    self._entries.append(name)
                    self._visit(item)

    def _visit_function(self, function: types.FunctionType) -> None:
        self._same(function.__code__)
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
        if type(value) is not types.ModuleType:
            self._visit(value)
        elif not _is_library(value.__name__):
            self._visit_attributes({k: vars(value)[k] for k in names if k in vars(value)})


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
    """Whether code is taken to stay as it is; the models of `dcpc` are watched as a user's are."""
    if module is None or module.startswith("dcpc.models"):
        return False
    return module.split(".")[0] in _LIBRARIES


@functools.lru_cache(maxsize=4096)
def _kind(cls: Hashable) -> str:
    """Kind of a class, by which its instances are visited."""
    assert isinstance(cls, type)
    if cls in _SIMPLE:
        return "simple"
    for kind, classes in _KINDS.items():
        if issubclass(cls, classes):
            return kind
    return "object" if _is_python(cls) else "opaque"


def _is_python(cls: type) -> bool:
    """Whether all state of a class's instances is in their `__dict__`."""
    has_state = any("__dict__" in vars(base) for base in cls.__mro__)
    return has_state and all(
        base in (object, types.SimpleNamespace)
        or (base.__flags__ & _HEAP_TYPE and "__slots__" not in vars(base))
        for base in cls.__mro__
    )
