"""Runs that are killed at any moment, saves included, leave a checkpoint that continues exactly."""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from forks import child, skip_without_autograd, wait
from resumable_runs import assert_continues, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, kills and /dev/shm")

OPTIONS = ("--trainer.max_epochs=8", "--trainer.limit_val_batches=0")


def attempt(folder: Path, seconds: float | None, elsewhere: bool) -> int:
    """Starts or resumes a run, and kills it after a while; its exit status."""
    link = folder / "last.ckpt"
    resumes = [f"--ckpt_path={link}"] if link.exists() else []

    def fit() -> None:
        if elsewhere:  # on another file system
            tempfile.tempdir = "/dev/shm"
        run(folder, "dcpc", *OPTIONS, *resumes)

    number = child(fit)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(number, signal.SIGKILL)
    return wait(number)


@pytest.mark.parametrize(
    "num_kills",
    [3, pytest.param(20, marks=pytest.mark.slow), pytest.param(60, marks=pytest.mark.slow)],
)
def test_killed_runs_go_on_bit_for_bit_and_leave_nothing_behind(
    num_kills: int, tmp_path: Path
) -> None:
    skip_without_autograd()
    started = time.perf_counter()
    assert wait(child(lambda: run(tmp_path / "whole", "dcpc", *OPTIONS))) == 0
    duration = time.perf_counter() - started
    whole = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)
    chance = random.Random(0)
    folder, num_runs, done = tmp_path / "run-0", 0, 0
    has_saved, num_continued = False, 0  # before a kill; runs that did
    while done < num_kills or not num_continued:
        status = attempt(folder, chance.uniform(0.2, 1.0) * duration, elsewhere=bool(done % 2))
        done += status == -signal.SIGKILL
        link = folder / "last.ckpt"
        if link.exists():
            saved = torch.load(link, weights_only=True)
            assert saved["dcpc"]["particles"]["visited"].all()
        has_saved |= status == -signal.SIGKILL and link.exists()
        if status == 0 or done % 4 == 0 or done >= num_kills:
            assert attempt(folder, None, elsewhere=False) == 0
            assert_continues(whole, torch.load(link, weights_only=True))
            left = [path for path in folder.rglob("*") if "particles-" in path.name]
            left += list(folder.rglob(".*.incomplete"))
            assert not left
            num_continued += has_saved
            num_runs, has_saved = num_runs + 1, False
            folder = tmp_path / f"run-{num_runs}"
    assert num_continued >= num_kills // 5
