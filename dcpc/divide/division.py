"""The result of dividing a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dcpc.divide.activity import Activity, find_activity
from dcpc.divide.batches import in_batches
from dcpc.divide.certify import (
    compare_values,
)
from dcpc.divide.graph import SiteGraph
from dcpc.divide.handlers import Substitute
from dcpc.divide.model import Latents
from dcpc.divide.program import (
    Arguments,
    Factors,
    Program,
)
from dcpc.divide.sites import Deterministic, Plate, Site, Sites, axis_names, read_sites
from dcpc.divide.supports.discrete import DiscreteSupport
from dcpc.divide.unit import Unit, UnitGroup, sum_to_plates
from dcpc.errors import DataError


class Division:
    """A model divided into units, for arguments of one shape.

    Attributes:
        program: The vectorised program of the whole model.
        graph: Its dependency graph.
        units: The complete conditionals, in program order.
        groups: The units as they move: group after group, in the order of the schedule.
        num_leading: Number of groups in the schedule's first step, whose units touch no factor
            in common.
        population: The plates that hold every site and whose elements are independent.
        completion: The division of the same model with the latents that this one sums out; None if
            there are none.
        arranged: The same captured model with other blocks of latents, as `divide` takes them.
        recordings: What was recorded of sweeps on it, by whoever records.
    """

    def __init__(
        self,
        program: Program,
        graph: SiteGraph,
        units: Sequence[Unit],
        groups: Sequence[UnitGroup],
        population: tuple[Plate, ...],
        num_leading: int,
        completion: Division | None,
        arranged: Callable[[Sequence[Sequence[str]]], Division],
    ) -> None:
        self.completion = completion
        self.arranged = arranged
        self.recordings: dict[Any, Any] = {}
        self.program = program
        self.graph = graph
        self.units = tuple(units)
        self.groups = tuple(groups)
        self.population = population
        self.num_leading = num_leading
        self._whole = program.select(list(program.sites))
        leading = {name for group in self.groups[:num_leading] for name in group.touched}
        rest = [name for name in program.sites if name not in leading]
        self._rest = program.select(rest) if rest else None
        self._active: tuple[DataIdentity, dict[str, Tensor], Activity] | None = None

    @property
    def has_rest(self) -> bool:
        """Whether there are factors that no unit of the schedule's first step touches."""
        return self._rest is not None

    @property
    def sites(self) -> Sites:
        """All random sites, in program order."""
        return self.program.sites

    @property
    def latents(self) -> list[str]:
        """Names of the latents, in program order."""
        return self.program.latents

    @property
    def summed_out(self) -> list[str]:
        """Names of the latents that are summed out."""
        return [] if self.program.summed_out is None else self.program.summed_out.members

    @property
    def barren(self) -> list[str]:
        """Names of the latents that nothing depends on; they are summed out, to one."""
        return [] if self.program.summed_out is None else self.program.summed_out.barren

    @property
    def model_sites(self) -> Sites:
        """All random sites of the model, with the latents that are summed out."""
        return self.sites if self.completion is None else self.completion.sites

    @property
    def discrete(self) -> dict[str, DiscreteSupport]:
        """Supports of the discrete latents, those that are summed out included."""
        return {name: site.discrete for name, site in self.model_sites.items() if site.discrete}

    @property
    def population_shape(self) -> tuple[int, ...]:
        """Sizes of the population plates."""
        return tuple(plate.size for plate in self.population)

    @property
    def population_scale(self) -> float:
        """Number of data that a population cell stands for, where its plate subsamples."""
        return self.sites[self.latents[0]].scale if self.population else 1.0

    def population_axes(self, name: str) -> tuple[int, ...]:
        """Axes of the population plates in a latent's value `(K, *batch, *event)`."""
        batch_dims = len(self.model_sites[name].batch_shape)
        return tuple(1 + batch_dims + plate.dim for plate in self.population)

    def value_axes(self) -> dict[str, tuple[int, ...]]:
        """Axes of the population plates in every value `(K, *batch, *event)` of a posterior.

        Latents and deterministic values; of the latter only those that are made cell by cell,
        since particles have weights by cell.
        """
        axes = {name: self.population_axes(name) for name in (*self.latents, *self.summed_out)}
        for name, value in self.sites.deterministic.items():
            found = [value.axis(plate) for plate in self.population]
            if None not in found:
                axes[name] = tuple(1 + axis for axis in found if axis is not None)
        return axes

    def axis_names(self, values: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
        """Plates on the axes `(*batch, *event)` of a posterior's values `(K, *batch, *event)`."""
        sites: dict[str, Site | Deterministic] = {**self.sites.deterministic, **self.model_sites}
        return {name: axis_names(sites[name], z.dim() - 1) for name, z in values.items()}

    def matches(self, arguments: Arguments) -> bool:
        """Whether what was captured agrees with a plain run of the model for these arguments.

        Raises:
            DataError: An observed value is NaN, or outside its distribution's support.
        """
        if self.completion is not None:
            return self.completion.matches(arguments)
        self._active = None  # a mask of the model's own may have changed in place
        particle = {name: u[0] for name, u in self.program.example.items()}
        plain = Substitute(particle, self.sites)
        try:
            sites = read_sites(self.program.model, *arguments.rebuild(arguments.tensors), plain)
            with torch.no_grad():
                factors = self.log_factors(self.program.example, arguments.tensors)
            first = {name: value[0] for name, value in factors.items()}
            expected = {name: plain.log_factors[name].to(first[name]) for name in first}
            compare_values(self.program, first, expected)
        except DataError:
            raise
        except Exception:  # what was captured for other data may fail on these in any way
            return False
        return sites == self.sites

    def activity(self, tensors: Sequence[Tensor]) -> Activity:
        """Elements of masked latents that these data make part of the target."""
        if not self.sites.masked:
            return NO_MASKS
        identity, masks = DataIdentity(tensors), self.program.masks(tensors)
        cached = self._active
        if cached is None or cached[0] != identity or not _all_equal(cached[1], masks):
            plates = {name: unit.plates for unit in self.units for name in unit.sites}
            activity = find_activity(self.program, masks, plates, self.groups, tensors)
            cached = self._active = identity, masks, activity
        return cached[2]

    def by_unit(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Splits numbers `(n,)` by group name into one number by unit name."""
        return {
            unit.name: number
            for group in self.groups
            if group.name in values
            for unit, number in zip(group.units, values[group.name].tolist(), strict=True)
        }

    def in_batches(
        self, function: Callable[[Latents], Any], latents: Latents, *, recompute: bool = False
    ) -> Any:
        """Values of a function of latents, by calls with as many particles as a program takes.

        Args:
            function: From the latents of one batch of particles to tensors by particle.
            latents: Unconstrained latents `(K, *batch, *event)`.
            recompute: Whether the backward pass evaluates a batch again, instead of keeping it.
        """
        return in_batches(function, latents, size=self.program.num_particles, recompute=recompute)

    def log_factors(self, latents: Latents, tensors: Sequence[Tensor]) -> Factors:
        """Log-factors of all sites at one batch of particles, each `(K, *batch_shape)`."""
        return self._whole(latents, tensors)

    def log_factors_apart_from_leading(
        self, latents: Latents, tensors: Sequence[Tensor]
    ) -> Factors:
        """Log-factors, likewise, that no unit of the schedule's first step touches."""
        assert self._rest is not None
        return self._rest(latents, tensors)

    def over_population(self, factors: Factors, *, scaled: bool = False) -> Tensor:
        """Sum of log-factors by population cell, `(K, *population)`.

        Args:
            factors: Log-factors by site.
            scaled: Whether a cell counts for as many data as it stands for.
        """
        unit = 1.0 if scaled else self.population_scale
        terms = [
            sum_to_plates(value, self.population) * (self.sites[name].scale / unit)
            if self.sites[name].scale != unit
            else sum_to_plates(value, self.population)
            for name, value in factors.items()
        ]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total


def _all_equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in second)


class DataIdentity:
    """Identity and version of the tensors that something was computed from."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tuple(tensors)
        self.versions = tuple(0 if t.is_inference() else t._version for t in tensors)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, DataIdentity)
            and self.versions == other.versions
            and len(self.tensors) == len(other.tensors)
            and all(a is b for a, b in zip(self.tensors, other.tensors, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]


NO_MASKS = Activity({}, frozenset(), {})
