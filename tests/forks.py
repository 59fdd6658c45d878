"""Forked processes, which have imported everything that this one has."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest
import torch

SILENCE = Path(os.devnull)


def skip_without_autograd() -> None:
    """Skips a test whose children learn, where torch refuses that in a forked process."""
    if torch.backends.cuda.is_built():
        pytest.skip("torch's builds for CUDA refuse autograd in a process forked after its use")


def child(call: Callable[[], object], out: Path = SILENCE, err: Path | None = None) -> int:
    """Runs something in a forked process; its number.

    Args:
        call: What to run. The process exits like a program whose only line this is.
        out: File of what it prints.
        err: File of what it prints to the standard error, traces included; None for this process's.
    """
    number = os.fork()
    if number:
        return number
    status = 1
    try:
        sys.stdout = _redirected(1, out)
        if err is not None:
            sys.stderr = _redirected(2, err)
        call()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        if err is not None:
            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _redirected(descriptor: int, path: Path) -> TextIO:
    """A standard stream that goes to a file, also what other programs print to it."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, descriptor)
    return os.fdopen(descriptor, "w", buffering=1, closefd=False)


def wait(number: int) -> int:
    """The exit status of a process; minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
