"""Moves: how a unit's value is changed along its prediction error."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from dcpc.conquer.preconditioner import Metric

Score = Callable[[Tensor], Tensor]
"""The gradient of the units' log-densities at given values, of the values' shape."""

Memory = dict[str, Tensor]
"""State that a move keeps per particle from sweep to sweep, by name; of the values' shape."""


@dataclass(frozen=True)
class Start:
    """Input of a move.

    Attributes:
        value: `u`, `(K, *plates, n, d)`.
        score: Gradient of the units' log-densities at `u`, of the same shape.
        step_size: `eta`, `(n,)`.
        metric: Factor of the preconditioner P.
        score_at: The score elsewhere, for moves of several steps.
        memory: Memory of the particles from the last sweep.
    """

    value: Tensor
    score: Tensor
    step_size: Tensor
    metric: Metric
    score_at: Score
    memory: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class WayBack:
    """Reverse move of a proposal, given the score at its end.

    Attributes:
        log_ratio: `log q(u | u') - log q(u' | u)`, or what takes its place in a move that is
            reversed in another way, `(K, *plates, n)`.
        memory: Memory where the proposal is accepted.
    """

    log_ratio: Tensor
    memory: Memory = field(default_factory=dict)


@dataclass(frozen=True)
class Proposal:
    """A proposed value, and the way back.

    Attributes:
        value: `u'`, `(K, *plates, n, d)`.
        way_back: The way back, given the score at `u'`.
        log_density: `log q(u' | u)`, `(K, *plates, n)`; None of moves that have none.
        memory_if_rejected: Memory where the proposal is rejected.
        memory: Memory where the proposal is accepted, of moves that know it without the way back.
    """

    value: Tensor
    way_back: Callable[[Tensor], WayBack]
    log_density: Tensor | None = None
    memory_if_rejected: Memory = field(default_factory=dict)
    memory: Memory = field(default_factory=dict)


class Move(ABC):
    """A proposal, and what it can be used for.

    Attributes:
        target_acceptance: Acceptance rate that its step size is adapted to under a Metropolis
            correction.
        is_random: Whether noise is drawn.
        is_reversible: Whether there is a way back, which makes an exact sampler of it.
    """

    target_acceptance: float = 0.574
    is_random: ClassVar[bool] = True
    is_reversible: ClassVar[bool] = True

    @property
    def num_scores(self) -> int:
        """Number of scores that a proposal takes, the one at its start included."""
        return 1

    @property
    def has_density(self) -> bool:
        """Whether its proposals have a `log_density`."""
        return self.is_reversible

    def init_memory(self, value: Tensor) -> Memory:
        """Memory of particles that have not moved yet.

        Args:
            value: Values of any shape, which the entries share.
        """
        return {}

    @abstractmethod
    def propose(self, start: Start) -> Proposal:
        """Proposes new values."""
