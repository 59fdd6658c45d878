"""The way of the particles from where they start to where they sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dcpc.annealing import importance_evidence
from dcpc.posterior import Evidence
from dcpc.problem import Problem
from dcpc.progress import ProgressBar
from dcpc.recombine import LogWeights, take_particles
from dcpc.sweep import SweepState, resample, retarget

NUM_PRIOR_DRAWS = 8192
"""Prior draws that a start elsewhere is compared with."""

MAX_PRIOR_ROUNDS = 64
"""Evaluations of the model that these may take, where there are few particles."""


@dataclass(frozen=True)
class Arrival:
    """Particles that are ready to sweep.

    Attributes:
        state: Equally weighted particles.
        evidence: The evidence if there is an estimate.
        families: Index of the initial particle that each descends from, `(K, *population)`; None
            where none were resampled.
    """

    state: SweepState
    evidence: Evidence
    families: Tensor | None = None


def approach(
    problem: Problem,
    *,
    initial_values: Mapping[str, Tensor],
    estimate_evidence: bool,
    conditional_ess: float,
    bar: ProgressBar,
) -> Arrival:
    """Brings particles to the posterior: by annealing, or by weights from the guide.

    Where the correction is not exact they stay where they start.

    Args:
        problem: A model bound to its data.
        initial_values: Constrained values to start latents from; they take precedence over a
            guide.
        estimate_evidence: Whether to spend a second annealing run on the evidence.
        conditional_ess: Conditional ESS that each step of the ladder keeps, over K.
        bar: Where progress is shown.
    """
    refusal, families = problem.evidence_refusal(), None
    uses_guide = problem.guide is not None and not initial_values
    start = problem.starting_density(initial_values) if not uses_guide else problem.density
    if not problem.parts.correction.is_exact:
        state = problem.init() if uses_guide else problem.draw_from_prior(start)
        return Arrival(state, Evidence(refusal=refusal))
    if uses_guide and (why := problem.guide_refusal()):
        state = retarget(problem.density, problem.init())
        state = replace(state, log_weight=LogWeights(torch.zeros_like(state.log_joint)))
        evidence = Evidence(refusal=refusal or why)
    elif uses_guide:
        state = retarget(problem.density, problem.init())
        evidence = Evidence(*importance_evidence(state), refusal)
    elif refusal or not estimate_evidence:
        annealed = problem.anneal_once(start, "annealing", conditional_ess, bar)
        state, families = annealed.state, annealed.eve
        evidence = Evidence(refusal=refusal or "run(..., evidence=False) was asked for")
    else:
        annealed = problem.anneal_twice(start, conditional_ess, bar)
        state, families = annealed.state, annealed.eve
        evidence = Evidence(annealed.log_evidence, annealed.log_evidence_se)
    if evidence.log_evidence is not None and (uses_guide or initial_values):
        evidence = replace(evidence, misses_prior_mass=_prior_finds_more(problem, evidence))
    state, ancestors = resample(problem.density, state, problem.parts, always=True)
    return Arrival(state, evidence, descended(families, ancestors))


def descended(families: Tensor | None, ancestors: Tensor | None) -> Tensor | None:
    """Families after whole particles were resampled; the ancestors' own where there were none."""
    if ancestors is None or families is None:
        return ancestors if families is None else families
    return take_particles(families, ancestors, tuple(range(1, families.dim())))


def _prior_finds_more(problem: Problem, evidence: Evidence) -> bool:
    """Whether draws of the prior alone show more evidence than a start elsewhere has found.

    A guide or initial values may cover one mode of several, of which their own weights know
    nothing. The mean likelihood of prior draws is an estimate too, and in low dimension a good
    one: less 4 of its standard errors, it must not exceed the other plus 4 of its own.
    """
    assert evidence.log_evidence is not None
    assert evidence.standard_error is not None
    chunks = []
    for _ in range(min(MAX_PRIOR_ROUNDS, math.ceil(NUM_PRIOR_DRAWS / problem.num_particles))):
        start = problem.draw_from_prior(problem.density)
        log_joint = problem.density.log_joint(start.latents)
        chunks.append((log_joint - start.log_joint).nan_to_num(nan=-math.inf).double())
    log_likelihood = torch.cat(chunks)
    largest = log_likelihood.amax(0)
    likelihood = (log_likelihood - largest).exp()
    error = likelihood.std(0) / math.sqrt(len(likelihood))
    lower = (likelihood.mean(0) - 4.0 * error).clamp(min=0.0).log() + largest
    upper = evidence.log_evidence + 4.0 * evidence.standard_error.nan_to_num(posinf=0.0)
    return bool((lower > upper).any())
