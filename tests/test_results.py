"""The commands of the results and of the experiments, beyond what `test_docs` runs of them."""

from __future__ import annotations

import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pages import HELD_OUT, ROOT, SHORT, commands, fences
from PIL import Image

from dcpc.training.command import main

FEW_IMAGES = ["--data.batch_size=8", "--data.num_held_out=2", "--trainer.log_every_n_steps=1"]
COMMANDS = {
    page: [
        command
        for block in fences((ROOT / "docs" / page).read_text())
        if block.kind == "bash"
        for command in commands(block.text)
    ]
    for page in ("results.md", "guides/experiments.md")
}
ALL = [command for page in COMMANDS.values() for command in page]
BENCHMARKS = [c for c in ALL if c.startswith("python -m experiments.benchmarks.")]
EXPERIMENTS = [c for c in ALL if c.startswith("python -m experiments.") and c not in BENCHMARKS]
SLOW_TESTS = [c for c in ALL if c.startswith("pytest ")]


def test_the_commands_of_the_experiments_run_on_a_folder_of_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "huggingface")
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (20, 28, 28))):
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    training = [c for c in COMMANDS["guides/experiments.md"] if c.startswith("dcpc fit")]
    assert len(training) >= 2
    for command in training:
        words = shlex.split(command)
        main([*words[1:], *HELD_OUT, *SHORT, *FEW_IMAGES, f"--data.path={folder.parent}"])
        assert (tmp_path / "runs" / "mnist" / Path(words[5]).stem / "last.ckpt").exists()


@pytest.mark.parametrize("command", [*BENCHMARKS, *dict.fromkeys(EXPERIMENTS), *SLOW_TESTS])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # by other tests
def test_what_a_page_names_exists(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(command)
    if words[0] == "pytest":
        assert (ROOT / words[-1]).exists()
        return
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [words[2], *words[3:], "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    assert not stopped.value.code
    assert "usage" in capsys.readouterr().out


def test_every_result_has_its_command() -> None:
    results = (ROOT / "docs" / "results.md").read_text()
    for section in results.split("\n## ")[1:]:
        assert "```bash" in section, section.splitlines()[0]
    known = (*BENCHMARKS, *EXPERIMENTS, *SLOW_TESTS)
    rest = [c for c in ALL if c not in known and not c.startswith(("dcpc ", "pip install "))]
    assert rest == []
    assert len(BENCHMARKS) == 5


@pytest.mark.slow
@pytest.mark.parametrize("command", BENCHMARKS)
def test_the_benchmarks_of_the_results_run(command: str) -> None:
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
