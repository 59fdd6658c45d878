"""Draws of the latents that are summed out, given the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dcpc.conquer import draw_from_conditional
from dcpc.divide import Density, Division, prior_particles


def complete(
    division: Division, tensors: Sequence[Tensor], latents: Mapping[str, Tensor], count: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draws the latents that a division sums out from their complete conditionals.

    Args:
        division: The division.
        tensors: Tensors among the model's arguments.
        latents: The other latents, unconstrained `(n K, *batch, *event)`.
        count: K, for which values are drawn at a time.

    Returns:
        All latents, and the conditional probabilities `(n K, *batch, *event, S)` of the drawn ones.
    """
    whole = division.completion
    if whole is None:
        return dict(latents), {}
    clouds = [
        _complete(
            whole, division.summed_out, tensors, {n: u[i : i + count] for n, u in latents.items()}
        )
        for i in range(0, len(next(iter(latents.values()))), count)
    ]
    return (
        {name: torch.cat([cloud[0][name] for cloud in clouds]) for name in clouds[0][0]},
        {name: torch.cat([cloud[1][name] for cloud in clouds]) for name in clouds[0][1]},
    )


def _complete(
    whole: Division, names: Sequence[str], tensors: Sequence[Tensor], latents: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    count = len(next(iter(latents.values())))
    density = Density(whole, tuple(tensors))
    active = density.active_values()
    if active:  # what is masked out is drawn from its prior, and stays what it is
        arguments = whole.program.arguments.replace(tensors)
        prior = prior_particles(whole.program.model, whole.sites, arguments, count, latents)
        start = {name: prior[name] for name in names}
    else:
        rows = torch.arange(count, device="cpu") % whole.program.num_particles
        start = {name: whole.program.example[name][rows] for name in names}
    everything = {**latents, **start}
    probabilities: dict[str, Tensor] = {}
    for group in whole.groups:
        if all(name in names for unit in group.units for name in unit.sites):
            unit = density.conditional(group, everything, active.get(group.name))
            drawn = draw_from_conditional(unit, keep_dead=False)
            everything |= group.unpack(drawn.value)
            probabilities |= drawn.probabilities
    return everything, probabilities
