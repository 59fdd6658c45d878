"""The Langevin move, of one step or several."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dcpc.conquer.move import Move, Proposal, Start, WayBack
from dcpc.conquer.preconditioner import Metric
from dcpc.errors import OptionError


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
    `log_ratio` is the difference of the kinetic energies, `|m|^2 / 2`. The length of the steps is
    drawn anew for every particle and sweep, within `jitter` of its mean: the dynamics of a Gaussian
    are periodic, and a fixed length may bring it back to where it was. With a wide jitter some
    steps are short enough for a place where the posterior is narrow, and no particle stays there.

    The target acceptance is MALA's optimum (Roberts & Rosenthal 1998); that of many leapfrog
    steps, .651, is little above it (Beskos et al. 2013).

    Attributes:
        leapfrog_steps: Steps, and scores, per move.
        jitter: Relative range of the length of steps; None for .2 of several, 0 of one.

    Raises:
        OptionError: No number of steps, or a jitter outside [0, 1).
    """

    leapfrog_steps: int = 1
    jitter: float | None = None

    def __post_init__(self) -> None:
        steps = self.leapfrog_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise OptionError(f"leapfrog_steps must be an integer of at least 1, got {steps!r}")
        if not 0.0 <= self._range < 1.0:
            raise OptionError(f"jitter must lie in [0, 1), got {self.jitter!r}")

    @property
    def has_density(self) -> bool:
        return self.leapfrog_steps == 1 and self._range == 0.0

    @property
    def _range(self) -> float:
        default = 0.0 if self.leapfrog_steps == 1 else 0.2
        return default if self.jitter is None else self.jitter

    @property
    def num_scores(self) -> int:
        return self.leapfrog_steps

    def propose(self, start: Start) -> Proposal:
        step_size, metric = self._jittered(start), start.metric
        eta, score = step_size.unsqueeze(-1), start.score
        noise = torch.randn_like(start.value)
        displacement = torch.addcmul((2 * eta).sqrt() * noise, eta, metric.whiten_score(score))
        value = start.value + metric.colour(displacement)
        for _ in range(self.leapfrog_steps - 1):
            score = start.score_at(value)
            displacement = torch.addcmul(displacement, 2 * eta, metric.whiten_score(score))
            value = value + metric.colour(displacement)
        kinetic = 0.5 * noise.square().sum(-1)

        def way_back(score: Tensor) -> WayBack:
            residual = torch.addcmul(displacement, eta, metric.whiten_score(score))
            return WayBack(kinetic - residual.square().sum(-1) / (4 * step_size))

        log_density = _log_norm(value, step_size, metric) - kinetic if self.has_density else None
        return Proposal(value, way_back, log_density)

    def _jittered(self, start: Start) -> Tensor:
        """Step sizes, `(n,)` or `(K, *plates, n)`, drawn without a look at the values."""
        if self._range == 0.0:
            return start.step_size
        factor = 1.0 + self._range * (2.0 * torch.rand_like(start.value[..., 0]) - 1.0)
        return start.step_size * factor.square()  # eta is half the square of a step's length


def _log_norm(value: Tensor, step_size: Tensor, metric: Metric) -> Tensor:
    dimension = value.shape[-1]
    return -0.5 * dimension * (4 * math.pi * step_size).log() - metric.half_log_det()
