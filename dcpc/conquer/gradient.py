"""The gradient step, without noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dcpc.conquer.move import Move, Proposal, Start, WayBack


@dataclass(frozen=True)
class Gradient(Move):
    """Gradient ascent `u' = u + eta P s`, the relaxation of classical predictive coding.

    Rao & Ballard (1999). It has no noise, hence no way back, and finds a mode.
    """

    is_random = False
    is_reversible = False

    def propose(self, start: Start) -> Proposal:
        displacement = start.step_size.unsqueeze(-1) * start.metric.whiten_score(start.score)

        def way_back(score: Tensor) -> WayBack:
            return WayBack(torch.zeros_like(score[..., 0]))

        return Proposal(start.value + start.metric.colour(displacement), way_back)
