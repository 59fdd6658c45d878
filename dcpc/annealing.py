"""Evidence by annealing: from the prior to the posterior, with the sweep as the move.

The temperature `beta` of `p(z) p(x | z)^beta` rises along a ladder; at every rung the weights
take the likelihood increments (`retarget`), whole particles are resampled where the ESS is low,
and the units move (`sweep`). With a fixed ladder and frozen proposals the mean weight `Zhat` is
unbiased for the evidence (Neal 2001; Del Moral, Doucet & Jasra 2006).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dcpc.divide import Division, Reference, Target
from dcpc.errors import DegenerateWeightsError
from dcpc.recombine import LogWeights, take_particles
from dcpc.sweep import (
    Adaptation,
    Parts,
    SweepState,
    restart_adaptation,
    retarget,
    sweep,
)

MAX_TEMPERATURES = 2000
"""Rungs after which an adaptive ladder gives up: the particles cannot follow the target."""

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Rung:
    """A temperature, and the proposals to move with there."""

    temperature: float
    adaptation: Mapping[str, Adaptation] = field(default_factory=dict)


@dataclass(frozen=True)
class Annealed:
    """Particles brought to the posterior.

    Attributes:
        state: Particles and weights at temperature one, not yet resampled.
        ladder: The rungs that were climbed, with what the proposals learned on each.
        log_evidence: `log Zhat`, `(*population)`.
        log_evidence_se: Its standard error, `(*population)`.
    """

    state: SweepState
    ladder: tuple[Rung, ...]
    log_evidence: Tensor
    log_evidence_se: Tensor


def anneal(
    division: Division,
    state: SweepState,
    parts: Parts,
    tensors: Sequence[Tensor],
    *,
    ladder: Sequence[Rung] | None = None,
    references: Mapping[str, Reference] | None = None,
    conditional_ess: float = 0.9,
    adapt: bool = True,
    progress: Progress | None = None,
) -> Annealed:
    """Brings particles from temperature zero to one.

    Args:
        division: The divided model.
        state: Particles drawn from the prior (or the references), weights referring to it.
        parts: What the sweeps are made of; the correction must be exact.
        tensors: Tensors among the model's arguments.
        ladder: Temperatures in increasing order, the last one 1; None chooses them so that each
            step keeps the conditional ESS, averaged over the population.
        references: Starting distributions that replace priors.
        conditional_ess: Of an adaptive ladder, as a fraction of K.
        adapt: Whether proposals learn on the way. The evidence is exactly unbiased only where
            the ladder is given and nothing adapts.
        progress: Called with the temperature after each rung.

    Raises:
        DegenerateWeightsError: No particle has positive density, or an adaptive ladder does not
            reach temperature one.
    """
    references = references or {}
    eve = _particle_index(state)
    climbed: list[Rung] = []
    temperature = 0.0
    while temperature < 1.0:
        if ladder is None:
            temperature = _next_temperature(
                division, state, tensors, references, temperature, conditional_ess
            )
            if len(climbed) >= MAX_TEMPERATURES:
                raise DegenerateWeightsError(
                    f"annealing is at temperature {temperature:.3g} after {MAX_TEMPERATURES} "
                    f"rungs; sites {division.latents}: the likelihood is too sharp for the prior's "
                    "particles. Use more particles, rescale the model, or give initial_values."
                )
        else:
            temperature = ladder[len(climbed)].temperature
            if not adapt:
                state = replace(state, adaptation=ladder[len(climbed)].adaptation)
        if adapt:
            state = restart_adaptation(state, parts)
        target = Target(temperature, references)
        if temperature >= 1.0:
            state = retarget(division, state, tensors, target)
            break
        state, info = sweep(
            division, state, parts, tensors, target=target, adapt=adapt, retargets=True
        )
        if info.ancestors is not None:
            eve = take_particles(eve, info.ancestors, tuple(range(1, eve.dim())))
        climbed.append(Rung(temperature, state.adaptation))
        if progress is not None:
            progress(temperature)
    log_evidence = state.log_weight.log_mean()
    standard_error = genealogical_standard_error(state.log_weight, eve)
    if progress is not None:
        progress(1.0)
    return Annealed(state, (*climbed, Rung(1.0, state.adaptation)), log_evidence, standard_error)


def importance_evidence(state: SweepState) -> tuple[Tensor, Tensor]:
    """`log Zhat` and its standard error from the weights of independent particles."""
    error = genealogical_standard_error(state.log_weight, _particle_index(state))
    return state.log_weight.log_mean(), error


def spaced_ladder(num_temperatures: int, power: float = 3.0) -> list[Rung]:
    """Temperatures `(t / T)^power`, dense near the prior, where the target changes fastest."""
    return [Rung((step / num_temperatures) ** power) for step in range(1, num_temperatures + 1)]


def genealogical_standard_error(weights: LogWeights, eve: Tensor) -> Tensor:
    """Standard error of `log Zhat` from one run, by the particles' genealogy.

    Particles that descend from one initial particle are dependent; with `W_e` the total weight
    of the descendants of particle e, `Var(Zhat / Z)` is about `K / (K - 1) (sum_e W_e^2 - 1/K)`:
    the estimate of Lee & Whiteley (2018) without its correction for the noise of multinomial
    resampling, which low-variance schemes do not make. It errs on the large side.

    Args:
        weights: Log-weights `(K, *population)`.
        eve: Index of each particle's initial ancestor, `(K, *population)`.

    Returns:
        `(*population)`; NaN for one particle.
    """
    num_particles = weights.num_particles
    if num_particles == 1:
        return torch.full_like(weights.log_weight[0], math.nan)
    normalized = weights.normalized()
    families = torch.zeros_like(normalized).scatter_add_(0, eve, normalized)
    excess = families.square().sum(0) - 1.0 / num_particles
    return (excess.clamp(min=0.0) * num_particles / (num_particles - 1)).sqrt()


def _next_temperature(
    division: Division,
    state: SweepState,
    tensors: Sequence[Tensor],
    references: Mapping[str, Reference],
    temperature: float,
    conditional_ess: float,
) -> float:
    """The temperature at which the conditional ESS falls to its target, by bisection."""
    with torch.no_grad():
        factors = division.log_factors(state.latents, tensors)
        start, end = (
            division.over_population(
                Target(beta, references).weigh(factors, state.latents, division.sites)
            )
            for beta in (0.0, 1.0)
        )
    slope = end - start
    if not bool(slope.isfinite().any()):
        return 1.0

    def kept(beta: float) -> float:
        increment = (beta - temperature) * slope
        return float(state.log_weight.conditional_ess(increment).mean()) / state.num_particles

    if state.num_particles == 1 or kept(1.0) >= conditional_ess:
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
