"""The way of the particles from where they start to where they sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dcpc.annealing import Annealed, importance_evidence
from dcpc.approach.blocks import find_blocks, strongest_correlation
from dcpc.approach.joint import (
    FIRST_CONDITIONAL_ESS,
    MIN_PARTICLES,
    finds_more,
    follow,
    joint_problem,
    send_pilots,
)
from dcpc.approach.roots import determined_roots
from dcpc.approach.tuning import tuned
from dcpc.divide.tempering import Reference
from dcpc.posterior import Evidence
from dcpc.problem import Problem
from dcpc.progress import ProgressBar
from dcpc.recombine import LogWeights, take_particles
from dcpc.recombine.correction import Metropolis
from dcpc.sweep import SweepState, resample, retarget

NUM_PRIOR_DRAWS = 8192
"""Prior draws that a start elsewhere is compared with."""

MAX_PRIOR_ROUNDS = 64
"""Evaluations of the model that these may take, where there are few particles."""

MIN_SWEEPS, MAX_SWEEPS = 300, 1000
"""Sweeps by default: the fewest, where moves are known to be good, and the most."""

ROUGH_SWEEPS = 4
"""Sweeps of a rough pilot at each of its temperatures, at most."""

SHORT_MOVE = 3
"""Leapfrog steps by which all latents move jointly, correlated or not."""


@dataclass(frozen=True)
class Arrival:
    """Particles that are ready to sweep.

    Attributes:
        state: Equally weighted particles.
        evidence: The evidence if there is an estimate.
        families: Index of the initial particle that each descends from, `(K, *population)`; None
            where none were resampled.
        problem: The problem that the state belongs to: that of the approach, or one with blocks of
            latents that the particles show to be correlated.
        num_sweeps: Sweeps that are enough, by what is known of the moves.
    """

    state: SweepState
    evidence: Evidence
    problem: Problem
    families: Tensor | None = None
    num_sweeps: int = MAX_SWEEPS


def approach(
    problem: Problem,
    *,
    initial_values: Mapping[str, Tensor],
    estimate_evidence: bool,
    conditional_ess: float,
    finds_blocks: bool,
    bar: ProgressBar,
) -> Arrival:
    """Brings particles to the posterior: by annealing, or by weights from the guide.

    Where the correction is not exact they stay where they start.

    Args:
        problem: A model bound to its data.
        finds_blocks: Whether latents whose particles are correlated are to move jointly.
        initial_values: Constrained values to start latents from; they take precedence over a
            guide.
        estimate_evidence: Whether to spend a second annealing run on the evidence.
        conditional_ess: Conditional ESS that each step of the ladder keeps, over K.
        bar: Where progress is shown.
    """
    refusal = problem.evidence_refusal()
    uses_guide = problem.guide is not None and not initial_values
    if not problem.parts.correction.is_exact:
        start = problem.starting_density(initial_values) if not uses_guide else problem.density
        state = problem.init() if uses_guide else problem.draw_from_prior(start)
        return Arrival(state, Evidence(refusal=refusal), problem)
    if not estimate_evidence:
        refusal = refusal or "run(..., evidence=False) was asked for"
    joint = None if uses_guide or initial_values else joint_problem(problem)
    if uses_guide:
        arrival = _from_guide(problem, refusal)
    elif joint is not None:
        arrival = _from_pilots(problem, joint, refusal, conditional_ess, finds_blocks, bar)
    else:
        arrival = _from_prior(problem, initial_values, refusal, conditional_ess, finds_blocks, bar)
    if arrival.evidence.log_evidence is not None and (uses_guide or initial_values):
        misses = _prior_finds_more(problem, arrival.evidence)
        arrival = replace(arrival, evidence=replace(arrival.evidence, misses_prior_mass=misses))
    problem = arrival.problem
    state, ancestors = resample(problem.density, arrival.state, problem.parts, always=True)
    return replace(arrival, state=state, families=descended(arrival.families, ancestors))


def anneal_with_evidence(
    problem: Problem, num_temperatures: int | None, conditional_ess: float, bar: ProgressBar
) -> Annealed:
    """Evidence by annealing: from the reference of pilots where there is one, else from the prior.

    Args:
        problem: A model bound to its data.
        num_temperatures: Length of a fixed ladder from the prior; None to adapt it.
        conditional_ess: Conditional ESS that each step of an adaptive ladder keeps, over K.
        bar: Where progress is shown.

    Raises:
        EvidenceError: The correction is not exact, or a prior is improper.
    """
    joint = None
    if num_temperatures is None and not problem.evidence_refusal():
        joint = joint_problem(problem)
    if joint is None:
        return problem.anneal(num_temperatures, conditional_ess=conditional_ess, bar=bar)
    annealed = follow(joint, send_pilots(joint, conditional_ess, bar), conditional_ess, bar)
    return replace(annealed, state=replace(annealed.state, adaptation={}))


def _from_guide(problem: Problem, refusal: str) -> Arrival:
    """Particles from the guide, with the weights that make them the posterior's."""
    state = retarget(problem.density, problem.init())
    if why := problem.guide_refusal():
        state = replace(state, log_weight=LogWeights(torch.zeros_like(state.log_joint)))
        return Arrival(state, Evidence(refusal=refusal or why), problem)
    return Arrival(state, Evidence(*importance_evidence(state), refusal), problem)


def _from_prior(
    problem: Problem,
    initial_values: Mapping[str, Tensor],
    refusal: str,
    conditional_ess: float,
    finds_blocks: bool,
    bar: ProgressBar,
) -> Arrival:
    """Particles annealed from the prior, or from references.

    A rough pilot tells which values are correlated, and are moved jointly from there on, and which
    ones the data determine, and start near where they were found.
    """
    start = nearer = problem.starting_density(initial_values)
    rough = None
    if problem.num_particles >= MIN_PARTICLES:
        rough = problem.anneal_once(
            start, "pilot", FIRST_CONDITIONAL_ESS, bar, max_sweeps=ROUGH_SWEEPS
        )
        found: dict[str, Reference] = {}
        if not initial_values:
            found = determined_roots(problem, problem.draw_from_prior(start), rough.state)
        blocks = find_blocks(problem, rough.state) if finds_blocks else []
        if blocks:
            problem = problem.with_blocks({block.sites: block.reason for block in blocks})
            start = problem.starting_density(initial_values)
        nearer = start.at(1.0, {**start.tempering.references, **found})
    pilot = problem.anneal_once(nearer, "annealing, pilot", conditional_ess, bar)
    if rough is not None and finds_more(rough, pilot):
        nearer = start
        pilot = problem.anneal_once(start, "annealing, pilot", conditional_ess, bar)
    annealed = pilot
    if not refusal:
        annealed = problem.anneal_once(
            nearer, "annealing", conditional_ess, bar, pilot.ladder, adapt=False
        )
    if not finds_blocks or not isinstance(problem.parts.correction, Metropolis):
        return _arrival(annealed, problem, refusal)
    state, _ = resample(problem.density, pilot.state, problem.parts, always=True)
    bar.stage("length of moves")
    moves = tuned(problem, state, jumps=False)
    state = replace(annealed.state, adaptation=moves.adaptation)
    return _arrival(replace(annealed, state=state), moves.problem, refusal)


def _from_pilots(
    problem: Problem,
    joint: Problem,
    refusal: str,
    conditional_ess: float,
    finds_blocks: bool,
    bar: ProgressBar,
) -> Arrival:
    """Particles annealed from a reference that pilots have fitted, all latents at once."""
    pilot = send_pilots(joint, conditional_ess, bar)
    annealed = pilot.annealed if refusal else follow(joint, pilot, conditional_ess, bar)
    if finds_blocks:
        state, _ = resample(joint.density, pilot.annealed.state, joint.parts, always=True)
        bar.stage("length of moves")
        moves = tuned(joint, state, jumps=True)
        reason = strongest_correlation(joint, state)
        if 0 < moves.problem.tuned_steps <= SHORT_MOVE:
            reason = reason or "short moves of all latents forget fast"
        if reason and not moves.forget_nothing:
            state = replace(annealed.state, adaptation=moves.adaptation)
            chosen = moves.problem.because({tuple(problem.division.latents): reason})
            arrival = _arrival(replace(annealed, state=state), chosen, refusal)
            return replace(arrival, num_sweeps=moves.num_sweeps(MIN_SWEEPS, MAX_SWEEPS))
    state = replace(annealed.state, adaptation={})
    return _arrival(replace(annealed, state=state), problem, refusal)


def _arrival(annealed: Annealed, problem: Problem, refusal: str) -> Arrival:
    evidence = Evidence(refusal=refusal)
    if not refusal:
        evidence = Evidence(annealed.log_evidence, annealed.log_evidence_se)
    return Arrival(annealed.state, evidence, problem, annealed.eve)


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
