"""Puts mistakes into the shipped configs and demands an error of one line that names the key.

    python tests/fuzz_configs.py                       600 mistakes
    python tests/fuzz_configs.py --count 50 --seed 3   other ones
    python tests/fuzz_configs.py --verbose             prints every error

A mistake is made in one of the layers of a run, or by an option of the command line; everything is
built, and nothing is trained. The script fails if a mistake ends in a traceback, a status other
than 2, more than one line or a line without the key, or if a certain mistake is accepted. Mistakes
that are none under some circumstances (null, where a key may be null) may be accepted.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import random
import re
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcpc.training.cli import ConfiguredCLI, one_line_errors

CONFIGS = Path(__file__).parents[1] / "configs"

BASES = (
    ["digits"],
    ["mnist"],
    ["mnist", "data/fashion_mnist"],
    ["mnist", "data/emnist"],
    ["cifar10"],
    ["cifar10", "data/celeba"],
)
ALGORITHMS = ("dcpc", "dcpc-smc", "dcpc-paper", "pgd", "mpgd", "lpc", "mcpc", "pc", "ipc", "vae")
STACKS = [
    *BASES,
    *([*base, f"algorithms/{algorithm}"] for base in BASES for algorithm in ALGORITHMS),
    *(["mnist", "algorithms/pgd", f"algorithms/{start}"] for start in ("warm", "warm-restart")),
    ["mnist", "algorithms/dcpc", "algorithms/noncentred"],
    ["mnist", "algorithms/headline"],
    ["cifar10", "algorithms/pgd-paper"],
    *([path.stem] for path in sorted(CONFIGS.glob("*.json")) if [path.stem] not in BASES),
    *([f"networks/{path.stem}"] for path in sorted(CONFIGS.glob("networks/*.json"))),
]
"""All layers that are shipped, in stacks that train."""

MAY_BE_NULL = {
    "afresh",
    "blocks",
    "callbacks",
    "check_val_every_n_epoch",
    "default_root_dir",
    "guide",
    "label_site",
    "learning_rate_schedule",
    "limit_val_batches",
    "log_every_n_steps",
    "max_epochs",
    "max_time",
    "move",
    "num_held_out",
    "num_threads",
    "optimizer",
    "restart",
    "schedule",
    "size",
    "step_size",
}
REQUIRED = {
    "class_path",
    "image_shape",
    "images",
    "latent_size",
    "latent_sizes",
    "network",
    "num_labelled",
    "path",
    "rule",
    "sizes",
}
TRANSPARENT = ("init_args", "class_path")
"""Keys that a path of the command line, and of an error, leaves out."""

MAX_LENGTH = 500
"""Characters of a line that a person reads."""

Place = tuple[Any, ...]


@dataclass(frozen=True)
class Mistake:
    """A mistake in one layer.

    Attributes:
        stack: The layers.
        layer: Which of them has the mistake.
        config: Its content.
        option: An option of the command line that makes the mistake instead.
        key: What an error must name.
        description: The mistake in words.
        is_certain: Whether there must be an error.
    """

    stack: list[str]
    layer: int
    config: dict[str, Any]
    option: str | None
    key: str
    description: str
    is_certain: bool = True


def places(value: Any, path: Place = ()) -> Iterator[tuple[Place, Any]]:
    """All keys and elements of a config, with their values."""
    children = value.items() if isinstance(value, dict) else enumerate(value)
    for name, child in children:
        yield (*path, name), child
        if isinstance(child, dict | list):
            yield from places(child, (*path, name))


def dotted(path: Place) -> str:
    """The path as an error names it, up to the key that holds the list an element is in."""
    names: list[str] = []
    for name in path:
        if isinstance(name, int):
            break
        if name not in TRANSPARENT:
            names.append(name)
    return ".".join(names)


def parent_of(config: Any, path: Place) -> Any:
    for name in path[:-1]:
        config = config[name]
    return config


def wrong_types(value: Any, path: Place) -> list[Any]:
    """Values that are of no type that a key could have whose value is this one."""
    if path[-1] == "class_path":
        return [17, [], "nowhere.Nothing", "dcpc.models.Nothing", "collections.OrderedDict"]
    if path[-1] == "step_size" or (len(path) > 1 and path[-2] == "step_size"):
        return ["much", [0.1], True]
    if path[-1] in ("guide", "move"):
        return [17, ["encoder"], "nowhere.Nothing", {"class_path": "nowhere.Nothing"}]
    if path[-1] == "init_args":
        return [17, "many", [3]]
    if path[-1] == "seed_everything":
        return ["many", [3], {"a": 1}, 2.5, 2**32]
    if path[-1] == "max_time":
        return [17, [3], "soon"]
    if isinstance(value, bool):
        return ["perhaps", 17, [True]]
    if isinstance(value, int):
        return ["many", [3], {"a": 1}, 2.5, True]
    if isinstance(value, float):
        return ["much", [0.1], {"a": 1}, True]
    if isinstance(value, str):
        return [17, ["a"], {"a": 1}]
    if isinstance(value, list):
        nested = [["many"]] if value and isinstance(value[0], str) else ["many"]
        return ["many", 17, {"a": 1}, [{"a": 1}], nested]
    return ["many", 17, [3]]


def mistakes(stack: list[str], layer: int, pick: random.Random) -> Iterator[Mistake]:
    """Mistakes in one layer, in a random order, without end."""
    configs = [json.loads((CONFIGS / f"{name}.json").read_text()) for name in stack]
    found = [
        (path, value)
        for path, value in places(configs[layer])
        if not any(_is_overridden(path, later) for later in configs[layer + 1 :])
    ]
    makers: list[Callable[..., Any]] = [_misspelt, _unknown, _wrong, _wrong, _null, _negative]
    while True:
        path, value = pick.choice(found)
        made = pick.choice([*makers, _missing])(configs[layer], path, value, pick)
        if made is not None:
            config, key, description, is_certain, replaced = made
            option = None
            may_be_option = not any(isinstance(name, int) for name in path)
            if replaced and may_be_option and pick.random() < 0.4:
                option = f"--{dotted(path)}={_as_option(replaced[0])}"
                if path[-1] in TRANSPARENT or isinstance(value, str):
                    option = None  # any option is a text
            yield Mistake(stack, layer, config, option, key, description, is_certain)


def _is_overridden(path: Place, later: Any) -> bool:
    """Whether a later layer has this key, one below it, or another class above it."""
    for name in path:
        if isinstance(later, dict) and "class_path" in later:
            return True
        if not isinstance(later, dict):
            return True
        if name not in later:
            # A layer may leave out class_path and init_args.
            return name in ("class_path", "init_args")
        later = later[name]
    return True


def _as_option(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _replaced(config: Any, path: Place, value: Any) -> Any:
    config = copy.deepcopy(config)
    parent_of(config, path)[path[-1]] = value
    return config


def _misspelt(config: Any, path: Place, value: Any, pick: random.Random) -> Any:
    name = path[-1]
    if not isinstance(name, str) or len(name) < 4 or name in TRANSPARENT:
        return None
    if len(path) > 1 and path[-2] == "step_size":  # names of algorithms: in the message, not a key
        return None
    at = pick.randrange(1, len(name) - 1)
    wrong = name[:at] + name[at + 1 :]
    if wrong == name or name in REQUIRED or len(path) == 1:
        return None  # the required key is then missing, and the error may be about that
    config = copy.deepcopy(config)
    parent_of(config, path)[wrong] = parent_of(config, path).pop(name)
    return config, dotted((*path[:-1], wrong)), f"{dotted(path)} misspelt as {wrong}", True, None


def _unknown(config: Any, path: Place, value: Any, pick: random.Random) -> Any:
    if not isinstance(value, dict) or "class_path" in value or path[-1] == "step_size":
        return None
    wrong = (*path, "zeal")
    return _replaced(config, wrong, 3), dotted(wrong), f"unknown key {dotted(wrong)}", True, None


def _wrong(config: Any, path: Place, value: Any, pick: random.Random) -> Any:
    wrong = pick.choice(wrong_types(value, path))
    description = f"{dotted(path)} {json.dumps(wrong)}"
    return _replaced(config, path, wrong), dotted(path), description, True, [wrong]


def _null(config: Any, path: Place, value: Any, pick: random.Random) -> Any:
    is_certain = path[-1] not in MAY_BE_NULL
    return _replaced(config, path, None), dotted(path), f"{dotted(path)} null", is_certain, [None]


def _negative(config: Any, path: Place, value: Any, pick: random.Random) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if path[-1] == "beta":  # nudges of equilibrium propagation may be negative
        return None
    wrong = -abs(value) - 7
    description = f"{dotted(path)} {wrong}"
    return _replaced(config, path, wrong), dotted(path), description, True, [wrong]


def _missing(config: Any, path: Place, value: Any, pick: random.Random) -> Any:
    if path[-1] not in REQUIRED or "trainer" not in config:
        return None  # the layer overrides one that has the key
    config = copy.deepcopy(config)
    del parent_of(config, path)[path[-1]]
    return config, dotted(path), f"{dotted(path)} missing", path[-1] != "class_path", None


def run(mistake: Mistake, folder: Path) -> tuple[str, str]:
    """What comes of a mistake: `one line`, `accepted` or `FAILED`; and the error."""
    paths = [CONFIGS / f"{name}.json" for name in mistake.stack]
    options = [mistake.option] if mistake.option else []
    if not options:
        paths[mistake.layer] = folder / "mistaken.json"
        paths[mistake.layer].write_text(json.dumps(mistake.config))
    written = io.StringIO()
    try:
        with contextlib.redirect_stderr(written), one_line_errors():
            ConfiguredCLI(["fit", *(f"--config={path}" for path in paths), *options])
    except SystemExit as error:
        return _judge(mistake, error.code, written.getvalue())
    except BaseException:
        return "FAILED", traceback.format_exc()
    return ("FAILED" if mistake.is_certain else "accepted"), "accepted"


def _judge(mistake: Mistake, code: Any, text: str) -> tuple[str, str]:
    key = re.escape(mistake.key)
    reasons = {
        f"status {code}": code != 2,
        "more than one line": len(text.splitlines()) != 1,
        "too long": len(text) > MAX_LENGTH,
        f"does not name {mistake.key}": not re.search(rf"(?<![\w.]){key}(?!\w)", text),
        "an object dump": re.search(r"Namespace\(| object at 0x|<class '", text),
    }
    failed = [reason for reason, holds in reasons.items() if holds]
    return ("FAILED" if failed else "one line"), "; ".join([*failed, text.strip()])


def sample(count: int, seed: int) -> list[Mistake]:
    """Mistakes spread evenly over the shipped layers."""
    pick = random.Random(seed)
    names = sorted({name for stack in STACKS for name in stack})
    pick.shuffle(names)
    made: list[Mistake] = []
    while len(made) < count:
        name = names[len(made) % len(names)]
        stack = pick.choice([stack for stack in STACKS if name in stack])
        made.append(next(mistakes(stack, stack.index(name), pick)))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=600, help="Number of mistakes")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the choice of mistakes")
    parser.add_argument("--verbose", action="store_true", help="Prints every error")
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        for mistake in sample(options.count, options.seed):
            outcome, text = run(mistake, Path(name))
            outcomes[outcome] += 1
            if options.verbose or outcome == "FAILED":
                where = mistake.option or mistake.stack[mistake.layer]
                print(f"{outcome}: {mistake.description} ({where})\n    {text}", flush=True)
    print(", ".join(f"{outcome}: {count}" for outcome, count in outcomes.items()))
    sys.exit("FAILED" in outcomes)


if __name__ == "__main__":
    main()
