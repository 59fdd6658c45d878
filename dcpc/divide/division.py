"""The result of dividing a model, and the function that divides it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dcpc.divide.activity import Activity, find_activity
from dcpc.divide.batches import in_batches
from dcpc.divide.certify import (
    certify_graph,
    certify_values,
    compare_values,
    independent_plates,
    perturbation_dependencies,
)
from dcpc.divide.certify_moves import certify_moves
from dcpc.divide.discrete_unit import DiscreteGroup, join_discrete
from dcpc.divide.graph import SCHEDULES, Members, Schedule, SiteGraph, group_blocks
from dcpc.divide.handlers import Substitute
from dcpc.divide.model import Latents, Model
from dcpc.divide.program import (
    Arguments,
    Factors,
    GraphProgram,
    LoopProgram,
    Program,
    build_program,
    prior_particles,
)
from dcpc.divide.sites import Plate, Sites, read_sites
from dcpc.divide.summed_out import SummedOut, find_sums
from dcpc.divide.supports.discrete import DiscreteSupport
from dcpc.divide.unit import Unit, UnitGroup, sum_to_plates
from dcpc.errors import DataError

NUM_EXAMPLES = 4
"""Prior samples that a program is captured and certified with."""


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
    """

    def __init__(
        self,
        program: Program,
        graph: SiteGraph,
        units: Sequence[Unit],
        groups: Sequence[UnitGroup],
        population: tuple[Plate, ...],
        num_leading: int,
        completion: Division | None = None,
    ) -> None:
        self.completion = completion
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
    def discrete(self) -> dict[str, DiscreteSupport]:
        """Supports of the discrete latents, those that are summed out included."""
        sites = self.sites if self.completion is None else self.completion.sites
        return {name: site.discrete for name, site in sites.items() if site.discrete}

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
        sites = self.completion.sites if self.completion and name in self.summed_out else self.sites
        return tuple(1 + len(sites[name].batch_shape) + p.dim for p in self.population)

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


def divide(
    model: Model,
    arguments: Arguments,
    sites: Sites,
    num_particles: int,
    *,
    schedule: Schedule = SCHEDULES["coloured"],
    blocks: Sequence[Sequence[str]] = (),
    backend: str = "auto",
    certify: bool = True,
) -> Division:
    """Divides a model into units.

    Args:
        model: The Pyro program.
        arguments: Its arguments; the division serves all arguments of the same key.
        sites: Its sites, from `read_sites`.
        num_particles: Particles that its programs take at once.
        schedule: Order in which units move.
        blocks: Latents to move jointly.
        backend: `"auto"`, `"graph"`, `"vmap"` or `"loop"`.
        certify: Whether to compare with plain runs and to perturb the graph. Independence of
            plates is always tested.

    Raises:
        ModelError: The model has no static structure.
        CertificationError: The divided program disagrees with the model.
        OptionError: Impossible blocks or backend.
    """
    capture = partial(
        _capture,
        model,
        arguments,
        num_particles=num_particles,
        backend=backend,
        certify=certify,
    )
    captured = capture(sites)
    summed_out = find_sums(sites, captured.graph, captured.independent_plates)
    if summed_out is None:
        return captured.arrange(schedule, blocks)
    completion = captured.arrange(schedule, [part.members for part in summed_out.sums])
    marginal = capture(summed_out.sites, summed_out=summed_out)
    return marginal.arrange(schedule, blocks, completion)


@dataclass(frozen=True)
class _Captured:
    """A model as a vectorised program, with its graph.

    Attributes:
        program: The program.
        graph: Its graph.
        particles: `NUM_EXAMPLES` particles from the prior.
        certify: Whether moves are compared with plain runs of the model.
    """

    program: Program
    graph: SiteGraph
    particles: dict[str, Tensor]
    certify: bool

    def independent_plates(self, units: Sequence[Members]) -> dict[Members, tuple[Plate, ...]]:
        """For every unit, the plates whose elements may move independently."""
        tensors = self.program.arguments.tensors
        return _independent_plates(self.program, self.graph, units, self.particles, tensors)

    def arrange(
        self,
        schedule: Schedule,
        blocks: Sequence[Sequence[str]],
        completion: Division | None = None,
    ) -> Division:
        """The division into units.

        Args:
            schedule: Order in which units move.
            blocks: Latents to move jointly.
            completion: The division with the latents that this one sums out.
        """
        program, graph, sites = self.program, self.graph, self.program.sites
        asked = group_blocks(graph, blocks)
        members = join_discrete(graph, asked, blocks)
        plates = self.independent_plates(members)
        if any(_is_split(graph, unit, own) for unit, own in plates.items()):
            members = asked
        steps = schedule(graph, members)
        plates = self.independent_plates([unit for step in steps for unit in step])
        population = _population(sites, plates)
        units = {names: _unit(graph, names, _first(population, plates[names])) for names in plates}
        by_step = [
            [_group(alike, program, graph, len(population)) for alike in _alike(graph, units, step)]
            for step in steps
        ]
        groups = [group for step in by_step for group in step]
        if self.certify and completion is None:
            certify_moves(program, graph, groups, self.particles, program.arguments)
        scale = sites[graph.latents[0]].scale if population else 1.0
        # Units that are scaled otherwise than a cell have log-densities that do not add up to it.
        num_leading = len(by_step[0]) if all(g.scales == {scale} for g in by_step[0]) else 0
        ordered = sorted(units.values(), key=lambda unit: graph.latents.index(unit.sites[0]))
        return Division(program, graph, ordered, groups, population, num_leading, completion)


def _capture(
    model: Model,
    arguments: Arguments,
    sites: Sites,
    *,
    num_particles: int,
    backend: str,
    certify: bool,
    summed_out: SummedOut | None = None,
) -> _Captured:
    """Captures a model, and compares it with plain runs.

    Raises:
        ModelError: The model has no static structure.
        CertificationError: The program disagrees with the model.
    """
    tensors = arguments.tensors
    particles = prior_particles(model, sites, arguments, NUM_EXAMPLES)
    rows = torch.arange(num_particles, device="cpu") % NUM_EXAMPLES
    example = {name: u[rows] for name, u in particles.items()}
    program = _build_program(model, sites, arguments, example, backend, summed_out)
    if isinstance(program, GraphProgram):
        depends = program.dependencies()
    else:
        depends = perturbation_dependencies(program, particles, tensors)
    if certify:
        with torch.no_grad():
            factors = program.select(list(program.sites))(example, tensors)
        certify_values(program, factors, example, tensors)
        certify_graph(program, depends, particles, tensors)
    return _Captured(program, SiteGraph(sites, depends), particles, certify)


def _build_program(
    model: Model,
    sites: Sites,
    arguments: Arguments,
    example: Latents,
    backend: str,
    summed_out: SummedOut | None,
) -> Program:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = build_program(model, sites, arguments, example, backend, summed_out)
    if backend == "auto" and isinstance(program, LoopProgram):
        warnings.warn(
            "the model cannot be vectorised over particles, so it runs once per particle: right, "
            f"but slow. What stopped it: {program.reason}. backend='loop' silences this.",
            stacklevel=4,
        )
    return program


def _is_split(graph: SiteGraph, unit: Members, plates: tuple[Plate, ...]) -> bool:
    """Whether a block of discrete latents has more than one value of each per plate element."""
    if len(unit) == 1 or not graph.is_discrete(unit):
        return False
    return set(plates) != set(graph.sites[unit[0]].plates)


def _group(units: Sequence[Unit], program: Program, graph: SiteGraph, population: int) -> UnitGroup:
    kind = DiscreteGroup if graph.is_discrete(units[0].sites) else UnitGroup
    return kind(units, program, graph, population)


def _population(sites: Sites, plates: Mapping[Members, tuple[Plate, ...]]) -> tuple[Plate, ...]:
    """The plates that hold every site and within which every unit moves by element."""
    first = next(iter(plates.values()))
    return tuple(
        plate
        for plate in first
        if all(plate in site.plates for site in sites.values())
        and all(plate in own for own in plates.values())
    )


def _first(population: tuple[Plate, ...], plates: tuple[Plate, ...]) -> tuple[Plate, ...]:
    """A unit's plates, those of the population first."""
    return population + tuple(plate for plate in plates if plate not in population)


def _alike(
    graph: SiteGraph, units: Mapping[Members, Unit], step: Iterable[Members]
) -> list[list[Unit]]:
    """The units of a step by plates, size and support: those that are alike move as one batch.

    A block of discrete latents has tables of its own, and moves alone.
    """
    alike: dict[tuple, list[Unit]] = {}
    for members in step:
        unit, support = units[members], graph.sites[members[0]].discrete
        alone = members if support and len(members) > 1 else ()
        alike.setdefault((unit.plates, unit.size, support, alone), []).append(unit)
    return list(alike.values())


def _independent_plates(
    program: Program,
    graph: SiteGraph,
    units: Sequence[Members],
    particles: Latents,
    tensors: Sequence[Tensor],
) -> dict[Members, tuple[Plate, ...]]:
    """For every unit, the plates whose elements may move independently.

    One test per plate for all its units at once, which passes in the common case; unit by unit
    where it fails.
    """
    candidates = {unit: _common_plates(graph, unit) for unit in units}
    passed = set()
    for plate in _unique(plate for own in candidates.values() for plate in own):
        moved = [name for unit, own in candidates.items() if plate in own for name in unit]
        touched = [name for name, site in graph.sites.items() if plate in site.plates]
        if independent_plates(program, moved, touched, (plate,), particles, tensors):
            passed.add(plate)
    return {
        unit: own
        if passed.issuperset(own)
        else independent_plates(program, unit, graph.factors(unit), own, particles, tensors)
        for unit, own in candidates.items()
    }


def _common_plates(graph: SiteGraph, members: tuple[str, ...]) -> tuple[Plate, ...]:
    """Plates around all the members' latents and all factors that they touch."""
    names = (*members, *graph.factors(members))
    return tuple(
        plate
        for plate in graph.sites[members[0]].plates
        if all(plate in graph.sites[name].plates for name in names)
    )


def _unit(graph: SiteGraph, members: tuple[str, ...], plates: tuple[Plate, ...]) -> Unit:
    count = sum(graph.sites[name].unconstrained_shape.numel() for name in members)
    for plate in plates:
        count //= plate.size
    return Unit(
        sites=members,
        parents=graph.parents(members),
        children=graph.children(members),
        blanket=graph.blanket(members),
        plates=plates,
        size=count,
        support=graph.sites[members[0]].support,
    )


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


def _unique(plates: Iterable[Plate]) -> tuple[Plate, ...]:
    return tuple(dict.fromkeys(plates))
