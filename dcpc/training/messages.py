"""Errors of configs in one line: the whole path of the key, what was expected, what was got.

jsonargparse reports an error by a block of text per level of nesting, in which a key stands without
those above it, and a `Union` as a dump of the errors of its members. Every level has a parser of
its own, whose `error` hook passes here: `explain` makes a line of the innermost message, and the
levels above put their keys in front of it.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

from dcpc.training.type_words import describe_type, find_misfit, is_container, show

__all__ = ["explain", "finish"]

START, PREFIX, END = "\x01", "\x02", "\x03"
"""Begin of a line that an inner level has made; place of the keys above it; its end."""

LAYERS = "; an algorithm is a layer on top of data and model: --config configs/mnist.json first"
HELP = "dcpc fit --help_all, --model.help CLASS and --data.help CLASS list the keys"

KEYED = re.compile(r'(?:Parser key|Key) "(?P<key>[^"]+)"(?: element (?P<element>\d+))?:\s*')
"""A value that is wrong; the rest of the message says how."""
REFUSED = re.compile(
    r"(?:(?:Group '(?P<group>[^']+)'|Subcommand '\w+') does not accept option '(?P<subkey>[^']+)'"
    r"|Option '(?P<key>[^']+)' is not accepted.*"
    r"|unrecognized arguments: --(?P<argument>[^\s=]+).*)\s*",
    re.DOTALL,
)
"""A key that nothing has."""
REQUIRED = re.compile(r"the following arguments are required: (?P<keys>.+)")

CLASSES = (
    re.compile(r"Problem with given class_path '(?P<path>[^']*)':\s+(?P<reason>[^\n]+)"),
    re.compile(r"Import path (?P<path>\S+) does not (?P<reason>correspond|implement)"),
    re.compile(
        r"Expected an instantiatable class, but (?:(?P<path>\S+) )?is (?:a )?(?P<reason>\w+)"
    ),
)
"""Class paths that name nothing, a class of another kind, or one that cannot be built."""
KINDS = {
    "abstract": "an abstract class; name one that derives from it",
    "correspond": "a class of another kind",
    "implement": "a class of another kind",
    "protocol": "a protocol",
}

NO_KEYS = re.compile(r"'(\w+)' object has no attribute 'keys'")
JSON_NAMES = {
    "NoneType": "null",
    "bool": "true or false",
    "float": "a number",
    "int": "a number",
    "list": "a list",
    "str": "a text",
}
SPEC = {"class_path", "init_args", "dict_kwargs"}
"""Keys of a class of the config."""

MAX_LISTED = 12
"""Keys of a class that are listed where none of them resembles the one that was given."""

GIVEN = (
    re.compile(r"^ *Given value: (.*)", re.MULTILINE | re.DOTALL),
    re.compile(r"Got value: (.*)"),
    re.compile(r"Not of type \w+: (\S+) does not conform"),
)
"""The value of a key, the outermost one last."""
BELOW = re.compile(r"NestedArg\(key='(?P<key>[^']*)', val=(?P<value>.*)\)", re.DOTALL)
"""A value of a key below, on the command line."""
CLASS_PATH = re.compile(r"'?class_path'?[=:] ?(?P<path>'[^']*'|[^,)}]+)")
ELEMENT = re.compile(r"^\s*Expected a <class '(?:int|float|str|bool)'>", re.MULTILINE)


def explain(parser: argparse.ArgumentParser, message: str, suggest: Callable[[str], str]) -> str:
    """A parser's message as a line to which the levels above add their keys; see `finish`.

    Args:
        parser: The parser of this level.
        message: Its message.
        suggest: A hint for a key that no key of this level resembles.
    """
    line = _line(parser, message, suggest)
    return line if line.startswith(START) else f"{START}{line}{END}"


def finish(line: str, subcommands: Iterable[str] = ()) -> str:
    """The line of the outermost level, without the marks and without the subcommand's name."""
    line = re.sub(f"[{START}{PREFIX}{END}]", "", line)
    return re.sub(rf"^(?:{'|'.join(subcommands)})\.", "", line) if subcommands else line


def _line(parser: argparse.ArgumentParser, message: str, suggest: Callable[[str], str]) -> str:
    keyed = KEYED.match(message)
    inner = re.search(f"{START}[^{END}]*{END}", message)
    if inner:
        return inner[0].replace(PREFIX, f"{PREFIX}{keyed['key']}.") if keyed else inner[0]
    if keyed:
        key = keyed["key"] + (f"[{int(keyed['element']) - 1}]" if keyed["element"] else "")
        return f"{PREFIX}{key}{_complaint(_type_of(parser, keyed['key']), message)}"
    if refused := REFUSED.fullmatch(message):
        groups = refused.groupdict()
        key = groups["key"] or groups["subkey"] or groups["argument"]
        key = f"{groups['group']}.{key}" if groups["group"] else key
        return f"{PREFIX}{key}: {_refusal(parser, key, suggest)}"
    if required := REQUIRED.fullmatch(message):
        key = required["keys"].split(", ")[0]
        expected = describe_type(_type_of(parser, key)) if _type_of(parser, key) else "a class_path"
        hint = LAYERS if key.rpartition(".")[2] in ("model", "data") else ""
        return f"{PREFIX}{key}: missing or null, expected {expected}{hint}"
    return " ".join(message.split())


def _type_of(parser: argparse.ArgumentParser, key: str) -> Any:
    """The type of a key; an object for one that groups others."""
    found = next((getattr(a, "_typehint", None) for a in parser._actions if a.dest == key), None)
    is_group = any(action.dest.startswith(f"{key}.") for action in parser._actions)
    return dict if found is None and is_group else found


def _complaint(expected_type: Any, message: str) -> str:
    """The end of a line: below which element of the value, what was expected, what was got."""
    if no_keys := NO_KEYS.search(message):
        kind = JSON_NAMES.get(no_keys[1], no_keys[1])
        return f".init_args: expected an object of keys, got {kind}"
    expected = f": expected {describe_type(expected_type)}"
    if found := next(filter(None, (pattern.search(message) for pattern in CLASSES)), None):
        reason = KINDS.get(found["reason"], found["reason"])
        path = found["path"] or _given(message)
        if missing := re.fullmatch(r"No module named '([^'.]+)'", reason):
            reason += f"; start dcpc in the folder of {missing[1]}.py, or put that on PYTHONPATH"
        return f"{expected}, got '{path}' ({reason})"
    text = _given(message)
    if text is None:
        return f"{expected} ({' '.join(KEYED.sub('', message).split())})"
    if text.startswith("Namespace(") and (path := CLASS_PATH.search(text)):
        return f"{expected}, got a class_path {path['path']}"
    return _misfit(_value(text), expected_type, is_element=bool(ELEMENT.search(message)))


def _misfit(value: Any, expected_type: Any, is_element: bool) -> str:
    """What a value, or an element of a list, has instead of its type."""
    beside = sorted(value.keys() - SPEC) if _is_spec(value) else []
    if beside:
        key = beside[0]
        return f".{key}: the key '{key}' is not accepted beside class_path and init_args"
    place, part_type, part = find_misfit(value, expected_type)
    got = "an element " if is_element and is_container(part_type) else ""
    return f"{place}: expected {describe_type(part_type)}, got {got}{show(part)}"


def _given(message: str) -> str | None:
    found = next(filter(None, (pattern.findall(message) for pattern in GIVEN)), None)
    return found[-1].strip() if found else None


def _is_spec(value: Any) -> bool:
    return isinstance(value, dict) and not SPEC.isdisjoint(value)


def _value(text: str) -> Any:
    """The value that a message shows by `str`."""
    if below := BELOW.fullmatch(text):
        return {below["key"]: _value(str(_value(below["value"])))}
    try:
        value = ast.literal_eval(text)
        return text if isinstance(value, tuple) and text[0] != "(" else value  # as in 10,32
    except (SyntaxError, TypeError, ValueError):
        return text


def _refusal(parser: argparse.ArgumentParser, key: str, suggest: Callable[[str], str]) -> str:
    group, _, leaf = key.rpartition(".")
    known = [action.dest.rpartition(".") for action in parser._actions]
    siblings = {name: f"{above}.{name}".lstrip(".") for above, _, name in known if above == group}
    cousins = {name: f"{above}.{name}".lstrip(".") for above, _, name in known}
    for names in (siblings, cousins):
        if close := difflib.get_close_matches(leaf, names, n=1, cutoff=0.8):
            hint = f"; did you mean '{PREFIX}{names[close[0]]}'?"
            break
    else:
        hint = suggest(leaf) or "."
        if 0 < len(siblings) <= MAX_LISTED:  # those of a class
            hint = f", only {', '.join(sorted(siblings.keys() - {'help'}))}{hint}"
    return f"the key '{leaf}' is not accepted{hint} {HELP}"
