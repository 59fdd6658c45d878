"""Runs over minibatches: latents of each datum are kept, global ones move on noisy scores."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from dcpc.continuation import SweepSums
from dcpc.convergence import SweepRecord, find_problems
from dcpc.divide import Conditional, Density, prior_particles
from dcpc.divide.handlers import quiet
from dcpc.divide.model import Model
from dcpc.divide.sites import Plate
from dcpc.errors import DataError, OptionError
from dcpc.posterior import Evidence, Posterior, Samples
from dcpc.problem import Problem
from dcpc.progress import ProgressBar
from dcpc.recombine import LogWeights
from dcpc.sweep import SweepInfo, SweepState, sweep

LOCAL_SWEEPS = 5
"""Moves of the latents of single data per minibatch by default."""

MIN_SPREAD = 0.1
"""Smallest spread of the prior, in unconstrained space, that an ascent reckons with."""

MOMENT_DECAY = 0.95
"""Decay of the running mean of squared scores in an ascent, per step."""

START_SPREAD = 0.1
"""Spread of the global latents' first values around the prior's mean, over that of the prior."""

REACH = 4.0
"""How far an ascent may go, in spreads of the prior."""

SHORTENED = 1e-3
"""Length of an ascent's last step, over that of its first one."""

MAX_KEPT = 200
"""Sweeps that are kept of each particle by default."""


class _Indices(Messenger):
    """Gives plates their subsamples."""

    def __init__(self, indices: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.indices = indices

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["name"] in self.indices:
            msg["value"], msg["done"] = self.indices[msg["name"]], True
            msg["infer"]["is_given"] = True


class Subsampled:
    """A model that takes the subsamples of its plates as its first argument.

    Args:
        model: A Pyro program whose plates draw subsamples (`subsample_size=`).
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(self, indices: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        with _Indices(indices):
            return self.model(*args, **kwargs)


@dataclass(frozen=True)
class Minibatch:
    """Arguments of one sweep.

    Attributes:
        args: Arguments of the model.
        kwargs: Keyword arguments.
        index: Indices of the data among all, `(B)`; None where the model has no latents of single
            data.
    """

    args: tuple
    kwargs: dict[str, Any]
    index: Tensor | None


def drawn_subsamples(model: Model, args: tuple, kwargs: dict) -> dict[str, tuple[int, int]]:
    """Plates of a model that draw a subsample, with their sizes and those of the subsample."""
    with torch.no_grad(), quiet():
        nodes: dict[str, Any] = pyro.poutine.trace(model).get_trace(*args, **kwargs).nodes
    return {
        name: (int(node["fn"].size), int(node["fn"].subsample_size))
        for name, node in nodes.items()
        if site_is_subsample(node) and (node["fn"].subsample_size or math.inf) < node["fn"].size
    }


class Source(ABC):
    """Where minibatches come from."""

    @abstractmethod
    def endless(self) -> Iterator[Minibatch]:
        """Minibatches without end, epoch after epoch."""

    @abstractmethod
    def once(self) -> Iterator[Minibatch]:
        """Minibatches that show all data."""


@dataclass(frozen=True)
class Drawn(Source):
    """Subsamples for a `Subsampled` model, independent of each other.

    The noise of subsamples that divide an epoch among them sums to zero over it, so that it would
    not be the noise that moves on noisy scores reckon with.

    Attributes:
        plates: Sizes of the plates that draw subsamples, and of these.
        args: Arguments of the model.
        kwargs: Keyword arguments.

    Raises:
        OptionError: Several plates draw subsamples.
    """

    plates: Mapping[str, tuple[int, int]]
    args: tuple
    kwargs: dict[str, Any]

    def __post_init__(self) -> None:
        if len(self.plates) > 1:
            raise OptionError(
                f"the plates {sorted(self.plates)} all draw subsamples; one may, and the others "
                "take all of their elements"
            )

    def endless(self) -> Iterator[Minibatch]:
        ((_, (size, batch_size)),) = self.plates.items()
        while True:
            yield self._minibatch(torch.randperm(size)[:batch_size])

    def once(self) -> Iterator[Minibatch]:
        """Minibatches that show all data; the last two may overlap."""
        ((_, (size, batch_size)),) = self.plates.items()
        for start in range(0, size, batch_size):
            yield self._minibatch(torch.arange(batch_size) + min(start, size - batch_size))

    def _minibatch(self, index: Tensor) -> Minibatch:
        ((name, _),) = self.plates.items()
        return Minibatch(({name: index}, *self.args), self.kwargs, index)


@dataclass(frozen=True)
class Loaded(Source):
    """Minibatches of a loader.

    Attributes:
        loader: Gives tuples of the model's arguments, or dictionaries of its keyword arguments.
        index: Which of them are the indices of the data.
    """

    loader: Iterable[Any]
    index: str | int | None

    def endless(self) -> Iterator[Minibatch]:
        while True:
            yield from self.once()

    def once(self) -> Iterator[Minibatch]:
        """The minibatches of one pass.

        Raises:
            DataError: The loader is empty, or an item has no argument with indices.
        """
        batch = None
        for batch in self.loader:
            named = dict(batch) if isinstance(batch, Mapping) else {}
            args = () if named else tuple(batch) if isinstance(batch, list | tuple) else (batch,)
            yield Minibatch(args, named, _indices(args, named, self.index))
        if batch is None:
            raise DataError(
                "the loader gives no minibatch; it must be possible to go through it many times"
            )


def _indices(args: tuple, kwargs: Mapping[str, Any], index: str | int | None) -> Tensor | None:
    if index is None:
        return None
    known: Mapping[Any, Any] = kwargs if isinstance(index, str) else dict(enumerate(args))
    if index not in known:
        raise DataError(
            f"index={index!r} is none of the arguments {list(known)} of a minibatch; name the one "
            "that holds the indices of its data"
        )
    return known[index]


@dataclass
class Ascent:
    """Steps of global latents up their noisy log-density, to where its noise is what counts.

    From far away the second moment of the scores says nothing of the scale of the posterior. Steps
    are those of RMSprop (Tieleman & Hinton 2012); they shorten by a thousand, and reach as far as
    four times the spread of the prior in all.

    Attributes:
        num_steps: Number of steps in all.
        scale: Spread of the prior, `(1, n, d)`.
        moment: Running mean of squared scores, of the same shape for each particle.
        num_done: Steps that were made.
    """

    num_steps: int
    scale: Tensor
    moment: Tensor
    num_done: int = 0

    @classmethod
    def begin(cls, unit: Conditional, num_steps: int) -> Ascent:
        """The start, from particles of the prior."""
        value = unit.value
        spread = value.std(0, correction=0, keepdim=True) if len(value) > 1 else value.abs()
        return cls(num_steps, spread.clamp(min=MIN_SPREAD), torch.zeros_like(value))

    def step(self, unit: Conditional) -> Tensor:
        """The value after one more step."""
        score = unit.score(unit.value)
        self.num_done += 1
        self.moment = torch.lerp(score.square(), self.moment, MOMENT_DECAY)
        mass = 1.0 - MOMENT_DECAY**self.num_done
        first = REACH * self.scale / self.num_steps * -math.log(SHORTENED)
        length = first * SHORTENED ** (self.num_done / self.num_steps)
        root = (self.moment / mass).sqrt()
        return unit.value + length * score / root.clamp(min=torch.finfo(root.dtype).tiny ** 0.5)


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

    def posterior(self, batches: Iterable[Minibatch]) -> Posterior:
        """The posterior of the global latents, with the latents of single data as they are.

        Args:
            batches: Minibatches that show all data once, to constrain their latents by.
        """
        problem, state = self._problem, self._state
        assert problem is not None
        assert state is not None
        division = problem.division
        names = [name for name in division.latents if name not in _local_plates(problem)]
        samples = self._global_values(problem, state)
        sums = self._sums
        whole = replace(state, latents={name: state.latents[name] for name in names})
        posterior = Posterior(
            samples=samples,
            state=replace(whole, log_joint=torch.zeros_like(whole.log_joint)),
            population_axes={name: () for name in samples},
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
            local_samples=self._local_values(batches),
        )
        record = SweepRecord(num_sweeps=self.num_done, adapts_step_size=False)
        return replace(posterior, warnings=find_problems(posterior, record))

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
        name, plate = next(iter(_local_plates(problem).items()))
        return round(plate.size * problem.division.sites[name].scale)

    def _global_values(self, problem: Problem, state: SweepState) -> Samples:
        """Constrained values that do not belong to single data."""
        values = problem.constrain(state.latents)
        sites, local = problem.division.sites, _local_plates(problem)
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

    def _local_values(self, batches: Iterable[Minibatch]) -> Samples:
        """Constrained values of the latents of single data that were visited, of all data."""
        if not self._kept:
            return {}
        assert self._state is not None
        result: dict[str, Tensor] = {}
        for minibatch in batches:
            problem = self._bind(minibatch)
            values = problem.constrain(self._enter(problem, minibatch).latents)
            for name, plate in _local_plates(problem).items():
                value = values[name]
                axis = 1 + len(problem.division.sites[name].batch_shape) + plate.dim
                if name not in result:
                    shape = list(value.shape)
                    shape[axis] = self._num_data(problem)
                    result[name] = value.new_full(
                        shape, math.nan if value.is_floating_point() else 0
                    )
                assert minibatch.index is not None
                result[name].index_copy_(axis, minibatch.index, value)
        return result


def _local_plates(problem: Problem) -> dict[str, Plate]:
    """Latents of single data, with the plate that subsamples them."""
    sites = problem.division.sites
    outside = {plate.name for site in sites.values() if site.scale == 1.0 for plate in site.plates}
    return {
        name: next(plate for plate in sites[name].plates if plate.name not in outside)
        for name in problem.division.latents
        if sites[name].scale != 1.0
    }


def _axis(problem: Problem, name: str, plate: Plate) -> int:
    """Axis of a plate in a latent's unconstrained value `(K, *batch, *event)`."""
    return 1 + len(problem.division.sites[name].batch_shape) + plate.dim


def check_minibatch_problem(problem: Problem) -> None:
    """Checks that a model can be run over minibatches.

    Raises:
        OptionError: No algorithm for minibatches, or no or discrete latents outside of the plate
            that subsamples, or a move that keeps a memory of each particle.
    """
    parts, sites = problem.parts, problem.division.sites
    if parts.subsampled is None:
        raise OptionError(
            f"algorithm {problem.algorithm.name!r} moves global latents on the density of all "
            "data; over minibatches use algorithm='sgld'"
        )
    scaled = [name for name, site in sites.items() if site.scale != 1.0]
    outside = [name for name in problem.division.latents if sites[name].scale == 1.0]
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


@dataclass(frozen=True)
class Length:
    """Length of a run over minibatches.

    Attributes:
        num_sweeps: Minibatches to visit.
        num_warmup: Number of sweeps that adapt.
        keep_every: Interval between sweeps that are kept; 0 for none, None for some 200 of them.
        local_sweeps: Moves of the latents of single data per visit.

    Raises:
        OptionError: A number out of range.
    """

    num_sweeps: int
    num_warmup: int
    keep_every: int | None = None
    local_sweeps: int = LOCAL_SWEEPS

    def __post_init__(self) -> None:
        if self.num_sweeps < 1 or not 0 <= self.num_warmup <= self.num_sweeps:
            raise OptionError(
                "num_sweeps must be at least 1 and num_warmup between 0 and num_sweeps, got "
                f"num_sweeps={self.num_sweeps}, num_warmup={self.num_warmup}"
            )
        if self.local_sweeps < 1:
            raise OptionError(f"local_sweeps must be at least 1, got {self.local_sweeps}")

    @property
    def num_ascent(self) -> int:
        """Sweeps of the warm-up in which global latents ascend."""
        return self.num_warmup // 2

    def keeps(self, number: int) -> bool:
        """Whether the global latents after a sweep are kept; sweeps count from one."""
        kept, recorded = number - self.num_warmup, self.num_sweeps - self.num_warmup
        every = self.keep_every
        if every is None:
            every = max(1, math.ceil(recorded / MAX_KEPT))
        return kept > 0 and every > 0 and kept % every == 0


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
    return run.posterior(source.once())
