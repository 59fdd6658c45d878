"""Jumps: proposals from a mixture that was fitted to the posterior, wherever a particle is.

Moves along a score stay in one mode of the posterior, and take long along what is curved. A mixture
that knows the modes carries particles from one to another, and decorrelates all of them at once
where it is close to the posterior.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dcpc.conquer.move import Move, Proposal, Start, WayBack
from dcpc.divide.joint_reference import StudentMixture

__all__ = ["JUMP_DEGREES", "Jump", "mixture_of", "state_of"]

JUMP_DEGREES = 10.0
"""Degrees of freedom of the mixture's components: tails that are heavier than a Gaussian's."""


@dataclass(frozen=True)
class Jump(Move):
    """An independence proposal, `u' ~ r`, whose ratio is `r(u) / r(u')` (Tierney 1994).

    Attributes:
        mixture: The distribution `r` of a unit's values, per element of its plates.
    """

    mixture: StudentMixture

    def propose(self, start: Start) -> Proposal:
        here = start.value.squeeze(-2)
        there = self.mixture.draw_each(here)
        log_here, log_there = (self.mixture.log_prob(u, u[..., 0]) for u in (here, there))
        back = WayBack((log_here - log_there).unsqueeze(-1))
        return Proposal(there.unsqueeze(-2), lambda score: back, log_there.unsqueeze(-1))


def state_of(mixture: StudentMixture) -> dict[str, Tensor]:
    """A mixture as tensors that an adaptation state holds."""
    assert mixture.log_share is not None
    return {"loc": mixture.loc, "factor": mixture.factor, "log_share": mixture.log_share}


def mixture_of(state: Mapping[str, Tensor]) -> StudentMixture:
    """The mixture of such tensors."""
    return StudentMixture(state["loc"], state["factor"], JUMP_DEGREES, state["log_share"])
