"""The posterior of a chain that goes on: weighted paths of particles."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache, cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from dcpc.filtering.filter import Filter
from dcpc.filtering.genealogy import PathSamples
from dcpc.posterior import Evidence, Posterior, Samples
from dcpc.recombine import LogWeights
from dcpc.sweep import SweepState

__all__ = ["FilteredPosterior", "posterior_of"]

Kind = TypeVar("Kind")


class FilteredPosterior(Posterior):
    """Weighted particles at the last step of a chain, with their paths.

    `samples` puts the values of an old site together when they are asked for. Statistics of the
    newest steps, whose latents still move, are those of the draws of all sweeps after the last
    observation; those of older ones, and of latents that hold for all times, are of the particles.
    Pickles and files hold an ordinary posterior of the particles.
    """

    filter: Filter
    """State that `DCPC.extend` goes on from."""

    @property
    def newest(self) -> tuple[str, ...]:
        """Sites of the steps whose latents still move, the newest step's last."""
        return tuple(self._drawn.samples)

    def filtered(self, prob: float = 0.9) -> dict[str, dict[str, Tensor]]:
        """Statistics of the sites in `newest`, as from `statistics`, at the same cost always.

        Args:
            prob: Mass of the equal-tailed interval.
        """
        return self._drawn.statistics(prob)

    def mean(self) -> Samples:
        return {**super().mean(), **self._drawn.mean()}

    def std(self) -> Samples:
        return {**super().std(), **self._drawn.std()}

    def quantile(self, probabilities: Sequence[float]) -> Samples:
        return {**super().quantile(probabilities), **self._drawn.quantile(probabilities)}

    def statistics(self, prob: float = 0.9) -> dict[str, dict[str, Tensor]]:
        return {**super().statistics(prob), **self.filtered(prob)}

    def __reduce__(self) -> tuple[Any, ...]:
        """As an ordinary posterior: a filter holds a model, and a long chain of generations."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("samples", "population_axes", "discrete"):
            values[name] = dict(values[name])
        return partial(Posterior, **values), ()

    @cached_property
    def _drawn(self) -> Posterior:
        """The draws after every sweep of the last step; those of a particle are a family."""
        draws, window = self.filter.draws, self.filter.window
        assert window is not None
        together = {name: torch.cat([draw[name] for draw in draws]) for name in draws[0]}
        values = window.constrain(together)
        weights = self.log_weight
        tall = (len(draws), *(1,) * (weights.dim() - 1))
        return Posterior(
            samples={name: values[name] for name in window.newest},
            state=SweepState({}, LogWeights(weights.repeat(tall)), self.state.log_joint),
            population_axes=self.population_axes,
            acceptance={},
            step_size={},
            unit_of={},
            families=self.filter.error.families.repeat(tall),
        )


class _ByKind(Mapping[str, Kind]):
    """What sites have by their kind: all counterparts of a site have the same.

    Args:
        names: Names of all sites; those whose kind has nothing are left out.
        kind: Kind of a site.
        known: By kind.
    """

    def __init__(
        self, names: Collection[str], kind: Callable[[str], str], known: Mapping[str, Kind]
    ) -> None:
        self._names, self._kind, self._known = names, kind, known

    def __getitem__(self, name: str) -> Kind:
        return self._known[self._kind(name)]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names if self._kind(name) in self._known)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def posterior_of(known: Filter) -> FilteredPosterior:
    """The posterior after the last observation; nothing is computed that is not asked for."""
    window, kind = known.window, known.steps.first_of
    assert window is not None
    division, groups = window.problem.division, window.problem.groups
    axes = window.by_kind(division.value_axes())
    samples = PathSamples(
        cache(lambda: window.constrain(known.state.latents)),
        list(window.values.values()),
        known.last,
        lambda name: axes[kind(name)],
    )
    evidence = _evidence(known)
    posterior = FilteredPosterior(
        samples=samples,
        state=known.state,
        population_axes=_ByKind(samples, kind, axes),
        acceptance={unit.name: known.acceptance for group in groups for unit in group.units},
        step_size=division.by_unit(known.step_size),
        unit_of={
            window.names.get(own, own): unit.name
            for group in groups
            for unit in group.units
            for own in unit.sites
        },
        evidence=evidence,
        warnings=tuple(_warnings(known, evidence)),
        discrete=_ByKind(samples, kind, window.by_kind(division.discrete)),
    )
    object.__setattr__(posterior, "filter", known)
    return posterior


def _evidence(known: Filter) -> Evidence:
    run = known.run
    if run.log_evidence is None:
        return run
    weights = known.state.log_weight
    return Evidence(
        (run.log_evidence.double() + known.log_evidence).to(run.log_evidence),
        known.error.standard_error(weights),
        misses_prior_mass=run.misses_prior_mass,
    )


def _warnings(known: Filter, evidence: Evidence) -> Iterator[str]:
    if evidence.standard_error is not None and bool(evidence.standard_error.isinf().any()):
        yield (
            "the evidence estimate is not reliable: too few families of particles have survived to "
            "tell its error; take more particles, or start from a run whose estimate is reliable"
        )
    if known.degenerate:
        yield (
            f"few distinct values are left of {list(known.degenerate)}, which hold for all times: "
            "new observations reweight them, and nothing moves them; call run(...) on all the data "
            "and extend from there, or take more particles"
        )
    if known.surprises:
        shown = ", ".join(map(str, known.surprises[:5]))
        more = f" and {len(known.surprises) - 5} more" if len(known.surprises) > 5 else ""
        yield (
            f"the observations of step(s) {shown}{more} were far from where the particles expected "
            "them, so that few of them survived; take more particles"
        )
