"""A function that is called again and again: plainly, then recorded, then compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dcpc.graphs.compiler import compile_recording
from dcpc.graphs.recording import NotRecordable, Recording, record
from dcpc.seeding import random_state_kept

__all__ = ["RECORD_AFTER", "Mode", "Tiered", "are_alike", "compile_seconds", "saved_seconds"]

Mode = Literal["auto"] | bool

RECORD_AFTER = 8
"""Calls after which a function is recorded where it is not known how many follow."""

WORTH_RECORDING = 100
"""Calls that make up for recording, which takes the time of some 50."""

SECONDS_PER_OPERATOR = 4e-6
SECONDS_PER_ELEMENT = 0.6e-9
SAVED_SHARE = 0.6
"""Time of a recording by its operators and the elements that they write, and share of it that
compiled code saves, on the slow side: `experiments.benchmarks.compiled_sweep` measures them."""

COMPILE_SECONDS = 5.0
COMPILE_SECONDS_PER_OPERATOR = 0.02
"""Time of compiling for the first time; from Inductor's cache it takes a twentieth."""

SHARE_ALIKE = 0.99
"""Share of the elements that must agree: rounding may turn a decision to accept."""


class Tiered:
    """A function of two trees of tensors that gets faster when it is called often.

    A recording gives the same numbers to the last bit, compiled code the same but for rounding. So
    whether a function is compiled does not depend on the clock, nor on what a disk holds: the same
    seed gives the same result.

    Args:
        function: The function, of trees of the same structure and shapes in every call.
        mode: True to compile it, `auto` to compile it where that pays.

    Attributes:
        refusal: Why it runs as it is written; empty if it does not, or not yet.
        is_compiled: Whether compiled code runs.
    """

    def __init__(self, function: Callable[[Any, Any], Any], mode: Mode) -> None:
        self.refusal = ""
        self.is_compiled = False
        self._function = function
        self._mode = mode
        self._recording: Recording | None = None
        self._num_calls = 0
        self._checks = 0

    @property
    def is_recorded(self) -> bool:
        """Whether a recording runs that was found to be right."""
        return self._checks > 0 and not self.refusal

    def __call__(
        self, settled: Any, moving: Any, num_expected: int, say: Callable[[str], None]
    ) -> Any:
        """The function's result.

        Args:
            settled: Its first argument.
            moving: Its second argument.
            num_expected: Number of calls that are known to come.
            say: Told what takes long, or what is not done and why.
        """
        self._num_calls += 1
        if self.refusal:
            return self._function(settled, moving)
        recording = self._recording
        if recording is None:
            if self._is_worth_recording(num_expected):
                return self._record(settled, moving, say)
            return self._function(settled, moving)
        if self._checks == 0:
            return self._check(recording, settled, moving, say)
        if not self.is_compiled and self._pays(recording, num_expected):
            say("compiling the sweep")
            try:
                compile_recording(recording)
            except Exception as error:
                self._refuse(f"torch's compiler failed: {_first_line(error)}", say)
                return self._function(settled, moving)
            self.is_compiled = True
            return self._check(recording, settled, moving, say)
        return recording(settled, moving)

    def _is_worth_recording(self, num_expected: int) -> bool:
        if self._mode is True or num_expected >= WORTH_RECORDING:
            return True
        return self._num_calls > RECORD_AFTER

    def _pays(self, recording: Recording, num_expected: int) -> bool:
        """Whether the calls that follow, or else as many as there were, make up for compiling."""
        if self._mode is True:
            return True
        calls = max(num_expected, self._num_calls)
        return calls * saved_seconds(recording) > compile_seconds(recording)

    def _record(self, settled: Any, moving: Any, say: Callable[[str], None]) -> Any:
        try:
            with random_state_kept():
                self._recording, _ = record(self._function, settled, moving)
        except NotRecordable as error:
            self._refuse(str(error), say)
        return self._function(settled, moving)

    def _check(
        self, recording: Recording, settled: Any, moving: Any, say: Callable[[str], None]
    ) -> Any:
        """The result as written, or as compiled, after a comparison of the two."""
        self._checks += 1
        with random_state_kept():
            result = recording(settled, moving)
        expected = self._function(settled, moving)
        if are_alike(pytree.tree_leaves(result), pytree.tree_leaves(expected)):
            return result
        self._refuse("its recording does not give the same numbers", say)
        return expected

    def _refuse(self, reason: str, say: Callable[[str], None]) -> None:
        self.refusal, self._recording, self.is_compiled = reason, None, False
        say(f"sweeps are not compiled: {reason}")


def saved_seconds(recording: Recording) -> float:
    """Time that compiled code saves in a call, about."""
    elements = recording.num_elements
    time = SECONDS_PER_OPERATOR * recording.num_operators + SECONDS_PER_ELEMENT * elements
    return SAVED_SHARE * time


def compile_seconds(recording: Recording) -> float:
    """Time that it takes to compile, about, where Inductor has not done so before."""
    return COMPILE_SECONDS + COMPILE_SECONDS_PER_OPERATOR * recording.num_operators


def are_alike(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether tensors are equal but for rounding, and decisions that it has turned."""
    return len(first) == len(second) and all(map(_is_alike, first, second))


def _is_alike(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if not first.is_floating_point():
        same = first == second
    else:
        finite = second[second.isfinite()]
        size = float(finite.abs().max()) if finite.numel() else 0.0
        tolerance = torch.finfo(first.dtype).eps ** 0.5
        same = first.isclose(second, rtol=tolerance, atol=tolerance * size, equal_nan=True)
    return not same.numel() or float(same.double().mean()) >= SHARE_ALIKE


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
