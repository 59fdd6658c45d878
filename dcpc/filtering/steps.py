"""The sites of a model by the step that they belong to."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from dcpc.divide.graph import SiteGraph
from dcpc.divide.sites import Sites
from dcpc.errors import ModelError

__all__ = ["Steps"]


@dataclass(frozen=True)
class Template:
    """Names of the sites that are one another's counterparts, as `x_0`, `x_1`, ...

    Attributes:
        prefix: What comes before the number.
        suffix: What comes after it.
        width: Digits that numbers are filled up to with zeros.
        offset: Number of step 0.
    """

    prefix: str
    suffix: str
    width: int
    offset: int

    def name(self, step: int) -> str:
        """Name of the site of a step."""
        return f"{self.prefix}{step + self.offset:0{self.width}d}{self.suffix}"

    def step(self, name: str) -> int | None:
        """Step that a name belongs to; None for a name of another kind, or before step 0."""
        if not name.startswith(self.prefix) or not name.endswith(self.suffix):
            return None
        digits = name[len(self.prefix) : len(name) - len(self.suffix)]
        if not digits.isdecimal():
            return None
        step = int(digits) - self.offset
        return step if step >= 0 and self.name(step) == name else None


@dataclass(frozen=True)
class Steps:
    """The sites that a step adds to a model, and those that are there at any length.

    Attributes:
        latents: Names of a step's latents, in program order.
        observed: Names of its observed sites.
        deterministic: Names of its deterministic values.
        constant: Latents at all lengths: initial states, and those that hold for all times.
        constant_values: Deterministic values at all lengths.
    """

    latents: tuple[Template, ...]
    observed: tuple[Template, ...]
    deterministic: tuple[Template, ...]
    constant: tuple[str, ...]
    constant_values: tuple[str, ...]

    @classmethod
    def between(cls, shorter: Sites, longer: Sites, num_steps: int) -> Steps:
        """The sites by step, from those of a model of so many steps and of one step more.

        Raises:
            ModelError: The step adds no latent, its sites do not carry its number, or a site is
                there at both lengths and has another shape.
        """
        _check_shapes(shorter, longer)
        values = longer.deterministic
        added = [name for name in longer if name not in shorter]
        added_values = [name for name in values if name not in shorter.deterministic]
        if not any(not longer[name].is_observed for name in added):
            raise ModelError(
                f"extend: a new observation adds the sites {added or 'none'} to the model, none of "
                "them a latent; expected a loop over time with a latent per step, as in "
                "`for t in pyro.markov(range(len(y)))`; call run(...) for other models"
            )
        before = {*shorter, *shorter.deterministic}
        templates = {n: _template(n, before, num_steps) for n in (*added, *added_values)}
        found = tuple(templates.values())

        def is_constant(name: str) -> bool:
            return name not in templates and all(_is_none(t.step(name)) for t in found)

        return cls(
            latents=tuple(templates[n] for n in added if not longer[n].is_observed),
            observed=tuple(templates[n] for n in added if longer[n].is_observed),
            deterministic=tuple(templates[n] for n in added_values),
            constant=tuple(name for name in longer.latents if is_constant(name)),
            constant_values=tuple(name for name in values if is_constant(name)),
        )

    def latents_of(self, step: int) -> list[str]:
        """Names of the latents of a step."""
        return [template.name(step) for template in self.latents]

    def observed_at(self, step: int) -> list[str]:
        """Names of the observed sites of a step."""
        return [template.name(step) for template in self.observed]

    def values_of(self, step: int) -> list[str]:
        """Names of all values of a step that a posterior has: latents and deterministic ones."""
        return [t.name(step) for t in (*self.latents, *self.deterministic)]

    def step_of(self, name: str) -> int | None:
        """Step of a site; None of one that is there at all lengths."""
        templates = (*self.latents, *self.observed, *self.deterministic)
        return next((s for t in templates if (s := t.step(name)) is not None), None)

    def first_of(self, name: str) -> str:
        """Name of a site's counterpart at step 0, which stands for its kind."""
        templates = (*self.latents, *self.observed, *self.deterministic)
        return next((t.name(0) for t in templates if t.step(name) is not None), name)

    def renamed(self, start: int, num_rows: int) -> Iterator[tuple[str, str]]:
        """Names in a model of the steps from `start` on, with their names in the whole model."""
        for row in range(num_rows):
            for template in (*self.latents, *self.observed, *self.deterministic):
                yield template.name(row), template.name(start + row)

    def order(self, graph: SiteGraph) -> int:
        """Markov order: steps that a factor looks back by, at most.

        Raises:
            ModelError: A factor depends on a later step.
        """
        order = 0
        for name, latents in graph.depends.items():
            step = self.step_of(name)
            if step is None:
                continue
            for latent in latents:
                other = self.step_of(latent)
                if other is not None and other > step:
                    raise ModelError(
                        f"extend: site '{name}' depends on '{latent}', of a later step; expected a "
                        "model that goes forward in time"
                    )
                order = max(order, step - (step if other is None else other))
        return order

    def initial(self, graph: SiteGraph, order: int) -> list[str]:
        """Constant latents that only the first steps depend on, as many as the order."""
        first = max(order, 1)
        later: set[str] = set()
        for name, latents in graph.depends.items():
            step = self.step_of(name)
            if step is not None and step >= first:
                later |= latents
        return [name for name in self.constant if name not in later]


def _is_none(value: object) -> bool:
    return value is None


def _check_shapes(shorter: Sites, longer: Sites) -> None:
    """Sites that are there at both lengths have to be the same.

    Raises:
        ModelError: One of them is not.
    """
    for name, site in shorter.items():
        if name not in longer:
            raise ModelError(
                f"extend: site '{name}' is there for the old data and not for the new ones; "
                "expected a step to add sites and to leave the others, so number them from the past"
            )
        one = (*site.batch_shape, "|", *site.unconstrained_shape)
        other = (*longer[name].batch_shape, "|", *longer[name].unconstrained_shape)
        if one != other:
            shapes = [tuple(s.unconstrained_shape or s.batch_shape) for s in (site, longer[name])]
            raise ModelError(
                f"extend: site '{name}' grows from shape {shapes[0]} to {shapes[1]} with the data; "
                "expected a site for every step: write time as a loop, `for t in "
                "pyro.markov(range(len(y)))`, not as an axis or a plate"
            )


def _template(name: str, before: Collection[str], step: int) -> Template:
    """The names that a new site's name belongs to: of its numbers, the one that counts steps.

    Raises:
        ModelError: There is none of which the step before has a site.
    """
    for match in re.finditer(r"\d+", name):
        prefix, digits, suffix = name[: match.start()], match[0], name[match.end() :]
        filled = rf"{re.escape(prefix)}0\d{{{len(digits) - 1}}}{re.escape(suffix)}"
        is_filled = len(digits) > 1 and any(re.fullmatch(filled, other) for other in before)
        template = Template(prefix, suffix, len(digits) if is_filled else 1, int(digits) - step)
        if int(digits) > 0 and template.name(step - 1) in before:
            return template
    raise ModelError(
        f"extend: site '{name}' of the new step has no counterpart in the step before; expected "
        "steps that are alike, with sites numbered by step, as f'x_{t}'"
    )
