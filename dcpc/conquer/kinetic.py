"""Kinetic Langevin dynamics, without a correction: the particles of momentum particle descent."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dcpc.conquer.move import Memory, Move, Proposal, Start, WayBack
from dcpc.errors import OptionError


@dataclass(frozen=True)
class Kinetic(Move):
    """Underdamped Langevin dynamics over a time in which the score is held fixed.

    In whitened coordinates (`P = F F^T`), with `eps = sqrt(2 eta)` and momentum `m ~ N(0, I)`, the
    equations

        du = F m dt,   dm = F^T s dt - c m dt + sqrt(2 c) dW

    are solved exactly over the time `eps`, for the score at its beginning and the friction `c` by
    which `persistence = exp(-c eps)` of the momentum is left. One score a move, which is not
    corrected: the posterior is reached as the steps become small. Cheng, Chatterji, Bartlett &
    Jordan (2018); Lim, Kuntz, Power & Johansen, "Momentum particle maximum likelihood", ICML 2024,
    whose runs keep a share of 1/e.

    Attributes:
        persistence: Share of the momentum that a sweep keeps.

    Raises:
        OptionError: A persistence outside (0, 1).
    """

    persistence: float = math.exp(-1.0)
    is_reversible = False

    def __post_init__(self) -> None:
        if not 0.0 < self.persistence < 1.0:
            raise OptionError(f"persistence must lie in (0, 1), got {self.persistence!r}")

    def init_memory(self, value: Tensor) -> Memory:
        return {"momentum": torch.randn_like(value)}

    def propose(self, start: Start) -> Proposal:
        metric, eps = start.metric, (2 * start.step_size).sqrt().unsqueeze(-1)
        kept, time = self.persistence, -math.log(self.persistence)  # in units of 1 / c
        mean = (1.0 - kept) / time
        spread = (1.0 - kept**2, (2.0 * time - 3.0 + 4.0 * kept - kept**2) / time**2)
        shared = (1.0 - kept) ** 2 / time / math.sqrt(spread[0])
        first, second = torch.randn_like(start.value), torch.randn_like(start.value)
        force = eps * metric.whiten_score(start.score)
        before = start.memory["momentum"]
        momentum = kept * before + mean * force + math.sqrt(spread[0]) * first
        noise = shared * first + math.sqrt(max(spread[1] - shared**2, 0.0)) * second
        path = mean * before + (1.0 - mean) / time * force + noise
        value = start.value + metric.colour(eps * path)

        def way_back(score: Tensor) -> WayBack:
            return WayBack(torch.zeros_like(score[..., 0]))

        return Proposal(value, way_back, memory={"momentum": momentum})
