"""One thread at a time in all that works on the state which a process has only once.

That is torch's default generator, Pyro's stack of effect handlers and its parameter store. Two
threads in them at once would run under each other's handlers and draw each other's numbers, so that
the second one is refused, whichever engine it uses. It is not made to wait: what unseeded threads
draw would depend on which comes first.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dcpc.errors import ThreadError

__all__ = ["exclusive"]


class _Turn:
    """A lock of one thread, and what that thread is in, from the outside in."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.calls: list[str] = []

    def renew_in_child(self) -> None:
        """Forgets, in a forked process, a thread of the parent that was at work."""
        if self.lock.acquire(blocking=False):  # this thread's own, or nobody's
            self.lock.release()
        else:
            self.lock, self.calls = threading.RLock(), []


_TURN = _Turn()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_TURN.renew_in_child)


@contextmanager
def exclusive(what: str) -> Iterator[None]:
    """A block of code, or a function, that one thread of the process runs at a time.

    Args:
        what: Name of what the user called.

    Raises:
        ThreadError: Another thread is in such a block.
    """
    if not _TURN.lock.acquire(blocking=False):
        other = next(iter(_TURN.calls), "an inference")
        raise ThreadError(
            f"{what} was called while another thread is in {other}: torch's random generator and "
            "Pyro's effect handlers belong to the whole process; call one after the other, or use "
            "processes (multiprocessing with 'spawn')"
        )
    try:
        _TURN.calls.append(what)
        yield
    finally:
        _TURN.calls.pop()
        _TURN.lock.release()
