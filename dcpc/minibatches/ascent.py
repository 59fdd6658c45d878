"""The way of global latents from the prior to where the noise of their scores is what counts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dcpc.divide import Conditional

MIN_SPREAD = 0.1
"""Smallest spread of the prior, in unconstrained space, that an ascent reckons with."""

MOMENT_DECAY = 0.95
"""Decay of the running mean of squared scores in an ascent, per step."""

START_SPREAD = 0.1
"""Spread of the first values around the prior's mean, over that of the prior."""

REACH = 4.0
"""How far an ascent may go, in spreads of the prior."""

SHORTENED = 1e-3
"""Length of an ascent's last step, over that of its first one."""


@dataclass
class Ascent:
    """Steps of global latents up their noisy log-density, to where its noise is what counts.

    From far away the second moment of the scores says nothing of the scale of the posterior. Steps
    are those of RMSprop (Tieleman & Hinton 2012); they shorten by a thousand, and reach as far as
    four times the spread of the prior in all.

    Attributes:
        num_steps: Number of steps in all.
        scale: Spread of the prior, `(1, n, d)`.
        moment: Running mean of squared scores, of the same shape for each particle.
        num_done: Steps that were made.
    """

    num_steps: int
    scale: Tensor
    moment: Tensor
    num_done: int = 0

    @classmethod
    def begin(cls, unit: Conditional, num_steps: int) -> Ascent:
        """The start, from particles `START_SPREAD` times as far apart as those of the prior."""
        value = unit.value
        spread = value.std(0, correction=0, keepdim=True) if len(value) > 1 else value.abs()
        scale = (spread / START_SPREAD).clamp(min=MIN_SPREAD)
        return cls(num_steps, scale, torch.zeros_like(value))

    def step(self, unit: Conditional) -> Tensor:
        """The value after one more step."""
        score = unit.score(unit.value)
        self.num_done += 1
        self.moment = torch.lerp(score.square(), self.moment, MOMENT_DECAY)
        mass = 1.0 - MOMENT_DECAY**self.num_done
        first = REACH * self.scale / self.num_steps * -math.log(SHORTENED)
        length = first * SHORTENED ** (self.num_done / self.num_steps)
        root = (self.moment / mass).sqrt()
        return unit.value + length * score / root.clamp(min=torch.finfo(root.dtype).tiny ** 0.5)
