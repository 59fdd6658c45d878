"""Every command and the example of the README run."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from pages import HELD_OUT, ROOT, SHORT, commands, difference, fences

from dcpc.training.command import main

README = (ROOT / "README.md").read_text()
COMMANDS = [
    command for block in fences(README) if block.kind == "bash" for command in commands(block.text)
]
INSTALLS = [command for command in COMMANDS if "pip install" in command]
TRAINING = [command for command in COMMANDS if command.startswith("dcpc ")]
(EXAMPLE,) = [block for block in fences(README) if block.kind == "python"]


def test_the_readme_fits_a_hundred_lines() -> None:
    assert len(README.splitlines()) <= 100


def test_the_readme_has_one_line_that_installs_and_trains_and_one_that_installs_and_tests() -> None:
    last = [command.split("&&")[-1].strip() for command in INSTALLS]
    assert last == ["dcpc fit --config configs/digits.json", "pytest"]


def test_the_training_commands_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    kinds = []
    for command in TRAINING:
        words = shlex.split(command)
        main([*words[1:], *HELD_OUT, *(SHORT if words[1] == "fit" else [])])
        kinds.append(words[1])
    assert kinds == ["fit", "test", "predict"]
    assert (tmp_path / "runs" / "digits" / "last.ckpt").exists()


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated:DeprecationWarning")
def test_tensorboard_takes_the_command_of_the_readme() -> None:
    (command,) = [c for c in COMMANDS if c.startswith("tensorboard")]
    from tensorboard import program  # says so when it is imported

    board = program.TensorBoard()
    board.configure(shlex.split(command))
    assert board.flags.logdir == "runs"


def test_the_example_is_right_and_prints_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    exec(compile(EXAMPLE.text, "README.md", "exec"), names)
    posterior = names["posterior"]
    # posteriordb's reference: mu 4.41 +- 3.30, tau 3.60 +- 3.20; 1000 particles.
    assert abs(float(posterior.mean()["mu"]) - 4.41) < 4 * 3.30 / 1000**0.5
    assert abs(float(posterior.mean()["tau"]) - 3.60) < 4 * 3.20 / 1000**0.5
    assert difference(EXAMPLE.output, capsys.readouterr().out) == ""


def test_the_landing_page_has_the_same_example() -> None:
    landing = fences((ROOT / "docs" / "index.md").read_text())
    (example,) = [block for block in landing if block.kind == "python"]
    assert example == EXAMPLE


def test_every_command_of_the_readme_is_covered_here() -> None:
    rest = [c for c in COMMANDS if c not in (*INSTALLS, *TRAINING)]
    assert rest == ["tensorboard --logdir runs"]


@pytest.mark.slow
def test_the_two_commands_install_and_run_from_a_fresh_clone(tmp_path: Path) -> None:
    for number, command in enumerate(INSTALLS):
        clone = tmp_path / str(number)
        run(["git", "clone", "--quiet", str(ROOT), str(clone)], tmp_path)
        run(["bash", "-c", command], clone)


def run(command: list[str], folder: Path) -> None:
    """Runs a command in a folder; a failure shows its output."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
