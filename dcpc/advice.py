"""Advice for a posterior whose particles have not mixed."""

from __future__ import annotations

import networkx as nx
import torch

from dcpc.draws import MIN_DRAWS
from dcpc.posterior import Posterior

CORRELATED = 0.8
"""Correlation of two units above which moving them apart is slow."""

MAX_VALUES = 16
"""Values of a latent up to which it is looked at, and may be a part of a block."""


def advise(posterior: Posterior, num_sweeps: int, few_families: bool) -> str:
    """Advise a block, more sweeps, or initial values.

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
    if posterior.describes_history or num_sweeps < 4 * MIN_DRAWS:
        advice.append(f"sweep longer, run(..., num_sweeps={max(1000, 4 * num_sweeps)})")
    else:
        advice.append("keep more sweeps (leave keep_every out), or take more particles")
    if few_families:
        advice.append(
            "start nearer to the posterior, run(..., initial_values={...}), or take more particles"
        )
    return "; ".join(advice)


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
