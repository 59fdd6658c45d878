"""Complete conditionals of discrete latents: log-densities at many values at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from dcpc.divide.batches import in_batches
from dcpc.divide.discrete_blocks import block_of
from dcpc.divide.graph import SiteGraph
from dcpc.divide.model import Latents
from dcpc.divide.program import Program
from dcpc.divide.sites import Site
from dcpc.divide.supports.discrete import ONE_HOT
from dcpc.divide.tempering import POSTERIOR, Tempering
from dcpc.divide.unit import ScoredDensity, Unit, UnitGroup

MAX_AT_ONCE = 1 << 20
"""Numbers of the units' values that are evaluated in one call."""


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
