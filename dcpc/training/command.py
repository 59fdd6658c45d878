"""The `dcpc` command: what it shows at once, without torch, and the way to what it runs."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dcpc import __version__
from dcpc.errors import OptionError
from dcpc.training.screens import HELP_ALL, OVERVIEW, SUBCOMMANDS, help_of
from dcpc.training.shipped import CONFIG_OPTIONS, describe_configs, find_configs

__all__ = ["main"]

HELP = ("-h", "--help")

SOURCES = (*CONFIG_OPTIONS, "--model", "--data", HELP_ALL, "--print_config")
"""Options, or beginnings of them, with which a run needs no config, or tells for itself."""

MISSING = """\
dcpc: error: --config: missing; say what to run, for example

  dcpc {subcommand} --config configs/digits.json

Shipped configs, found from any folder:

{configs}

Options: dcpc {subcommand} --help. One of your own, to start from a shipped one:
dcpc {subcommand} --config configs/digits.json --print_config > mine.json"""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the `dcpc` command.

    Bad input is one line on standard error and exit status 2.

    Args:
        args: Arguments of the command line; None for the process's own.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    # As `python -m` does, so that a config may name classes in files of the working directory.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    screen = _screen(arguments)
    if screen is not None:
        print(screen)
        return
    _refuse_incomplete(arguments)
    try:
        arguments = find_configs(arguments)
    except OptionError as error:
        _fail(f"dcpc: error: {error}")
    from dcpc.training.cli import run  # torch and Lightning, which take seconds to import

    run([HELP[1] if argument == HELP_ALL else argument for argument in arguments])


def _screen(arguments: Sequence[str]) -> str | None:
    """What is only shown; None where something is to be run."""
    if not arguments:
        return f"{OVERVIEW}\nShipped configs, found from any folder:\n\n{describe_configs()}"
    first, *rest = arguments
    if first in HELP:
        return OVERVIEW
    if first == "--version":
        return f"dcpc {__version__}"
    if first in SUBCOMMANDS and any(argument in HELP for argument in rest):
        return help_of(first)
    return None


def _refuse_incomplete(arguments: Sequence[str]) -> None:
    """Fails where there is nothing to run."""
    first, *rest = arguments
    if first.startswith("-"):
        return
    if first not in SUBCOMMANDS:
        close = difflib.get_close_matches(first, SUBCOMMANDS, n=1)
        if first.endswith(".json"):
            _fail(f"dcpc: error: expected a command, got '{first}'; dcpc fit --config {first}?")
        hint = f"; did you mean '{close[0]}'?" if close else "; `dcpc --help` explains them"
        _fail(
            f"dcpc: error: the command must be one of {', '.join(SUBCOMMANDS)}, got '{first}'{hint}"
        )
    options = ["", *rest]
    for option, argument in zip(options, rest, strict=False):
        is_value = option.startswith("-") and "=" not in option
        if not argument.startswith("-") and not is_value and Path(argument).suffix == ".json":
            _fail(f"dcpc: error: '{argument}' stands alone; did you mean --config {argument}?")
    if not any(argument.startswith(SOURCES) for argument in rest):
        _fail(MISSING.format(subcommand=first, configs=describe_configs()))


def _fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(2)
