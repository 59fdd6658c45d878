"""The progress line of a run, as a terminal shows it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pytorch_lightning.callbacks import Timer

from dcpc.training.callbacks import RunProgress
from dcpc.training.run_length import fractions_done

pty = pytest.importorskip("pty")  # of POSIX systems
termios = pytest.importorskip("termios")

MODULE: Any = None


class Terminal(StringIO):
    """A terminal, with what of a stream it would show: `text` reads the bytes as one does."""

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        return shown(self.getvalue())


class Error(Terminal):
    """The other stream of a terminal."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__()
        self.write = terminal.write  # type: ignore[method-assign]


def shown(written: str) -> list[str]:
    """The lines of a terminal after carriage returns, line feeds, and moves of one line up."""
    lines: list[list[str]] = [[]]
    row = column = 0
    for part in re.findall(r"\x1b\[A|\x1b\[K|.|\n", written.replace("\r\n", "\n\r")):
        if part == "\n":
            row, column = row + 1, 0
            lines += [[]] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part == "\x1b[A":
            row -= 1
        elif part == "\x1b[K":
            lines[row] = lines[row][:column]
        else:
            line = lines[row] + [" "] * (column + 1 - len(lines[row]))
            line[column] = part
            lines[row], column = line, column + 1
    return [line for line in ("".join(part).rstrip() for part in lines) if line]


def fake_trainer(**state: Any) -> Any:
    """What a trainer says of a run: ten batches an epoch, ten epochs."""
    known = {
        "max_epochs": 10,
        "max_steps": -1,
        "num_training_batches": 10,
        "num_val_batches": [4],
        "current_epoch": 0,
        "global_step": 0,
        "callbacks": [],
        "progress_bar_metrics": {"train/loss": 1.25},
        "is_global_zero": True,
    }
    loop = SimpleNamespace(total_batch_idx=-1)
    return SimpleNamespace(**{**known, "fit_loop": loop, **state})


def after(trainer: Any, num_batches: int) -> Any:
    trainer.fit_loop.total_batch_idx = num_batches - 1
    trainer.current_epoch = (num_batches - 1) // 10
    return trainer


def test_a_run_is_as_far_as_each_of_its_limits_says() -> None:
    timer = Timer(duration={"seconds": 40})
    timer._offset = 10  # of the run that is resumed; the clock has not started
    trainer = fake_trainer(max_steps=50, global_step=20, callbacks=[timer])
    assert fractions_done(trainer, 30) == pytest.approx([30 / 100, 20 / 50, 10 / 40])
    assert fractions_done(fake_trainer(max_epochs=-1), 30) == []
    assert fractions_done(fake_trainer(), 130) == [1.0]


def run_lines(
    monkeypatch: pytest.MonkeyPatch, trainer: Any, batches: list[tuple[int, float]], start: int = 0
) -> str:
    """The last line of a run, of which so many batches are done after so many seconds."""
    clock = [0.0]
    monkeypatch.setattr("time.time", lambda: clock[0])
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    terminal = Terminal()
    progress = RunProgress()
    with redirect_stdout(terminal), redirect_stderr(terminal):
        progress.on_train_start(after(trainer, start), MODULE)
        for num_batches, seconds in batches:
            clock[0] = seconds
            progress.on_train_epoch_start(after(trainer, num_batches), MODULE)
            progress.on_train_epoch_end(trainer, MODULE)
        last = terminal.lines[-1]
        progress.on_train_end(trainer, MODULE)
    return last


def test_the_time_to_go_is_that_of_the_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    line = run_lines(monkeypatch, fake_trainer(), [(10, 5.0), (20, 12.0)])
    # A fifth of the run took 12 seconds, so that four fifths will take 48.
    assert re.fullmatch(r"epoch 2/10 +20%\|.+\| \[00:12<00:48, loss 1\.25\]", line)


def test_a_resumed_run_reckons_with_what_it_has_done_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = run_lines(monkeypatch, fake_trainer(), [(60, 20.0)], start=50)
    # Ten batches took 20 seconds, and 40 are left.
    assert re.fullmatch(r"epoch 6/10 +60%\|.+\| \[00:20<01:20, loss 1\.25\]", line)


def test_the_limit_that_is_reached_first_sets_the_time_to_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = fake_trainer(max_steps=25, global_step=0)
    trainer_steps = [(10, 10.0)]

    def step(*_: Any) -> None:
        trainer.global_step = 10

    monkeypatch.setattr(RunProgress, "on_train_epoch_start", step)
    line = run_lines(monkeypatch, trainer, trainer_steps)
    # A step a second: 15 steps are left, and 90 batches.
    assert "[00:10<00:15" in line
    assert " 40%" in line


def test_a_run_without_an_end_has_no_time_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    line = run_lines(monkeypatch, fake_trainer(max_epochs=-1), [(20, 12.0)])
    assert line == "epoch 2 [00:12, loss 1.25]"


def test_whatever_is_printed_appears_above_the_lines_as_it_was() -> None:
    terminal = Terminal()
    progress, trainer = RunProgress(), fake_trainer()
    with redirect_stdout(terminal), redirect_stderr(Error(terminal)):
        outer = sys.stdout
        progress.on_train_start(trainer, MODULE)
        progress.on_validation_start(trainer, MODULE)
        print("a report")
        print("an error", file=sys.stderr)
        sys.stdout.write("half a line")
        sys.stdout.write(", and its end\n")
        during = terminal.lines
        progress.on_validation_end(trainer, MODULE)
        progress.on_train_end(trainer, MODULE)
        assert sys.stdout is outer
        print("after it")
    printed = ["a report", "an error", "half a line, and its end"]
    assert during[:3] == terminal.lines[:3] == printed
    assert during[3].startswith("epoch 1/10")
    assert during[4].startswith("measuring held-out data, batch 0/4")
    assert terminal.lines[3].startswith("epoch 1/10")
    assert terminal.lines[4:] == ["after it"]


def test_an_error_finds_no_line_in_its_way() -> None:
    terminal = Terminal()
    progress, trainer = RunProgress(), fake_trainer()
    with redirect_stdout(terminal), redirect_stderr(terminal):
        progress.on_train_start(trainer, MODULE)
        progress.on_exception(trainer, MODULE, RuntimeError())
        print("dcpc: error: this")
    assert terminal.lines == ["dcpc: error: this"]


OPTIONS = (
    "--config=configs/digits.json",
    "--data.num_held_out=1700",
    "--model.held_out.num_temperatures=2",
    "--model.held_out.test_temperatures=2",
    "--model.compile=false",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
    "--trainer.log_every_n_steps=1",
    "--trainer.max_epochs=3",
    "--trainer.check_val_every_n_epoch=1",
)


def dcpc(*arguments: str) -> list[str]:
    main = "from dcpc.training.command import main; main()"
    return [sys.executable, "-c", main, *arguments]


@pytest.mark.parametrize("size", [(40, 100), (0, 0)], ids=["of 100 columns", "of unknown size"])
def test_a_terminal_shows_the_reports_of_a_run_and_one_line(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, size)
    command = dcpc("fit", *OPTIONS, f"--trainer.default_root_dir={tmp_path}")
    with subprocess.Popen(command, stdout=slave, stderr=slave) as process:
        os.close(slave)
        written = b""
        while True:
            try:
                part = os.read(master, 4096)
            except OSError:  # its end, on Linux
                break
            if not part:
                break
            written += part
    os.close(master)
    assert process.returncode == 0
    *reports, line, checkpoint, comparison, advice = shown(written.decode())
    assert [report[:19] for report in reports] == [f"epoch   {n}: held-out" for n in range(4)]
    assert re.match(r"epoch 3/3 100%\|█+\| \[\d\d:\d\d<00:00, loss \S+", line)
    assert checkpoint.startswith("checkpoint: ")
    assert comparison.startswith("held-out evidence NLL")
    assert advice.startswith("next, with the same --config: dcpc predict")


def test_a_pipe_gets_no_line(tmp_path: Path) -> None:
    for subcommand in ("fit", "test"):
        command = dcpc(subcommand, *OPTIONS, f"--trainer.default_root_dir={tmp_path}")
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert "\r" not in done.stdout + done.stderr
        assert "%|" not in done.stdout + done.stderr
