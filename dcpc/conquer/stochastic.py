"""Stochastic-gradient Langevin dynamics, for latents whose score is estimated from a subsample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dcpc.conquer.move import Move, Proposal, Start, WayBack
from dcpc.conquer.preconditioner import Dense, DenseSecondMoment, Metric, Preconditioner, State

MIN_NOISE = 0.05
"""Smallest share of its variance without correction that injected noise keeps in any direction."""


@dataclass(frozen=True)
class NoisyMetric(Dense):
    """`P = F F^T`, with what is known of the noise of scores.

    Attributes:
        noise: `F^T V F` of the scores' covariance V about the score of all data, `(n, d, d)`.
    """

    noise: Tensor


@dataclass(frozen=True)
class NoisyMoment(Preconditioner):
    """`P = E[s s^T]^-1` of scores that are noisy, and the covariance V of their noise.

    Every sweep has a subsample of its own, so that half the mean square of the difference of the
    scores of two sweeps is V, but for what the values moved in between.

    Attributes:
        decay: Decay of the exponential averages, per sweep. The particles of a sweep share their
            subsample, so that its noise counts once.
    """

    decay: float = 0.998

    def init(self, score: Tensor, population: int) -> State:
        state = DenseSecondMoment(self.decay).init(score, population)
        noise = torch.zeros_like(state["moment"])
        return {**state, "noise": noise, "noise_mass": score.new_zeros(()), "last": score}

    def update(self, state: State, score: Tensor, population: int) -> State:
        kept: State = {name: state[name] for name in ("moment", "mass", "factor") if name in state}
        learned = DenseSecondMoment(self.decay).update(kept, score, population)
        difference = score - state["last"]
        noise, mass = state["noise"], state["noise_mass"]
        if bool((difference != 0).any()):
            half = 0.5 * torch.einsum("k...i,k...j->...ij", difference, difference) / len(score)
            noise = torch.lerp(half, noise, self.decay)
            mass = 1.0 - self.decay * (1.0 - mass)
        return {**learned, "noise": noise, "noise_mass": mass, "last": score}

    def metric(self, state: Mapping[str, Tensor], score: Tensor) -> Metric:
        factor = state["factor"]
        noise = state["noise"] / state["noise_mass"].clamp(min=1.0 - self.decay)
        return NoisyMetric(factor, factor.mT @ noise @ factor)


class StochasticLangevin(Move):
    """`u' = u + eta P s + F xi`, with `xi ~ N(0, 2 eta I - eta^2 F^T V F)`.

    Stochastic-gradient Langevin dynamics (Welling & Teh 2011), preconditioned by `P = F F^T`. The
    noise of the scores, of covariance V, is a part of the noise that is due, and less is injected
    (Ahn, Korattikara & Welling 2012): without that the variance would come out too large by
    `eta P V / 2`. No correction: the error is that of unadjusted Langevin steps of the length
    `eta` over the ratio of the scores' second moment to the posterior's precision, and that of V.
    """

    is_reversible = True

    @property
    def has_density(self) -> bool:
        return False

    def propose(self, start: Start) -> Proposal:
        assert isinstance(start.metric, NoisyMetric)
        step_size = start.step_size[:, None, None]
        values, vectors = torch.linalg.eigh(start.metric.noise)
        due = 2.0 * step_size.squeeze(-1)
        injected = (due - step_size.squeeze(-1).square() * values).clamp(min=MIN_NOISE * due)
        root = vectors * injected.sqrt().unsqueeze(-2)
        noise = (root @ torch.randn_like(start.value).unsqueeze(-1)).squeeze(-1)
        drift = step_size.squeeze(-1) * start.metric.whiten_score(start.score)
        value = start.value + start.metric.colour(drift + noise)
        return Proposal(value, lambda score: WayBack(torch.zeros_like(score[..., 0])))
