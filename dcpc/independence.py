"""Independence proposals: particles that jump to draws of a guide."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dcpc.errors import OptionError
from dcpc.problem import Problem
from dcpc.recombine.resampling import along_population
from dcpc.start import draw_from_guide, guide_log_density
from dcpc.sweep import SweepState, retarget

__all__ = ["jump_to_guide"]


def jump_to_guide(problem: Problem, state: SweepState) -> tuple[SweepState, Tensor]:
    """Proposes a draw of the guide in the place of every particle, all latents at once.

    Accepted with probability `min(1, w(z') / w(z))`, `w(z) = p(x, z) / q(z | x)`, particle by
    particle and cell by cell: Metropolis with an independence proposal, which leaves the posterior
    invariant (Hastings 1970; Tierney 1994). Particles that lag behind what the guide has learned,
    whose `w` is small, start anew from it; those that are ahead stay. Weights do not move but for
    the reweighting to the present parameters.

    Args:
        problem: A model with a guide, bound to its data.
        state: Particles and weights.

    Returns:
        The state, and the mean acceptance rate.

    Raises:
        OptionError: There is no guide, or the algorithm is not exact.
    """
    guide, division, arguments = problem.guide, problem.division, problem.arguments
    if guide is None:
        raise OptionError("there is no guide to jump to; give one: DCPC(model, guide, ...)")
    if not problem.parts.correction.is_exact:
        raise OptionError(
            f"algorithm {problem.algorithm.name!r} does not leave posteriors invariant, which is "
            "what jumps to draws of a guide do; use dcpc or dcpc-smc"
        )
    state = retarget(problem.density, state)
    drawn = draw_from_guide(guide, division, arguments, state.num_particles)
    target = problem.density.log_joint(drawn.latents)
    here = guide_log_density(guide, division, arguments, state.latents)
    ratio = (target - drawn.log_joint) - (state.log_joint - here)
    ratio = ratio.nan_to_num(nan=-torch.inf)
    accepted = torch.rand_like(ratio).log() < ratio

    def chosen(name: str, value: Tensor, other: Tensor) -> Tensor:
        here = along_population(accepted, value, division.population_axes(name))
        return torch.where(here, other, value)

    latents = {name: chosen(name, u, drawn.latents[name]) for name, u in state.latents.items()}
    fresh = problem.parts.init_memory(drawn.latents)
    memory = {
        kind: {name: chosen(name, kept, fresh[kind][name]) for name, kept in by_latent.items()}
        for kind, by_latent in state.memory.items()
    }
    log_joint = torch.where(accepted, target, state.log_joint)
    moved = replace(state, latents=latents, memory=memory, log_joint=log_joint, scored={})
    return moved, ratio.clamp(max=0.0).exp().mean()
