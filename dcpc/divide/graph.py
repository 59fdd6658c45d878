"""Dependency graph of the sites, Markov blankets, the moral graph of units, and schedules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import networkx as nx

from dcpc.divide.sites import Site
from dcpc.errors import OptionError

Members = tuple[str, ...]
"""The latents of a unit."""


@dataclass(frozen=True)
class SiteGraph:
    """The directed graph of a model: an edge from each latent to the factors that it enters.

    Attributes:
        sites: The sites, in program order.
        depends: For every site, the latents that its factor is a function of (itself included,
            when it is a latent).
    """

    sites: Mapping[str, Site]
    depends: Mapping[str, frozenset[str]]

    def parents(self, members: Sequence[str]) -> frozenset[str]:
        """Latents that the members' own factors depend on, members excluded."""
        return frozenset().union(*(self.depends[name] for name in members)) - set(members)

    def children(self, members: Sequence[str]) -> frozenset[str]:
        """Sites whose factors depend on a member, members excluded; observed sites included."""
        return frozenset().union(*(self._entered[name] for name in members)) - set(members)

    def blanket(self, members: Sequence[str]) -> frozenset[str]:
        """Markov blanket: parents, children and the children's other parents."""
        children = self.children(members)
        co_parents = frozenset().union(*(self.depends[child] for child in children), frozenset())
        return (self.parents(members) | children | co_parents) - set(members)

    def factors(self, members: Sequence[str]) -> list[str]:
        """Sites whose factors make up the members' complete conditional, in program order."""
        return sorted({*members} | self.children(members), key=self._order.__getitem__)

    def is_discrete(self, members: Members) -> bool:
        """Whether the members are discrete latents."""
        return self.sites[members[0]].discrete is not None

    @cached_property
    def _entered(self) -> Mapping[str, list[str]]:
        """For every latent, the sites whose factors depend on it."""
        entered: dict[str, list[str]] = {name: [] for name in self.sites}
        for name, latents in self.depends.items():
            for latent in latents:
                entered[latent].append(name)
        return entered

    @cached_property
    def _order(self) -> Mapping[str, int]:
        """Position of every site in the program."""
        return {name: index for index, name in enumerate(self.sites)}

    @property
    def latents(self) -> list[str]:
        return [name for name, site in self.sites.items() if not site.is_observed]

    def moral(self, units: Sequence[Members]) -> nx.Graph:
        """Undirected graph of units (by position): an edge where two share a factor."""
        graph = nx.Graph()
        graph.add_nodes_from(range(len(units)))
        owner = {name: index for index, unit in enumerate(units) for name in unit}
        for latents in self.depends.values():
            clique = sorted({owner[name] for name in latents if name in owner})
            graph.add_edges_from((a, b) for i, a in enumerate(clique) for b in clique[i + 1 :])
        return graph


class Schedule(ABC):
    """Order in which units move.

    Attributes:
        separates: Whether the units of a step touch no factor in common.
    """

    separates: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, graph: SiteGraph, units: Sequence[Members]) -> list[list[Members]]:
        """Arranges units in steps; the units of one step move at once."""


class Sequential(Schedule):
    """One unit at a time, in reverse topological order: from the data up to the roots."""

    def __call__(self, graph: SiteGraph, units: Sequence[Members]) -> list[list[Members]]:
        return [[unit] for unit in reversed(units)]


class Coloured(Schedule):
    """Units of one colour of the moral graph move together; a chain takes two colours.

    DSATUR colouring (Brelaz 1979), exact on bipartite graphs. Colours are ordered from the data
    up: by their last unit in program order.
    """

    def __call__(self, graph: SiteGraph, units: Sequence[Members]) -> list[list[Members]]:
        colour = nx.greedy_color(graph.moral(units), strategy="DSATUR")
        classes: dict[int, list[int]] = {}
        for index in sorted(colour):
            classes.setdefault(colour[index], []).append(index)
        return [[units[i] for i in c] for c in sorted(classes.values(), key=max, reverse=True)]


class Joint(Schedule):
    """All continuous latents at once, as one block; discrete units follow by colour."""

    separates = False

    def __call__(self, graph: SiteGraph, units: Sequence[Members]) -> list[list[Members]]:
        discrete = [unit for unit in units if graph.is_discrete(unit)]
        block = tuple(name for unit in units if unit not in discrete for name in unit)
        steps = [[block]] if block else []
        return steps + (Coloured()(graph, discrete) if discrete else [])


class Global(Schedule):
    """Local units by colour, then all continuous latents outside of a subsampling plate at once.

    The noise of global latents' scores, which comes from the subsample, is common to them.
    """

    def __call__(self, graph: SiteGraph, units: Sequence[Members]) -> list[list[Members]]:
        largest = max(site.scale for site in graph.sites.values())
        block = [
            unit
            for unit in units
            if graph.sites[unit[0]].scale < largest and not graph.is_discrete(unit)
        ]
        local = [unit for unit in units if unit not in block]
        steps = Coloured()(graph, local) if local else []
        return [*steps, [tuple(name for unit in block for name in unit)]] if block else steps


SCHEDULES: dict[str, Schedule] = {
    "sequential": Sequential(),
    "coloured": Coloured(),
    "joint": Joint(),
    "global": Global(),
}


def group_blocks(graph: SiteGraph, blocks: Sequence[Sequence[str]]) -> list[Members]:
    """The units: the given joint blocks, and every other latent on its own, in program order.

    Raises:
        OptionError: A block names a site that is not a latent, a latent is in two blocks, or a
            block holds continuous and discrete latents.
    """
    latents = graph.latents
    seen: dict[str, Members] = {}
    for block in blocks:
        unknown = [name for name in block if name not in latents]
        if unknown:
            raise OptionError(
                f"blocks: '{unknown[0]}' is not a latent site; the latents are {latents}"
            )
        discrete = [name for name in block if graph.is_discrete((name,))]
        if discrete and len(discrete) < len(block):
            raise OptionError(
                f"blocks: {tuple(block)} holds the discrete latents {discrete} beside continuous "
                "ones, which are moved in other ways; give each kind a block of its own"
            )
        for name in block:
            if name in seen:
                raise OptionError(
                    f"blocks: latent '{name}' is in {seen[name]} and in {tuple(block)}; a latent "
                    "belongs to one block"
                )
            seen[name] = tuple(sorted(block, key=latents.index))
    units: list[Members] = []
    for name in latents:
        unit = seen.get(name, (name,))
        if unit not in units:
            units.append(unit)
    return units
