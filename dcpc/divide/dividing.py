"""Divides a model: captures it, reads its graph, and arranges its latents in units."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dcpc.divide.certify import (
    certify_graph,
    certify_values,
    independent_plates,
    perturbation_dependencies,
)
from dcpc.divide.certify_moves import certify_moves
from dcpc.divide.discrete_blocks import join_discrete
from dcpc.divide.discrete_unit import DiscreteGroup
from dcpc.divide.division import Division
from dcpc.divide.graph import SCHEDULES, Members, Schedule, SiteGraph, group_blocks
from dcpc.divide.model import Latents, Model
from dcpc.divide.program import (
    Arguments,
    GraphProgram,
    LoopProgram,
    Program,
    build_program,
    prior_particles,
)
from dcpc.divide.sites import Plate, Sites
from dcpc.divide.summed_out import SummedOut, find_sums
from dcpc.divide.unit import Unit, UnitGroup

NUM_EXAMPLES = 4
"""Prior samples that a program is captured and certified with."""


@contextmanager
def _collecting_later() -> Iterator[None]:
    """Puts off the collection of cyclic garbage.

    A graph is a hundred thousand objects that live on; looking for garbage among them, again and
    again, is a quarter of the time of a long capture.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_collecting_later()
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

    @_collecting_later()
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
        joined = [unit for unit in members if unit not in asked]
        if any(_is_split(graph, *unit) for unit in self.independent_plates(joined).items()):
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
        arranged = partial(self.arrange, schedule, completion=completion)
        return Division(
            program, graph, ordered, groups, population, num_leading, completion, arranged
        )


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
    if backend == "auto" and program.reason:
        what = (
            "the model cannot be vectorised over particles, so it runs once per particle: right, "
            "but slow"
            if isinstance(program, LoopProgram)
            else "the model cannot be captured as one graph, so it runs under torch.vmap: right, "
            "but several times slower, and never compiled"
        )
        warnings.warn(
            f"{what}. What stopped it: {program.reason}. backend='{program.name}' silences this.",
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
        support=", ".join(dict.fromkeys(graph.sites[name].support for name in members)),
    )


def _unique(plates: Iterable[Plate]) -> tuple[Plate, ...]:
    return tuple(dict.fromkeys(plates))
