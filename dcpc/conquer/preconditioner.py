"""Preconditioners: the matrix P that scales a unit's drift and noise.

A preconditioner turns scores into a `Metric`, a factor of P. Its state, a dict of tensors, is
updated between sweeps, so that within a sweep P does not depend on the particles it moves; only
`ParticleVariance`, which belongs to the paper's correction, looks at the current scores. Averages
have an entry `mass` in it from their first scores on.

Shapes: scores are `(K, *plates, n, d)`. An estimate is shared by the particles and by the
population, whose data change from call to call; every element of the other plates has its own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

State = dict[str, Tensor]

MAX_OUTLIER = 25.0
"""Squared scores are cut at so many times their running mean."""

MAX_DENSE = 32
"""Largest unit that `Adapted` gives a dense matrix."""


class Metric(ABC):
    """A factor F of the preconditioner, `P = F F^T`."""

    @abstractmethod
    def colour(self, noise: Tensor) -> Tensor:
        """`F x`, for `x` of shape `(K, *plates, n, d)`."""

    @abstractmethod
    def whiten_score(self, score: Tensor) -> Tensor:
        """`F^T x`, so that `P x = colour(whiten_score(x))`."""

    @abstractmethod
    def half_log_det(self) -> Tensor:
        """`log |det F|`, broadcastable to `(K, *plates, n)`."""


@dataclass(frozen=True)
class Diagonal(Metric):
    """`P = diag(scale^2)`, with `scale` broadcastable to `(K, *plates, n, d)`."""

    scale: Tensor

    def colour(self, noise: Tensor) -> Tensor:
        return self.scale * noise

    def whiten_score(self, score: Tensor) -> Tensor:
        return self.scale * score

    def half_log_det(self) -> Tensor:
        return self.scale.log().sum(-1)


@dataclass(frozen=True)
class Dense(Metric):
    """`P = F F^T` with a square `factor`, broadcastable to `(*plates, n, d, d)`."""

    factor: Tensor

    def colour(self, noise: Tensor) -> Tensor:
        return _multiply(self.factor, noise)

    def whiten_score(self, score: Tensor) -> Tensor:
        return _multiply(self.factor.mT, score)

    def half_log_det(self) -> Tensor:
        return torch.linalg.slogdet(self.factor).logabsdet


class Preconditioner(ABC):
    """Interface of a preconditioner, which keeps no state of its own."""

    uses_current_scores: ClassVar[bool] = False
    """Whether P depends on the particles that it moves; no exact correction allows that."""

    is_scaled: ClassVar[bool] = True
    """Whether it measures the target, so that step sizes are in units of its scale."""

    sees_values: ClassVar[bool] = False
    """Whether it learns from the particles themselves, by `see_values`."""

    def init(self, score: Tensor, population: int) -> State:
        """State before any update.

        Args:
            score: Any scores `(K, *plates, n, d)`, for shapes.
            population: Number of leading plates that are population plates.
        """
        return {}

    def update(self, state: State, score: Tensor, population: int) -> State:
        """State after seeing the scores of a sweep."""
        return state

    def see_values(self, state: State, value: Tensor, mass: Tensor) -> State:
        """State after seeing the particles themselves.

        Args:
            state: The state before.
            value: Their values `(K, *plates, n, d)`.
            mass: Their normalised weights, broadcastable to `(K, *plates)`.
        """
        return state

    @abstractmethod
    def metric(self, state: Mapping[str, Tensor], score: Tensor) -> Metric:
        """The factor of P for this sweep."""


class Identity(Preconditioner):
    """`P = I`."""

    is_scaled = False

    def metric(self, state: Mapping[str, Tensor], score: Tensor) -> Metric:
        return Diagonal(torch.ones_like(score[(0,) * (score.dim() - 2)]))


class ParticleVariance(Preconditioner):
    """The paper's: `P = 1 / (Var_k[score] + 1/K)`, scaled to mean one over the unit's values.

    Sennesh, Wu & Salvatori (2024), Algorithm 1. The variance is the biased one, zero at K = 1.
    """

    uses_current_scores = True

    def metric(self, state: Mapping[str, Tensor], score: Tensor) -> Metric:
        precision = 1.0 / (score.var(0, correction=0) + 1.0 / score.shape[0])
        return Diagonal((precision / precision.mean(-1, keepdim=True)).sqrt())


@dataclass(frozen=True)
class SecondMoment(Preconditioner):
    """Running second moment of the score, `m`: `P = (m + tiny)^(-exponent)`.

    At equilibrium the second moment of the score is the Fisher information, for a Gaussian the
    precision, so that exponent one gives steps in units of conditional standard deviations.
    Exponent one half is the RMSprop scaling of pSGLD (Li et al. 2016), used by Langevin
    predictive coding (Zahid et al. 2024).

    Attributes:
        exponent: Power of the inverse.
        decay: Decay of the exponential average, per sweep.
    """

    exponent: float = 1.0
    decay: float = 0.95

    def init(self, score: Tensor, population: int) -> State:
        return {"moment": torch.zeros_like(_pool(score, population))}

    def update(self, state: State, score: Tensor, population: int) -> State:
        squared = score.square()
        squared = squared.minimum(MAX_OUTLIER * _typical(state, squared, population))
        return {
            "moment": torch.lerp(_pool(squared, population), state["moment"], self.decay),
            "mass": _grown(state, score, self.decay),
        }

    def metric(self, state: Mapping[str, Tensor], score: Tensor) -> Metric:
        moment = state["moment"]
        if "mass" in state:
            moment = moment / state["mass"]
        # Scores of zero (particles at a mode) measure nothing: the identity until they do.
        moment = torch.where(moment > 0, moment, 1.0)
        return Diagonal(moment.clamp(min=_tiny(moment)).pow(-0.5 * self.exponent))


@dataclass(frozen=True)
class DenseSecondMoment(Preconditioner):
    """Running second moment of the score as a full matrix: `P = E[s s^T]^-1`.

    For collinear latents in one block. `O(d^3)` per update and `O(d^2)` per particle.

    Attributes:
        decay: Decay of the exponential average, per sweep.
    """

    decay: float = 0.95

    def init(self, score: Tensor, population: int) -> State:
        pooled = _pool(score, population)
        identity = torch.eye(score.shape[-1], dtype=score.dtype, device=score.device)
        factor = identity.expand(*pooled.shape, score.shape[-1]).clone()
        return {"moment": torch.zeros_like(factor), "factor": factor}

    def update(self, state: State, score: Tensor, population: int) -> State:
        if "mass" in state:
            length = Dense(state["factor"]).whiten_score(score).square().mean(-1, keepdim=True)
            score = score * (MAX_OUTLIER / length).clamp(max=1.0).sqrt()
        else:
            squared = score.square()
            bound = MAX_OUTLIER * _typical(state, squared, population)
            score = score * (bound / squared).clamp(max=1.0).sqrt().nan_to_num(nan=1.0)
        moment = torch.lerp(self._average(score, population), state["moment"], self.decay)
        mass = _grown(state, score, self.decay)
        return {"moment": moment, "mass": mass, "factor": _inverse_factor(moment / mass)}

    def metric(self, state: Mapping[str, Tensor], score: Tensor) -> Metric:
        return Dense(state["factor"])

    def _average(self, score: Tensor, population: int) -> Tensor:
        axes = tuple(range(1 + population))
        if population == 0:
            return torch.einsum("k...i,k...j->...ij", score, score) / score.shape[0]
        outer = score.movedim(axes, tuple(range(len(axes)))).flatten(0, population)
        average = torch.einsum("k...i,k...j->...ij", outer, outer) / outer.shape[0]
        return average.reshape((1,) * population + average.shape)


@dataclass(frozen=True)
class Adapted(Preconditioner):
    """The default: a running second moment, dense for small units and diagonal for large ones.

    Dense where a unit has at most `MAX_DENSE` values and the particles of a few sweeps determine
    the matrix.

    Attributes:
        decay: Decay of the exponential average, per sweep.
    """

    decay: float = 0.95

    def init(self, score: Tensor, population: int) -> State:
        return self._choose(score, population).init(score, population)

    def update(self, state: State, score: Tensor, population: int) -> State:
        # A short last batch must not change the kind of estimate that the first one chose.
        if "factor" in state:
            return DenseSecondMoment(self.decay).update(state, score, population)
        return SecondMoment(decay=self.decay).update(state, score, population)

    def metric(self, state: Mapping[str, Tensor], score: Tensor) -> Metric:
        if "factor" in state:
            return Dense(state["factor"])
        return SecondMoment(decay=self.decay).metric(state, score)

    def _choose(self, score: Tensor, population: int) -> SecondMoment | DenseSecondMoment:
        size = score.shape[-1]
        samples = score.shape[: 1 + population].numel() / (1.0 - self.decay)
        if 1 < size <= MAX_DENSE and samples >= 20 * size:
            return DenseSecondMoment(self.decay)
        return SecondMoment(decay=self.decay)


@dataclass(frozen=True)
class Covariance(Preconditioner):
    """The particles' covariance, `P = Cov[u]`, for a unit that holds all latents.

    Where nothing else moves, the covariance of the posterior is the right scale in all directions:
    the particles of a cloud know it, and those of a few sweeps where they are few. It is shrunk to
    its diagonal where even these do not determine it. Every element of the plates has its own.

    Attributes:
        draws: Particles, per value of the unit, that an estimate remembers.
    """

    draws: float = 20.0

    sees_values = True

    def init(self, score: Tensor, population: int) -> State:
        identity = torch.eye(score.shape[-1], dtype=score.dtype, device=score.device)
        factor = identity.expand(*score.shape[1:], score.shape[-1]).clone()
        return {
            "covariance": torch.zeros_like(factor),
            "mass": score.new_zeros(()),
            "factor": factor,
        }

    def see_values(self, state: State, value: Tensor, mass: Tensor) -> State:
        size = value.shape[-1]
        decay = max(0.0, 1.0 - len(value) / (self.draws * size))
        share = mass.to(value).unsqueeze(-1).expand(value.shape[:-1])
        deviation = value - (share.unsqueeze(-1) * value).sum(0)
        rows = deviation.movedim(0, -2)  # (*plates, n, K, d)
        now = (share.movedim(0, -1).unsqueeze(-1) * rows).mT @ rows
        covariance = torch.lerp(now, state["covariance"], decay)
        total = 1.0 - decay * (1.0 - state["mass"])
        effective = share.square().sum(0).reciprocal() / (1.0 - decay)  # (*plates, n)
        shrunk = (0.5 * size / effective).masked_fill(effective >= 10 * size, 0.0).clamp(max=1.0)
        diagonal = torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
        estimate = torch.lerp(covariance, diagonal, shrunk[..., None, None]) / total
        return {"covariance": covariance, "mass": total, "factor": factor_of(estimate)}

    def metric(self, state: Mapping[str, Tensor], score: Tensor) -> Metric:
        return Dense(state["factor"])


PRECONDITIONERS: dict[str, type[Preconditioner]] = {
    "identity": Identity,
    "particle_variance": ParticleVariance,
    "second_moment": SecondMoment,
    "dense": DenseSecondMoment,
    "adapted": Adapted,
    "covariance": Covariance,
}


def _multiply(matrix: Tensor, vectors: Tensor) -> Tensor:
    """`(*plates, n, d, d)` times `(K, *plates, n, d)`; one product where plates share a matrix."""
    if matrix.shape[:-3].numel() == 1:
        return torch.einsum("...ni,nji->...nj", vectors, matrix.reshape(matrix.shape[-3:]))
    return (matrix @ vectors.unsqueeze(-1)).squeeze(-1)


def _pool(value: Tensor, population: int) -> Tensor:
    """Mean over the particles and the population: `(*plates, n, d)`, population axes of one."""
    return value.mean(tuple(range(1 + population)), keepdim=True)[0]


def _grown(state: State, score: Tensor, decay: float) -> Tensor:
    """Total weight of the scores in an average, which is none before the first of them."""
    if "mass" not in state:
        return score.new_full((), 1.0 - decay)
    return 1.0 - decay * (1.0 - state["mass"])


def _typical(state: State, squared: Tensor, population: int) -> Tensor:
    """Reference level for outliers among squared scores: their running mean or the median.

    Heavy-tailed posteriors throw scores of a thousand standard deviations, one of which would
    freeze a unit for as long as the average remembers it.
    """
    if "mass" in state:
        moment = state["moment"] / state["mass"]
        # A value that had no score yet (it was masked out, say) has nothing to be measured against.
        return torch.where(moment > 0, moment.clamp(min=_tiny(moment)), math.inf)
    median = squared.flatten(0, population).median(0).values
    return torch.where(median > 0, median, math.inf)


def _tiny(value: Tensor) -> float:
    return torch.finfo(value.dtype).tiny ** 0.5


def _inverse_factor(moment: Tensor) -> Tensor:
    """`F` with `F F^T = moment^-1`."""
    scale, factor = _correlation_factor(moment)
    identity = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    return (1.0 / scale).unsqueeze(-1) * inverse.mT


def factor_of(covariance: Tensor) -> Tensor:
    """`F` with `F F^T = covariance`."""
    scale, factor = _correlation_factor(covariance)
    return scale.unsqueeze(-1) * factor


def _correlation_factor(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Square roots of the diagonal and the Cholesky factor of what is left of a second moment.

    With a relative ridge for rounding; the identity where there is no factor.
    """
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    floor = torch.where(diagonal > 0, diagonal.clamp(min=_tiny(moment)), 1.0)
    scale = floor.sqrt()
    correlation = moment / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
    identity = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    ridge = 100 * torch.finfo(moment.dtype).eps
    factor, failed = torch.linalg.cholesky_ex(correlation + ridge * identity)
    factor = torch.where((failed > 0)[..., None, None], identity, factor)
    return scale, factor
