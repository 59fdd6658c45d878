"""Advice for a posterior whose particles have not mixed."""

from __future__ import annotations

import math

import networkx as nx
import torch

from dcpc.approach.joint import particles_for
from dcpc.draws import MIN_DRAWS
from dcpc.posterior import Posterior

CORRELATED = 0.8
"""Correlation of two units above which moving them apart is slow."""

FUNNEL = 0.5
"""Correlation of a scalar with the logarithm of a latent's spread from which it is its scale."""

MIN_LOG_SCALE_SD = 0.3
"""Standard deviation of the logarithm of a scale below which it does no harm."""

MIN_PARTICLES = 20
"""Particles that it takes to see that."""

MAX_VALUES = 16
"""Values of a latent up to which it is looked at, and may be a part of a block."""


def advise(posterior: Posterior, num_sweeps: int, few_families: bool) -> str:
    """Advise a block, other coordinates, more sweeps, or initial values.

    Args:
        posterior: The posterior.
        num_sweeps: Sweeps that were made.
        few_families: Whether the particles descend from few that they have not forgotten.
    """
    advice = []
    blocks, strongest = correlated_blocks(posterior)
    if blocks:
        named = ", ".join("(" + ", ".join(f'"{n}"' for n in block) + ")" for block in blocks)
        advice.append(
            f"move correlated latents together, DCPC(..., blocks=[{named}]) (correlation "
            f"{strongest:.3f})"
        )
    funnels = find_funnels(posterior)
    if funnels:
        scale, narrow = funnels[0]
        advice.append(
            f"'{narrow}' is narrow where '{scale}' is small (a funnel): move it by its "
            "standardised error instead, as DCPC(..., reparam='noncentred') does with all latents "
            "that have one"
        )
    if enough := particles_for_one_unit(posterior):
        advice.append(
            f"take {enough} particles, from which on all latents move as one unit by default"
        )
    if posterior.describes_history or num_sweeps < 4 * MIN_DRAWS:
        advice.append(f"sweep longer, run(..., num_sweeps={max(1000, 4 * num_sweeps)})")
    else:
        advice.append("keep more sweeps (leave keep_every out), or take more particles")
    if few_families:
        advice.append(
            "start nearer to the posterior, run(..., initial_values={...}), or take more particles"
        )
    return "; ".join(advice)


def particles_for_one_unit(posterior: Posterior) -> int:
    """Particles from which on a run moves all latents jointly; 0 if it never does, or has them."""
    is_one = len(set(posterior.unit_of.values())) < 2
    has_cells = posterior.log_weight.dim() > 1
    if is_one or has_cells or posterior.discrete or not posterior.is_exact:
        return 0
    enough = particles_for(sum(u[0].numel() for u in posterior.state.latents.values()))
    return enough if posterior.num_particles < enough else 0


def find_funnels(posterior: Posterior) -> list[tuple[str, str]]:
    """Pairs of a scalar and a latent whose spread follows it, the strongest first.

    By the correlation, over the final particles, of the unconstrained scalar with the logarithm of
    the other's spread: over its elements where it has several, and from its mean where it has one.
    None where the model is a population of independent problems.
    """
    weights = posterior.state.log_weight.normalized().double()
    latents = {
        name: u.reshape(len(u), -1).double()
        for name, u in posterior.state.latents.items()
        if name in posterior.unit_of and name not in posterior.discrete
    }
    if weights.dim() > 1 or posterior.num_particles < MIN_PARTICLES:
        return []
    found = []
    for scale, s in latents.items():
        if s.shape[1] > 1:
            continue
        for narrow, u in latents.items():
            if narrow == scale:
                continue
            centre = u.mean(1, keepdim=True) if u.shape[1] > 2 else (weights[:, None] * u).sum(0)
            spread = (u - centre).square().mean(1).clamp(min=1e-300).log()
            covariance = torch.cov(torch.stack([s[:, 0], spread]), correction=0, aweights=weights)
            scale_sd, spread_sd = covariance.diagonal().sqrt().tolist()
            strength = float(covariance[0, 1]) / (scale_sd * spread_sd or math.inf)
            if scale_sd >= MIN_LOG_SCALE_SD and strength > FUNNEL:
                found.append((strength, scale, narrow))
    return [(scale, narrow) for _, scale, narrow in sorted(found, reverse=True)]


def correlated_blocks(posterior: Posterior) -> tuple[list[tuple[str, ...]], float]:
    """Latents of different units that correlate, as blocks, and their strongest correlation.

    Of the final particles, unconstrained, of continuous latents with few values; whole units are
    joined. None where the model is a population of independent problems.
    """
    weights = posterior.state.log_weight.normalized().double()
    unit_of = posterior.unit_of
    latents = {
        name: u.reshape(len(u), -1).double()
        for name, u in posterior.state.latents.items()
        if u[0].numel() <= MAX_VALUES and name in unit_of and name not in posterior.discrete
    }
    if weights.dim() > 1 or posterior.num_particles < 3 or len(latents) < 2:
        return [], 0.0
    values = torch.cat(list(latents.values()), 1)
    units = [unit_of[name] for name, u in latents.items() for _ in range(u.shape[1])]
    deviations = values - (weights[:, None] * values).sum(0)
    covariance = deviations.T @ (weights[:, None] * deviations)
    scale = covariance.diagonal().sqrt()
    correlation = (covariance / scale / scale[:, None]).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    joined, strongest = nx.Graph(), 0.0
    for i, j in (correlation.abs() > CORRELATED).triu(1).nonzero().tolist():
        if units[i] != units[j]:
            joined.add_edge(units[i], units[j])
            strongest = max(strongest, float(correlation[i, j]), key=abs)
    blocks = [
        tuple(name for name in unit_of if unit_of[name] in members)
        for members in nx.connected_components(joined)
    ]
    return blocks, strongest
