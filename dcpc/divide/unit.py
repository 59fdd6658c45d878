"""Complete conditionals: units that move together, their log-densities and scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dcpc.divide.batches import in_batches
from dcpc.divide.graph import Members, SiteGraph
from dcpc.divide.model import Latents
from dcpc.divide.program import Factors, Program
from dcpc.divide.sites import Plate, Site
from dcpc.divide.tempering import POSTERIOR, Tempering

MAX_ROUNDING = 1024.0
"""Rounding error, in nats, from which a positive log-density is no number."""


@dataclass(frozen=True)
class Unit:
    """A latent, or a joint block of latents, with its Markov blanket.

    Attributes:
        sites: Names of its latents.
        parents: Latents that its own factors depend on.
        children: Sites, observed ones included, whose factors depend on it.
        blanket: Parents, children and the children's other parents.
        plates: Plates whose elements move independently.
        size: Number of unconstrained values per plate element.
        support: Supports of its latents.
    """

    sites: Members
    parents: frozenset[str]
    children: frozenset[str]
    blanket: frozenset[str]
    plates: tuple[Plate, ...]
    size: int
    support: str

    @property
    def name(self) -> str:
        """Name of the latent, or the names of the block's latents joined by `+`."""
        return "+".join(self.sites)


@dataclass(frozen=True)
class ScoredDensity:
    """Log-density `(K, *plates, n)` and score `(K, *plates, n, d)` of a group's units."""

    log_density: Tensor
    score: Tensor

    def count_bad_scores(self) -> Tensor:
        """Number of scores of each unit `(n,)` that are not finite where the log-density is."""
        # By `abs` and one comparison, since `isfinite` takes four operators.
        bad = ~(self.score.abs() < math.inf).all(-1) & (self.log_density.abs() < math.inf)
        return bad.flatten(0, -2).sum(0)


class UnitGroup:
    """Units of one colour and one shape, which are evaluated and moved as one tensor.

    Their values are packed as `(K, *plates, n, d)`: `n` units of `d` unconstrained values in
    each element of their plates. No two of them share a factor, so that the gradient of the sum
    of their log-densities holds each one's score.

    Args:
        units: Units with the same plates and size.
        program: The program of the whole model.
        graph: The graph of the sites.
        population: Number of leading plates that are population plates.

    Attributes:
        name: Names of its units, joined by commas.
        touched: Sites whose factors are parts of the units' log-densities, in program order.
        scales: The units' scales, where their plates subsample. A factor counts in a unit's
            log-density by its site's scale over the unit's own.
        is_subsampled: Whether the units lie outside of a plate that subsamples their children, so
            that their log-densities are estimates.
        is_discrete: Whether the latents are discrete, so that there is no score.
    """

    is_discrete: ClassVar[bool] = False

    def __init__(
        self, units: Sequence[Unit], program: Program, graph: SiteGraph, population: int
    ) -> None:
        self.units = tuple(units)
        self.name = ",".join(unit.name for unit in units)
        self.plates = units[0].plates
        self.size = units[0].size
        self.population = population
        self._sites = graph.sites
        self._touched = [graph.factors(unit.sites) for unit in units]
        selected = {name for names in self._touched for name in names}
        self.touched = [name for name in graph.sites if name in selected]
        self._factors = program.select(self.touched, for_score=True)
        self._batch_size = program.num_particles
        self.scales = {graph.sites[unit.sites[0]].scale for unit in units}
        self.is_subsampled = any(graph.sites[n].scale not in self.scales for n in self.touched)

    @property
    def plate_shape(self) -> tuple[int, ...]:
        """Sizes of the plates, outermost first."""
        return tuple(plate.size for plate in self.plates)

    def pack(self, latents: Latents) -> Tensor:
        """The units' values as one tensor `(K, *plates, n, d)`; a view where `n` is one."""
        values = []
        for unit in self.units:
            parts = [self._to_rows(self._sites[name], latents[name]) for name in unit.sites]
            values.append(parts[0] if len(parts) == 1 else torch.cat(parts, -1))
        if len(values) == 1:
            return values[0].unsqueeze(-2)
        return torch.stack(values, -2)

    def unpack(self, value: Tensor) -> dict[str, Tensor]:
        """The latents `(K, *batch, *event)` of a packed tensor."""
        latents: dict[str, Tensor] = {}
        for unit, rows in zip(self.units, value.unbind(-2), strict=True):
            if len(unit.sites) == 1:
                latents[unit.sites[0]] = self._from_rows(self._sites[unit.sites[0]], rows)
                continue
            sizes = [self._rows_per_element(self._sites[name]) for name in unit.sites]
            for name, part in zip(unit.sites, rows.split(sizes, -1), strict=True):
                latents[name] = self._from_rows(self._sites[name], part)
        return latents

    def log_density(
        self,
        value: Tensor,
        latents: Latents,
        tensors: Sequence[Tensor],
        tempering: Tempering = POSTERIOR,
    ) -> Tensor:
        """Complete conditional `log p(z_i | pa) + log|det J| + sum_c log p(c | pa(c))`.

        Args:
            value: Packed values `(K, *plates, n, d)` of the units.
            latents: All latents; those of this group are replaced by `value`.
            tensors: Tensors among the model's arguments.
            tempering: Tempering of the factors.

        Returns:
            `(K, *plates, n)`, up to a constant in `value`.
        """
        return in_batches(
            lambda value, latents: self._log_density(value, latents, tensors, tempering),
            value,
            latents,
            size=self._batch_size,
        )

    def log_terms(
        self,
        value: Tensor,
        latents: Latents,
        tensors: Sequence[Tensor],
        tempering: Tempering = POSTERIOR,
    ) -> list[dict[str, Tensor]]:
        """Terms of the units' log-densities by site, as for `log_density`.

        Returns:
            By unit and site, `(K, *plates)`.
        """
        return in_batches(
            lambda value, latents: self._log_terms(value, latents, tensors, tempering),
            value,
            latents,
            size=self._batch_size,
        )

    def reduced(self, factors: Factors) -> list[dict[str, Tensor]]:
        """Log-factors `(K, *batch_shape)` by site, summed to each unit's plates: `(K, *plates)`."""
        return [
            {
                name: self._reduce(factors, name, self._sites[unit.sites[0]].scale)
                for name in touched
            }
            for unit, touched in zip(self.units, self._touched, strict=True)
        ]

    def evaluate(
        self,
        value: Tensor,
        latents: Latents,
        tensors: Sequence[Tensor],
        tempering: Tempering = POSTERIOR,
    ) -> ScoredDensity:
        """Log-density and its gradient with respect to the value, the prediction error."""

        def evaluate(value: Tensor, latents: Latents) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                leaf = value.detach().requires_grad_()
                log_density = self._log_density(leaf, latents, tensors, tempering)
                (score,) = torch.autograd.grad(log_density.sum(), leaf)
            return log_density.detach(), score

        return ScoredDensity(*in_batches(evaluate, value, latents, size=self._batch_size))

    def log_reference(self, tempering: Tempering, value: Tensor, factors: Factors) -> Tensor:
        """Log-density `(K, *plates)` of the joint reference of the group's only unit.

        Args:
            tempering: A tempering that has one.
            value: The unit's packed value `(K, *plates, 1, d)`.
            factors: Log-factors of the model, those of its latents at least.
        """
        assert tempering.joint is not None
        (unit,) = self.units
        own = [sum_to_plates(factors[name], self.plates) for name in unit.sites]
        return tempering.joint.log_prob(value.squeeze(-2), sum_terms(own))

    def size_of(self, name: str) -> int:
        """Number of values of one of a unit's latents, per plate element."""
        return self._rows_per_element(self._sites[name])

    def over_population(self, value: Tensor) -> Tensor:
        """Sums `(K, *plates, n)` over the units and all but the population plates."""
        return value.flatten(1 + self.population).sum(-1)

    def _log_density(
        self, value: Tensor, latents: Latents, tensors: Sequence[Tensor], tempering: Tempering
    ) -> Tensor:
        """Log-densities of one batch of particles."""
        everything = {**latents, **self.unpack(value)}
        factors = self._factors(everything, tensors)
        terms = self.reduced(tempering.weigh(factors, everything, self._sites))
        densities = [sum_terms(by_site.values()) for by_site in terms]
        if tempering.starts_jointly:
            densities[0] = densities[0] + tempering.bridge(
                self.log_reference(tempering, value, factors)
            )
        stacked = torch.stack(densities, -1) if len(densities) > 1 else densities[0].unsqueeze(-1)
        return credible(stacked.to(value.dtype))  # data and other latents may be more precise

    def _log_terms(
        self, value: Tensor, latents: Latents, tensors: Sequence[Tensor], tempering: Tempering
    ) -> list[dict[str, Tensor]]:
        """Terms of the log-densities of one batch of particles."""
        everything = {**latents, **self.unpack(value)}
        return self.reduced(
            tempering.weigh(self._factors(everything, tensors), everything, self._sites)
        )

    def _reduce(self, factors: Factors, name: str, own_scale: float) -> Tensor:
        reduced = sum_to_plates(factors[name], self.plates)
        relative = self._sites[name].scale / own_scale
        return reduced if relative == 1.0 else reduced * relative

    def _rows_per_element(self, site: Site) -> int:
        return math.prod(site.unconstrained_shape) // math.prod(self.plate_shape)

    def _plate_axes(self, site: Site) -> list[int]:
        """Axes of the unit's plates in the site's value `(K, *batch, *event)`."""
        return [1 + len(site.batch_shape) + plate.dim for plate in self.plates]

    def _to_rows(self, site: Site, u: Tensor) -> Tensor:
        axes = self._plate_axes(site)
        if axes != list(range(1, 1 + len(axes))):
            u = u.movedim(axes, list(range(1, 1 + len(axes))))
        return u.reshape(u.shape[0], *self.plate_shape, -1)

    def _from_rows(self, site: Site, rows: Tensor) -> Tensor:
        shape = site.unconstrained_shape
        axes = [axis - 1 for axis in self._plate_axes(site)]
        if axes == list(range(len(axes))):
            return rows.reshape(rows.shape[0], *shape)
        moved = [size for axis, size in enumerate(shape) if axis not in axes]
        u = rows.reshape(rows.shape[0], *self.plate_shape, *moved)
        return u.movedim(list(range(1, 1 + len(axes))), [1 + axis for axis in axes])


def credible(log_density: Tensor) -> Tensor:
    """Log-densities, minus infinity where they are so large that arithmetic has broken down.

    Moves and weights go where a log-density is high, and so find the places where it is rounding
    that makes it high: a covariance that is singular but for its last digits, say.
    """
    largest = MAX_ROUNDING / torch.finfo(log_density.dtype).eps
    return log_density.masked_fill(log_density > largest, -math.inf)


def sum_terms(terms: Iterable[Tensor]) -> Tensor:
    """Sum of the terms of a log-density, in order."""
    total, *rest = terms
    for term in rest:
        total = total + term
    return total


def sum_to_plates(factor: Tensor, plates: Sequence[Plate]) -> Tensor:
    """Sums a log-factor `(K, *batch_shape)` to `(K, *plates)`, in the order of the plates."""
    axes = [factor.dim() + plate.dim for plate in plates]
    rest = [axis for axis in range(1, factor.dim()) if axis not in axes]
    if rest:
        factor = factor.sum(rest)
    order = sorted(axes)
    if axes == order:
        return factor
    return factor.permute(0, *(1 + order.index(axis) for axis in axes))
