"""Corrections: they turn proposed values of a unit into a step of a sampler.

Each is a small class with one interface. `apply` takes a proposed move of a group of units and
returns the values to keep, and by how much the particles' log-weights and log-joints change.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from dcpc.conquer import ConditionalDraw, Move, Proposal
from dcpc.conquer.move import Memory
from dcpc.divide import Conditional, ScoredDensity, UnitGroup
from dcpc.errors import OptionError
from dcpc.recombine.resampling import Resampler, take_particles
from dcpc.recombine.weights import LogWeights, zero_density


@dataclass(frozen=True)
class ProposedMove:
    """Everything that a correction may ask of a proposed move of a group.

    Attributes:
        unit: The group's complete conditionals. Values that are not active are where they were in
            the proposal, too, and are not counted.
        value: Its current values `(K, *plates, n, d)`.
        predicted: Log-density and score there, as they are.
        proposal: The proposed values.
        log_weight: The particles' weights before the move.
        resampler: Scheme to resample with.
    """

    unit: Conditional
    value: Tensor
    predicted: ScoredDensity
    proposal: Proposal
    log_weight: LogWeights
    resampler: Resampler

    @cached_property
    def before(self) -> ScoredDensity:
        """Log-density and score to move along at the current values."""
        return self.unit.usable(self.predicted)

    @property
    def group(self) -> UnitGroup:
        """The units that move."""
        return self.unit.group

    def mean_acceptance(self, log_acceptance: Tensor) -> Tensor:
        """Mean acceptance probability `(n,)` of the units that have something to move.

        Args:
            log_acceptance: Logarithms `(K, *plates, n)`, at most zero where it matters.
        """
        acceptance = log_acceptance.clamp(max=0.0).exp()
        active = self.unit.active
        if active is None:
            return acceptance.flatten(0, -2).mean(0)
        counted = active.any(-1).to(acceptance.dtype).expand(acceptance.shape)
        total = (acceptance * counted).flatten(0, -2).sum(0)
        return total / counted.flatten(0, -2).sum(0)

    def arrive(self) -> Arrived:
        """Evaluates the proposal at its end.

        `a = log_density(u') + log q(u | u') - log_density(u) - log q(u' | u)`. Zero density at
        either end gives minus infinity: such a move is never made, and a particle of zero density
        stays what it is until it is resampled.
        """
        after = self.unit.evaluate_raw(self.proposal.value)
        back = self.proposal.way_back(self.unit.usable(after).score)
        ratio = after.log_density - self.predicted.log_density + back.log_ratio
        ratio, bad = zero_density(ratio)  # where either density is zero, it is not finite
        return Arrived(
            self.predicted, after, ratio, bad, back.memory, self.proposal.memory_if_rejected
        )


@dataclass(frozen=True)
class Arrived:
    """A proposed move, evaluated at its end.

    Attributes:
        before: Log-density and score where it starts, as they are.
        after: The same there.
        log_ratio: `a`, `(K, *plates, n)`.
        bad: Where it was not finite.
        memory: Memory of the move where the proposal is accepted.
        memory_if_rejected: Memory elsewhere.
    """

    before: ScoredDensity
    after: ScoredDensity
    log_ratio: Tensor
    bad: Tensor
    memory: Memory
    memory_if_rejected: Memory

    def gained(self, accepted: Tensor) -> Tensor:
        """Change of the log-densities, given where the proposal is accepted, `(K, *plates, n)`."""
        return torch.where(accepted, self.after.log_density - self.before.log_density, 0.0)

    def kept(self, accepted: Tensor) -> ScoredDensity:
        """Log-density and score of the values that are kept."""
        return ScoredDensity(
            torch.where(accepted, self.after.log_density, self.before.log_density),
            torch.where(accepted.unsqueeze(-1), self.after.score, self.before.score),
        )

    def remember(self, accepted: Tensor) -> Memory:
        """Memory of the move, given where the proposal is accepted, `(K, *plates, n)`."""
        return {
            name: torch.where(accepted.unsqueeze(-1), value, self.memory_if_rejected[name])
            for name, value in self.memory.items()
        }


@dataclass(frozen=True)
class Outcome:
    """The result of a correction.

    Attributes:
        value: Values to keep, `(K, *plates, n, d)`.
        log_weight: Change of the log-weights, `(K, *population)`; None for none.
        log_joint: Change of the log-joint, `(K, *population)`; None if it is not followed.
        statistic: Statistic that step-size adaptation drives to its target, `(n,)`; None for none.
        num_bad: Number of log-densities that were NaN or infinite.
        memory: Memory of the move.
        kept: Log-density and score of the values to keep, as they are; None if not known.
    """

    value: Tensor
    log_weight: Tensor | None
    log_joint: Tensor | None
    statistic: Tensor | None
    num_bad: Tensor
    memory: Memory = field(default_factory=dict)
    kept: ScoredDensity | None = None


class Correction(ABC):
    """Interface of a correction.

    Attributes:
        is_exact: Whether the posterior is left invariant, or weighted properly; then particles
            carry their log-joint, and the target may change between sweeps.
        compares: Whether it compares a unit's log-densities before and after a move, between which
            nothing else that touches the unit may move.
        needs_density: Whether it needs the proposal's own density.
        scores_proposal: Whether it takes the score at the proposed values, for the way back.
    """

    is_exact: ClassVar[bool] = True
    compares: ClassVar[bool] = True
    needs_density: ClassVar[bool] = False
    scores_proposal: ClassVar[bool] = True

    def target_for(self, move: Move) -> float | None:
        """Value of the statistic that step sizes of a move are adapted to; None for none."""
        return None

    @abstractmethod
    def apply(self, proposed: ProposedMove) -> Outcome:
        """Corrects a proposed move of a group of units."""

    def keep(self, unit: Conditional, drawn: ConditionalDraw, resampler: Resampler) -> Outcome:
        """Keep a draw from the complete conditional, which leaves the posterior invariant.

        The ratio of the extended target to what was sampled is one: weights do not move.
        """
        gained = torch.where(drawn.after == drawn.before, 0.0, drawn.after - drawn.before)
        return Outcome(
            value=drawn.value,
            log_weight=None,
            log_joint=unit.group.over_population(gained) if self.is_exact else None,
            statistic=None,
            num_bad=(~drawn.before.isfinite()).sum(),
        )

    def begin(self, log_weight: LogWeights) -> LogWeights:
        """Log-weights at the beginning of a sweep."""
        return log_weight

    def end(self, log_weight: LogWeights, log_joint: Callable[[], Tensor]) -> LogWeights:
        """Log-weights at the end of a sweep; `log_joint()` evaluates the whole model."""
        return log_weight


@dataclass(frozen=True)
class Metropolis(Correction):
    """Accepts with probability `min(1, exp a)`, per element of the unit's plates.

    Leaves the complete conditional, and with it the posterior, invariant (Hastings 1970;
    Roberts & Tweedie 1996). Weights do not move.

    Attributes:
        target: Acceptance rate that the step size is adapted to; None for the move's own.
    """

    target: float | None = None

    def target_for(self, move: Move) -> float | None:
        return self.target if self.target is not None else move.target_acceptance

    def apply(self, proposed: ProposedMove) -> Outcome:
        after = proposed.arrive()
        ratio, bad = after.log_ratio, after.bad
        accepted = torch.rand_like(ratio).log() < ratio
        return Outcome(
            value=torch.where(accepted.unsqueeze(-1), proposed.proposal.value, proposed.value),
            log_weight=None,
            log_joint=proposed.group.over_population(after.gained(accepted)),
            statistic=proposed.mean_acceptance(ratio),
            num_bad=bad.sum(),
            memory=after.remember(accepted),
            kept=after.kept(accepted),
        )


@dataclass(frozen=True)
class LocalMetropolis(Metropolis):
    """Metropolis of the latents of a subsample, given global ones that only approach the posterior.

    Particles then carry no log-joint, and weights do not move.
    """

    is_exact: ClassVar[bool] = False


@dataclass(frozen=True)
class Weight(Correction):
    """Multiplies the weight by `exp a`: annealed importance sampling's move.

    `a` is the ratio of the extended target `p(u') q(u | u')` to what was sampled,
    `p(u) q(u' | u)`, so that the weights stay proper (Neal 2001; Del Moral, Doucet & Jasra 2006,
    with the reversal as backward kernel). Whole particles are resampled by the sweep.

    Proposals alone diverge where a step is too long for a datum's curvature, and few particles
    diverge together, which their weights do not tell. A move is therefore accepted with probability
    `min(1, exp(a + c))`, of the way back likewise `min(1, exp(c - a))`, and their ratio is part of
    the weight: an accepted move multiplies it by `exp(clip(a, -c, c))`, a rejected one by 1. That
    is proper for every bound c, and Metropolis at zero.

    The step size is adapted to the increments' conditional ESS times the acceptance.

    Attributes:
        target: Value of that product.
        bound: `c`, how much a move may change a log-weight.

    Raises:
        OptionError: A bound that is negative or not finite.
    """

    target: float = 0.95
    bound: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.bound < math.inf:
            raise OptionError(f"bound must be finite and at least 0, got {self.bound!r}")

    def target_for(self, move: Move) -> float | None:
        return self.target

    def apply(self, proposed: ProposedMove) -> Outcome:
        after = proposed.arrive()
        ratio, bad = after.log_ratio, after.bad
        group = proposed.group
        acceptance = (ratio + self.bound).clamp(max=0.0).exp()
        accepted = torch.rand_like(ratio) < acceptance
        increment = torch.where(accepted, ratio.clamp(-self.bound, self.bound), 0.0)
        spare = tuple(range(1 + group.population, ratio.dim() - 1))
        by_unit = increment.sum(spare) if spare else increment
        ess = torch.stack(
            [proposed.log_weight.conditional_ess(a).mean() for a in by_unit.unbind(-1)]
        ).to(ratio.dtype)
        return Outcome(
            value=torch.where(accepted.unsqueeze(-1), proposed.proposal.value, proposed.value),
            log_weight=group.over_population(increment),
            log_joint=group.over_population(after.gained(accepted)),
            statistic=ess / ratio.shape[0] * proposed.mean_acceptance(ratio + self.bound),
            num_bad=bad.sum(),
            memory=after.remember(accepted),
            kept=after.kept(accepted),
        )


@dataclass(frozen=True)
class Resample(Correction):
    """The paper's: each unit's values are resampled on their own (Algorithm 1, lines 7-11).

    Local weights `a = log_density(u') - log q(u' | u)` resample this unit's values across the
    particles of a population cell; `log Zhat_i = logmeanexp(a)`. After the sweep
    `log w = log p(x, z) - sum_i (log_density_i at its update - log Zhat_i)`.

    Not exact: values are separated from the blankets that they were weighed under. On a Gaussian
    chain the posterior variance comes out at .2 instead of .52, and the mean of `Zhat` can exceed
    the evidence, so that its logarithm is no bound. It is here to reproduce the paper.
    """

    is_exact: ClassVar[bool] = False
    needs_density: ClassVar[bool] = True
    scores_proposal: ClassVar[bool] = False

    def apply(self, proposed: ProposedMove) -> Outcome:
        assert proposed.proposal.log_density is not None
        density = proposed.unit.log_density(proposed.proposal.value)
        return self._resampled(
            proposed.group,
            proposed.proposal.value,
            density,
            density - proposed.proposal.log_density,
            proposed.resampler,
        )

    def keep(self, unit: Conditional, drawn: ConditionalDraw, resampler: Resampler) -> Outcome:
        """Resample draws by their local weights, `exp log_normaliser`."""
        return self._resampled(
            unit.group, drawn.value, drawn.after, drawn.log_normaliser, resampler
        )

    def _resampled(
        self,
        group: UnitGroup,
        value: Tensor,
        density: Tensor,
        local: Tensor,
        resampler: Resampler,
    ) -> Outcome:
        """Values `(K, *plates, n, d)` resampled by local log-weights `(K, *plates, n)`."""
        density, bad = zero_density(density)
        local = local.masked_fill(bad, -math.inf)
        spare = tuple(range(1 + group.population, local.dim() - 1))
        if spare:
            local, density = local.sum(spare), density.sum(spare)
        weights = LogWeights(local)
        ancestors = resampler(weights.normalized(group.name))
        axes = (*range(1, 1 + group.population), value.dim() - 2)
        kept = take_particles(density, ancestors, tuple(range(1, density.dim())))
        return Outcome(
            value=take_particles(value, ancestors, axes),
            log_weight=(weights.log_mean() - kept).sum(-1),
            log_joint=None,
            statistic=None,
            num_bad=bad.sum(),
        )

    def begin(self, log_weight: LogWeights) -> LogWeights:
        return LogWeights(torch.zeros_like(log_weight.log_weight))

    def end(self, log_weight: LogWeights, log_joint: Callable[[], Tensor]) -> LogWeights:
        return log_weight.add(log_joint())


@dataclass(frozen=True)
class Uncorrected(Correction):
    """Keeps every proposal: unadjusted Langevin dynamics, or gradient ascent without noise."""

    is_exact: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    scores_proposal: ClassVar[bool] = False

    def apply(self, proposed: ProposedMove) -> Outcome:
        proposal = proposed.proposal
        memory = proposal.memory
        if proposal.memory_if_rejected:
            memory = proposal.way_back(proposed.unit.score(proposal.value)).memory
        return Outcome(
            value=proposal.value,
            log_weight=None,
            log_joint=None,
            statistic=None,
            num_bad=(~proposed.before.log_density.isfinite()).sum(),
            memory=memory,
        )


CORRECTIONS: dict[str, type[Correction]] = {
    "metropolis": Metropolis,
    "weight": Weight,
    "resample": Resample,
    "none": Uncorrected,
}
