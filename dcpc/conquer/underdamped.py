"""Underdamped Langevin dynamics: a momentum that persists from sweep to sweep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dcpc.conquer.move import Memory, Move, Proposal, Start, WayBack
from dcpc.errors import OptionError


@dataclass(frozen=True)
class Underdamped(Move):
    """A leapfrog step with a momentum that is refreshed in part only.

    In whitened coordinates (`P = F F^T`), with `eps = sqrt(2 eta)` and momentum `m ~ N(0, I)`:

        m <- persistence m + sqrt(1 - persistence^2) noise
        m += eps / 2 F^T s(u),   u += eps F m,   m += eps / 2 F^T s(u)

    The particles go straight on for about `1 / (1 - persistence)` sweeps, as several leapfrog steps
    would, but every step is corrected, and costs one score. A rejected step turns the momentum
    around, which keeps the joint density of value and momentum invariant; hence a high target
    acceptance. Horowitz (1991); Neal (2011), section 5.5.3.

    Attributes:
        persistence: Share of the momentum that a sweep keeps; at 0 it is the Langevin move.

    Raises:
        OptionError: A persistence outside [0, 1).
    """

    persistence: float = 0.9
    target_acceptance: float = 0.9

    def __post_init__(self) -> None:
        if not 0.0 <= self.persistence < 1.0:
            raise OptionError(f"persistence must lie in [0, 1), got {self.persistence!r}")

    @property
    def has_density(self) -> bool:
        return False  # a value with its momentum goes to one place only

    def init_memory(self, value: Tensor) -> Memory:
        return {"momentum": torch.randn_like(value)}

    def propose(self, start: Start) -> Proposal:
        metric, eps = start.metric, (2 * start.step_size).sqrt().unsqueeze(-1)
        noise = torch.randn_like(start.value)
        momentum = self.persistence * start.memory["momentum"]
        momentum = torch.add(momentum, noise, alpha=(1.0 - self.persistence**2) ** 0.5)
        middle = torch.addcmul(momentum, 0.5 * eps, metric.whiten_score(start.score))
        value = start.value + metric.colour(eps * middle)

        def way_back(score: Tensor) -> WayBack:
            end = torch.addcmul(middle, 0.5 * eps, metric.whiten_score(score))
            gained = 0.5 * (momentum.square().sum(-1) - end.square().sum(-1))
            return WayBack(gained, {"momentum": end})

        return Proposal(value, way_back, memory_if_rejected={"momentum": -momentum})
