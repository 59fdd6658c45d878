"""Every command and every example of the README runs."""

import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dcpc.training.command import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EVALUATION = [
    "--model.held_out.num_temperatures=3",
    "--model.held_out.test_temperatures=3",
    "--model.held_out.num_particles=2",
    "--data.evaluation_batch_size=20",
    *(f"--trainer.limit_{part}_batches=1" for part in ("val", "test", "predict")),
]
SMALL = ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1", *EVALUATION]
FEW_IMAGES = ["--data.batch_size=8", "--data.num_held_out=2", "--trainer.log_every_n_steps=1"]


def blocks(language: str) -> list[str]:
    """Fenced code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    """The README's commands, line by line."""
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


def table_commands() -> list[str]:
    """The commands in the last column of the table of results."""
    return re.findall(r"\| `((?:dcpc|python|pytest) [^`]+)` \|$", README, flags=re.MULTILINE)


def steps(command: str) -> list[str]:
    return [step.strip() for step in command.split("&&")]


INSTALLS = [command for command in commands() if "pip install" in command]
BENCHMARKS = [command for command in table_commands() if "experiments.benchmarks" in command]
EXPERIMENTS = [
    command
    for command in (*commands(), *table_commands())
    if command.startswith("python -m experiments.") and command not in BENCHMARKS
]
SLOW_TESTS = [command for command in table_commands() if command.startswith("pytest ")]


def run(command: list[str], folder: Path) -> None:
    """Runs a command in a folder; a failure shows its output."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture
def dcpc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a `dcpc` command of the README in a folder with the configs, made small.

    That the installed script calls `main` is tested on the wheel.
    """
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)

    def run_small(command: str, *small: str) -> None:
        words = shlex.split(command)
        assert words[0] == "dcpc"
        main([*words[1:], *small])

    return run_small


def test_the_readme_has_one_line_that_installs_and_trains_and_one_that_installs_and_tests() -> None:
    last = [steps(command)[-1] for command in INSTALLS]
    assert last == ["dcpc fit --config configs/digits.json", "pytest"]


def test_the_training_commands_of_the_readme_run_one_after_the_other(
    dcpc: Callable[..., None], tmp_path: Path
) -> None:
    ran = 0
    for command in commands():
        if "configs/digits.json" not in command or command in INSTALLS:
            continue
        dcpc(command, *(SMALL if command.startswith("dcpc fit") else EVALUATION))
        ran += 1
    assert ran >= 4
    assert (tmp_path / "runs" / "digits" / "last.ckpt").exists()


def test_the_commands_of_the_experiments_run_on_a_folder_of_pictures(
    dcpc: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "huggingface")
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (20, 28, 28))):
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    experiments = [c for c in commands() if c.startswith("dcpc fit --config configs/mnist")]
    assert len(experiments) >= 2
    for command in experiments:
        dcpc(command, *SMALL, *FEW_IMAGES, f"--data.path={folder.parent}")
        algorithm = Path(shlex.split(command)[5])
        assert (tmp_path / "runs" / "mnist" / algorithm.stem / "last.ckpt").exists()


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated:DeprecationWarning")
def test_tensorboard_takes_the_command_of_the_readme() -> None:
    (command,) = [c for c in commands() if c.startswith("tensorboard")]
    from tensorboard import program  # says so when it is imported

    board = program.TensorBoard()
    board.configure(shlex.split(command))
    assert board.flags.logdir == "runs"


def test_the_example_of_the_readme_runs_and_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    example, _ = blocks("python")
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    posterior = names["posterior"]
    # posteriordb's reference: mu 4.41 +- 3.30, tau 3.60 +- 3.20; 1000 particles.
    assert abs(float(posterior.mean()["mu"]) - 4.41) < 4 * 3.30 / 1000**0.5
    assert abs(float(posterior.mean()["tau"]) - 3.60) < 4 * 3.20 / 1000**0.5
    assert "log evidence" in capsys.readouterr().out


def test_the_example_of_a_network_learns() -> None:
    _, example = blocks("python")
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert float(names["accuracy"]) > 0.9


def test_the_command_of_the_networks_draws_the_boundary(
    dcpc: Callable[..., None], tmp_path: Path
) -> None:
    (command,) = [c for c in commands() if "configs/networks" in c]
    dcpc(command, "--trainer.max_epochs=1")
    assert (tmp_path / "runs" / "networks" / "two-moons" / "decision_boundary.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", BENCHMARKS)
def test_the_benchmarks_of_the_readme_run(command: str) -> None:
    words = shlex.split(command)
    run([sys.executable, *words[1:]], ROOT)


@pytest.mark.slow
def test_the_two_commands_install_and_run_from_a_fresh_clone(tmp_path: Path) -> None:
    for number, command in enumerate(INSTALLS):
        clone = tmp_path / str(number)
        run(["git", "clone", "--quiet", str(ROOT), str(clone)], tmp_path)
        run(["bash", "-c", command], clone)


@pytest.mark.parametrize("command", [*BENCHMARKS, *EXPERIMENTS, *SLOW_TESTS])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # by other tests
def test_what_the_readme_names_exists(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(command)
    if words[0] == "pytest":
        assert (ROOT / words[-1]).exists()
        return
    assert words[:2] == ["python", "-m"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [words[2], *words[3:], "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    assert not stopped.value.code
    assert "usage" in capsys.readouterr().out


def test_every_command_of_the_readme_is_covered_here() -> None:
    known = (*INSTALLS, *BENCHMARKS, *EXPERIMENTS, *SLOW_TESTS)
    everything = [*commands(), *table_commands()]
    rest = [c for c in everything if c not in known and not c.startswith(("dcpc ", "tensorboard "))]
    assert rest == []
    assert {notebook for notebook in re.findall(r"\((notebooks/\w+\.ipynb)\)", README)} == {
        f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")
    }
    assert len(BENCHMARKS) == 5
    assert set(c for c in table_commands() if c.startswith("dcpc ")) <= set(commands())
