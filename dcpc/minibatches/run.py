"""Sweeps over minibatches: latents of single data are kept, global ones move on noisy scores."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dcpc.continuation import SweepSums
from dcpc.convergence import SweepRecord, find_problems
from dcpc.divide import Density, prior_particles
from dcpc.divide.sites import Plate
from dcpc.errors import DataError, OptionError
from dcpc.minibatches.ascent import START_SPREAD, Ascent
from dcpc.minibatches.length import Length
from dcpc.minibatches.source import Minibatch, Source
from dcpc.posterior import Evidence, Posterior, Samples
from dcpc.problem import Problem
from dcpc.progress import ProgressBar
from dcpc.recombine import LogWeights
from dcpc.sweep import SweepInfo, SweepState, sweep

MAX_PASSES = 20
"""Passes through the data that show the latents of all of them once more, at most."""


def run_over(
    bind: Callable[[Minibatch], Problem], source: Source, length: Length, bar: ProgressBar
) -> Posterior:
    """Makes the sweeps of a run, one per minibatch.

    Args:
        bind: Makes a problem of a minibatch.
        source: Where minibatches come from.
        length: Length of the run.
        bar: Where progress is shown.
    """
    run = MinibatchRun(bind, length)
    bar.stage("sweeps", length.num_sweeps)
    for minibatch in itertools.islice(source.endless(), length.num_sweeps):
        bar.advance(run.sweep(minibatch))
    return run.posterior(source)


class MinibatchRun:
    """Particles on their way over minibatches.

    A sweep takes the latents of a minibatch's data from where they are kept, moves them
    `local_sweeps` times given the global ones, then moves the global ones once: by steps of an
    `Ascent` in the first half of the warm-up, by the algorithm's move afterwards.

    Args:
        bind: Makes a problem of a minibatch.
        length: Length of the run.
    """

    def __init__(self, bind: Callable[[Minibatch], Problem], length: Length) -> None:
        self._bind = bind
        self._length = length
        self._ascents: dict[str, Ascent] = {}
        self._kept: dict[str, Tensor] = {}
        self._seen: Tensor | None = None
        self._state: SweepState | None = None
        self._sums = SweepSums()
        self._history: list[Samples] = []
        self._problem: Problem | None = None
        self.num_done = 0

    def sweep(self, minibatch: Minibatch) -> SweepInfo:
        """Moves the particles on one minibatch.

        Raises:
            DataError: It has another size than the one before.
        """
        problem = self._bind(minibatch)
        if self._problem is None:
            check_minibatch_problem(problem)
            problem.check()
        elif problem.division is not self._problem.division:
            raise DataError(
                "a minibatch has another shape than the one before; all have to have as many data: "
                "DataLoader(..., drop_last=True)"
            )
        self._problem = problem
        self.num_done += 1
        adapt = self.num_done <= self._length.num_warmup
        state, density, parts = self._enter(problem, minibatch), problem.density, problem.parts
        local = [g.name for g in problem.division.groups if not g.is_subsampled]
        for _ in range(self._length.local_sweeps if local else 0):
            state, info = sweep(density, state, parts, adapt=adapt, groups=local)
        if self.num_done <= self._length.num_ascent:
            state = self._ascend(density, state)
        rest = [g.name for g in problem.division.groups if g.is_subsampled]
        if self.num_done > self._length.num_ascent or not local:
            state, info = sweep(density, state, parts, adapt=adapt, groups=rest)
        self._leave(problem, minibatch, state)
        if not adapt:
            self._sums.add(info)
        if self._length.keeps(self.num_done):
            self._history.append(self._global_values(problem, state))
        return info

    def _ascend(self, density: Density, state: SweepState) -> SweepState:
        """Moves the global latents up their log-density."""
        latents = dict(state.latents)
        for group in density.division.groups:
            if group.is_subsampled:
                unit = density.conditional(group, latents)
                if group.name not in self._ascents:
                    self._ascents[group.name] = Ascent.begin(unit, self._length.num_ascent)
                latents.update(group.unpack(self._ascents[group.name].step(unit)))
        return replace(state, latents=latents)

    def posterior(self, source: Source) -> Posterior:
        """The posterior of the global latents, with the latents of single data as they are.

        Args:
            source: Where minibatches come from, to constrain the latents of single data by.
        """
        problem, state = self._problem, self._state
        assert problem is not None
        assert state is not None
        division = problem.division
        names = [name for name in division.latents if name not in _local_plates(problem)]
        samples = self._global_values(problem, state)
        sums = self._sums
        local_samples, messages = self._local_values(source)
        whole = replace(state, latents={name: state.latents[name] for name in names})
        posterior = Posterior(
            samples=samples,
            state=replace(whole, log_joint=torch.zeros_like(whole.log_joint)),
            population_axes={name: () for name in samples},
            axis_names=division.axis_names(samples),
            acceptance=division.by_unit(sums.mean(sums.statistic)),
            step_size=division.by_unit(sums.mean(sums.step_size)),
            unit_of={n: unit.name for unit in division.units for n in unit.sites if n in names},
            num_bad=sums.num_bad,
            history={
                name: torch.stack([values[name] for values in self._history], 1)
                for name in (samples if self._history else ())
            },
            is_chains=False,  # particles share the noise of their minibatches
            evidence=Evidence(refusal=problem.evidence_refusal()),
            is_exact=False,
            local_samples=local_samples,
        )
        record = SweepRecord(num_sweeps=self.num_done, adapts_step_size=False)
        return replace(posterior, warnings=(*find_problems(posterior, record), *messages))

    def _enter(self, problem: Problem, minibatch: Minibatch) -> SweepState:
        """The state of the global latents with those of the minibatch's data."""
        plates = _local_plates(problem)
        is_new = bool(plates) and self._is_new(problem, minibatch)
        if self._state is None:
            start = problem.draw_from_prior(problem.density)
            weights = LogWeights(torch.zeros_like(start.log_weight.log_weight))
            near = {n: u.mean(0) + START_SPREAD * (u - u.mean(0)) for n, u in start.latents.items()}
            self._state = replace(start, latents=near, log_weight=weights)
        latents = dict(self._state.latents)
        drawn = self._draw_local(problem, latents) if is_new else {}
        for name, plate in plates.items():
            axis = _axis(problem, name, plate)
            assert minibatch.index is not None
            assert self._seen is not None
            if name not in self._kept:
                shape = list(latents[name].shape)
                shape[axis] = self._num_data(problem)
                self._kept[name] = latents[name].new_zeros(shape)
            latents[name] = self._kept[name].index_select(axis, minibatch.index)
            if is_new:
                new = ~self._seen[minibatch.index]
                new = new.reshape(-1, *(1,) * (latents[name].dim() - axis - 1))
                latents[name] = torch.where(new, drawn[name], latents[name])
        return replace(self._state, latents=latents)

    def _draw_local(self, problem: Problem, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Latents of single data from their prior given the global ones."""
        program, local = problem.division.program, _local_plates(problem)
        given = {name: u for name, u in latents.items() if name not in local}
        return prior_particles(
            program.model, program.sites, problem.arguments, problem.num_particles, given
        )

    def _leave(self, problem: Problem, minibatch: Minibatch, state: SweepState) -> None:
        """Keeps the latents of the minibatch's data."""
        for name, plate in _local_plates(problem).items():
            axis = _axis(problem, name, plate)
            assert minibatch.index is not None
            assert self._seen is not None
            self._kept[name].index_copy_(axis, minibatch.index, state.latents[name])
            self._seen[minibatch.index] = True
        self._state = state

    def _is_new(self, problem: Problem, minibatch: Minibatch) -> bool:
        """Whether some of the minibatch's data come for the first time.

        Raises:
            OptionError: Their indices are not known.
        """
        size = self._num_data(problem)
        if minibatch.index is None:
            raise OptionError(
                f"the latents {list(_local_plates(problem))} belong to single data, so that it has "
                "to be known which data a minibatch holds: run_over(..., index=), the argument of "
                "the model with their indices"
            )
        if self._seen is None:
            self._seen = torch.zeros(size, dtype=torch.bool, device=minibatch.index.device)
        if int(minibatch.index.max()) >= size or int(minibatch.index.min()) < 0:
            raise DataError(
                f"a minibatch has the indices {int(minibatch.index.min())} to "
                f"{int(minibatch.index.max())}, but the model's plate has {size} elements"
            )
        return not bool(self._seen[minibatch.index].all())

    def _num_data(self, problem: Problem) -> int:
        """Number of all data, by the size and the scale of the plate that subsamples."""
        name, plate = next(iter(_local_plates(problem, self._shown(problem)).items()))
        return round(plate.size * problem.division.model_sites[name].scale)

    def _global_values(self, problem: Problem, state: SweepState) -> Samples:
        """Constrained values that do not belong to single data."""
        values = problem.constrain(state.latents)
        sites, local = problem.division.sites, _local_plates(problem, self._shown(problem))
        names = [plate.name for plate in local.values()]
        inside = {
            name
            for name, site in sites.deterministic.items()
            if any(plate.name in names for plate in site.plates)
        }
        return {
            name: values[name].contiguous()
            for name in problem.division.value_axes()
            if name not in local and name not in inside
        }

    def _local_values(self, source: Source) -> tuple[Samples, tuple[str, ...]]:
        """Constrained values of the latents of single data, of all data that were visited.

        The source is gone through until all of them were shown again, which takes the model's
        arguments, but not more than `MAX_PASSES` times.

        Returns:
            The values; NaN (and floating-point numbers) where data were not shown. And a message
            if there are such data.
        """
        shown = torch.zeros_like(self._seen) if self._seen is not None else None
        problem = self._problem
        assert problem is not None
        if shown is None and not _local_plates(problem, problem.division.summed_out):
            return {}, ()
        result: dict[str, Tensor] = {}
        for minibatch in itertools.chain.from_iterable(source.once() for _ in range(MAX_PASSES)):
            if minibatch.index is None:  # latents that are summed out are not kept, and need none
                return {}, ("local_samples are left out: run_over(..., index=) was not given",)
            problem = self._bind(minibatch)
            values = problem.constrain(self._enter(problem, minibatch).latents)
            for name, plate in _local_plates(problem, self._shown(problem)).items():
                value, axis = values[name], _axis(problem, name, plate)
                if name not in result:
                    shape = list(value.shape)
                    shape[axis] = self._num_data(problem)
                    result[name] = value.new_zeros(shape)
                result[name].index_copy_(axis, minibatch.index, value)
            shown = (
                torch.zeros(self._num_data(problem), dtype=torch.bool) if shown is None else shown
            )
            shown[minibatch.index] = True
            if bool(shown.all()):
                return result, ()
        assert shown is not None
        return self._without(result, ~shown)

    def _without(self, values: Samples, missing: Tensor) -> tuple[Samples, tuple[str, ...]]:
        """Values with NaN for data that were not shown, and the message that says so."""
        problem = self._problem
        assert problem is not None
        result = {}
        for name, plate in _local_plates(problem, self._shown(problem)).items():
            axis = _axis(problem, name, plate)
            mask = missing.reshape(-1, *(1,) * (values[name].dim() - axis - 1))
            value = values[name]
            number = value if value.is_floating_point() else value.to(torch.get_default_dtype())
            result[name] = number.masked_fill(mask, math.nan)
        count = int(missing.sum())
        return result, (
            f"{count} of {len(missing)} data were not in the last minibatches that were looked at; "
            "their local_samples are NaN",
        )

    def _shown(self, problem: Problem) -> list[str]:
        """Latents whose values are shown: those that are moved and those that are summed out."""
        return [*problem.division.latents, *problem.division.summed_out]


def _local_plates(problem: Problem, names: Sequence[str] | None = None) -> dict[str, Plate]:
    """Latents of single data, with the plate that subsamples them; by default those that move."""
    division, sites = problem.division, problem.division.model_sites
    outside = {plate.name for site in sites.values() if site.scale == 1.0 for plate in site.plates}
    return {
        name: next(plate for plate in sites[name].plates if plate.name not in outside)
        for name in (division.latents if names is None else names)
        if sites[name].scale != 1.0
    }


def _axis(problem: Problem, name: str, plate: Plate) -> int:
    """Axis of a plate in a latent's value `(K, *batch, *event)`."""
    return 1 + len(problem.division.model_sites[name].batch_shape) + plate.dim


def check_minibatch_problem(problem: Problem) -> None:
    """Checks that a model can be run over minibatches.

    Raises:
        OptionError: No algorithm for minibatches, or no or discrete latents outside of the plate
            that subsamples, or a move that keeps a memory of each particle.
    """
    parts, division = problem.parts, problem.division
    sites = division.model_sites
    if parts.subsampled is None:
        raise OptionError(
            f"algorithm {problem.algorithm.name!r} moves global latents on the density of all "
            "data; over minibatches use algorithm='sgld'"
        )
    scaled = [name for name, site in sites.items() if site.scale != 1.0]
    latents = [*division.latents, *division.summed_out]
    outside = [name for name in latents if sites[name].scale == 1.0]
    if not scaled or not outside:
        raise OptionError(
            "a run over minibatches needs latents outside of a plate that subsamples (subsample= "
            f"or subsample_size=), got {outside or 'none'} and, inside of such a plate, "
            f"{scaled or 'no site'}; without them use run(...) of another algorithm"
        )
    discrete = [name for name in outside if sites[name].discrete]
    if discrete:
        raise OptionError(
            f"'{discrete[0]}' is a discrete latent outside of the plate that subsamples: an "
            "estimate of its probabilities does not do; pass all the data, with algorithm='dcpc'"
        )
    if parts.move.init_memory(torch.zeros(1)):
        raise OptionError(
            f"move {parts.move} remembers every particle's last move, which latents of single data "
            "do not keep from visit to visit; use move='langevin'"
        )
