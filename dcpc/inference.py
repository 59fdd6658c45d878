"""`DCPC`, the class that users meet."""

from __future__ import annotations

import html
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from functools import partial
from typing import Any

from torch import Tensor

from dcpc.annealing import Annealed
from dcpc.approach import MAX_SWEEPS, anneal_with_evidence, approach
from dcpc.conquer import Move, Preconditioner
from dcpc.convergence import ConvergenceWarning, format_problems
from dcpc.divide import Arguments, Division, Unit
from dcpc.divide.cache import ALL, Blocks, Divisions
from dcpc.divide.graph import Schedule
from dcpc.divide.model import Model
from dcpc.errors import OptionError, require_at_least
from dcpc.filtering import NUM_SWEEPS, FilteredPosterior, check_posterior, extend
from dcpc.graphs.runner import RecordedRunner
from dcpc.graphs.tiers import Mode
from dcpc.habits import check_model_arguments, refuse
from dcpc.minibatches import (
    LOCAL_SWEEPS,
    Drawn,
    Length,
    Loaded,
    Minibatch,
    Source,
    Subsampled,
    drawn_subsamples,
    run_over,
)
from dcpc.posterior import Posterior, Samples
from dcpc.presets import build_algorithm
from dcpc.problem import Problem, check_annealing
from dcpc.progress import ProgressBar
from dcpc.recombine.correction import Correction
from dcpc.recorder import Recorder
from dcpc.reparam import Config, reparameterised
from dcpc.seeding import continued, random_state_kept, seeded
from dcpc.sweep import PLAIN, SweepInfo, SweepState, restart_adaptation
from dcpc.sweeping import check_continuation, continuation_of, sweep_to_end, with_blocks_of
from dcpc.tables import table
from dcpc.threads import exclusive


class Units(list[Unit]):
    """The units of a model; prints as a table.

    Args:
        units: The units.
        joined: By name of a unit of several latents that a run has joined, why.
    """

    HEADER = ("unit", "parents", "children", "blanket", "plates", "size", "support")

    def __init__(self, units: Iterable[Unit], joined: Mapping[str, str] | None = None) -> None:
        super().__init__(units)
        self.joined = dict(joined or {})

    def __str__(self) -> str:
        return "\n".join([table(self.HEADER, self._rows(), "plain"), *self._reasons()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        reasons = "<br>".join(map(html.escape, self._reasons()))
        return table(self.HEADER, self._rows(), "html") + reasons

    def _reasons(self) -> list[str]:
        return [f"{unit} moved jointly: {reason}" for unit, reason in self.joined.items()]

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                unit.name,
                *(
                    ", ".join(sorted(names))
                    for names in (unit.parents, unit.children, unit.blanket)
                ),
                ", ".join(f"{plate.name}({plate.size})" for plate in unit.plates),
                str(unit.size),
                unit.support,
            )
            for unit in self
        ]


class DCPC:
    """Divide-and-conquer predictive coding for a static-structure Pyro model.

    The model is divided into complete conditionals, one per latent; each is moved by Langevin
    proposals along its prediction error; importance weights recombine the units into weighted
    particles and an evidence estimate. Sennesh, Wu & Salvatori (2024).

    Examples:
        >>> posterior = DCPC(model, num_particles=256).run(y, num_sweeps=500)
        >>> posterior.summary()

    One thread of a process infers at a time; a second one is refused. Torch's default generator is
    one for all threads as well: another thread that draws from it while a seeded run is under way
    changes the run's draws, and is set back when the run ends; give it a `torch.Generator` of its
    own. An engine can be pickled if its model can, and run in another process; what `pyro.param`
    keeps in its store stays behind, unless it is saved by `pyro.get_param_store().save`.

    Args:
        model: A Pyro program with a fixed set of sites.
        guide: A Pyro program (encoder, autoguide) over the same latents that the particles are
            drawn from, with proper weights, instead of annealing from the prior.
        num_particles: K.
        particle_batch_size: Particles that the model is evaluated for at once: fewer take less
            memory, and more time; None for all of them. The draws are the same, and the results up
            to rounding.
        algorithm: A preset: `dcpc`, `dcpc-smc`, `sgld`, `dcpc-paper`, `pgd`, `mpgd`, `lpc`, `mcpc`,
            `pc`, `ipc`.
        schedule: `sequential`, `coloured` or `joint`; None for the preset's.
        move: `langevin`, `underdamped`, `barker`, `kinetic` or `gradient`, or a `Move`, as in
            `Langevin(leapfrog_steps=4)`.
        correction: `metropolis`, `weight`, `resample` or `none`, or a `Correction`.
        preconditioner: `adapted`, `dense`, `second_moment`, `identity` or `particle_variance`, or
            a `Preconditioner`.
        step_size: Fixed step size; None adapts it by dual averaging where the correction has a
            target statistic, and is 0.01 elsewhere.
        blocks: Latents to move jointly, as in `[("alpha", "beta")]`; `"all"` for all continuous
            ones; `"auto"` joins what a run's particles show to be correlated, `()` nothing.
        resampling: `systematic`, `stratified`, `multinomial` or `residual`.
        resample_threshold: Whole particles are resampled where ESS / K is below it.
        reparam: Coordinates of latents: `noncentred` to hold them by their standardised errors, `e`
            in `z = loc + scale e` (a cure for funnels; `dcpc.reparam.NonCentred` for some of them),
            under the names and with the values of the model as it is written; `auto` for Pyro's own
            `AutoReparam`; reparameterisations by site or a strategy, as for `pyro.poutine.reparam`;
            None for the model as it is written.
        backend: `auto`, `graph`, `vmap` or `loop`.
        certify: Whether divided programs are compared with plain runs of the model.
        compile: Whether sweeps are recorded as graphs and compiled; `auto` compiles them where the
            sweeps that are asked for make up for the time, some ten seconds and more. Compiled
            sweeps take the same random numbers, and give the same results but for rounding.

    Raises:
        OptionError: An unknown name, a value out of range, or parts that do not go together.
    """

    def __init__(
        self,
        model: Model,
        guide: Model | None = None,
        *,
        num_particles: int,
        particle_batch_size: int | None = None,
        algorithm: str = "dcpc",
        schedule: str | Schedule | None = None,
        move: str | Move | None = None,
        correction: str | Correction | None = None,
        preconditioner: str | Preconditioner | None = None,
        step_size: float | None = None,
        blocks: str | Sequence[Sequence[str]] = "auto",
        resampling: str = "systematic",
        resample_threshold: float = 0.5,
        reparam: str | Config | None = None,
        backend: str = "auto",
        certify: bool = True,
        compile: Mode = "auto",
        **unknown: Any,
    ) -> None:
        refuse(unknown, "DCPC")
        if not callable(model):
            raise OptionError(f"model must be a Pyro program (a callable), got {model!r}")
        _require_count("num_particles", num_particles)
        if particle_batch_size is not None:
            _require_count("particle_batch_size", particle_batch_size)
        self.model = reparameterised(model, reparam)
        self.guide = guide
        self.num_particles = num_particles
        self.algorithm = build_algorithm(
            algorithm,
            schedule=schedule,
            move=move,
            correction=correction,
            preconditioner=preconditioner,
            resampling=resampling,
            resample_threshold=resample_threshold,
            step_size=step_size,
        )
        if isinstance(blocks, str) and blocks not in ("auto", ALL):
            raise OptionError(
                f"blocks must be 'auto', 'all' or a list of blocks, as in [('alpha', 'beta')], got "
                f"{blocks!r}"
            )
        self.finds_blocks = blocks == "auto"
        self.blocks: Blocks = () if self.finds_blocks else ALL if blocks == ALL else _tuples(blocks)
        self.algorithm.check(one_block=self.blocks == ALL or len(self.blocks) == 1)
        if self.algorithm.preset.single_particle and num_particles != 1:
            raise OptionError(
                f"algorithm {algorithm!r} has one particle per datum, got num_particles="
                f"{num_particles}; use num_particles=1, or algorithm='pgd' for a cloud"
            )
        self.parts = self.algorithm.parts
        self._divide = partial(
            Divisions,
            num_particles=num_particles,
            batch_size=particle_batch_size,
            schedule=self.algorithm.schedule,
            blocks=self.blocks,
            backend=backend,
            certify=certify,
        )
        self._divisions = self._divide(self.model)
        self._windows = self._divide(self.model, blocks=())
        if compile not in (True, False, "auto"):
            raise OptionError(f"compile must be True, False or 'auto', got {compile!r}")
        self._runner = RecordedRunner(compile) if compile else PLAIN
        self._posterior: Posterior | None = None

    # -- what users call ---------------------------------------------------------------------

    def units(self, *args: Any, **kwargs: Any) -> Units:
        """The units of the model for these arguments; prints as a table.

        After a run that has found blocks, they are its units.
        """
        division, last = self.division(*args, **kwargs), self._posterior
        if last is None or not last.joined or set(last.unit_of) != set(division.latents):
            return Units(division.units)
        return Units(division.arranged(list(last.found_blocks)).units, last.joined)

    def run(
        self,
        *args: Any,
        num_sweeps: int | None = None,
        num_warmup: int | None = None,
        keep_every: int | None = None,
        initial_values: Mapping[str, Tensor] | None = None,
        evidence: bool = True,
        conditional_ess: float = 0.9,
        seed: int | None = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> Posterior:
        """Infers the posterior of the latents given the arguments.

        The exact algorithms anneal to the posterior twice: a pilot chooses the temperatures, and
        how many sweeps the particles need at each to decorrelate, and adapts the proposals; a
        second run with all of it fixed gives an unbiased evidence estimate and the particles to go
        on with. Where the particles are enough to know the posterior's shape, they start from a
        reference that pilots have fitted to it (`dcpc.approach.joint`), else from the prior.
        `num_sweeps` sweeps at the posterior follow, the first `num_warmup` of which still adapt.

        Ctrl-C during these finishes the sweep and returns what there is: a posterior that
        `is_partial`, with a warning, and from which `resume` goes on. A second Ctrl-C raises, and
        so does one before: annealing leaves nothing of use, and the engine as it was.

        Args:
            *args: Arguments of the model.
            num_sweeps: Sweeps at the posterior; by default 1,000, or fewer, 300 at least, where all
                latents move jointly, the particles were seen to forget in few sweeps, and
                `num_warmup` is left out too.
            num_warmup: Number of sweeps that adapt; half of them by default.
            keep_every: Keep every n-th of the other sweeps in `posterior.history`; 0 for none. By
                default some 100 of them, at most 64 MiB in all.
            initial_values: Constrained values to start latents from instead of their prior.
            evidence: Whether to spend the second annealing run on an evidence estimate.
            conditional_ess: Conditional ESS, over K, that each temperature step keeps; closer to
                one means more temperatures.
            seed: Seeds this run only; the global random state is left as it was. The result is
                reproducible if no other thread draws from torch's default generator meanwhile.
            progress: Whether to show a progress bar.
            **kwargs: Keyword arguments of the model.

        Raises:
            ModelError, DataError, CertificationError: The model or data cannot be handled.
            DegenerateWeightsError: No particle has positive density.
            OptionError: An option out of range.
            ThreadError: Another thread is in an inference.

        Warns:
            ConvergenceWarning: The posterior may be off; `posterior.warnings` says why, and what to
                do.
        """
        most = MAX_SWEEPS if num_sweeps is None else num_sweeps
        if most < 0 or not 0 <= (num_warmup or 0) <= most:
            raise OptionError(
                f"num_sweeps must be at least 0 and num_warmup between 0 and num_sweeps, got "
                f"num_sweeps={most}, num_warmup={num_warmup}"
            )
        if keep_every is not None and keep_every < 0:
            raise OptionError(f"keep_every must be at least 0, got {keep_every}")
        check_annealing(None, conditional_ess)
        check_model_arguments(self.model, kwargs, "DCPC.run")
        plates = drawn_subsamples(self.model, args, kwargs) if self.parts.subsampled else {}
        if plates:
            model = Subsampled(self.model)
            length = Length(most, _or_half(num_warmup, most), keep_every)
            return self._run_over(model, Drawn(plates, args, kwargs), length, seed, progress)
        with (
            exclusive("DCPC.run"),
            seeded(seed),
            ProgressBar(progress) as bar,
            self._runner.expecting(most, bar.say),
        ):
            problem = self._problem(args, kwargs, thorough=True)
            arrival = approach(
                problem,
                initial_values=initial_values or {},
                estimate_evidence=evidence,
                conditional_ess=conditional_ess,
                finds_blocks=self.finds_blocks,
                bar=bar,
            )
            problem = arrival.problem
            if num_sweeps is None:
                num_sweeps = arrival.num_sweeps if num_warmup is None else most
            num_warmup = _or_half(num_warmup, num_sweeps)
            recorder = Recorder(problem, arrival, num_sweeps, num_warmup, keep_every)
            state = restart_adaptation(arrival.state, problem.parts)
            with self._runner.expecting(num_sweeps, bar.say):  # as `resume` does
                posterior = sweep_to_end(problem, state, recorder, bar, is_seeded=seed is not None)
        return self._keep(posterior.made_by(self, (args, kwargs)))

    def run_over(
        self,
        loader: Iterable[Any],
        *,
        index: str | int | None = None,
        num_sweeps: int = 1000,
        num_warmup: int | None = None,
        keep_every: int | None = None,
        local_sweeps: int = LOCAL_SWEEPS,
        seed: int | None = None,
        progress: bool = True,
    ) -> Posterior:
        """Infers global latents from minibatches, of which each sweep sees one (`sgld`).

        The model takes a minibatch, and tells by `pyro.plate("data", size, subsample=index)` how
        many data there are. Latents outside of that plate move by stochastic-gradient Langevin
        steps (`StochasticLangevin`); those inside, one per datum, are kept from visit to visit and
        move by Metropolis steps that are exact given the global ones. The result is approximate:
        compare with `run` on all the data where that can be done.

        `run` does the same for a model whose plate draws a subsample (`subsample_size=`) of the
        data that it is given.

        Args:
            loader: Gives tuples of the model's arguments, or dictionaries of its keyword arguments;
                minibatches of one size. It is gone through as often as needed.
            index: Position or name of the argument that holds the indices of a minibatch's data;
                needed where there are latents of single data.
            num_sweeps: Minibatches to visit; some hundred epochs.
            num_warmup: Number of sweeps that adapt; half of them by default.
            keep_every: Keep every n-th of the other sweeps; by default 200 of them.
            local_sweeps: Moves of the latents of single data per visit.
            seed: As in `run`; the loader's order is seeded too where it draws from torch.
            progress: Whether to show a progress bar.

        Returns:
            The posterior of the global latents; `local_samples` has those of single data.

        Raises:
            ModelError, DataError, CertificationError: The model or data cannot be handled.
            OptionError: An option out of range, or another algorithm than `sgld`.
            ThreadError: Another thread is in an inference.

        Warns:
            ConvergenceWarning: As `run` does.
        """
        num_warmup = _or_half(num_warmup, num_sweeps)
        length = Length(num_sweeps, num_warmup, keep_every, local_sweeps)
        return self._run_over(self.model, Loaded(loader, index), length, seed, progress)

    def resume(
        self, posterior: Posterior, /, *args: Any, progress: bool = True, **kwargs: Any
    ) -> Posterior:
        """Makes the sweeps that are left of an interrupted run.

        The result is that of a run without the interruption, bit for bit; of one without a seed, if
        nothing else has drawn from torch's generator since. The posterior may come from a file, the
        engine from another process: it has to be made alike.

        Args:
            posterior: What `run` returned when it was interrupted.
            *args: Arguments of the model, those of the interrupted run.
            progress: Whether to show a progress bar.
            **kwargs: Keyword arguments of the model.

        Raises:
            OptionError: The posterior is not partial, or that of another engine.
            DataError: It is that of other arguments or parameters of the model.
            ThreadError: Another thread is in an inference.

        Warns:
            ConvergenceWarning: As `run` does.
        """
        continuation = continuation_of(posterior)
        check_model_arguments(self.model, kwargs, "DCPC.resume")
        random_state = continuation.random_state
        with (
            exclusive("DCPC.resume"),
            continued(random_state),
            ProgressBar(progress) as bar,
            self._runner.expecting(continuation.num_sweeps, bar.say),
        ):
            with random_state_kept():  # blocks are arranged with numbers that the run drew before
                problem = self._problem(args, kwargs, thorough=True)
                if self.finds_blocks:
                    problem = with_blocks_of(problem, posterior)
            check_continuation(problem, posterior.state, continuation)
            recorder = Recorder.resume(problem, posterior)
            posterior = sweep_to_end(
                problem, posterior.state, recorder, bar, is_seeded=bool(random_state)
            )
        return self._keep(posterior.made_by(self, (args, kwargs)))

    def extend(
        self,
        posterior: Posterior,
        /,
        *longer_args: Any,
        num_sweeps: int = NUM_SWEEPS,
        seed: int | None = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> FilteredPosterior:
        """Takes new observations of a chain into a posterior, at a cost that the past does not set.

        A resample-move filter (Gilks & Berzuini 2001; Chopin 2002): at every new step the particles
        draw its latents from their prior, weigh by the density of its observations (the log of the
        mean weight is the increment of `log_evidence`), are resampled as whole paths where their
        ESS is low, and move the latents of the last steps by Metropolis sweeps.

        The model is a loop over time, `for t in pyro.markov(range(len(y)))`, with sites that carry
        the number of their step (`f"x_{t}"`) and steps that are alike; it is run on its last rows
        alone, which is compared with the whole now and then. Initial states and latents that hold
        for all times may be there besides; the latter are reweighted, not moved.

        `posterior.filtered()` describes the newest steps, `posterior.samples` holds whole paths.

        Args:
            posterior: What `run` or `extend` of this engine returned; it stays as it is.
            *longer_args: Arguments of the model: the old data, with new rows after them.
            num_sweeps: Sweeps after each new observation.
            seed: Seeds this call only.
            progress: Whether to show a progress bar, where several observations are new.
            **kwargs: Keyword arguments of the model, likewise.

        Raises:
            OptionError: The posterior is of another engine, from a file, partial or not exact.
            DataError: The arguments are not the old ones with new rows, or cannot be handled.
            ModelError: The model is no chain of steps that are alike.
            DegenerateWeightsError: No particle has positive density.
            ThreadError: Another thread is in an inference.

        Warns:
            ConvergenceWarning: Few particles survive; `posterior.warnings` says why.
        """
        check_posterior(posterior, self)
        require_at_least("num_sweeps", num_sweeps, 0)
        check_model_arguments(self.model, kwargs, "DCPC.extend")
        with exclusive("DCPC.extend"), seeded(seed), ProgressBar(progress) as bar:
            extended = extend(
                posterior,
                (longer_args, kwargs),
                whole=lambda call: self._problem(*call),
                bind=self._window,
                num_sweeps=num_sweeps,
                bar=bar,
            )
        extended.made_by(self, (longer_args, kwargs))
        self._keep(extended, known=posterior.warnings)
        return extended

    def anneal(
        self,
        *args: Any,
        num_temperatures: int | None = None,
        conditional_ess: float = 0.9,
        seed: int | None = None,
        progress: bool = False,
        **kwargs: Any,
    ) -> Annealed:
        """Evidence of the arguments by annealing, and particles at the posterior.

        A pilot adapts the proposals (and chooses the temperatures, unless their number is given);
        the second run, with everything fixed, is the estimate. It starts from where `run` does,
        from the prior where the number of temperatures is given. An adaptive ladder repeats the
        sweeps at each temperature until the particles have decorrelated; with `num_temperatures`
        there is one sweep per temperature. The standard error is infinite where too few of the
        initial particles have descendants to tell.

        Args:
            num_temperatures: Length of a fixed ladder `(t / T)^3`; None to adapt it.
            conditional_ess: Conditional ESS that each step of an adaptive ladder keeps, over K.

        Raises:
            EvidenceError: The correction is not exact, or a prior is improper.
            OptionError: An option out of range.
            ThreadError: Another thread is in an inference.
        """
        check_annealing(num_temperatures, conditional_ess)
        with (
            exclusive("DCPC.anneal"),
            seeded(seed),
            ProgressBar(progress) as bar,
            self._runner.expecting(0, bar.say),
        ):
            problem = self._problem(args, kwargs, thorough=True)
            return anneal_with_evidence(problem, num_temperatures, conditional_ess, bar)

    def get_samples(self) -> Samples:
        """Equally weighted constrained samples of the last run, `(K, *batch, *event)`."""
        return self._last().resample()

    def summary(self, prob: float = 0.9) -> None:
        """Prints a table of the last run's posterior."""
        self._last().summary(prob)

    def diagnostics(self) -> dict[str, dict[str, Any]]:
        """Diagnostics of the last run, by site."""
        return self._last().diagnostics()

    def statistics(self, prob: float = 0.9) -> dict[str, dict[str, Tensor]]:
        """Statistics of the last run, by site: the numbers of its table."""
        return self._last().statistics(prob)

    def __repr__(self) -> str:
        model = getattr(self.model, "__qualname__", type(self.model).__name__)
        guide = "" if self.guide is None else ", guide"
        told = self.blocks if self.blocks == ALL else list(self.blocks)
        blocks = f", blocks={told!r}" if self.blocks else ""
        return (
            f"DCPC({model}{guide}, num_particles={self.num_particles}, "
            f"algorithm={self.algorithm.name!r}{blocks})"
        )

    def _repr_html_(self) -> str:
        parts = [(f.name, str(getattr(self.parts, f.name))) for f in fields(self.parts)]
        return f"<code>{html.escape(repr(self))}</code>{table(['part', ''], parts, 'html')}"

    # -- the functional level, for training --------------------------------------------------

    def bind(self, *args: Any, **kwargs: Any) -> Problem:
        """The model bound to these arguments: what `init`, `sweep` and `loss` work on.

        Divisions are kept by the arguments' shapes and looked up cheaply; whether the data can be
        handled is checked by `Problem.init`.

        Raises:
            ModelError, DataError, CertificationError: The model or data cannot be handled.
        """
        return self._problem(args, kwargs)

    def expecting(
        self, num_sweeps: int, say: Callable[[str], None] = lambda _: None
    ) -> AbstractContextManager[None]:
        """A block of code for a loop of `Problem.sweep`: it is compiled where its length pays.

        Args:
            num_sweeps: Number of sweeps, of arguments of one shape, that are known to come.
            say: Told what takes long.
        """
        return self._runner.expecting(num_sweeps, say)

    def division(self, *args: Any, **kwargs: Any) -> Division:
        """The divided model for arguments of this shape, from a cache."""
        return self.bind(*args, **kwargs).division

    def init(self, *args: Any, **kwargs: Any) -> SweepState:
        """Particles as from `Problem.init`."""
        return self._problem(args, kwargs, thorough=True).init()

    def sweep(
        self, state: SweepState, *args: Any, adapt: bool = True, **kwargs: Any
    ) -> tuple[SweepState, SweepInfo]:
        """A sweep as by `Problem.sweep`."""
        return self.bind(*args, **kwargs).sweep(state, adapt=adapt)

    def loss(self, state: SweepState, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as by `Problem.loss`."""
        return self.bind(*args, **kwargs).loss(state)

    # -- internals ---------------------------------------------------------------------------

    def _problem(self, args: tuple, kwargs: dict, *, thorough: bool = False) -> Problem:
        arguments = Arguments(args, kwargs)
        return Problem(
            self._divisions,
            arguments,
            self.algorithm,
            self.guide,
            thorough=thorough,
            runner=self._runner,
        )

    def _window(self, args: tuple, kwargs: dict) -> Problem:
        """The model bound to the last rows of its data, as it is written."""
        return Problem(self._windows, Arguments(args, kwargs), self.algorithm, thorough=True)

    def _run_over(
        self, model: Model, source: Source, length: Length, seed: int | None, progress: bool
    ) -> Posterior:
        divisions = self._divisions if model is self.model else self._divide(model)

        def bind(minibatch: Minibatch) -> Problem:
            arguments = Arguments(minibatch.args, minibatch.kwargs)
            return Problem(divisions, arguments, self.algorithm)

        with exclusive("DCPC.run"), seeded(seed), ProgressBar(progress) as bar:
            posterior = run_over(bind, source, length, bar)
        return self._keep(posterior)

    def _keep(self, posterior: Posterior, known: Sequence[str] = ()) -> Posterior:
        """Makes it the last one, and warns the caller's caller of what is wrong with it.

        Args:
            known: Warnings that were issued before.
        """
        self._posterior = posterior
        new = tuple(text for text in posterior.warnings if text not in known)
        if new:
            message = format_problems(new)
            warnings.warn(message, ConvergenceWarning, stacklevel=3)
        return posterior

    def _last(self) -> Posterior:
        if self._posterior is None:
            raise OptionError("there is no posterior yet; call run(...) first")
        return self._posterior


def _tuples(blocks: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(block) for block in blocks)


def _or_half(num_warmup: int | None, num_sweeps: int) -> int:
    return num_sweeps // 2 if num_warmup is None else num_warmup


def _require_count(option: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise OptionError(f"{option} must be an integer, got {value!r}")
    if value < 1:
        raise OptionError(f"{option} must be at least 1, got {value}")


__all__ = ["DCPC", "Units"]
