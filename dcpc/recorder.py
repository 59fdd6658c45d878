"""Record of a run: a thin history of the particles, and statistics of the moves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dcpc.approach import Arrival, descended
from dcpc.convergence import SweepRecord, find_problems
from dcpc.draws import MIN_DRAWS
from dcpc.posterior import Posterior, Samples, equal_weights
from dcpc.problem import Problem
from dcpc.recombine import take_particles
from dcpc.sweep import SweepInfo, SweepState, resample

MAX_KEPT = 100
"""Sweeps kept of each particle by default, or as many more as it takes to `MIN_KEPT_DRAWS`."""

MIN_KEPT_DRAWS = 4000
"""Draws to keep by default of few particles."""

MAX_HISTORY_BYTES = 1 << 26
"""Size of a history that is kept by default: 64 MiB."""

CONSTRAIN_AT_ONCE = 4096
"""Particles whose constrained values are computed at once."""


class Recorder:
    """Follows the sweeps of a run, and makes a posterior of them.

    Args:
        problem: A model bound to its data.
        arrival: Where the sweeps start.
        num_sweeps: Number of sweeps.
        num_warmup: Number of sweeps that adapt. The others are recorded; the last one, if all
            adapt.
        keep_every: Interval between sweeps that are kept; 0 for none, None to choose.
    """

    def __init__(
        self,
        problem: Problem,
        arrival: Arrival,
        num_sweeps: int,
        num_warmup: int,
        keep_every: int | None,
    ) -> None:
        self._problem = problem
        self._evidence = arrival.evidence
        self._families = arrival.families
        self._num_sweeps = num_sweeps
        self._num_warmup = num_warmup
        if keep_every is None:
            keep_every = self._thinning(arrival.state)
        self._keep_every = keep_every
        self._kept: list[dict[str, Tensor]] = []
        self._is_chains = True
        self._num_bad = 0
        self._count = 0
        self._frozen = _Frozen()

    def add(self, before: SweepState, after: SweepState, info: SweepInfo) -> None:
        """Records a sweep from one state to the next."""
        self._count += 1
        self._num_bad += int(info.num_bad)
        self._families = descended(self._families, info.ancestors)
        number = self._count - self._num_warmup
        if number > 0:
            self._frozen.follow(before, after, info, self._problem)
            self._is_chains = self._is_chains and info.ancestors is None
            if self._keep_every and number % self._keep_every == 0:
                self._is_chains = self._is_chains and equal_weights(after.log_weight)
                self._kept.append(self._equally_weighted(after).latents)
        if number > 0 or self._count == self._num_sweeps:
            self._frozen.add(info)

    def posterior(self, state: SweepState) -> Posterior:
        """The posterior, given the state after the last sweep."""
        division, frozen = self._problem.division, self._frozen
        has_series = self._is_chains or len(self._kept) < MIN_DRAWS
        posterior = Posterior(
            samples=self._constrain(state.latents),
            state=state,
            population_axes=division.value_axes(),
            acceptance=division.by_unit(frozen.mean(frozen.statistic)),
            step_size=division.by_unit(frozen.mean(frozen.step_size)),
            unit_of={name: unit.name for unit in division.units for name in unit.sites},
            num_bad=self._num_bad,
            history=self._constrain_history(),
            is_chains=self._is_chains and bool(self._kept),
            evidence=self._evidence,
            # Where whole particles are resampled on the way, the cloud's series of means tells.
            families=self._families if has_series else None,
            is_exact=self._problem.parts.correction.is_exact,
            num_masked={
                name: int((~active).sum())
                for name, active in self._problem.density.active_latents().items()
            },
        )
        return replace(posterior, warnings=find_problems(posterior, self._record(state)))

    def _thinning(self, state: SweepState) -> int:
        """Thinning that makes the history long enough and small enough."""
        num_recorded = self._num_sweeps - self._num_warmup
        if num_recorded == 0:
            return 0
        size = sum(z.numel() * z.element_size() for z in self._constrain(state.latents).values())
        most = max(MAX_KEPT, MIN_KEPT_DRAWS // self._problem.num_particles)
        most = min(most, MAX_HISTORY_BYTES // size)
        return math.ceil(num_recorded / most) if most else 0

    def _record(self, state: SweepState) -> SweepRecord:
        """Record of the sweeps that the convergence checks need."""
        parts, division = self._problem.parts, self._problem.division
        moved = sum(math.prod(plate.size for plate in unit.plates) for unit in division.units)
        proposals = self._problem.num_particles * moved * max(self._frozen.count, 1)
        return SweepRecord(
            num_sweeps=self._num_sweeps,
            target=parts.target,
            sizes={unit.name: unit.size for unit in division.units},
            adapts_step_size=parts.adapts_step_size,
            is_preconditioned=parts.preconditioner.is_scaled,
            is_random=parts.move.is_reversible,
            bad_share=self._frozen.num_bad / proposals,
            undefined=self._undefined(state) if self._frozen.num_bad else (),
            # Particles that are no chains share ancestors that their series may not show.
            forgotten={} if self._is_chains else self._frozen.forgotten(state),
            bad_scores=division.by_unit(self._frozen.bad_scores),
            active=self._problem.density.active_latents(),
        )

    def _undefined(self, state: SweepState) -> list[str]:
        """Sites whose log-density is NaN or plus infinity where a latent is moved by about its sd.

        Minus infinity is none of these: hard edges (a uniform likelihood) are part of some models.
        """
        found: set[str] = set()
        with torch.no_grad():
            for name, u in state.latents.items():
                moved = u + 0.7 * (u.roll(1, 0) - u.roll(2, 0))
                factors = self._problem.density.log_factors({**state.latents, name: moved})
                found |= {
                    n for n, f in factors.items() if bool((f.isnan() | (f == math.inf)).any())
                }
        return sorted(found)

    def _equally_weighted(self, state: SweepState) -> SweepState:
        if equal_weights(state.log_weight):
            return state
        return resample(self._problem.density, state, self._problem.parts, always=True)[0]

    def _constrain(self, latents: Mapping[str, Tensor]) -> Samples:
        values = self._problem.constrain(latents)
        return {name: values[name] for name in self._problem.division.value_axes()}

    def _constrain_history(self) -> Samples:
        """Values `(K, num_kept, *batch, *event)` of the clouds that were kept."""
        step = max(1, CONSTRAIN_AT_ONCE // self._problem.num_particles)
        parts = [
            self._constrain_clouds(self._kept[first : first + step])
            for first in range(0, len(self._kept), step)
        ]
        names = parts[0] if parts else ()
        return {name: torch.cat([part[name] for part in parts], 1) for name in names}

    def _constrain_clouds(self, clouds: Sequence[Mapping[str, Tensor]]) -> Samples:
        stacked = {
            name: torch.stack([latents[name] for latents in clouds], 1).flatten(0, 1)
            for name in self._problem.division.latents
        }
        shape = (self._problem.num_particles, len(clouds))
        values = self._constrain(stacked)
        return {name: value.unflatten(0, shape) for name, value in values.items()}


@dataclass
class _Frozen:
    """Sums over the sweeps that do not adapt (the last sweep, if all do).

    Attributes:
        statistic: By group name, `(n,)`.
        step_size: By group name, `(n,)`.
        bad_scores: By group name, `(n,)`.
        num_bad: Log-densities that were NaN or infinite.
        squared_moves: By latent, mean squared move of a particle, summed over the sweeps,
            `(*batch, *event)`.
        count: Number of sweeps.
    """

    statistic: dict[str, Tensor] = field(default_factory=dict)
    step_size: dict[str, Tensor] = field(default_factory=dict)
    bad_scores: dict[str, Tensor] = field(default_factory=dict)
    squared_moves: dict[str, Tensor] = field(default_factory=dict)
    num_bad: int = 0
    count: int = 0

    def follow(
        self, before: SweepState, after: SweepState, info: SweepInfo, problem: Problem
    ) -> None:
        """Adds up how far particles moved in a sweep, from where their ancestors were."""
        for name, u in after.latents.items():
            start = before.latents[name]
            if info.ancestors is not None:
                axes = problem.division.population_axes(name)
                start = take_particles(start, info.ancestors, axes)
            moved = (u - start).square().mean(0)
            self.squared_moves[name] = self.squared_moves.get(name, 0.0) + moved

    def forgotten(self, state: SweepState) -> dict[str, Tensor]:
        """Independent values that a lineage has taken, `n E[move^2] / (2 Var)`, by latent.

        That is how often a diffusion by such moves has forgotten where it was.
        """
        return {
            name: moves / (2.0 * state.latents[name].var(0, correction=0))
            for name, moves in self.squared_moves.items()
        }

    def add(self, info: SweepInfo) -> None:
        """Counts one more sweep."""
        for total, new in (
            (self.statistic, info.statistic),
            (self.step_size, info.step_size),
            (self.bad_scores, info.num_bad_scores),
        ):
            for name, value in new.items():
                total[name] = total[name] + value if name in total else value
        self.num_bad += int(info.num_bad)
        self.count += 1

    def mean(self, total: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Averages over the sweeps."""
        return {name: value / self.count for name, value in total.items()}
