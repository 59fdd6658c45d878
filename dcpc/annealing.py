"""Evidence by annealing: from the prior to the posterior, with the sweep as the move.

The temperature `beta` of `p(z) p(x | z)^beta` rises along a ladder; at every rung the weights
take the likelihood increments (`retarget`), whole particles are resampled where the ESS is low,
and the units move (`sweep`), as often as it takes them to decorrelate. With a fixed ladder, fixed
numbers of sweeps and frozen proposals the mean weight `Zhat` is unbiased for the evidence (Neal
2001; Del Moral, Doucet & Jasra 2006).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dcpc.divide import Density
from dcpc.errors import DegenerateWeightsError
from dcpc.parts import Adaptation, Parts
from dcpc.recombine import LogWeights, take_particles
from dcpc.sweep import PLAIN, Runner, SweepState, restart_adaptation, retarget, sweep

MAX_TEMPERATURES = 2000
"""Rungs after which an adaptive ladder gives up: the particles cannot follow the target."""

MAX_CORRELATION = 0.2
"""Correlation of the slopes before and after the moves of a rung at which they are enough.

The error of the mean slope, which `log Zhat` adds up over the rungs, has `(1 + r) / (1 - r)` times
the variance that independent particles would give it: half as much again at .2.
"""

MAX_SWEEPS = 50
"""Sweeps at a rung after which an adaptive ladder goes on, decorrelated or not.

A Langevin move needs some `2 d^(1/3)` sweeps in d dimensions: 12 in 200, 25 in 2,000, 43 in 10,000.
What takes more mixes too slowly for the evidence to be worth the time.
"""

NUM_PROBES = 10
"""Sweeps at a rung after which it shows whether `MAX_SWEEPS` can be enough; if not, no more."""

MIN_FAMILIES = 10.0
"""Effective number of families from which a standard error is reported.

One error from n families is about `n^(-1/2)`, with n - 1 degrees of freedom. Where families inherit
their weight (importance sampling, moves that do not decorrelate), it is too small besides, for the
families that would show it are rare: of 100 particles annealed through Gaussians with too few
moves, 5 of 79 estimates with 5 to 8 families were off by more than 4 errors, and none of 189 with
more.
"""

MIN_DECORRELATED_FAMILIES = 5.0
"""The same where the moves of every rung decorrelated the particles, so that families are alike.

Then an error of 4 degrees of freedom is what it seems: of some 400 such estimates none was off by
more than 3.4 errors, with as few as 3.3 families.
"""

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Rung:
    """A temperature, and the moves that are made there.

    Attributes:
        temperature: `beta`.
        adaptation: Proposals to move with.
        num_sweeps: Number of sweeps; none are made at temperature one, where the ladder ends.
        correlation: Correlation of the particles' slopes (`d/dbeta` of the log-target) before and
            after the sweeps, as the pilot of an adaptive ladder found it; NaN where unknown.
    """

    temperature: float
    adaptation: Mapping[str, Adaptation] = field(default_factory=dict)
    num_sweeps: int = 1
    correlation: float = math.nan

    @property
    def decorrelates(self) -> bool:
        """Whether the sweeps are known to be enough."""
        return self.temperature >= 1.0 or self.correlation <= MAX_CORRELATION


@dataclass(frozen=True)
class Annealed:
    """Particles brought to the posterior.

    Attributes:
        state: Particles and weights at temperature one, not yet resampled.
        ladder: The rungs that were climbed, with what the proposals learned on each.
        log_evidence: `log Zhat`, `(*population)`.
        log_evidence_se: Its standard error, `(*population)`: infinite where too few families are
            left to tell, NaN for one particle.
        eve: Index of every particle's initial ancestor, `(K, *population)`.
    """

    state: SweepState
    ladder: tuple[Rung, ...]
    log_evidence: Tensor
    log_evidence_se: Tensor
    eve: Tensor

    @property
    def effective_families(self) -> Tensor:
        """Effective number of initial particles with descendants, `(*population)`."""
        return effective_families(self.state.log_weight, self.eve)


@dataclass(frozen=True)
class _Cloud:
    """Particles on their way.

    Attributes:
        state: Particles and weights.
        eve: Initial ancestors, `(K, *population)`.
        slope: `d/dbeta` of the log-target, `(K, *population)`, if anybody looks at it.
    """

    state: SweepState
    eve: Tensor
    slope: Tensor | None

    def descend(self, ancestors: Tensor) -> _Cloud:
        """Ancestors and slopes after whole particles were resampled; the state already is."""
        axes = tuple(range(1, ancestors.dim()))
        slope = None if self.slope is None else take_particles(self.slope, ancestors, axes)
        return replace(self, eve=take_particles(self.eve, ancestors, axes), slope=slope)


def anneal(
    density: Density,
    state: SweepState,
    parts: Parts,
    *,
    ladder: Sequence[Rung] | None = None,
    conditional_ess: float = 0.9,
    max_sweeps: int = MAX_SWEEPS,
    adapt: bool = True,
    progress: Progress | None = None,
    runner: Runner = PLAIN,
) -> Annealed:
    """Brings particles from temperature zero to one.

    An adaptive ladder repeats the sweeps of a rung until the particles have decorrelated
    (`MAX_CORRELATION`), up to `MAX_SWEEPS` times, or until it shows that these would not be enough;
    a given ladder says how often.

    Args:
        density: The density at temperature one; with references, where they replace priors.
        state: Particles drawn from the prior (or the references), weights referring to it.
        parts: Parts of the sweeps; the correction must be exact.
        ladder: Temperatures in increasing order, the last one 1; None chooses them so that each
            step keeps the conditional ESS, averaged over the population, and the sweeps on it.
        conditional_ess: Conditional ESS that each step of an adaptive ladder keeps, over K.
        max_sweeps: Sweeps at a rung after which an adaptive ladder goes on, decorrelated or not.
        adapt: Whether proposals learn on the way. The evidence is exactly unbiased only where
            the ladder is given and nothing adapts.
        progress: Called with the temperature after each rung.
        runner: What evaluates and moves the particles.

    Raises:
        DegenerateWeightsError: No particle has positive density, or an adaptive ladder does not
            reach temperature one.
    """
    slope = density.slope(state.latents) if ladder is None else None
    cloud = _Cloud(state, _particle_index(state), slope)
    climbed: list[Rung] = []
    while True:
        if ladder is None:
            rung = _next_rung(density, cloud, climbed, conditional_ess, max_sweeps)
        else:
            rung = ladder[len(climbed)]
            if not adapt:
                cloud = replace(cloud, state=replace(cloud.state, adaptation=rung.adaptation))
        if adapt:
            cloud = replace(cloud, state=restart_adaptation(cloud.state, parts))
        tempered = density.at(rung.temperature)
        if rung.temperature >= 1.0:
            break
        cloud, rung = _climb(tempered, cloud, rung, parts, adapt, runner)
        climbed.append(rung)
        if progress is not None:
            progress(rung.temperature)
    state = retarget(tempered, cloud.state)
    if progress is not None:
        progress(1.0)
    return _annealed(state, cloud.eve, (*climbed, Rung(1.0, state.adaptation)))


def importance_evidence(state: SweepState) -> tuple[Tensor, Tensor]:
    """`log Zhat` and its standard error from the weights of independent particles.

    Every particle is a family: their effective number is the ESS of the weights.
    """
    error = genealogical_standard_error(state.log_weight, _particle_index(state))
    return state.log_weight.log_mean(), error


def spaced_ladder(num_temperatures: int, power: float = 3.0) -> list[Rung]:
    """Temperatures `(t / T)^power`, dense near the prior, where the target changes fastest.

    One sweep is made at each: its length is what a given ladder costs.
    """
    return [Rung((step / num_temperatures) ** power) for step in range(1, num_temperatures + 1)]


def effective_families(weights: LogWeights, eve: Tensor) -> Tensor:
    """Effective number of families, `1 / sum_e W_e^2`, `(*population)`.

    `W_e` is the total weight of the descendants of initial particle e. Between one and K, and the
    ESS where nothing was resampled.

    Args:
        weights: Log-weights `(K, *population)`.
        eve: Index of each particle's initial ancestor, `(K, *population)`.
    """
    normalized = weights.normalized()
    families = torch.zeros_like(normalized).scatter_add_(0, eve, normalized)
    return families.square().sum(0).reciprocal()


def genealogical_standard_error(
    weights: LogWeights, eve: Tensor, min_families: float = MIN_FAMILIES
) -> Tensor:
    """Standard error of `log Zhat` from one run, by the particles' genealogy.

    Particles that descend from one initial particle are dependent; with `W_e` the total weight
    of the descendants of particle e, `Var(Zhat / Z)` is about `K / (K - 1) (sum_e W_e^2 - 1/K)`:
    the estimate of Lee & Whiteley (2018) without its correction for the noise of multinomial
    resampling, which low-variance schemes do not make. It errs on the large side.

    It cannot exceed one, however wrong `Zhat` is. Where few families are left it says nothing, and
    the error is infinite; of few particles at least half have to count.

    Args:
        weights: Log-weights `(K, *population)`.
        eve: Index of each particle's initial ancestor, `(K, *population)`.
        min_families: Effective number of families to ask for, of K large.

    Returns:
        `(*population)`; infinite where families are too few, NaN for one particle.
    """
    num_particles = weights.num_particles
    if num_particles == 1:
        return torch.full_like(weights.log_weight[0], math.nan)
    families = effective_families(weights, eve)
    excess = (families.reciprocal() - 1.0 / num_particles).clamp(min=0.0)
    error = (excess * num_particles / (num_particles - 1)).sqrt()
    too_few = families < min(min_families, 0.5 * (num_particles + 1))
    return error.masked_fill(too_few, math.inf)


def _annealed(state: SweepState, eve: Tensor, ladder: tuple[Rung, ...]) -> Annealed:
    """The estimate from particles at temperature one."""
    decorrelated = all(rung.decorrelates for rung in ladder)
    error = genealogical_standard_error(
        state.log_weight, eve, MIN_DECORRELATED_FAMILIES if decorrelated else MIN_FAMILIES
    )
    return Annealed(state, ladder, state.log_weight.log_mean(), error, eve)


def _climb(
    density: Density, cloud: _Cloud, rung: Rung, parts: Parts, adapt: bool, runner: Runner
) -> tuple[_Cloud, Rung]:
    """Reweights the particles to the density of a rung and sweeps there.

    As often as the rung says, or, where slopes are measured, at most: until they have forgotten
    what they were before the moves.

    Returns:
        The particles, and the rung with the proposals and the sweeps that were made.
    """
    state, correlation, num_sweeps = cloud.state, rung.correlation, 0
    slope = None
    while num_sweeps < rung.num_sweeps:
        state, info = sweep(
            density, state, parts, adapt=adapt, retargets=num_sweeps == 0, runner=runner
        )
        num_sweeps += 1
        if info.ancestors is not None:
            cloud = cloud.descend(info.ancestors)
        if cloud.slope is not None:
            slope = density.slope(state.latents)
            correlation = _correlation(state.log_weight, cloud.slope, slope)
            # NaN, where there is nothing to measure, ends the rung too.
            if not correlation > MAX_CORRELATION or _is_hopeless(correlation, num_sweeps):
                break
    return replace(cloud, state=state, slope=slope), replace(
        rung, adaptation=state.adaptation, num_sweeps=num_sweeps, correlation=correlation
    )


def _is_hopeless(correlation: float, num_sweeps: int) -> bool:
    """Whether a correlation falls too slowly to be low enough after `MAX_SWEEPS`.

    As `r^n` with the number n of sweeps; judged once that many were made that it shows.
    """
    enough = MAX_CORRELATION ** (num_sweeps / MAX_SWEEPS)
    return num_sweeps >= NUM_PROBES and correlation > enough


def _correlation(weights: LogWeights, before: Tensor, after: Tensor) -> float:
    """Weighted correlation over the particles of two statistics, pooled over the population.

    `sum_kc W_kc a_kc b_kc / sqrt(sum_kc W_kc a_kc^2  sum_kc W_kc b_kc^2)`, over particles k and
    cells c, of values less their cell's weighted mean. Cells count by their variance, as they do
    in the error of the sum of `log Zhat`.

    Args:
        weights: Log-weights `(K, *population)`.
        before: One statistic, `(K, *population)`.
        after: The other.

    Returns:
        The correlation; NaN where one of them does not vary. Values that are not finite are left
        out.
    """
    usable = before.isfinite() & after.isfinite()
    mass = torch.where(usable, weights.normalized().double(), 0.0)
    share = mass / mass.sum(0).clamp(min=torch.finfo(mass.dtype).tiny)
    first, second = (
        value - (share * value).sum(0)
        for value in (torch.where(usable, v.double(), 0.0) for v in (before, after))
    )
    product, left, right = (
        (mass * a * b).sum() for a, b in ((first, second), (first, first), (second, second))
    )
    return float(product / (left * right).sqrt())


def _next_rung(
    density: Density,
    cloud: _Cloud,
    climbed: Sequence[Rung],
    conditional_ess: float,
    max_sweeps: int,
) -> Rung:
    """The next rung of an adaptive ladder, with the most sweeps that may be made there.

    Raises:
        DegenerateWeightsError: The ladder is too long.
    """
    assert cloud.slope is not None
    weights, slope = cloud.state.log_weight, cloud.slope
    temperature = climbed[-1].temperature if climbed else 0.0
    temperature = _next_temperature(weights, slope, temperature, conditional_ess)
    if len(climbed) >= MAX_TEMPERATURES:
        raise DegenerateWeightsError(
            f"annealing is at temperature {temperature:.3g} after {MAX_TEMPERATURES} "
            f"rungs; sites {density.division.latents}: the likelihood is too sharp for the prior's "
            "particles. Use more particles, rescale the model, or give initial_values."
        )
    return Rung(temperature, num_sweeps=max_sweeps)


def _next_temperature(
    weights: LogWeights, slope: Tensor, temperature: float, conditional_ess: float
) -> float:
    """The temperature at which the conditional ESS falls to its target, by bisection."""
    if not bool(slope.isfinite().any()):
        return 1.0

    def kept(beta: float) -> float:
        increment = (beta - temperature) * slope
        return float(weights.conditional_ess(increment).mean()) / weights.num_particles

    if weights.num_particles == 1 or kept(1.0) >= conditional_ess:
        return 1.0
    low, high = temperature, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high) if low > 1e-3 else max(math.sqrt(max(low, 1e-12) * high), 1e-12)
        if kept(middle) >= conditional_ess:
            low = middle
        else:
            high = middle
    return high


def _particle_index(state: SweepState) -> Tensor:
    weights = state.log_weight.log_weight
    index = torch.arange(weights.shape[0], device=weights.device)
    return index.reshape(-1, *(1,) * (weights.dim() - 1)).expand(weights.shape).contiguous()
