"""Runs a page of documentation as its reader would, from top to bottom, in a folder of its own.

| fence | |
|---|---|
| `python` | runs; all programs of a page share their names |
| `python title="my_model.py"`, also `json` | is written into that file |
| `text`, right after a program | what it prints: the same words, and numbers near to these |
| `bash` | runs; `dcpc` commands are made small |
| `console` | commands after `$ `, each followed by what it prints; `...` is anything |

A page that shows no output runs with few sweeps.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcpc.training.command import main

ROOT = Path(__file__).parents[1]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<kind>\w+)(?: title=\"(?P<title>[^\"]+)\")?[^\n]*\n"
    r"(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?$")
FEW_SWEEPS = "num_sweeps=20"

HELD_OUT = [
    "--model.held_out.num_temperatures=3",
    "--model.held_out.test_temperatures=3",
    "--model.held_out.num_particles=2",
    "--data.evaluation_batch_size=20",
    *(f"--trainer.limit_{part}_batches=1" for part in ("val", "test", "predict")),
]
SHORT = ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1"]
MAX_EPOCHS = 2
SMALL_CONFIGS = ("digits", "networks/two-moons", "networks/digits")
"""Shipped configs whose commands run; the options of others are parsed only."""


@dataclass(frozen=True)
class Fence:
    """A block of code on a page.

    Attributes:
        kind: Its language.
        text: What it holds.
        title: The file that it is; empty for none.
        output: What it prints, where the page shows it.
    """

    kind: str
    text: str
    title: str = ""
    output: str = ""


def fences(markdown: str) -> list[Fence]:
    """The blocks of code of a page."""
    found: list[Fence] = []
    end = 0
    for match in FENCE.finditer(markdown):
        text = textwrap.dedent(match["text"])
        follows = not markdown[end : match.start()].strip()
        if match["kind"] == "text" and follows and found and found[-1].kind == "python":
            found[-1] = Fence("python", found[-1].text, output=text)
        else:
            found.append(Fence(match["kind"], text, match["title"] or ""))
        end = match.end()
    return found


def commands(text: str) -> list[str]:
    """The commands of a `bash` block: a line each, or several that end in a backslash."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    stripped = (re.sub(r"\s+# .*$", "", line).strip() for line in lines)
    return [line for line in stripped if line and not line.startswith("#")]


@dataclass
class Page:
    """A page that runs in the present folder, which has to be empty.

    Attributes:
        path: The page.
        names: Names that its programs have defined.
    """

    path: Path
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})

    def run(self) -> None:
        """Runs everything on the page."""
        Path("configs").symlink_to(ROOT / "configs")
        blocks = fences(self.path.read_text())
        as_written = any(block.output for block in blocks)
        with importable(Path.cwd()):
            for block in blocks:
                if block.title:
                    Path(block.title).write_text(block.text)
                elif block.kind == "python":
                    self.run_program(block, as_written)
                elif block.kind == "bash":
                    for command in commands(block.text):
                        run_command(command)
                elif block.kind == "console":
                    check_console(block.text)

    def run_program(self, block: Fence, as_written: bool) -> None:
        """Runs a program, and compares what it prints."""
        text = block.text if as_written else re.sub(r"num_sweeps=[\d_]+", FEW_SWEEPS, block.text)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(text, str(self.path), "exec"), self.names)
        if block.output:
            differs = difference(block.output, printed.getvalue())
            assert not differs, f"{self.path}: {differs}\n{printed.getvalue()}"


def difference(shown: str, printed: str) -> str:
    """The first line of a shown output that is not what was printed; empty for none.

    A line `...` stands for any lines. Numbers may differ by a fifth, or .03.
    """
    rest = [line for line in printed.splitlines() if line.strip()]
    skips = False
    for line in filter(str.strip, shown.splitlines()):
        if line.strip() == "...":
            skips = True
            continue
        while skips and rest and not same_line(line, rest[0]):
            rest = rest[1:]
        if not rest or not same_line(line, rest[0]):
            return f"shown {line!r}, printed {rest[0] if rest else ''!r}"
        rest, skips = rest[1:], False
    return "" if skips or not rest else f"printed {rest[0]!r}, which is not shown"


def same_line(shown: str, printed: str) -> bool:
    """Whether two lines have the same words, and numbers near to each other."""
    a, b = (re.findall(r"[^\s,()\[\]{}|'\":;=%]+", line) for line in (shown, printed))
    return len(a) == len(b) and all(map(_same_word, a, b))


def _same_word(shown: str, printed: str) -> bool:
    if NUMBER.match(shown) and NUMBER.match(printed):
        return math.isclose(float(shown), float(printed), rel_tol=0.2, abs_tol=0.03)
    return shown == printed


def run_command(command: str) -> None:
    """Runs a command of a page; training is short, and what needs a download is parsed only."""
    words = shlex.split(command)
    if words[0] == "dcpc":
        output, status = dcpc(words[1:])
        assert status == 0, f"{command}\n{output}"
    elif words[:2] == ["python", "-m"]:
        with set_arguments([words[2], *words[3:], "--help"]), contextlib.suppress(SystemExit):
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    elif words[0] not in ("tensorboard", "pip", "pytest"):
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def check_console(text: str) -> None:
    """Runs the `$ ` commands of a block and looks for the lines below each in its output."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, *shown = part.strip().splitlines()
        output, _ = dcpc(shlex.split(command)[1:])
        pieces = map(re.escape, map(_flat, "".join(shown).split("...")))
        assert re.search(".*".join(pieces), _flat(output)), f"{command}\n{output}"


def _flat(text: str) -> str:
    """Text without blanks: terminals wrap lines where they like."""
    return re.sub(r"\s+", "", text)


def dcpc(arguments: list[str]) -> tuple[str, int]:
    """Output and exit status of a `dcpc` command, made small."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            main(small(arguments))
        except SystemExit as stopped:
            return printed.getvalue(), int(stopped.code or 0)
    return printed.getvalue(), 0


def small(arguments: list[str]) -> list[str]:
    """The arguments with short training and evaluation, which those of the page override."""
    configs = [i + 1 for i, word in enumerate(arguments) if word == "--config"]
    if not configs:
        return arguments
    files = [arguments[i] for i in configs]
    if any(
        name.startswith("configs/") and name not in [f"configs/{c}.json" for c in SMALL_CONFIGS]
        for name in files
    ):
        return [*arguments, "--print_config"]
    options = [] if "networks" in files[0] else HELD_OUT
    options = options + (SHORT if arguments[0] == "fit" else [])
    last = configs[-1] + 1
    rest = [
        str(min(int(word), MAX_EPOCHS)) if before == "--trainer.max_epochs" else word
        for before, word in itertools.pairwise(arguments[last - 1 :])
    ]
    return [*arguments[:last], *options, *rest]


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Modules of a folder can be imported here, and are forgotten afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if getattr(sys.modules[name], "__file__", None) == str(folder / f"{name}.py"):
                del sys.modules[name]


@contextlib.contextmanager
def set_arguments(arguments: list[str]) -> Iterator[None]:
    """The arguments of a program, `sys.argv`."""
    kept, sys.argv = sys.argv, arguments
    try:
        yield
    finally:
        sys.argv = kept
