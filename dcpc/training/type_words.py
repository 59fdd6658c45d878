"""Types of a config's keys in plain words, and which part of a value is of the wrong type."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from os import PathLike
from typing import Annotated, Any, Literal, Union, get_args, get_origin

__all__ = ["describe_type", "find_misfit", "is_container", "refuses_null", "show"]

SIMPLE: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    type(None): "null",
    timedelta: "a duration days:hours:minutes:seconds",
    dict: "an object of keys",
    list: "a list",
}

MAX_SHOWN = 100
"""Characters of a value that are shown."""


def describe_type(hint: Any) -> str:
    """A type in words, for example `a whole number or null`."""
    if hint in SIMPLE:
        return SIMPLE[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if _is_union(hint):
        return _either([describe_type(member) for member in arguments])
    if origin is Literal:
        return _either([show(name) for name in arguments])
    if origin is Annotated:
        return describe_type(arguments[0])
    if _is_tuple(hint) and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)}, each {_either([describe_type(a) for a in arguments])}"
    if _is_sequence(hint) or _is_tuple(hint):
        return f"a list, each element {describe_type(arguments[0])}" if arguments else "a list"
    if _is_mapping(hint):
        return f"an object, each value {describe_type(arguments[1])}" if arguments else "an object"
    if origin is Callable:
        return "a class or a function, by its import path"
    if isinstance(hint, type):
        return _describe_class(hint)
    return "another value" if hint is None else str(hint)


def show(value: Any) -> str:
    """A value as JSON, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = " ".join(str(value).split())
    if isinstance(value, str):
        text = f"'{value if value.isprintable() else text[1:-1]}'"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def find_misfit(value: Any, hint: Any) -> tuple[str, Any, Any]:
    """The first part of a value that is of the wrong type.

    Returns:
        Where it is, as in `[2]` or `.pgd`, empty for the value itself; its type; itself.
    """
    if _is_union(hint):
        members = [member for member in get_args(hint) if _is_container(value, member)]
        misfits = [find_misfit(value, member) for member in members]
        return misfits[0] if len(misfits) == 1 and misfits[0][0] else ("", hint, value)
    arguments = get_args(hint)
    parts: list[tuple[str, Any, Any]] = []
    if isinstance(value, list | tuple) and _is_container(value, hint) and arguments:
        types_ = _element_types(hint, arguments, len(value))
        parts = [(f"[{n}]", t, v) for n, (t, v) in enumerate(zip(types_, value, strict=False))]
    elif isinstance(value, dict) and _is_mapping(hint) and arguments:
        parts = [(f".{name}", arguments[1], v) for name, v in value.items()]
    for place, part_type, part in parts:
        if not _fits(part, part_type):
            below, inner_type, inner = find_misfit(part, part_type)
            return place + below, inner_type, inner
    return "", hint, value


def is_container(hint: Any) -> bool:
    """Whether a type is that of lists or of objects."""
    return _is_sequence(hint) or _is_tuple(hint) or _is_mapping(hint)


def refuses_null(hint: Any) -> bool:
    """Whether null is not of a type; False where the type is unknown."""
    if _is_union(hint):
        return all(refuses_null(member) for member in get_args(hint))
    return hint not in (None, type(None), Any, object)


def _element_types(hint: Any, arguments: tuple[Any, ...], count: int) -> list[Any]:
    if _is_tuple(hint) and arguments[-1] is not Ellipsis:
        return list(arguments) if count == len(arguments) else []
    return [arguments[0]] * count


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, as far as values of JSON tell."""
    if _is_union(hint):
        return any(_fits(value, member) for member in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str, type(None)):
        return isinstance(value, hint)
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if _is_container(value, hint):
        return find_misfit(value, hint)[0] == ""
    return not is_container(hint)


def _is_container(value: Any, hint: Any) -> bool:
    if isinstance(value, dict):
        return _is_mapping(hint)
    return isinstance(value, list | tuple) and (_is_sequence(hint) or _is_tuple(hint))


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _is_tuple(hint: Any) -> bool:
    return (get_origin(hint) or hint) is tuple


def _is_sequence(hint: Any) -> bool:
    return (get_origin(hint) or hint) in (list, Sequence)


def _is_mapping(hint: Any) -> bool:
    return (get_origin(hint) or hint) in (dict, Mapping)


def _describe_class(hint: type) -> str:
    if issubclass(hint, PathLike):
        return "a path"
    if issubclass(
        hint, int | float
    ):  # jsonargparse's restricted numbers say how in their docstring
        kind = SIMPLE[int] if issubclass(hint, int) else SIMPLE[float]
        return f"{kind} {(hint.__doc__ or '').partition('restricted to be ')[2]}".strip()
    return f"a class_path of type {hint.__name__}"


def _either(words: list[str]) -> str:
    words = list(dict.fromkeys(words))
    return " or ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} or {words[-1]}"
