"""Arguments that a class of the config refuses: which key they were given by.

jsonargparse builds the classes that a config names from the inside out. A constructor that raises
knows its own arguments, but not where in the config they stand; it is in the error's traceback.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from traceback import walk_tb
from typing import Any, NamedTuple

from jsonargparse import Namespace

from dcpc.errors import DCPCError, OptionError

__all__ = ["refusal"]

CONSTRUCTORS = ("__init__", "__post_init__")
NAMED = re.compile(r"-*(model|data|trainer|optimizer|lr_scheduler|ckpt_path)\b[.:]")
"""Begin of a message that names its key."""
MISSING = re.compile(r"Requirement '([^']+)' not met|No module named '([^']+)'")
"""A package that a class needs."""
WRAPPED = re.compile(
    r"Does not validate against|Not a valid subclass|Problem with given class_path|Parser key"
)
"""Begin of a message of jsonargparse around an error of a constructor."""


class Node(NamedTuple):
    """A class of the config."""

    path: str
    class_name: str
    arguments: Mapping[str, Any]


def refusal(error: BaseException, options: Namespace) -> DCPCError:
    """The error of a constructor, which jsonargparse may have wrapped, as one about a key.

    Args:
        error: Raised while the classes of a config were built.
        options: What was configured.
    """
    causes = [cause for cause in _causes(error) if not WRAPPED.match(str(cause))] or [error]
    cause = next((e for e in causes if isinstance(e, DCPCError)), causes[0])
    message = " ".join(str(cause).split()) or type(cause).__name__
    owner = ([*_constructing(cause)] or ["it"])[-1]
    if package := MISSING.search(message):
        message = (
            f"{owner} needs the package {package[1] or package[2]}, which is not installed; "
            "install it by pip, or choose another class"
        )
    node, named = _node(cause, options), NAMED.match(message)
    if named and node is not None and not message.startswith(node.path):
        key = message[named.end() :]  # of a class that does not know that another one holds it
        if any(re.match(rf"{re.escape(name)}\b", key) for name in node.arguments):
            message = f"{node.path}.{key}"
    elif node is not None and not named:
        place = _place(message, node.arguments)
        begins = place and re.match(rf"{re.escape(place)}\b", message)
        path = ".".join(filter(None, (node.path, place)))
        message = f"{node.path}.{message}" if begins else f"{path}: {message}"
    return (type(cause) if isinstance(cause, DCPCError) else OptionError)(message)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        hidden = None if error.__suppress_context__ else error.__context__
        error = error.__cause__ or hidden


def _node(error: BaseException, options: Namespace) -> Node | None:
    """The class of the config, the innermost, in whose constructor an error arose."""
    nodes = [Node("trainer", "Trainer", _arguments(options.get("trainer"))), *_nodes(options, "")]
    found = None
    for name in _constructing(error):
        found = next((node for node in nodes if node.class_name == name), found)
    return found


def _constructing(error: BaseException) -> Iterator[str]:
    """The classes in whose constructors an error arose, the innermost last."""
    for frame, _ in walk_tb(error.__traceback__):
        if frame.f_code.co_name in CONSTRUCTORS and "self" in frame.f_locals:
            yield type(frame.f_locals["self"]).__name__


def _nodes(value: Any, path: str) -> Iterator[Node]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        for index, element in enumerate(value):
            yield from _nodes(element, f"{path}[{index}]")
    if not isinstance(value, Mapping | Namespace):
        return
    arguments = _arguments(value)
    if "class_path" in value:
        yield Node(path, str(value["class_path"]).rpartition(".")[2], arguments)
    for name, argument in arguments.items():
        yield from _nodes(argument, f"{path}.{name}" if path else name)


def _arguments(value: Any) -> Mapping[str, Any]:
    """The keys below one, whether it names a class or not."""
    if isinstance(value, Mapping | Namespace) and "class_path" in value:
        value = value.get("init_args")
    if isinstance(value, Namespace):
        return vars(value)
    return value if isinstance(value, Mapping) else {}


def _place(message: str, arguments: Mapping[str, Any]) -> str:
    """The argument that a message mentions, by its name or else by its value; empty for none."""
    mentions = {
        name: found.start()
        for name in arguments
        if (found := re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", message))
    }
    name = min(mentions, key=mentions.__getitem__) if mentions else ""
    if not name:
        return next((n for n, text in _shown(arguments) if _stands_in(text, message)), "")
    below = _place(message.replace(name, "", 1), _arguments(arguments[name]))
    return f"{name}.{below}" if below else name


def _shown(arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values, as a message would show them; of lists, their fractions too."""
    for name, value in arguments.items():
        parts = value if isinstance(value, list | tuple) else []
        for part in [value, *(p for p in parts if isinstance(p, float))]:
            if part not in (None, "") and not isinstance(part, bool | Mapping | Namespace):
                yield name, str(part)


def _stands_in(text: str, message: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(text)}(?![\w.])", message) is not None
