"""Length of a run over minibatches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dcpc.errors import OptionError

LOCAL_SWEEPS = 5
"""Moves of the latents of single data per minibatch by default."""

MAX_KEPT = 200
"""Sweeps that are kept of each particle by default."""


@dataclass(frozen=True)
class Length:
    """Length of a run over minibatches.

    Attributes:
        num_sweeps: Minibatches to visit.
        num_warmup: Number of sweeps that adapt.
        keep_every: Interval between sweeps that are kept; 0 for none, None for some 200 of them.
        local_sweeps: Moves of the latents of single data per visit.

    Raises:
        OptionError: A number out of range.
    """

    num_sweeps: int
    num_warmup: int
    keep_every: int | None = None
    local_sweeps: int = LOCAL_SWEEPS

    def __post_init__(self) -> None:
        if self.num_sweeps < 1 or not 0 <= self.num_warmup <= self.num_sweeps:
            raise OptionError(
                "num_sweeps must be at least 1 and num_warmup between 0 and num_sweeps, got "
                f"num_sweeps={self.num_sweeps}, num_warmup={self.num_warmup}"
            )
        if self.keep_every is not None and self.keep_every < 0:
            raise OptionError(f"keep_every must be at least 0, got {self.keep_every}")
        if self.local_sweeps < 1:
            raise OptionError(f"local_sweeps must be at least 1, got {self.local_sweeps}")

    @property
    def num_ascent(self) -> int:
        """Sweeps of the warm-up in which global latents ascend."""
        return self.num_warmup // 2

    def keeps(self, number: int) -> bool:
        """Whether the global latents after a sweep are kept; sweeps count from one."""
        kept, recorded = number - self.num_warmup, self.num_sweeps - self.num_warmup
        every = self.keep_every
        if every is None:
            every = max(1, math.ceil(recorded / MAX_KEPT))
        return kept > 0 and every > 0 and kept % every == 0
