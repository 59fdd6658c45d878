"""Signals that end a training run: the first asks it to save and stop, a second kills it."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from dcpc.training.processes import is_first_process

__all__ = ["Signals"]

HANDLED = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)


class Signals:
    """Notes SIGTERM, SIGINT and SIGHUP for as long as the block of code lasts.

    While nobody waits for them, the first one ends the process by `SystemExit`, and a line says so.
    The exit status is the shell's, 128 plus the signal's number. Only the main thread may handle
    signals; in any other one this does nothing.

    Attributes:
        received: The first signal; None before.
        are_awaited: Whether somebody looks at `received` and stops in time.
        have_saved: Whether the run has saved a checkpoint.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.are_awaited = False
        self.have_saved = False
        self._ended_at_once = False
        self._before: dict[int, Any] = {}

    @property
    def exit_status(self) -> int:
        """Status to exit with after a signal."""
        assert self.received is not None
        return 128 + self.received

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in HANDLED}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._ended_at_once and is_first_process():
            assert self.received is not None
            when = "after the last checkpoint" if self.have_saved else "before anything was saved"
            print(f"stopped by {self.received.name} {when}")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        if not self.are_awaited:
            self._ended_at_once = True
            raise SystemExit(self.exit_status)
