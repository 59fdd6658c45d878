"""The configs that are shipped with the package: where they are, and a line on each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from dcpc.errors import OptionError

__all__ = ["CONFIG_OPTIONS", "describe_configs", "find_configs", "shipped_configs"]

CONFIG_OPTIONS = ("--config", "-c")
MODULE_KEYS = ("model", "network")
"""Keys below `model` that hold the class of what is trained."""


def find_configs(arguments: Sequence[str]) -> list[str]:
    """The arguments, with shipped configs found where the working directory has none.

    Raises:
        OptionError: There is no such file.
    """
    found = []
    for option, argument in zip(["", *arguments], arguments, strict=False):
        name, _, path = argument.partition("=")
        if option in CONFIG_OPTIONS:
            found.append(_find(argument))
        elif name in CONFIG_OPTIONS and argument != name:
            found.append(f"{name}={_find(path)}")
        else:
            found.append(argument)
    return found


def shipped_configs() -> dict[str, dict[str, Any]]:
    """The shipped configs, by the path that `--config` takes."""
    home = _home()
    paths = sorted(home.glob("configs/**/*.json"), key=lambda path: (len(path.parts), path))
    return {path.relative_to(home).as_posix(): json.loads(path.read_text()) for path in paths}


def describe_configs() -> str:
    """A line on each config that can be run, and the layers that can be put on top of one."""
    configs = shipped_configs()
    layers: dict[str, list[str]] = {}
    lines = []
    for path, config in configs.items():
        data = _class(config.get("data"))
        if data:
            model = next(filter(None, map(_class, _models(config))), "")
            lines.append(f"  {path:<40} {model} on {data}")
        else:
            folder, _, name = path.rpartition("/")
            layers.setdefault(folder, []).append(name.removesuffix(".json"))
    on_top = [
        fill(f"{folder}/: {', '.join(names)}", 80, initial_indent="  ", subsequent_indent="    ")
        for folder, names in layers.items()
    ]
    return "\n".join([*lines, "", "Layers, for a further --config on top of those:", *on_top])


def _models(config: Mapping[str, Any]) -> Iterator[Any]:
    """What a config may name as its model, the innermost first."""
    module = config.get("model", {})
    for arguments in (module, module.get("init_args", {})):
        yield from (arguments.get(key) for key in MODULE_KEYS)
    yield module


def _class(value: Any) -> str:
    path = value.get("class_path", "") if isinstance(value, Mapping) else ""
    return str(path).rpartition(".")[2]


def _find(path: str) -> str:
    if Path(path).is_file():
        return path
    if path.startswith("configs/") and (_home() / path).is_file():
        return str(_home() / path)
    raise OptionError(f"--config: there is no file '{path}'; `dcpc` lists the shipped ones")


def _home() -> Path:
    """The folder that `configs` is in: installed, the package; in a checkout, the one above."""
    package = Path(__file__).parents[1]
    return package if (package / "configs").is_dir() else package.parent
