"""Which latents are to move jointly: those whose particles are correlated."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dcpc.approach.joint import MAX_SIZE, MIN_PARTICLES, PARTICLES_PER_VALUE
from dcpc.divide import Unit
from dcpc.problem import Problem
from dcpc.sweep import SweepState

__all__ = ["Block", "find_blocks", "strongest_correlation"]

MIN_CORRELATION = 0.3
"""Correlation, in absolute value, of values of two units from which they move jointly."""

MAX_VALUES = 4096
"""Values of latents with the same plates, per element, above which no blocks are looked for."""

MAX_NUMBERS = 2**24
"""Numbers in the matrices of correlations, of which there is one per element of the plates."""


@dataclass(frozen=True)
class Block:
    """Latents that are to move jointly.

    Attributes:
        sites: Their names, in program order.
        reason: Why.
    """

    sites: tuple[str, ...]
    reason: str


def strongest_correlation(problem: Problem, state: SweepState) -> str:
    """The two latents that are correlated the most, in any element of their plates.

    Args:
        problem: A problem whose latents are one unit.
        state: Particles and weights.

    Returns:
        A sentence that names them; empty if they are hardly correlated.
    """
    (group,) = problem.division.groups
    names = group.units[0].sites
    correlation = _correlations(group.pack(state.latents).squeeze(-2), state)
    at = correlation.abs().amax(0)
    owner = _owners([group.size_of(name) for name in names])
    at = at.masked_fill(owner[:, None] == owner, 0.0)
    i, j = divmod(int(at.argmax()), len(owner))
    if not float(at[i, j]) > MIN_CORRELATION:
        return ""
    element = correlation[int(correlation[:, i, j].abs().argmax()), i, j]
    return _sentence(names[owner[i]], names[owner[j]], float(element))


def find_blocks(problem: Problem, state: SweepState) -> list[Block]:
    """Units with the same plates whose values are correlated, as blocks of bounded size.

    The pairs with the strongest correlations come first. Correlations are averaged over the
    elements of the plates.

    Args:
        problem: A problem whose latents are units of their own.
        state: Particles and weights at the posterior.
    """
    num_particles = problem.num_particles
    active = problem.density.active_latents()
    if num_particles < MIN_PARTICLES:
        return []
    alike: dict[tuple, list[tuple[Unit, Tensor]]] = defaultdict(list)
    values = {
        unit.name: value
        for group in problem.division.groups
        if not group.is_discrete
        for unit, value in zip(group.units, group.pack(state.latents).unbind(-2), strict=True)
    }
    for unit in problem.division.units:
        if unit.name in values and active.keys().isdisjoint(unit.sites):
            alike[unit.plates].append((unit, values[unit.name]))
    most = min(MAX_SIZE, num_particles // PARTICLES_PER_VALUE)
    least = MIN_CORRELATION + 2.0 / math.sqrt(num_particles)
    order = problem.division.latents
    found = [_blocks_of(members, state, order, most, least) for members in alike.values()]
    return [block for blocks in found for block in blocks]


def _blocks_of(
    members: Sequence[tuple[Unit, Tensor]],
    state: SweepState,
    order: Sequence[str],
    most: int,
    least: float,
) -> list[Block]:
    """Blocks of units with the same plates.

    Args:
        members: The units, and their values `(K, *plates, d)`.
        state: Particles and weights.
        order: Names of the latents, in program order.
        most: Most values of a block, per element of the plates.
        least: Correlation from which two units are joined.
    """
    sizes = [unit.size for unit, _ in members]
    if len(members) < 2 or sum(sizes) > MAX_VALUES:
        return []
    value = torch.cat([value for _, value in members], -1)
    most_elements = max(MAX_NUMBERS // sum(sizes) ** 2, 1)
    correlation = _correlations(value, state, most_elements).mean(0)
    owner = _owners(sizes)
    apart = (owner[:, None] < owner) & (correlation.abs() > least)
    found = apart.nonzero().tolist()
    found.sort(key=lambda pair: -abs(float(correlation[pair[0], pair[1]])))
    clusters = {index: [index] for index in range(len(members))}
    reasons: dict[int, str] = {}
    for i, j in found:
        first, second = clusters[int(owner[i])], clusters[int(owner[j])]
        if first is second or sum(sizes[k] for k in first + second) > most:
            continue
        one, other = (members[int(owner[k])][0].name for k in (i, j))
        reason = reasons.get(first[0]) or reasons.get(second[0])
        first.extend(second)
        clusters |= dict.fromkeys(second, first)
        reasons[first[0]] = reason or _sentence(one, other, float(correlation[i, j]))
    joined = {id(cluster): cluster for cluster in clusters.values() if len(cluster) > 1}
    return [
        Block(
            tuple(sorted((n for k in cluster for n in members[k][0].sites), key=order.index)),
            reasons[cluster[0]],
        )
        for cluster in joined.values()
    ]


def _correlations(value: Tensor, state: SweepState, most: int | None = None) -> Tensor:
    """Correlations `(number of elements, d, d)` of weighted values `(K, *plates, d)`.

    Args:
        value: The values.
        state: The state that they are of.
        most: Elements of the plates to look at, evenly spaced; None for all.
    """
    mass = state.log_weight.normalized()
    mass = mass.reshape(mass.shape + (1,) * (value.dim() - mass.dim())).expand_as(value[..., :1])
    mass, value = (x.reshape(len(x), -1, x.shape[-1]) for x in (mass, value))
    stride = 1 if most is None else math.ceil(value.shape[1] / most)
    mass, value = mass[:, ::stride], value[:, ::stride]
    deviation = (value - (mass * value).sum(0)) * mass.sqrt()
    deviation = deviation / deviation.square().sum(0).sqrt()
    rows = deviation.movedim(0, -2)
    return (rows.mT @ rows).nan_to_num(nan=0.0).cpu()


def _owners(sizes: Sequence[int]) -> Tensor:
    """For every value of some latents, which of them it belongs to."""
    return torch.repeat_interleave(
        torch.arange(len(sizes), device="cpu"), torch.tensor(sizes, device="cpu")
    )


def _sentence(first: str, second: str, correlation: float) -> str:
    return f"'{first}' and '{second}' are correlated ({correlation:.2f})"
