"""Record of a run: a thin history of the particles, and statistics of the moves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dcpc.approach import Arrival, descended
from dcpc.continuation import Continuation, SweepSums
from dcpc.convergence import SweepRecord, find_problems
from dcpc.draws import MIN_DRAWS
from dcpc.posterior import Posterior, Samples, equal_weights
from dcpc.problem import Problem
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

    Attributes:
        num_done: Number of sweeps that were recorded, the warm-up included.
        num_warmup: Number of sweeps that adapt.
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
        self.num_warmup = num_warmup
        if keep_every is None:
            keep_every = self._thinning(arrival.state)
        self._keep_every = keep_every
        self._kept: list[dict[str, Tensor]] = []
        self._is_chains = True
        self._num_bad = 0
        self._sums = SweepSums()
        self._last: SweepInfo | None = None
        self.num_done = 0

    @classmethod
    def resume(cls, problem: Problem, posterior: Posterior) -> Recorder:
        """The recorder of an interrupted run, as it was then."""
        told = posterior.continuation
        assert told is not None
        arrival = Arrival(posterior.state, posterior.evidence, problem, told.families)
        recorder = cls(problem, arrival, told.num_sweeps, told.num_warmup, told.keep_every)
        num_kept = len(next(iter(told.kept.values()), ()))
        recorder._kept = [{name: u[i] for name, u in told.kept.items()} for i in range(num_kept)]
        recorder._is_chains = told.is_chains
        recorder._num_bad = posterior.num_bad
        recorder._sums = told.sums.copy()
        recorder.num_done = told.num_done
        return recorder

    @property
    def num_left(self) -> int:
        """Number of sweeps that are still to be recorded."""
        return self._num_sweeps - self.num_done

    def add(self, before: SweepState, after: SweepState, info: SweepInfo) -> None:
        """Records a sweep from one state to the next."""
        self.num_done += 1
        self._num_bad += int(info.num_bad)
        self._families = descended(self._families, info.ancestors)
        number = self.num_done - self.num_warmup
        if number > 0:
            self._sums.follow(before, after, info, self._problem.division)
            self._sums.add(info)
            self._is_chains = self._is_chains and info.ancestors is None
            if self._keep_every and number % self._keep_every == 0:
                self._is_chains = self._is_chains and equal_weights(after.log_weight)
                self._kept.append(self._equally_weighted(after).latents)
        self._last = info

    def posterior(self, state: SweepState, random_state: Mapping[str, Tensor]) -> Posterior:
        """The posterior, given the state after the last sweep; partial where sweeps are left.

        Args:
            state: Particles and weights.
            random_state: State of the run's own generators; empty if it has none.
        """
        division, sums = self._problem.division, self._described
        has_series = self._is_chains or len(self._kept) < MIN_DRAWS
        samples = self._constrain(state.latents)
        posterior = Posterior(
            samples=samples,
            state=state,
            population_axes=division.value_axes(),
            axis_names=division.axis_names(samples),
            acceptance=division.by_unit(sums.mean(sums.statistic)),
            step_size=division.by_unit(sums.mean(sums.step_size)),
            unit_of={name: unit.name for unit in division.units for name in unit.sites},
            joined=self._problem.joined,
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
            continuation=self._continuation(state, random_state) if self.num_left else None,
            discrete=division.discrete,
            conditional_probabilities={
                **sums.mean(sums.probabilities),
                **self._probabilities_of_summed_out(state),
            },
        )
        return replace(posterior, warnings=find_problems(posterior, self._record(state)))

    def _probabilities_of_summed_out(self, state: SweepState) -> dict[str, Tensor]:
        """Probabilities of the latents that are summed out, over the clouds that are kept."""
        if self._problem.division.completion is None:
            return {}
        if not self._kept:
            drawn = self._problem.completed(self._equally_weighted(state).latents)[1]
            return {name: probability.mean(0) for name, probability in drawn.items()}
        each = [self._problem.completed(latents)[1] for latents in self._kept]
        return {name: torch.stack([e[name].mean(0) for e in each]).mean(0) for name in each[0]}

    @property
    def _described(self) -> SweepSums:
        """The sweeps whose moves are described: the last one, where all of them adapted."""
        if self._sums.count or self._last is None:
            return self._sums
        last = SweepSums()
        last.add(self._last)
        return last

    def _continuation(self, state: SweepState, random_state: Mapping[str, Tensor]) -> Continuation:
        names = self._kept[0] if self._kept else ()
        return Continuation(
            num_done=self.num_done,
            num_sweeps=self._num_sweeps,
            num_warmup=self.num_warmup,
            keep_every=self._keep_every,
            kept={name: torch.stack([latents[name] for latents in self._kept]) for name in names},
            sums=self._sums.copy(),
            is_chains=self._is_chains,
            families=self._families,
            log_joint=self._problem.log_joint(state),
            random_state=random_state,
            leapfrog_steps=self._problem.tuned_steps,
        )

    def _thinning(self, state: SweepState) -> int:
        """Thinning that makes the history long enough and small enough."""
        num_recorded = self._num_sweeps - self.num_warmup
        if num_recorded == 0:
            return 0
        size = sum(z.numel() * z.element_size() for z in self._constrain(state.latents).values())
        most = max(MAX_KEPT, MIN_KEPT_DRAWS // self._problem.num_particles)
        most = min(most, MAX_HISTORY_BYTES // size)
        return math.ceil(num_recorded / most) if most else 0

    def _record(self, state: SweepState) -> SweepRecord:
        """Record of the sweeps that the convergence checks need."""
        parts, division = self._problem.parts, self._problem.division
        sums = self._described
        moved = sum(math.prod(plate.size for plate in unit.plates) for unit in division.units)
        proposals = self._problem.num_particles * moved * max(sums.count, 1)
        return SweepRecord(
            num_sweeps=self.num_done,
            target=parts.target,
            sizes={unit.name: unit.size for unit in division.units},
            adapts_step_size=parts.adapts_step_size,
            is_preconditioned=parts.preconditioner.is_scaled,
            is_random=parts.move.is_random,
            bad_share=sums.num_bad / proposals,
            undefined=self._undefined(state) if sums.num_bad else (),
            # Particles that are no chains share ancestors that their series may not show.
            forgotten={} if self._is_chains else sums.forgotten(state),
            bad_scores=division.by_unit(sums.bad_scores),
            active=self._problem.density.active_latents(),
        )

    def _undefined(self, state: SweepState) -> list[str]:
        """Sites whose log-density is NaN or plus infinity where a latent is moved by about its sd.

        Minus infinity is none of these: hard edges (a uniform likelihood) are part of some models.
        """
        found: set[str] = set()
        with torch.no_grad():
            for name, u in state.latents.items():
                site = self._problem.division.sites[name]
                moved = site.other(u, 0.7 * (u.roll(1, 0) - u.roll(2, 0)))
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
        # Compact, so that sums run over the same memory layout before a file and after.
        return {name: values[name].contiguous() for name in self._problem.division.value_axes()}

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
