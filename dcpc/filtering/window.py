"""The last steps of a model: the same program on the last rows of its data.

The density of the last L steps given what is before is that of the model run on the last `p + L`
rows alone, with the latents of the first p of them (p is the Markov order) given. The factors of
these p steps are wrong, since their own past is not there; they hold no latent that moves, and
cancel. So a step costs the same however long the past is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from torch import Tensor

from dcpc.divide.certify import differs
from dcpc.divide.model import Latents, log_factors, sample_prior
from dcpc.divide.program import map_particles
from dcpc.divide.sites import read_sites
from dcpc.errors import DCPCError, ModelError
from dcpc.filtering.growth import Call, Growth
from dcpc.filtering.steps import Steps
from dcpc.presets import JOINT_ACCEPTANCE
from dcpc.problem import Problem
from dcpc.recombine.correction import Metropolis

__all__ = ["NUM_FREE", "Bind", "Window", "disagreement", "open_window"]

Kind = TypeVar("Kind")

NUM_FREE = 4
"""Steps whose latents still move (L)."""

NUM_CERTIFIED = 2
"""Particles whose factors are compared with those of the whole model."""

Bind = Callable[[tuple, dict], Problem]
"""Binds the model of an engine to arguments."""


@dataclass(frozen=True)
class Window:
    """The model on some steps of its data, the last of which are free to move.

    Names of sites are those in the whole model, but where they are said to be the window's own.

    Attributes:
        base: The problem as the engine binds it.
        problem: The same, whose free latents are one unit that moves alone.
        steps: The sites by step.
        start: Step that its first row holds.
        stop: Number of steps of the whole model.
        first_free: First step whose latents move.
        own_free: Latents that move, by the window's own names.
    """

    base: Problem
    problem: Problem
    steps: Steps
    start: int
    stop: int
    first_free: int
    own_free: frozenset[str]

    @cached_property
    def names(self) -> dict[str, str]:
        """Names of the sites by the window's own."""
        steps = self.steps
        constant = {name: name for name in (*steps.constant, *steps.constant_values)}
        return constant | dict(steps.renamed(self.start, self.stop - self.start))

    @cached_property
    def latents(self) -> dict[str, str]:
        """Names of the latents by the window's own, in program order."""
        return {own: self.names[own] for own in self.problem.division.latents}

    @cached_property
    def values(self) -> dict[str, str]:
        """Names of the values that it gives, by the window's own.

        Latents and deterministic values of free steps, and those that are there at all lengths.
        """
        found = {own: self.names[own] for own in self.problem.division.value_axes()}
        step_of = self.steps.step_of
        return {
            own: name
            for own, name in found.items()
            if (step := step_of(name)) is None or step >= self.first_free
        }

    @property
    def newest(self) -> list[str]:
        """Values of the free steps, the newest last."""
        return [name for name in self.values.values() if self.steps.step_of(name) is not None]

    @cached_property
    def observed(self) -> list[str]:
        """The last step's observed sites, by the window's own names."""
        own = self.steps.observed_at(self.stop - 1 - self.start)
        return [name for name in own if name in self.problem.division.sites]

    def at(self, temperature: float) -> Problem:
        """The problem in which the last step's observations count by a temperature."""
        if temperature == 1.0:
            return self.problem
        return self.problem.tempered(temperature, self.observed)

    def is_final(self, name: str) -> bool:
        """Whether a value belongs to a step whose latents do not move any more."""
        step = self.steps.step_of(name)
        return step is not None and step < self.first_free

    def is_full(self, order: int) -> bool:
        """Whether it is as long as windows become."""
        return self.stop - self.start == NUM_FREE + order

    def shares_units(self, other: Window) -> bool:
        """Whether what was learned about the units of one holds for the other."""
        return self.problem.division is other.problem.division

    def inside(self, latents: Latents) -> dict[str, Tensor]:
        """Those of the window's latents that are given, by the window's names."""
        return {own: latents[name] for own, name in self.latents.items() if name in latents}

    def outside(self, latents: Latents) -> dict[str, Tensor]:
        """The window's latents, given by its own names."""
        return {name: latents[own] for own, name in self.latents.items()}

    def constrain(self, latents: Latents) -> dict[str, Tensor]:
        """Constrained and deterministic values, as many as `values` has.

        Args:
            latents: Unconstrained `(n K, *batch, *event)`.
        """
        own, sites = self.inside(latents), self.problem.division.sites
        if sites.deterministic or not all(sites[name].is_unbounded for name in own):
            own = self.problem.constrain(own)
        return {name: own[key] for key, name in self.values.items()}

    def naming(self) -> AbstractContextManager[None]:
        """A block of code whose errors name sites as the whole model does."""
        return _naming(self.names)

    def by_kind(self, known: Mapping[str, Kind]) -> dict[str, Kind]:
        """What the window's sites have, by the name of their kind (`Steps.first_of`).

        Args:
            known: By the window's own names.
        """
        first_of = self.steps.first_of
        return {first_of(self.names[own]): value for own, value in known.items()}


def open_window(
    bind: Bind, growth: Growth, steps: Steps, order: int, stop: int, last: Window | None
) -> Window:
    """The window of a number of steps.

    Args:
        bind: Binds the model to arguments.
        growth: The arguments, of at least as many steps.
        steps: The sites by step.
        order: Markov order.
        stop: Number of steps.
        last: The window before, whose division is used again if it fits.

    Raises:
        ModelError: Latents are summed out.
        DCPCError: The model or data cannot be handled.
    """
    first_free = max(stop - NUM_FREE, 0)
    start = max(first_free - order, 0)
    with _naming(dict(steps.renamed(start, stop - start))):
        base = bind(*growth.cut(start, stop))
    division = base.division
    if division.summed_out:
        raise ModelError(
            f"extend: the latents {division.summed_out} are summed out, over all steps at once; "
            "leave out infer={'enumerate': 'parallel'}, and they are drawn"
        )
    rows = range(first_free - start, stop - start)
    own = [name for row in rows for name in steps.latents_of(row) if name in division.sites]
    if first_free == 0:
        own += steps.initial(division.graph, order)
    if last is not None and last.base.division is division and last.own_free == frozenset(own):
        problem = last.problem.with_arguments(base.arguments)
    else:
        problem = _moving(base, own)
    return Window(base, problem, steps, start, stop, first_free, frozenset(own))


def _moving(problem: Problem, own: list[str]) -> Problem:
    """The problem with the free latents as units of their own, discrete ones apart, that move.

    By Metropolis steps, whatever the engine corrects by: weights belong to the observations.
    """
    sites = problem.division.sites
    continuous = [name for name in own if sites[name].discrete is None]
    blocks = [continuous, [name for name in own if name not in continuous]]
    parts = replace(problem.algorithm.joint, resample_threshold=0.0)  # that is done before
    if not isinstance(parts.correction, Metropolis):
        parts = replace(parts, correction=Metropolis(JOINT_ACCEPTANCE))
    arranged = problem.arranged([block for block in blocks if block], parts)
    return arranged.moving_only(own)


def disagreement(window: Window, growth: Growth, latents: Latents) -> str:
    """Where the factors of the free steps are not those of the whole model.

    The whole model runs a few times, so that it costs what a run of it costs. What is older than
    the window is drawn from the prior: nothing in the window may depend on it.

    Args:
        window: A window.
        growth: The arguments.
        latents: The window's latents, by its own names.

    Returns:
        Which site differs and how; empty if none does.
    """
    model, names = window.problem.model, window.names
    known = {own: u[:NUM_CERTIFIED] for own, u in latents.items()}
    here = _factors(model, known, growth.cut(window.start, window.stop))
    there = _factors(model, window.outside(known), growth.cut(0, window.stop))
    for own, value in here.items():
        name = names.get(own, own)
        step = window.steps.step_of(name)
        if step is None or step < window.first_free:
            continue
        if name not in there:
            return f"the whole model has no site '{name}'"
        if there[name].shape != value.shape or bool(differs(value, there[name]).any()):
            one, other = (float(factor[0].sum()) for factor in (value, there[name]))
            return f"site '{name}' has the log-density {one:.6g} there, {other:.6g} in the whole"
    return ""


def _factors(model: Callable, known: Latents, call: Call) -> Mapping[str, Tensor]:
    """All factors of a model, whose other latents are drawn from the prior."""
    sites = read_sites(model, *call)

    def factors(particle: dict[str, Tensor]) -> dict[str, Tensor]:
        drawn = sample_prior(model, *call, sites.latents, particle)
        return log_factors(model, {**drawn, **particle}, *call, sites)

    return map_particles(factors, dict(known))


@contextmanager
def _naming(names: Mapping[str, str]) -> Iterator[None]:
    try:
        yield
    except DCPCError as error:
        text = re.sub(r"'([^']+)'", lambda match: f"'{names.get(match[1], match[1])}'", str(error))
        raise type(error)(text) from error
