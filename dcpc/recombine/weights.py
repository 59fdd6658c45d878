"""Immutable log-weights of a particle population, and the one rule for bad log-densities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dcpc.errors import DegenerateWeightsError

__all__ = ["LogWeights", "zero_density"]


def zero_density(log_density: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the package's only rule for log-densities that are not finite: they mean density zero.

    NaN and plus infinity are failures of arithmetic, minus infinity lies outside the support. No
    particle should be kept for any of them.

    Args:
        log_density: log-densities or log-weights of any shape.

    Returns:
        The log-densities with every entry that is not finite set to minus infinity, and the boolean
        mask of those entries, for the diagnostics to count.
    """
    bad = ~(log_density.abs() < math.inf)
    return log_density.masked_fill(bad, -math.inf), bad


@dataclass(frozen=True, eq=False)
class LogWeights:
    """Unnormalised log-weights of K particles, in each cell of a population.

    Every method returns something new. NaN and plus infinity become zero weight at construction
    (`zero_density`).

    Attributes:
        log_weight: shape `(K, *population)`, floating point.

    Raises:
        ValueError: if `log_weight` has no particle axis, no particles, or is not floating point.
    """

    log_weight: Tensor

    def __post_init__(self) -> None:
        log_weight = self.log_weight
        if not log_weight.is_floating_point():
            raise ValueError(f"log_weight must be floating point, got {log_weight.dtype}")
        if log_weight.dim() == 0 or log_weight.shape[0] < 1:
            raise ValueError(
                "log_weight must have shape (num_particles, *population) with at least one "
                f"particle, got shape {tuple(log_weight.shape)}"
            )
        object.__setattr__(self, "log_weight", zero_density(log_weight)[0])

    @classmethod
    def uniform(
        cls,
        num_particles: int,
        population: Sequence[int] = (),
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LogWeights:
        """Give every particle the weight one.

        Args:
            num_particles: K.
            population: shape of the population.
            dtype: floating point type; torch's default type if None.
            device: where the weights live.
        """
        return cls(torch.zeros(num_particles, *population, dtype=dtype, device=device))

    @property
    def num_particles(self) -> int:
        """K."""
        return self.log_weight.shape[0]

    @property
    def population(self) -> torch.Size:
        """Shape of the population; `()` if there is a single inference problem."""
        return self.log_weight.shape[1:]

    @cached_property
    def num_bad(self) -> Tensor:
        """Number of particles of zero weight, shape `(*population)`."""
        return torch.isinf(self.log_weight).sum(0)

    def add(self, increment: Tensor) -> LogWeights:
        """Multiply the weights by `exp(increment)`.

        Args:
            increment: broadcasts to `(K, *population)`.

        Raises:
            ValueError: if `increment` does not broadcast to the weights' shape.
        """
        try:
            return LogWeights(self.log_weight + increment.expand_as(self.log_weight))
        except RuntimeError as error:
            raise ValueError(
                f"increment must broadcast to the weights' shape {tuple(self.log_weight.shape)}, "
                f"got shape {tuple(increment.shape)}"
            ) from error

    def log_mean(self) -> Tensor:
        """`log (1/K sum_k w_k)`, shape `(*population)`; minus infinity where all weights are zero.

        With weights that are proper for a target of mass Z, `exp(log_mean())` is unbiased for Z
        (Del Moral, Doucet & Jasra 2006, section 3.2).
        """
        return torch.logsumexp(self.log_weight, 0) - math.log(self.num_particles)

    def normalized(self, site: str | None = None) -> Tensor:
        """`W_k = w_k / sum_j w_j`, shape `(K, *population)`, summing to one over the particles.

        Args:
            site: the site whose weights these are, to be named in the error.

        Raises:
            DegenerateWeightsError: if all the particles of some population cell have zero weight.
        """
        normalized = torch.softmax(self.log_weight, 0)
        if torch.isnan(normalized).any():
            raise DegenerateWeightsError(self._degenerate_message(site))
        return normalized

    def ess(self) -> Tensor:
        """Effective sample size `(sum_k w_k)^2 / sum_k w_k^2`, shape `(*population)` (Kong 1992).

        Between one and K; zero where all weights are zero.
        """
        return self._ess

    @cached_property
    def _ess(self) -> Tensor:
        normalized = torch.softmax(self.log_weight, 0)
        return normalized.square().sum(0).reciprocal().nan_to_num(nan=0.0)

    def conditional_ess(self, increment: Tensor) -> Tensor:
        """Conditional ESS of a weight increment.

        `K (sum_k W_k e^{a_k})^2 / sum_k W_k e^{2 a_k}` with `W` normalised and `a` the increment
        (Zhou, Johansen & Aston 2016, the conditional ESS). Unlike the ESS it measures one step
        only: it is K for a constant increment, however uneven the weights are.

        Args:
            increment: log of the incremental weights; broadcasts to `(K, *population)`.

        Returns:
            Shape `(*population)`; zero where no particle keeps any weight.
        """
        log_normalized = torch.log_softmax(self.log_weight, 0)
        alive = self.log_weight > -math.inf
        increment = torch.where(alive, zero_density(increment)[0], -math.inf)
        # The ratio does not change when the increment is shifted; rounding does.
        increment = increment - increment.amax(0)
        first = torch.logsumexp(log_normalized + increment, 0)
        second = torch.logsumexp(log_normalized + 2 * increment, 0)
        return self.num_particles * torch.exp(2 * first - second).nan_to_num(nan=0.0)

    def reset_to_mean(self, mask: Tensor | None = None) -> LogWeights:
        """Give every particle of a cell the cell's mean weight, which leaves `log_mean` as it was.

        These are the weights after whole particles were resampled: the evidence estimate carries
        over, and so does its unbiasedness.

        Args:
            mask: boolean, shape `(*population)`, the cells to reset; all cells if None.
        """
        reset = self.log_mean().expand_as(self.log_weight)
        if mask is not None:
            reset = torch.where(mask, reset, self.log_weight)
        return LogWeights(reset)

    def _degenerate_message(self, site: str | None) -> str:
        dead = self.num_bad == self.num_particles
        where = "" if site is None else f' at site "{site}"'
        cells = ""
        if self.population:
            first = tuple(torch.nonzero(dead)[0].tolist())
            cells = f" in {int(dead.sum())} of {dead.numel()} population cells, the first {first}"
        return (
            f"all {self.num_particles} particles have zero weight{where}{cells}: their "
            "log-densities are NaN or infinite. Check the data and the initial values, lower the "
            "step size, or use more particles"
        )
