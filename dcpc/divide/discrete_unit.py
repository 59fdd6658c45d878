"""Complete conditionals of discrete latents: what they are compared and drawn over."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import networkx as nx
import torch
from torch import Tensor

from dcpc.divide.batches import in_batches
from dcpc.divide.graph import Members, SiteGraph
from dcpc.divide.model import Latents
from dcpc.divide.program import Program
from dcpc.divide.sites import Site
from dcpc.divide.supports.discrete import ONE_HOT, DiscreteSupport
from dcpc.divide.tempering import POSTERIOR, Tempering
from dcpc.divide.unit import ScoredDensity, Unit, UnitGroup
from dcpc.errors import OptionError

MAX_EVALUATIONS = 256
"""Evaluations of its factors that a block of discrete latents may take in a sweep."""

MAX_TABLE = 1 << 16
"""Numbers per particle and plate element in the largest table of an elimination."""

MAX_AT_ONCE = 1 << 20
"""Numbers of the units' values that are evaluated in one call."""


@dataclass(frozen=True)
class EliminationPlan:
    """How the variables of a block are summed out.

    Attributes:
        sizes: Number of values of each variable.
        scopes: Variables of each factor, by site, in increasing order.
        order: Order in which variables are summed out.
        colours: Variables of one colour have no factor in common, and are enumerated together.
        table_size: Size of the largest table on the way.
    """

    sizes: tuple[int, ...]
    scopes: Mapping[str, tuple[int, ...]]
    order: tuple[int, ...]
    colours: tuple[int, ...]
    table_size: int

    @property
    def colour_sizes(self) -> list[int]:
        """Values that each colour is enumerated over."""
        return [
            max(size for size, own in zip(self.sizes, self.colours, strict=True) if own == colour)
            for colour in range(max(self.colours) + 1)
        ]

    @property
    def num_evaluations(self) -> int:
        """Evaluations of the factors that the tables take."""
        return math.prod(self.colour_sizes)

    @property
    def is_cheap(self) -> bool:
        """Whether the block may be moved in this way."""
        return self.num_evaluations <= MAX_EVALUATIONS and self.table_size <= MAX_TABLE


def plan_elimination(
    sizes: Sequence[int], scopes: Mapping[str, tuple[int, ...]]
) -> EliminationPlan:
    """A plan that sums the variable with the fewest neighbours out first.

    Args:
        sizes: Number of values of each variable.
        scopes: Variables of each factor.
    """
    graph = nx.Graph()
    graph.add_nodes_from(range(len(sizes)))
    for scope in scopes.values():
        graph.add_edges_from(itertools.combinations(scope, 2))
    colour = nx.greedy_color(graph, strategy="DSATUR")
    order, table_size = [], 1
    rest = graph.copy()
    while rest:
        variable = min(rest, key=lambda v: (rest.degree(v), v))
        neighbours = list(rest.neighbors(variable))
        table_size = max(table_size, math.prod(sizes[v] for v in (variable, *neighbours)))
        rest.add_edges_from(itertools.combinations(neighbours, 2))
        rest.remove_node(variable)
        order.append(variable)
    colours = tuple(colour[variable] for variable in range(len(sizes)))
    return EliminationPlan(tuple(sizes), scopes, tuple(order), colours, table_size)


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


class DiscreteGroup(UnitGroup):
    """Units of discrete latents, packed like others as `(K, *plates, n, d)`.

    Attributes:
        supports: Supports of a unit's components, in the order of its numbers.
        block: How a unit of several latents is drawn; None of one latent.
    """

    is_discrete = True

    def __init__(
        self, units: Sequence[Unit], program: Program, graph: SiteGraph, population: int
    ) -> None:
        super().__init__(units, program, graph, population)
        first = units[0]
        supports = [(graph.sites[name], self._count(graph.sites[name])) for name in first.sites]
        self.supports = tuple(
            site.discrete for site, count in supports for _ in range(count) if site.discrete
        )
        self.block = block_of(graph, first) if len(first.sites) > 1 else None
        members = [name for unit in units for name in unit.sites]
        self._repeated = program.select_repeated(self.touched, members)

    def evaluate(
        self,
        value: Tensor,
        latents: Latents,
        tensors: Sequence[Tensor],
        tempering: Tempering = POSTERIOR,
    ) -> ScoredDensity:
        """Log-density; the score is zero, since there is no gradient."""
        with torch.no_grad():
            log_density = self.log_density(value, latents, tensors, tempering)
        return ScoredDensity(log_density, torch.zeros_like(value))

    def log_terms_at(
        self,
        values: Tensor,
        latents: Latents,
        tensors: Sequence[Tensor],
        tempering: Tempering = POSTERIOR,
    ) -> list[dict[str, Tensor]]:
        """Terms of the units' log-densities by site, at several values.

        Args:
            values: Packed values `(C, K, *plates, n, d)` of the units.
            latents: All latents; those of this group are replaced by the values.
            tensors: Tensors among the model's arguments.
            tempering: Tempering of the factors.

        Returns:
            By unit and site, `(C, K, *plates)`.
        """

        def by_particle(rows: Tensor, latents: Latents) -> list[dict[str, Tensor]]:
            values = rows.movedim(1, 0)
            at_once = max(1, MAX_AT_ONCE // values[0].numel())
            chunks = [
                self._log_terms_at(chunk, latents, tensors, tempering)
                for chunk in values.split(at_once)
            ]
            return [
                {
                    name: torch.cat([c[i][name] for c in chunks]).movedim(0, 1)
                    for name in chunks[0][i]
                }
                for i in range(len(self.units))
            ]

        terms = in_batches(by_particle, values.movedim(0, 1), latents, size=self._batch_size)
        return [{name: value.movedim(1, 0) for name, value in term.items()} for term in terms]

    def _log_terms_at(
        self, values: Tensor, latents: Latents, tensors: Sequence[Tensor], tempering: Tempering
    ) -> list[dict[str, Tensor]]:
        shape = values.shape[:2]
        many = self.unpack(values.flatten(0, 1))
        many = {name: u.unflatten(0, shape) for name, u in many.items()}
        factors = self._repeated(many, latents, tensors)
        if tempering.temperature != 1.0:
            weigh = partial(tempering.weigh, latents=latents, sites=self._sites)
            factors = torch.vmap(weigh)(factors)
        terms = self.reduced({name: value.flatten(0, 1) for name, value in factors.items()})
        return [{name: value.unflatten(0, shape) for name, value in t.items()} for t in terms]

    def component_at(self, start: int) -> int:
        """Index of the component that begins at a position of a unit's numbers."""
        return start // self.supports[0].width

    def unpack_probabilities(self, probabilities: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Probabilities of the latents' values, from those of the units' components.

        Args:
            probabilities: `(K, *plates, n, S)` by component.

        Returns:
            By latent, `(K, *batch, *event, S)` of integers and `(K, *batch, S)` of one-hot vectors;
            latents without enumerated components are left out.
        """
        if len(probabilities) < len(self.supports):
            return {}
        found = {}
        for position, unit in enumerate(self.units):
            first = 0
            for name in unit.sites:
                site = self._sites[name]
                assert site.discrete is not None
                count = self._count(site)
                parts = [probabilities[first + i].select(-2, position) for i in range(count)]
                found[name] = self._by_value(site, torch.stack(parts, -2))
                first += count
        return found

    def _by_value(self, site: Site, shares: Tensor) -> Tensor:
        """A latent's probabilities from those of its components, `(K, *plates, m, S)`."""
        assert site.discrete is not None
        if site.discrete.kind == ONE_HOT:
            return self._from_rows(site, shares.flatten(-2))
        return torch.stack([self._from_rows(site, share) for share in shares.unbind(-1)], -1)

    def _count(self, site: Site) -> int:
        """Number of components of a latent in an element of the units' plates."""
        assert site.discrete is not None
        return self._rows_per_element(site) // site.discrete.width


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
