"""A function that is called again and again: plainly, then recorded, then compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dcpc.graphs.compiler import compile_recording
from dcpc.graphs.recording import NotRecordable, Recording, record
from dcpc.graphs.trees import leaves_of, mapped
from dcpc.seeding import random_state_kept

__all__ = [
    "RECORD_AFTER",
    "Mode",
    "Tiered",
    "are_results",
    "compile_seconds",
    "first_line",
    "pays_to_compile",
    "recorded_seconds",
]

Mode = Literal["auto"] | bool

RECORD_AFTER = 8
"""Calls after which a function is recorded if it is not known how many follow."""

WORTH_RECORDING = 100
"""Calls that make up for recording, which takes the time of some 50."""

SECONDS_PER_OPERATOR = 4e-6
SECONDS_PER_ELEMENT = 0.6e-9
SECONDS_PER_LARGE_ELEMENT = 2.5e-9
LARGE = 2**16
SAVED_SHARE = 0.6
"""Time of a recording by its operators and the elements that they write, and share of it that
compiled code saves, on the slow side: `experiments.benchmarks.compiled_sweep` measures them.
Tensors of `LARGE` elements and more go through memory, operator after operator."""

COMPILE_SECONDS = 5.0
COMPILE_SECONDS_PER_OPERATOR = 0.02
"""Time of compiling for the first time; from Inductor's cache it takes a twentieth."""

SHARE_ALIKE = 0.99
"""Share of the elements that must agree: rounding may turn a decision to accept."""

MAX_ROUNDING = 100.0
"""Differences of results that rounding explains, over those that rounded inputs make."""


class Tiered:
    """A function of two trees of tensors that gets faster where it is called often.

    Where many calls are known to come, it is recorded, and compiled if that pays, before the first
    one; all results then are those of the recording. Else it is recorded after a few calls, in a
    way that gives the same numbers to the last bit. Nothing here depends on the clock, nor on what
    a disk holds: the same seed gives the same result, and a run that goes on elsewhere too.

    Args:
        function: The function, of trees of the same structure and shapes in every call.
        mode: True to compile it, `auto` to compile it where that pays.

    Attributes:
        refusal: Why it runs as it is written; empty if it does not, or not yet.
        is_compiled: Whether compiled code runs.
        recording: The recording; None if there is none.
    """

    def __init__(self, function: Callable[[Any, Any], Any], mode: Mode) -> None:
        self.refusal = ""
        self.is_compiled = False
        self._function = function
        self._mode = mode
        self.recording: Recording | None = None
        self._num_calls = 0
        self._num_recorded = 0

    @property
    def num_operators(self) -> int:
        """Number of operators of the recording; 0 if there is none."""
        return 0 if self.recording is None else self.recording.num_operators

    def __call__(
        self,
        settled: Any,
        moving: Any,
        leaves: Sequence[Tensor],
        num_expected: int,
        say: Callable[[str], None],
    ) -> Any:
        """The function's result.

        Args:
            settled: Its first argument.
            moving: Its second argument.
            leaves: Leaves of both.
            num_expected: Number of calls that are known to come; 0 if that is not known.
            say: Told what takes long, or what is not done and why.
        """
        self._num_calls += 1
        if self.recording is None and not self.refusal:
            self._prepare(settled, moving, num_expected, say)
        recording = self.recording
        if recording is None:
            return self._function(settled, moving)
        self._num_recorded += 1
        if self._num_recorded == 2:  # on other values than it was recorded with
            self._check(recording, settled, moving, say)
        if self.refusal:
            return self._function(settled, moving)
        return recording.on_leaves(leaves)

    def _prepare(
        self, settled: Any, moving: Any, num_expected: int, say: Callable[[str], None]
    ) -> None:
        """Records the function where that is worth while, and compiles it where that pays."""
        is_known = self._mode is True or num_expected >= WORTH_RECORDING
        if not is_known and (num_expected > 0 or self._num_calls <= RECORD_AFTER):
            return
        try:
            with random_state_kept():
                recording = record(self._function, settled, moving, is_exact=not is_known)
        except NotRecordable as error:
            self._refuse(str(error), say)
            return
        if pays_to_compile(recording, self._mode, num_expected):
            say("compiling the sweep")
            try:
                compile_recording(recording)
            except Exception as error:
                self._refuse(f"torch's compiler failed: {first_line(error)}", say)
                return
            self.is_compiled = True
        self.recording = recording

    def _check(
        self, recording: Recording, settled: Any, moving: Any, say: Callable[[str], None]
    ) -> None:
        """Compares the recording with what was recorded."""
        with random_state_kept():
            result = recording(settled, moving)
        if not are_results(result, self._function, settled, moving):
            self._refuse("its recording does not give the same numbers", say)

    def _refuse(self, reason: str, say: Callable[[str], None]) -> None:
        self.refusal, self.recording, self.is_compiled = reason, None, False
        say(f"sweeps are not compiled: {reason}")


def pays_to_compile(recording: Recording, mode: Mode, num_expected: int) -> bool:
    """Whether a recording is to be compiled.

    Args:
        recording: The recording.
        mode: True to compile it, `auto` to compile it where that pays.
        num_expected: Number of calls that are known to come.
    """
    saved = num_expected * SAVED_SHARE * recorded_seconds(recording)
    return mode is True or saved > compile_seconds(recording)


def recorded_seconds(recording: Recording) -> float:
    """Estimate of the time that a recording takes, which does not depend on the machine."""
    num_large = recording.num_elements(least=LARGE, by_element=True)
    num_small = recording.num_elements() - num_large
    by_element = SECONDS_PER_ELEMENT * num_small + SECONDS_PER_LARGE_ELEMENT * num_large
    return SECONDS_PER_OPERATOR * recording.num_operators + by_element


def compile_seconds(recording: Recording) -> float:
    """Estimate of the time that it takes to compile a recording."""
    return COMPILE_SECONDS + COMPILE_SECONDS_PER_OPERATOR * recording.num_operators


def are_results(
    results: Any, function: Callable[[Any, Any], Any], settled: Any, moving: Any
) -> bool:
    """Whether trees are equal to a function's results but for rounding.

    Where they are not at first sight, the function tells what rounding does to it: its results on
    inputs that differ in the last digits. The inverse of a matrix of nearly dependent scores may
    differ by much.
    """
    found = leaves_of(results)
    with random_state_kept():
        expected = leaves_of(function(settled, moving))
    if len(found) != len(expected):
        return False
    unlike = [pair for pair in zip(found, expected, strict=True) if not _is_alike(*pair, 0.0)]
    if not unlike:
        return True
    with random_state_kept():
        rounded = mapped(_rounded, (settled, moving))
    with random_state_kept():
        nearby = leaves_of(function(*rounded))
    return all(
        _is_alike(one, other, MAX_ROUNDING * _largest(third.double() - other.double()))
        for one, other, third in zip(found, expected, nearby, strict=True)
    )


def _is_alike(first: Tensor, second: Tensor, tolerance: float) -> bool:
    """Whether tensors agree but for a tolerance, and decisions that rounding has turned."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if not first.is_floating_point():
        same = first == second
    else:
        # Far from the posterior, ratios of acceptance are differences of large numbers.
        relative = torch.finfo(first.dtype).eps ** 0.25
        absolute = max(tolerance, relative * _largest(second))
        same = first.isclose(second, rtol=relative, atol=absolute, equal_nan=True)
    return not same.numel() or float(same.double().mean()) >= SHARE_ALIKE


def _rounded(value: Tensor) -> Tensor:
    """A tensor whose elements differ in the last digits."""
    if not value.is_floating_point():
        return value
    return value * (1.0 + 4.0 * torch.finfo(value.dtype).eps * torch.randn_like(value))


def _largest(value: Tensor) -> float:
    """Largest absolute value of those that are finite."""
    finite = value[value.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
