"""Whole paths of the particles, kept as values by step and the ancestors of each resampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from dcpc.recombine import take_particles

__all__ = ["Generation", "PathSamples"]


@dataclass(frozen=True)
class Generation:
    """Values that will not move any more, and how particles were resampled after that.

    A step adds one, which refers to the one before: nothing is copied, and posteriors of earlier
    steps share what they have in common (Jacob, Murray & Rubenthaler 2015 prune such a tree).

    Attributes:
        values: Constrained values `(K, *batch, *event)` by name, in the order of the particles
            before the resampling.
        ancestors: Ancestors `(K, *population)`; None where nothing was resampled.
        before: The generation before; None for the first.
    """

    values: Mapping[str, Tensor]
    ancestors: Tensor | None
    before: Generation | None


class PathSamples(Mapping[str, Tensor]):
    """Constrained values of all sites, put together when they are asked for.

    Values of recent steps are those of the particles; for an older one the ancestors since then
    are composed, once for all sites.

    Args:
        recent: Values of the particles as they are, by name; called when one is needed.
        recent_names: Their names.
        last: The last generation.
        axes: Population axes of a site's value.
    """

    def __init__(
        self,
        recent: Callable[[], Mapping[str, Tensor]],
        recent_names: list[str],
        last: Generation | None,
        axes: Callable[[str], tuple[int, ...]],
    ) -> None:
        self._recent, self._recent_names = recent, recent_names
        self._axes = axes
        self._last = self._at = last
        self._lineage: Tensor | None = None
        self._found: dict[str, tuple[Tensor, Tensor | None]] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._recent_names:
            return self._recent()[name]
        while name not in self._found:
            if self._at is None:
                raise KeyError(name)
            self._go_back(self._at)
        value, lineage = self._found[name]
        return value if lineage is None else take_particles(value, lineage, self._axes(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @cached_property
    def _names(self) -> dict[str, None]:
        """All names, the oldest step's first."""
        generations = []
        generation = self._last
        while generation is not None:
            generations.append(generation)
            generation = generation.before
        old = [name for generation in reversed(generations) for name in generation.values]
        return dict.fromkeys([*old, *self._recent_names])

    def _go_back(self, generation: Generation) -> None:
        """Follows the particles to where a generation's values are."""
        ancestors, lineage = generation.ancestors, self._lineage
        if ancestors is not None and lineage is not None:
            ancestors = take_particles(ancestors, lineage, tuple(range(1, ancestors.dim())))
        self._lineage = lineage if ancestors is None else ancestors
        self._found |= {name: (value, self._lineage) for name, value in generation.values.items()}
        self._at = generation.before
