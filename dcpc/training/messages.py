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
HELP = "dcpc fit --help, --model.help CLASS and --data.help CLASS list the keys"

KEYED = re.compile(r'(?:Parser key|Key) "(?P<key>[^"]+)"(?: element (?P<element>\d+))?:\s*')
REFUSED = re.compile(
    r"(?:(?:Group '(?P<group>[^']+)'|Subcommand '\w+') does not accept option '(?P<subkey>[^']+)'"
    r"|Option '(?P<key>[^']+)' is not accepted.*"
    r"|unrecognized arguments: --(?P<argument>[^\s=]+).*)\s*",
    re.DOTALL,
)
REQUIRED = re.compile(r"the following arguments are required: (?P<keys>.+)")
IMPORT = re.compile(r"Problem with given class_path '(?P<path>[^']*)':\s+(?P<reason>[^\n]+)")
OTHER_CLASS = re.compile(r"Import path (?P<path>\S+) does not (?:correspond|implement)")
ABSTRACT = re.compile(r"Expected an instantiatable class, but (?P<path>\S+) is")
SPEC = {"class_path", "init_args", "dict_kwargs"}
BELOW = re.compile(r"NestedArg\(key='(?P<key>[^']*)', val=(?P<value>.*)\)", re.DOTALL)
"""A value of a key below, on the command line."""
ELEMENT = re.compile(r"^\s*Expected a <class '(?:int|float|str|bool)'>", re.MULTILINE)
NO_KEYS = re.compile(r"'(\w+)' object has no attribute 'keys'")
JSON_NAMES = {
    "NoneType": "null",
    "bool": "true or false",
    "float": "a number",
    "int": "a number",
    "list": "a list",
    "str": "a text",
}
OUT_OF_RANGE = re.compile(r"Not of type \w+: (\S+) does not conform")
CLASS_PATH = re.compile(r"'?class_path'?[=:] ?(?P<path>'[^']*'|[^,)}]+)")


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
    for pattern in (IMPORT, OTHER_CLASS, ABSTRACT):
        if found := pattern.search(message):
            reason = found["reason"] if pattern is IMPORT else "a class of another kind"
            reason = "an abstract class" if pattern is ABSTRACT else reason
            return f": expected {describe_type(expected_type)}, got '{found['path']}' ({reason})"
    given = re.findall(r"^ *Given value: (.*)", message, re.MULTILINE | re.DOTALL)
    given = given or re.findall(r"Got value: (.*)", message) or OUT_OF_RANGE.findall(message)
    if not given:
        reason = " ".join(message.split("\n", 1)[-1].split()) if "\n" in message else message
        return f": expected {describe_type(expected_type)} ({reason})"
    text = given[-1].strip()
    if text.startswith("Namespace(") and (path := CLASS_PATH.search(text)):
        return f": expected {describe_type(expected_type)}, got a class_path {path['path']}"
    value = _value(text)
    beside = [key for key in value if key not in SPEC] if _is_spec(value) else []
    if beside:
        return (
            f".{beside[0]}: the key '{beside[0]}' is not accepted beside class_path and init_args"
        )
    place, part_type, part = find_misfit(value, expected_type)
    # Of a list, jsonargparse shows the element alone.
    got = "an element " if ELEMENT.search(message) and is_container(part_type) else ""
    return f"{place}: expected {describe_type(part_type)}, got {got}{show(part)}"


def _is_spec(value: Any) -> bool:
    return isinstance(value, dict) and not SPEC.isdisjoint(value)


def _value(text: str) -> Any:
    """The value that a message shows by `str`."""
    if below := BELOW.fullmatch(text):
        return {below["key"]: _value(str(_value(below["value"])))}
    try:
        return ast.literal_eval(text)
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
    return f"the key '{leaf}' is not accepted{hint} {HELP}"
