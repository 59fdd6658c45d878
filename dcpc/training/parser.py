"""The parser of configs: JSON in layers, errors of one line, numbers in their range."""

from __future__ import annotations

import difflib
import inspect
import json
import os
import sys
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Mapping
from typing import Any, NoReturn

from jsonargparse import DefaultHelpFormatter, Namespace
from jsonargparse.typing import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    restricted_number_type,
)
from pytorch_lightning.cli import LightningArgumentParser

from dcpc.training.data import (
    ArrayData,
    BouncingDigits,
    DigitsData,
    HalfLabelledData,
    HubImages,
    MoonsData,
    NamedArrayData,
    PixelSequences,
    StoredSequences,
)
from dcpc.training.messages import explain, finish
from dcpc.training.modules import (
    AmortisedModule,
    ClassifierModule,
    HeldOut,
    ParticleModule,
    Start,
)
from dcpc.training.type_words import refuses_null, show

__all__ = ["ConfigParser", "Threads", "fail", "narrow_types"]

CONFIGURED: dict[str, tuple[type, ...]] = {
    "model": (ParticleModule, AmortisedModule, ClassifierModule),
    "data": (
        HubImages,
        DigitsData,
        ArrayData,
        MoonsData,
        HalfLabelledData,
        BouncingDigits,
        StoredSequences,
        PixelSequences,
        NamedArrayData,
    ),
}
"""The classes below each key of a config that this package has."""

GROUPS: dict[str, tuple[type, ...]] = {"model.start": (Start,), "model.held_out": (HeldOut,)}
"""Groups of keys within those classes."""

SUBCOMMANDS = ("fit", "validate", "test", "predict")

COUNTS_OR_FRACTIONS = (
    *(f"trainer.limit_{part}_batches" for part in ("train", "val", "test", "predict")),
    "trainer.overfit_batches",
    "trainer.val_check_interval",
)

Seed = restricted_number_type(
    "Seed", int, [(">=", 0), ("<=", 2**32 - 1)], docstring="int restricted to be 0 to 2^32 - 1"
)

Threads = restricted_number_type("Threads", int, [(">", 0), ("<=", 1024)])

SanitySteps = restricted_number_type("SanitySteps", int, (">=", -1))

IN_RANGE: dict[str, Any] = {
    "seed_everything": bool | Seed,
    "trainer.num_nodes": PositiveInt,
    "trainer.check_val_every_n_epoch": PositiveInt | None,
    "trainer.log_every_n_steps": NonNegativeInt | None,
    "trainer.accumulate_grad_batches": PositiveInt,
    "trainer.num_sanity_val_steps": SanitySteps | None,
    "trainer.gradient_clip_val": NonNegativeFloat | None,
    "trainer.min_epochs": NonNegativeInt | None,
    "trainer.min_steps": NonNegativeInt | None,
    "trainer.reload_dataloaders_every_n_epochs": NonNegativeInt,
}
"""Types of numbers of whose range Lightning makes sure too late, or not at all."""


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of descriptions."""


class ConfigParser(LightningArgumentParser):
    """Reads JSON; says in one line what is wrong with a config, and exits with status 2."""

    def __init__(self, **kwargs: Any) -> None:
        given = {"parser_mode": "json", "formatter_class": _HelpFormatter, **kwargs}
        super().__init__(**given, allow_abbrev=False)  # in a config they are no keys either

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """A config as text that can be read, also by `--print_config`."""
        return super().dump(*args, **{"format": "json_indented", **kwargs})

    def parse_path(self, path: str | os.PathLike, *args: Any, **kwargs: Any) -> Namespace:
        """Reads the file of a layer."""
        try:
            return super().parse_path(path, *args, **kwargs)
        except UnicodeDecodeError as error:
            self.error(f"--config: the file '{path}' is no text in UTF-8 ({error})")

    def parse_string(
        self, content: str, path: str | os.PathLike = "", *args: Any, **kwargs: Any
    ) -> Namespace:
        """Reads a layer, which must be a JSON object whose groups of keys are objects too."""
        try:
            layer = json.loads(content)
        except ValueError as error:
            self.error(f"--config: the file '{path}' is no JSON ({error})")
        if not isinstance(layer, dict):
            self.error(f"--config: the file '{path}' must hold a JSON object, got {show(layer)}")
        self._check_groups(layer)
        return super().parse_string(content, path, *args, **kwargs)

    def validate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> None:
        """Checks also what jsonargparse does not: groups of keys, and nulls.

        To jsonargparse null is no value, and therefore never one of the wrong type.
        """
        self._check_groups(namespace)
        for action in self._actions:
            is_null = action.dest in namespace and namespace[action.dest] is None
            hint = getattr(action, "_typehint", None)
            if (
                is_null
                and not action.required
                and action.default is not None
                and refuses_null(hint)
            ):
                self.error(f'Parser key "{action.dest}":\n  Expected a value. Got value: None')
        super().validate(namespace, *args, **kwargs)

    def _check_groups(self, config: Mapping[str, Any] | Namespace) -> None:
        typed = {action.dest for action in self._actions if hasattr(action, "_typehint")}
        for name in {action.dest.rpartition(".")[0] for action in self._actions} - typed - {""}:
            value = config.get(name, {})
            if not isinstance(value, dict | Namespace):
                self.error(f'Parser key "{name}":\n  Expected an object. Got value: {value}')

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Fails with one line that names the key; within a class, hands it to the level above."""
        level = getattr(ex, "subcommand_parser", None) or self
        line = explain(level, message, _suggest_key)
        if not self.exit_on_error:
            raise ArgumentError(None, line) from ex
        fail(finish(line, SUBCOMMANDS))


def narrow_types(parser: LightningArgumentParser) -> None:
    """Gives keys of Lightning's the types of the numbers that they take.

    Reads `limit_val_batches: 1` as one batch, and `1.0` as all of them.

    `typing` caches its unions regardless of order, so that a parser may meet `Union[float, int]`
    where Lightning wrote `Union[int, float]`, and makes a float of every number.
    """
    types = dict.fromkeys(COUNTS_OR_FRACTIONS, int | float | None) | IN_RANGE
    for action in parser._actions:
        if action.dest in types:
            action._typehint = types[action.dest]  # type: ignore[attr-defined]


def _suggest_key(key: str) -> str:
    """The likely fix of a key that its class does not accept, but another one does."""
    owners = {
        name: (f"{part}.{name}", configured)
        for part, classes in (GROUPS | CONFIGURED).items()
        for configured in reversed(classes)
        for name in inspect.signature(configured).parameters
    }
    close = difflib.get_close_matches(key, owners, n=1, cutoff=0.8)
    if not close:
        return ""
    path, owner = owners[close[0]]
    if close[0] == key:
        return f"; '{path}' is a key of {owner.__name__} (a layer of another class comes last)."
    return f"; did you mean '{path}'?"


def fail(message: str, status: int = 2) -> NoReturn:
    """Prints an error and exits."""
    print(f"dcpc: error: {message}", file=sys.stderr)
    raise SystemExit(status)
