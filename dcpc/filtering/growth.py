"""How a call's arguments grew since the last one: by whole steps, the old data in front."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from dcpc.divide.model import Model
from dcpc.errors import DataError

__all__ = ["Growth"]

Call = tuple[tuple, dict]
"""Positional and keyword arguments of a model."""


@dataclass(frozen=True)
class Growth:
    """A call whose arguments hold one more row per step, and how to cut it.

    Attributes:
        call: The longer call.
        axes: By position among its leaves, the axis along which a tensor grew.
        counts: Positions of the integers that grew: numbers of steps.
        num_steps: Steps of the longer call: rows of the shortest tensor that grew.
        num_new: Steps that are new.
    """

    call: Call
    axes: Mapping[int, int]
    counts: frozenset[int]
    num_steps: int
    num_new: int

    @classmethod
    def between(cls, model: Model, old: Call, new: Call) -> Growth:
        """How a call grew from another one.

        Costs one comparison of the old data with the beginning of the new ones.

        Raises:
            DataError: An argument is of another kind, its old data are not the beginning of the
                new ones, or arguments did not grow, or by different numbers of steps.
        """
        before, old_structure = pytree.tree_flatten(old)
        after, structure = pytree.tree_flatten(new)
        if old_structure != structure:
            raise DataError(
                f"extend: expected the arguments of before, longer ({_kinds(old)}), got others "
                f"({_kinds(new)}); give them in the same places, with time as an axis of tensors"
            )
        names = _leaf_names(model, new)
        axes: dict[int, int] = {}
        grown: dict[int, int] = {}
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            if isinstance(one, Tensor) and isinstance(other, Tensor):
                axis = _grown_axis(names[index], one, other)
                if axis is not None:
                    axes[index], grown[index] = axis, other.shape[axis] - one.shape[axis]
            elif _is_count(one) and _is_count(other) and other > one:
                grown[index] = other - one
            elif not _same(one, other):
                raise DataError(
                    f"extend: argument '{names[index]}' was {one!r} and is {other!r}; only data "
                    "may grow: keep it, or call run(...) anew"
                )
        if not axes:
            raise DataError(
                f"extend: expected a tensor among the arguments that grew by new rows, got "
                f"{_kinds(new)} as before; give all data, the old ones first"
            )
        if len(set(grown.values())) > 1:
            steps = ", ".join(f"'{names[i]}' by {n}" for i, n in grown.items())
            raise DataError(
                f"extend: expected all data to grow by the same number of steps, got {steps}; "
                "give each of them one row per step"
            )
        shortest = min(after[index].shape[axis] for index, axis in axes.items())
        counts = frozenset(grown) - frozenset(axes)
        return cls(new, axes, counts, shortest, next(iter(grown.values())))

    def cut(self, start: int, stop: int) -> Call:
        """The call on some of the steps, `start .. stop - 1`."""
        leaves, structure = pytree.tree_flatten(self.call)
        missing = self.num_steps - stop
        for index, axis in self.axes.items():
            length = leaves[index].shape[axis] - start - missing
            leaves[index] = leaves[index].narrow(axis, start, length)
        for index in self.counts:
            leaves[index] = leaves[index] - start - missing
        return pytree.tree_unflatten(leaves, structure)


def _grown_axis(name: str, old: Tensor, new: Tensor) -> int | None:
    """The axis along which a tensor grew; None where it is the same.

    Raises:
        DataError: It changed otherwise.
    """
    if old.dtype != new.dtype or old.device != new.device or old.dim() != new.dim():
        raise DataError(
            f"extend: argument '{name}' was a {_kind(old)} and is a {_kind(new)}; give it the type "
            "and the axes that it had"
        )
    different = [i for i, (a, b) in enumerate(zip(old.shape, new.shape, strict=True)) if a != b]
    if len(different) > 1 or any(old.shape[axis] > new.shape[axis] for axis in different):
        raise DataError(
            f"extend: argument '{name}' had shape {tuple(old.shape)} and has {tuple(new.shape)}; "
            "expected more rows on one axis, time; call run(...) for other data"
        )
    axis = different[0] if different else None
    beginning = new if axis is None else new.narrow(axis, 0, old.shape[axis])
    changed = (beginning != old) & ~((beginning != beginning) & (old != old))  # NaN: missing data
    if bool(changed.any()):
        place = tuple(changed.nonzero()[0].tolist())
        raise DataError(
            f"extend: argument '{name}' is {beginning[place].item():g} at {list(place)}, where it "
            f"was {old[place].item():g}; expected the old data as the beginning of the new ones: "
            "the past cannot change, call run(...) for other data"
        )
    return axis


def _leaf_names(model: Model, call: Call) -> list[str]:
    """Names of the arguments that a call's leaves belong to."""
    args, kwargs = call
    try:
        parameters = list(inspect.signature(model).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    positional = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL][: len(args)]
    positional += [f"argument {index}" for index in range(len(positional), len(args))]
    values = [*zip(positional, args, strict=True), *kwargs.items()]
    return [name for name, value in values for _ in pytree.tree_leaves(value)]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _same(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except (ValueError, RuntimeError):  # arrays of another library
        return False


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor {tuple(value.shape)}"
    return type(value).__name__


def _kinds(call: Call) -> str:
    args, kwargs = call
    parts = [_kind(value) for value in args]
    return ", ".join([*parts, *(f"{name}: {_kind(value)}" for name, value in kwargs.items())])
