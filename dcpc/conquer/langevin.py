"""Moves: how a unit's value is changed along its prediction error."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dcpc.conquer.preconditioner import Metric
from dcpc.errors import OptionError

JITTER = 0.2
"""Relative range of the length of leapfrog steps, where there are several."""

Score = Callable[[Tensor], Tensor]
"""The gradient of the units' log-densities at given values, of the values' shape."""


@dataclass(frozen=True)
class Proposal:
    """A proposed value, and what its density needs.

    Attributes:
        value: `u'`, of shape `(K, *plates, n, d)`.
        displacement: The last step to it in whitened coordinates, `F^-1 (u' - u)` if it is the
            only one.
        log_forward: `log q(u' | u)`, of shape `(K, *plates, n)`; zero for a move without noise. Of
            a move of several steps, the log-density of the noise that determines it, scaled alike.
    """

    value: Tensor
    displacement: Tensor
    log_forward: Tensor


class Move(ABC):
    """A move has a proposal, and a way back if it draws noise.

    Attributes:
        is_reversible: Whether noise is drawn, so that `log_backward - log_forward` corrects it.
        has_density: Whether `log_forward` is, besides, the proposal's own density.
    """

    is_reversible: ClassVar[bool]

    @property
    def has_density(self) -> bool:
        return self.is_reversible

    def jitter(self, step_size: Tensor) -> Tensor:
        """The step size `(n,)` that a sweep takes, drawn without a look at the particles."""
        return step_size

    @abstractmethod
    def propose(
        self, value: Tensor, score: Tensor, step_size: Tensor, metric: Metric, score_at: Score
    ) -> Proposal:
        """Proposes new values.

        Args:
            value: `u`, `(K, *plates, n, d)`.
            score: Gradient of the units' log-densities at `u`, same shape.
            step_size: `eta`, `(n,)`.
            metric: Factor of the preconditioner P.
            score_at: The score elsewhere, for moves of several steps.
        """

    @abstractmethod
    def log_backward(
        self, proposal: Proposal, score: Tensor, step_size: Tensor, metric: Metric
    ) -> Tensor:
        """`log_forward` of the way back, `(K, *plates, n)`, given the score at `u'`."""


@dataclass(frozen=True)
class Langevin(Move):
    """Preconditioned Langevin proposal `u' = u + eta P s + sqrt(2 eta P) noise`.

    Its density is Gaussian; with `P = F F^T` and `w = F^-1 (u' - u)`,
    `log q(u' | u) = -|w - eta F^T s|^2 / (4 eta) - d/2 log(4 pi eta) - log |det F|`.
    Roberts & Tweedie (1996); Sennesh, Wu & Salvatori (2024), eq. 8.

    The proposal is a leapfrog step of Hamiltonian dynamics of length `eps = sqrt(2 eta)` whose
    momentum `m` is the noise (Neal 2011, section 5.2):

        m += eps / 2 F^T s(u),   u += eps F m,   m += eps / 2 F^T s(u)

    With `leapfrog_steps` of them before the noise is drawn anew, a unit goes straight on where
    single steps would wander: n steps reach as far as n^2 single moves, for n scores. Then
    `log_backward - log_forward` is the difference of the kinetic energies, `-|m|^2 / 2`. The length
    of the steps is drawn anew for every sweep, within `JITTER` of its mean: the dynamics of a
    Gaussian are periodic, and a fixed length may bring it back to where it was.

    Attributes:
        leapfrog_steps: Steps, and scores, per move.

    Raises:
        OptionError: No number of steps.
    """

    leapfrog_steps: int = 1

    is_reversible = True

    def __post_init__(self) -> None:
        steps = self.leapfrog_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise OptionError(f"leapfrog_steps must be an integer of at least 1, got {steps!r}")

    @property
    def has_density(self) -> bool:
        return self.leapfrog_steps == 1

    def jitter(self, step_size: Tensor) -> Tensor:
        if self.leapfrog_steps == 1:
            return step_size
        factor = 1.0 + JITTER * (2.0 * torch.rand_like(step_size) - 1.0)
        return step_size * factor.square()  # eta is half the square of a leapfrog step's length

    def propose(
        self, value: Tensor, score: Tensor, step_size: Tensor, metric: Metric, score_at: Score
    ) -> Proposal:
        eta = step_size.unsqueeze(-1)
        noise = torch.randn_like(value)
        displacement = torch.addcmul((2 * eta).sqrt() * noise, eta, metric.whiten_score(score))
        value = value + metric.colour(displacement)
        for _ in range(self.leapfrog_steps - 1):
            score = score_at(value)
            displacement = torch.addcmul(displacement, 2 * eta, metric.whiten_score(score))
            value = value + metric.colour(displacement)
        return Proposal(
            value=value,
            displacement=displacement,
            log_forward=-0.5 * noise.square().sum(-1) + _log_norm(value, step_size, metric),
        )

    def log_backward(
        self, proposal: Proposal, score: Tensor, step_size: Tensor, metric: Metric
    ) -> Tensor:
        eta = step_size.unsqueeze(-1)
        residual = torch.addcmul(proposal.displacement, eta, metric.whiten_score(score))
        squared = residual.square().sum(-1) / (4 * step_size)
        return _log_norm(proposal.value, step_size, metric) - squared


class Gradient(Move):
    """Gradient ascent `u' = u + eta P s`, the relaxation of classical predictive coding."""

    is_reversible = False

    def propose(
        self, value: Tensor, score: Tensor, step_size: Tensor, metric: Metric, score_at: Score
    ) -> Proposal:
        displacement = step_size.unsqueeze(-1) * metric.whiten_score(score)
        return Proposal(
            value=value + metric.colour(displacement),
            displacement=displacement,
            log_forward=value.new_zeros(value.shape[:-1]),
        )

    def log_backward(
        self, proposal: Proposal, score: Tensor, step_size: Tensor, metric: Metric
    ) -> Tensor:
        return torch.zeros_like(proposal.log_forward)


MOVES: dict[str, type[Move]] = {"langevin": Langevin, "gradient": Gradient}


def _log_norm(value: Tensor, step_size: Tensor, metric: Metric) -> Tensor:
    dimension = value.shape[-1]
    return -0.5 * dimension * (4 * math.pi * step_size).log() - metric.half_log_det()
