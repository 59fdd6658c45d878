"""Blocks of discrete latents that are drawn at once, and which latents make one by themselves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor

from dcpc.divide.elimination import (
    MAX_EVALUATIONS,
    MAX_TABLE,
    EliminationPlan,
    plan_elimination,
)
from dcpc.divide.graph import Members, SiteGraph
from dcpc.divide.sites import Site
from dcpc.divide.supports.discrete import DiscreteSupport
from dcpc.divide.unit import Unit
from dcpc.errors import OptionError


@dataclass(frozen=True)
class Block:
    """Several discrete latents that are drawn at once, one component each.

    Attributes:
        supports: Their supports.
        plan: How they are summed out.
    """

    supports: tuple[DiscreteSupport, ...]
    plan: EliminationPlan

    def indices(self, value: Tensor) -> list[Tensor]:
        """Index of each latent's value, `(K, *plates)`.

        Args:
            value: The block's value, `(K, *plates, 1, d)`.
        """
        widths = [support.width for support in self.supports]
        parts = value.squeeze(-2).split(widths, -1)
        return [s.index(part) for s, part in zip(self.supports, parts, strict=True)]

    def value(self, indices: Sequence[Tensor], like: Tensor) -> Tensor:
        """The block's value `(K, *plates, 1, d)` of given indices."""
        parts = [s.values(like)[i] for s, i in zip(self.supports, indices, strict=True)]
        return torch.cat(parts, -1).unsqueeze(-2)

    def assignments(self, value: Tensor) -> Tensor:
        """Values that show every factor at all values of its variables, `(C, K, *plates, 1, d)`."""
        rows = []
        for by_colour in self._combinations():
            parts = []
            for support, size, colour in zip(
                self.supports, self.plan.sizes, self.plan.colours, strict=True
            ):
                parts.append(support.values(value)[min(by_colour[colour], size - 1)])
            rows.append(torch.cat(parts))
        stacked = torch.stack(rows)
        return stacked.reshape(len(rows), *(1,) * (value.dim() - 1), -1).expand(-1, *value.shape)

    def tables(self, terms: Mapping[str, Tensor]) -> dict[tuple[int, ...], Tensor]:
        """Log-factors `(K, *plates, *sizes)` by scope.

        Args:
            terms: By site, its log-factor at the assignments, `(C, K, *plates)`.
        """
        shape = self.plan.colour_sizes
        tables: dict[tuple[int, ...], Tensor] = {}
        for name, scope in self.plan.scopes.items():
            by_colour = terms[name].unflatten(0, shape)
            for colour in reversed(range(len(shape))):
                if colour not in [self.plan.colours[variable] for variable in scope]:
                    by_colour = by_colour.select(colour, 0)
            own = sorted(scope, key=lambda variable: self.plan.colours[variable])
            table = by_colour.permute(
                *range(len(own), by_colour.dim()), *(own.index(variable) for variable in scope)
            )
            for position, variable in enumerate(scope):
                axis = table.dim() - len(scope) + position
                table = table.narrow(axis, 0, self.plan.sizes[variable])
            tables[scope] = tables[scope] + table if scope in tables else table
        return tables

    def _combinations(self) -> list[tuple[int, ...]]:
        return list(itertools.product(*map(range, self.plan.colour_sizes)))


def block_of(graph: SiteGraph, unit: Unit) -> Block:
    """How a unit of several discrete latents is drawn.

    Raises:
        OptionError: It would take too many evaluations, or too large a table.
    """
    plan = plan_members(graph, unit.sites)
    supports = tuple(s for name in unit.sites if (s := graph.sites[name].discrete))
    if plan is None or sum(support.width for support in supports) != unit.size:
        raise OptionError(
            f"blocks: {unit.sites} cannot be drawn at once: each discrete latent of a block needs "
            "a finite support and one value per element of the block's plates "
            f"{[plate.name for plate in unit.plates]}; leave it out of blocks"
        )
    if not plan.is_cheap:
        raise OptionError(
            f"blocks: {unit.sites} would take {plan.num_evaluations:,} evaluations of its factors "
            f"per sweep (at most {MAX_EVALUATIONS}) and a table of {plan.table_size:,} numbers per "
            f"particle (at most {MAX_TABLE:,}); split the block"
        )
    return Block(supports, plan)


def plan_members(graph: SiteGraph, members: Members) -> EliminationPlan | None:
    """Plan of a block; None if one of its latents is continuous or has no finite support."""
    sizes = []
    for name in members:
        support = graph.sites[name].discrete
        if support is None or math.isinf(support.num_values):
            return None
        sizes.append(int(support.num_values))
    scopes = {
        name: tuple(i for i, member in enumerate(members) if member in graph.depends[name])
        for name in graph.factors(members)
    }
    return plan_elimination(sizes, scopes)


def join_discrete(
    graph: SiteGraph, units: Sequence[Members], asked: Sequence[Sequence[str]]
) -> list[Members]:
    """The units, with discrete latents that share factors joined where that is cheap.

    A connected part of the discrete latents becomes one block if all of them lie in the same
    plates, with one value per element, and if it can be drawn at once (`EliminationPlan.is_cheap`):
    chains, trees, and what is little more.

    Args:
        graph: The graph of the sites.
        units: The units so far.
        asked: Blocks that the user asked for, which stay as they are.
    """
    fixed = {name for block in asked for name in block}
    candidates = [
        unit
        for unit in units
        if len(unit) == 1 and unit[0] not in fixed and _is_single(graph.sites[unit[0]])
    ]
    moral = graph.moral(candidates)
    for a, b in list(moral.edges):
        if graph.sites[candidates[a][0]].plates != graph.sites[candidates[b][0]].plates:
            moral.remove_edge(a, b)
    joined: dict[Members, Members] = {}
    for part in nx.connected_components(moral):
        members = tuple(candidates[index][0] for index in sorted(part))
        plan = plan_members(graph, members) if len(members) > 1 else None
        if plan is not None and plan.is_cheap:
            joined |= {(name,): members for name in members}
    return list(dict.fromkeys(joined.get(unit, unit) for unit in units))


def _is_single(site: Site) -> bool:
    """Whether a latent is discrete and has one finite component per element of its plates."""
    if site.discrete is None or math.isinf(site.discrete.num_values):
        return False
    count = math.prod(site.unconstrained_shape) // site.discrete.width
    return count == math.prod(plate.size for plate in site.plates)
