"""Discrete latents that are summed out: as `infer={"enumerate": "parallel"}` asks for, or barren.

The sum over their values takes the place of the likelihood factors that it runs through: the other
latents then move on their marginal density, as in Pyro's own samplers. A barren latent, on which
nothing depends (a label that is not seen), sums to one, and is left out (Shachter 1986). Values can
be drawn afterwards, from the divided model in which they are latents (`Division.completion`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import networkx as nx
import torch
from torch import Tensor

from dcpc.divide.discrete_blocks import Block, plan_members
from dcpc.divide.elimination import MAX_EVALUATIONS, MAX_TABLE, log_normaliser
from dcpc.divide.graph import Members, SiteGraph
from dcpc.divide.sites import Plate, Site, Sites
from dcpc.divide.unit import sum_to_plates
from dcpc.errors import ModelError

Run = Callable[[Mapping[str, Tensor]], tuple[dict[str, Tensor], dict[str, Tensor]]]
"""Log-factors and masks of one particle, given values of the latents that are summed out."""


PlatesOf = Callable[[Sequence[Members]], Mapping[Members, tuple[Plate, ...]]]
"""The plates within which units move by element."""


@dataclass(frozen=True)
class Sum:
    """Discrete latents that are summed out together.

    Attributes:
        members: The latents.
        block: Their supports, and the order in which they are summed out.
        plates: Plates whose elements are independent, outermost first.
        likelihood: The observed site whose factor the sum becomes; empty where it is one.
    """

    members: Members
    block: Block
    plates: tuple[Plate, ...]
    likelihood: str

    @property
    def batch_shape(self) -> torch.Size:
        """Batch shape of the sum, an axis for each plate at its place."""
        sizes = [1] * max((-plate.dim for plate in self.plates), default=0)
        for plate in self.plates:
            sizes[plate.dim] = plate.size
        return torch.Size(sizes)

    def assignments(self, sites: Mapping[str, Site], like: Tensor) -> dict[str, Tensor]:
        """Values `(C, *batch, *event)` of the members that show all values of every factor.

        Any value does where the sum is one.
        """
        width = sum(support.width for support in self.block.supports)
        rows = self.block.assignments(like.new_zeros(1, 1, width))[:, 0, 0]
        rows = rows if self.likelihood else rows[:1]
        values, start = {}, 0
        for name, support in zip(self.members, self.block.supports, strict=True):
            part = rows[:, start : start + support.width]
            shape = sites[name].unconstrained_shape
            row = part.reshape(len(part), *(1,) * (len(shape) - (support.width > 1)), -1)
            values[name] = (row if support.width > 1 else row.flatten(-2)).expand(-1, *shape)
            start += support.width
        return values

    def log_sum(self, factors: Mapping[str, Tensor]) -> Tensor:
        """Logarithm of the sum over all values, `batch_shape`.

        Args:
            factors: Log-factors `(C, *batch)` at the assignments.
        """
        terms = {
            name: sum_to_plates(factors[name], self.plates).unsqueeze(1)
            for name in self.block.plan.scopes
        }
        tables = self.block.tables(terms)
        return log_normaliser(tables, self.block.plan)[0].reshape(self.batch_shape)


class SummedOut:
    """The latents of a model that are summed out.

    Args:
        base: The sites of the model.
        sums: What is summed out.

    Attributes:
        base: The sites of the model.
        sums: What is summed out.
        sites: The sites that are left; those that a sum runs through are one.
    """

    def __init__(self, base: Sites, sums: Iterable[Sum]) -> None:
        self.base = base
        self.sums = list(sums)
        self.sites = Sites(
            {name: site for name, site in base.items() if name not in self._merged()},
            base.deterministic,
        )
        for part in self._with_likelihood():
            self.sites[part.likelihood] = replace(
                base[part.likelihood], plates=part.plates, batch_shape=part.batch_shape
            )

    @property
    def members(self) -> list[str]:
        """Names of the latents that are summed out."""
        return [name for part in self.sums for name in part.members]

    @property
    def barren(self) -> list[str]:
        """Names of those whose sum is one."""
        return [name for part in self.sums if not part.likelihood for name in part.members]

    def factors_and_masks(
        self, run: Run, like: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Log-factors of one particle after summing out, and masks.

        Args:
            run: Runs the model.
            like: A latent, for its dtype and device.
        """
        values: dict[str, Tensor] = {}
        for part in self.sums:
            values |= part.assignments(self.base, like)
        most = max(len(value) for value in values.values())
        padded = {
            name: torch.cat([value, value[:1].expand(most - len(value), *value.shape[1:])])
            for name, value in values.items()
        }
        factors, masks = _at_all(run, padded)
        result = {name: factors[name][0] for name in self.sites}
        for part in self._with_likelihood():
            count = len(values[part.members[0]])
            own = {name: factors[name][:count] for name in part.block.plan.scopes}
            result[part.likelihood] = part.log_sum(own)
        return result, {name: mask[0] for name, mask in masks.items()}

    def _with_likelihood(self) -> list[Sum]:
        return [part for part in self.sums if part.likelihood]

    def _merged(self) -> set[str]:
        return {
            name
            for part in self.sums
            for name in (*part.members, *part.block.plan.scopes)
            if name != part.likelihood
        }


def _at_all(run: Run, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Log-factors and masks at all values, which have a leading axis."""
    try:
        return torch.vmap(run, randomness="same")(dict(values))
    except Exception:  # a model that cannot be vectorised
        count = len(next(iter(values.values())))
        runs = [run({name: value[c] for name, value in values.items()}) for c in range(count)]
        factors, masks = (
            {name: torch.stack([one[i][name] for one in runs]) for name in runs[0][i]}
            for i in range(2)
        )
        return factors, masks


def find_sums(
    sites: Sites,
    graph: SiteGraph,
    plates_of: PlatesOf,
) -> SummedOut | None:
    """The latents that the model's author wants enumerated and that can be summed out, or barren.

    Of the former, those that continuous latents depend on, whose priors a handler masks or scales,
    or whose plates hold elements that are not independent, are drawn like other discrete latents,
    and so are all where no other latent would be left: the posterior is the same.

    Args:
        sites: The sites.
        graph: Their graph.
        plates_of: The plates within which units move by element.

    Raises:
        ModelError: A support has no end, or the sum has too many terms.
    """
    found = _barren(sites, graph, plates_of)
    gone = {name for part in found for name in part.members}
    wanted = [n for n in sites.latents if sites[n].is_enumerated and n not in gone]
    for whole in _connected(graph, wanted):
        part = _sum(graph, whole, plates_of([whole])[whole])
        found += [part] if part is not None else _sums_by_plates(graph, whole, plates_of)
    if sum(len(part.members) for part in found) == len(sites.latents):
        return None
    return SummedOut(sites, found) if found else None


def _barren(sites: Sites, graph: SiteGraph, plates_of: PlatesOf) -> list[Sum]:
    """Sums of one, over discrete latents that no other factor depends on."""
    found = []
    for name in sites.latents:
        site, support = sites[name], sites[name].discrete
        if support is None or math.isinf(support.num_values) or graph.factors((name,)) != [name]:
            continue
        plates = plates_of([(name,)])[(name,)]
        plan = plan_members(graph, (name,))
        handled = site.is_rescaled or site.is_improper
        if plan is not None and plan.is_cheap and not handled and _is_single(site, plates):
            ordered = tuple(sorted(plates, key=lambda plate: plate.dim))
            found.append(Sum((name,), Block((support,), plan), ordered, ""))
    return found


def _is_single(site: Site, plates: Sequence[Plate]) -> bool:
    """Whether a discrete latent has one value per element of some plates."""
    assert site.discrete is not None
    elements = math.prod(plate.size for plate in plates)
    return (
        math.prod(site.batch_shape) == elements
        and site.unconstrained_shape.numel() == elements * site.discrete.width
    )


def _connected(graph: SiteGraph, names: Sequence[str]) -> list[Members]:
    """The parts of some latents that share factors."""
    moral = graph.moral([(name,) for name in names])
    return [tuple(names[i] for i in sorted(part)) for part in nx.connected_components(moral)]


def _sums_by_plates(graph: SiteGraph, members: Members, plates_of: PlatesOf) -> list[Sum]:
    """Sums over the members of one plate each, the innermost first; the others are drawn."""
    by_plates: dict[tuple[Plate, ...], list[str]] = {}
    for name in members:
        by_plates.setdefault(graph.sites[name].plates, []).append(name)
    found: list[Sum] = []
    taken: set[str] = set()
    for names in sorted(by_plates.values(), key=lambda names: -len(graph.sites[names[0]].plates)):
        for part in _connected(graph, names) if len(by_plates) > 1 else []:
            if taken.isdisjoint(graph.factors(part)):
                candidate = _sum(graph, part, plates_of([part])[part])
                if candidate is not None:
                    found.append(candidate)
                    taken |= set(graph.factors(part))
    return found


def _sum(graph: SiteGraph, members: Members, plates: tuple[Plate, ...]) -> Sum | None:
    """The sum over a connected part of the enumerated latents; None if they have to be drawn."""
    for name in members:
        support = graph.sites[name].discrete
        if support is None or math.isinf(support.num_values):
            raise ModelError(
                f"site '{name}' is to be enumerated (infer={{'enumerate': ...}}), but its support "
                f"{graph.sites[name].support} has no end; take the annotation away, and it is drawn"
            )
    plan = plan_members(graph, members)
    assert plan is not None
    likelihoods = [name for name in plan.scopes if graph.sites[name].is_observed]
    elements = math.prod(plate.size for plate in plates)
    single = all(_is_single(graph.sites[name], plates) for name in members)
    others = [name for name in plan.scopes if name not in members and name not in likelihoods]
    handled = any(
        site.is_masked or site.is_rescaled or site.is_improper
        for site in (graph.sites[name] for name in members)
    )
    if not single or others or not likelihoods or handled:
        return None
    if not plan.is_cheap:
        raise ModelError(
            f"sites {list(members)} are to be enumerated (infer={{'enumerate': ...}}), which takes "
            f"{plan.num_evaluations:,} evaluations of their factors (at most {MAX_EVALUATIONS}) "
            f"and tables of {plan.table_size * elements:,} numbers per particle, {elements} "
            f"elements of their plates by {plan.table_size:,} (at most {MAX_TABLE:,}); take the "
            "annotation away, and they are drawn"
        )
    supports = tuple(s for name in members if (s := graph.sites[name].discrete))
    ordered = tuple(sorted(plates, key=lambda plate: plate.dim))
    return Sum(members, Block(supports, plan), ordered, likelihoods[0])
