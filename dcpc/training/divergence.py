"""Runs that diverge: steps that would spoil the parameters, and losses that explode."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dcpc.errors import DCPCError

__all__ = ["DivergenceError", "Watch", "failures_told"]

NUM_FIRST = 20
"""Steps whose losses say what is usual."""

FACTOR = 100.0
"""A loss that is higher than usual by so many times its size (plus one) explodes."""

PATIENCE = 50
"""Steps in a row that may explode, or be left out, before training stops."""

REMEDY = "lower model.learning_rate or model.step_size, or set trainer.gradient_clip_val"


class DivergenceError(DCPCError):
    """Training diverges: losses or gradients are not finite, or grow without bound."""


@contextmanager
def failures_told(num_steps: int) -> Iterator[None]:
    """Turns what the model's distributions refuse, once it has learned, into one line.

    Raises:
        DivergenceError: In the place of another `ValueError`.
    """
    try:
        yield
    except DCPCError:
        raise
    except ValueError as error:
        if num_steps == 0:  # nothing was learned yet
            raise
        first = str(error).strip().splitlines()[0][:200]
        raise DivergenceError(
            f"after {num_steps} steps the model cannot be run any more: {first}; if its parameters "
            f"have diverged, {REMEDY}"
        ) from error


class Watch:
    """Watches the losses and gradients of a run.

    The first bad step is a warning, and `PATIENCE` of them in a row are an error.
    """

    def __init__(self) -> None:
        self._first: list[float] = []
        self._num_bad = 0
        self._has_warned = False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {"first": list(self._first)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores it."""
        self._first = list(saved["first"])

    def usable(self, loss: Tensor | None, gradients: Iterable[Tensor]) -> bool:
        """Whether a step may be taken: loss, if there is one, and gradients are finite.

        Raises:
            DivergenceError: The last steps were bad, all of them.
        """
        value = 0.0 if loss is None else float(loss)
        if not math.isfinite(value):
            self._note(f"the loss is {value}, so the step is left out")
            return False
        if not bool(torch.nn.utils.get_total_norm(gradients).isfinite()):
            self._note("the gradients are not finite, so the step is left out")
            return False
        if len(self._first) < NUM_FIRST:
            self._first.append(value)
        usual = statistics.median(self._first)
        if value > usual + FACTOR * (abs(usual) + 1.0):
            self._note(f"the loss is {value:.4g}, and was {usual:.4g} at first")
        else:
            self._num_bad = 0
        return True

    def _note(self, what: str) -> None:
        self._num_bad += 1
        if self._num_bad >= PATIENCE:
            raise DivergenceError(
                f"training diverges: {what} ({PATIENCE} steps in a row); {REMEDY}"
            )
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(f"training may diverge: {what}; if it does, {REMEDY}", stacklevel=2)
