"""Forked processes, which have imported everything that this one has."""

from __future__ import annotations

import os
from collections.abc import Callable


def child(call: Callable[[], object]) -> int:
    """Runs something in a forked process, silently; its number."""
    number = os.fork()
    if number:
        return number
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        call()
    except BaseException:
        os._exit(1)
    os._exit(0)


def wait(number: int) -> int:
    """The exit status of a process; minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
