"""Runs that stop anywhere, by steps, time or signals, go on as if they had not."""

from __future__ import annotations

import functools
import io
import os
import re
import signal
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from resumable_runs import NUM_STEPS, SCHEDULER, SETTINGS, assert_continues, run

from dcpc.training import cli

UNMEASURED = "--trainer.limit_val_batches=0"
"""What a run learns does not depend on whether it is measured on the way."""


class Signalling(Callback):
    """Sends a signal to this process at a given batch, or at a given one of validation."""

    def __init__(self, number: int, batch: int, in_validation: bool = False) -> None:
        self.number = number
        self.batch = batch
        self.in_validation = in_validation

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if not self.in_validation and trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        is_due = trainer.fit_loop.total_batch_idx == self.batch and trainer.state.fn == "fit"
        if self.in_validation and is_due:
            os.kill(os.getpid(), self.number)


class Stopping(Callback):
    """Asks the trainer to stop after a given batch, as Lightning's timer does."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop |= trainer.fit_loop.total_batch_idx == self.batch


class Whole(NamedTuple):
    """The checkpoint of a run that is not stopped, and what it has printed of its measurements."""

    checkpoint: dict[str, Any]
    measured: list[str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    """Runs that are not stopped, one for each of the settings."""
    folder = tmp_path_factory.mktemp("whole")

    def of(name: str) -> Whole:
        with redirect_stdout(io.StringIO()) as said:
            checkpoint = run(folder / name, name, *SCHEDULER)
        return Whole(checkpoint, held_out(said.getvalue()))

    return functools.cache(of)


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs `dcpc fit` with a callback, and returns its checkpoint."""
    make = cli.TrainingCLI.instantiate_trainer

    def fit(
        name: str, folder: str, *options: str, callback: Callback | None = None
    ) -> dict[str, Any]:
        def with_callback(cli: Any, **kwargs: Any) -> Trainer:
            trainer = make(cli, **kwargs)
            if callback is not None:
                trainer.callbacks.insert(0, callback)
            return trainer

        torch.manual_seed(len(options))  # nothing may depend on it
        with monkeypatch.context() as patched:
            patched.setattr(cli.TrainingCLI, "instantiate_trainer", with_callback)
            return run(tmp_path / folder, name, *options)

    return fit


def exit_status(call: Callable[[], Any]) -> int:
    with pytest.raises(SystemExit) as stopped:
        call()
    return stopped.value.code


def grid(*quick: tuple[str, int]) -> list[Any]:
    """Settings and steps: a few, and all others in slow tests."""
    steps = range(2 * NUM_STEPS)
    others = [(name, step) for name in SETTINGS for step in steps if (name, step) not in quick]
    return [*quick, *(pytest.param(*case, marks=pytest.mark.slow) for case in others)]


@pytest.mark.parametrize(
    ("name", "step"), grid(("dcpc", 6), ("lpc", 1), ("ipc", 2 * NUM_STEPS - 1))
)
def test_a_run_that_is_signalled_goes_on_as_if_it_had_not(
    name: str,
    step: int,
    fit: Callable,
    whole: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    stop = Signalling(signal.SIGTERM, step)
    assert exit_status(lambda: fit(name, "stopped", *SCHEDULER, callback=stop)) == 143
    link = tmp_path / "stopped" / "last.ckpt"
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("stopped by SIGTERM after step ")
    assert said.endswith(f"go on with --ckpt_path {link}")
    saved = torch.load(link, weights_only=True)
    assert saved["dcpc"]["num_steps"] == step + 1
    assert_continues(
        whole(name).checkpoint, fit(name, "stopped", *SCHEDULER, f"--ckpt_path={link}")
    )


@pytest.mark.parametrize(("name", "step"), grid(("dcpc", 0), ("lpc", 3), ("ipc", NUM_STEPS)))
def test_a_run_that_a_callback_stops_within_an_epoch_goes_on_as_if_it_had_not(
    name: str, step: int, fit: Callable, whole: Callable, tmp_path: Path
) -> None:
    options = (*SCHEDULER, UNMEASURED)
    fit(name, "stopped", *options, callback=Stopping(step))
    link = f"--ckpt_path={tmp_path / 'stopped' / 'last.ckpt'}"
    assert_continues(whole(name).checkpoint, fit(name, "stopped", *options, link))


def test_a_run_in_double_precision_goes_on_as_if_it_had_not_stopped(
    fit: Callable, tmp_path: Path
) -> None:
    """Its weights are loaded into a model that was made in single precision."""
    double = ("--trainer.precision=64-true", UNMEASURED)
    whole = fit("dcpc", "whole", *double)
    assert all(value.dtype == torch.float64 for value in whole["state_dict"].values())
    fit("dcpc", "stopped", *double, callback=Stopping(6))
    link = f"--ckpt_path={tmp_path / 'stopped' / 'last.ckpt'}"
    assert_continues(whole, fit("dcpc", "stopped", *double, link))


@pytest.mark.parametrize("name", ["dcpc", "ipc"])
def test_a_run_that_has_its_steps_goes_on_as_if_it_had_more(
    name: str, fit: Callable, whole: Callable, tmp_path: Path
) -> None:
    options = (*SCHEDULER, UNMEASURED)
    fit(name, "stopped", *options, "--trainer.max_steps=8")
    link = f"--ckpt_path={tmp_path / 'stopped' / 'last.ckpt'}"
    assert_continues(whole(name).checkpoint, fit(name, "stopped", *options, link))


@pytest.mark.parametrize("name", ["dcpc", "ipc"])
def test_a_run_that_is_signalled_while_it_validates_goes_on_with_the_next_epoch(
    name: str, fit: Callable, whole: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint, measured = whole(name)
    assert len(measured) == 4
    stop = Signalling(signal.SIGHUP, NUM_STEPS - 1, in_validation=True)
    assert exit_status(lambda: fit(name, "stopped", *SCHEDULER, callback=stop)) == 129
    link = f"--ckpt_path={tmp_path / 'stopped' / 'last.ckpt'}"
    capsys.readouterr()
    assert_continues(checkpoint, fit(name, "stopped", *SCHEDULER, link))
    # Nothing is measured on the rest of the data that the signal has cut off.
    assert held_out(capsys.readouterr().out) == measured[2:]


def held_out(said: str) -> list[str]:
    """The lines that a run has printed of its measurements."""
    return [line for line in said.splitlines() if line.startswith("epoch ")]


def test_an_interrupt_from_the_keyboard_saves_too(fit: Callable, tmp_path: Path) -> None:
    stop = Signalling(signal.SIGINT, 2)
    assert exit_status(lambda: fit("dcpc", "stopped", UNMEASURED, callback=stop)) == 130
    saved = torch.load(tmp_path / "stopped" / "last.ckpt", weights_only=True)
    assert saved["dcpc"]["num_steps"] == 3
    assert not list((tmp_path / "stopped").rglob("particles-*"))


@pytest.mark.parametrize(
    ("hook", "number", "status", "line"),
    [
        ("setup", signal.SIGTERM, 143, "stopped by SIGTERM before anything was saved"),
        ("on_validation_start", signal.SIGINT, 130, "stopped by SIGINT before anything was saved"),
        ("on_train_end", signal.SIGHUP, 129, "stopped by SIGHUP after step 5, epoch 1; go on .*"),
        ("on_fit_end", signal.SIGHUP, 129, "stopped by SIGHUP after the last checkpoint"),
    ],
)
def test_a_signal_while_nothing_is_learned_is_one_line(
    hook: str,
    number: int,
    status: int,
    line: str,
    fit: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """While the model is set up or first measured, or when all was saved."""
    callback = Callback()
    setattr(callback, hook, lambda *_, **__: os.kill(os.getpid(), number))
    options = ["--trainer.max_epochs=1"] + [UNMEASURED] * hook.endswith("_end")
    assert exit_status(lambda: fit("dcpc", "stopped", *options, callback=callback)) == status
    said = capsys.readouterr()
    assert re.fullmatch(line, said.out.splitlines()[-1])
    assert "Traceback" not in said.err
    assert (tmp_path / "stopped" / "last.ckpt").exists() == (hook in ("on_train_end", "on_fit_end"))
