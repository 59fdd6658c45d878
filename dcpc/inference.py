"""`DCPC`, the class that users meet."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from tqdm.auto import tqdm

from dcpc import annealing
from dcpc.algorithms import build_algorithm
from dcpc.annealing import Annealed, Rung, anneal, spaced_ladder
from dcpc.conquer import Move, Preconditioner
from dcpc.divide import (
    Arguments,
    Division,
    Reference,
    Target,
    Unit,
    constrained_particles,
    divide,
    prior_particles,
    read_sites,
)
from dcpc.divide.graph import Schedule
from dcpc.divide.model import Model, observation_means, transform_of, unconstrain
from dcpc.divide.program import map_particles, parameter_key
from dcpc.divide.unit import sum_to_plates
from dcpc.errors import DataError, EvidenceError, OptionError
from dcpc.posterior import Evidence, Posterior, Samples, equal_weights
from dcpc.recombine import LogWeights
from dcpc.recombine.correction import Correction
from dcpc.sweep import (
    SweepInfo,
    SweepState,
    loss,
    resample,
    restart_adaptation,
    retarget,
    sweep,
)

MAX_DIVISIONS = 16
"""Divisions kept for different argument shapes; the least recently used one goes first."""

REFERENCE_SCALE = 2.0
"""Spread, in unconstrained space, that latents with flat priors start with."""

INITIAL_SCALE = 1.0
"""Spread, in unconstrained space, around initial values that the user gives."""


class Units(list[Unit]):
    """The units of a model; prints as a table."""

    def __str__(self) -> str:
        header = ("unit", "parents", "children", "blanket", "plates", "size", "support")
        rows = [header] + [
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
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


class DCPC:
    """Divide-and-conquer predictive coding for a static-structure Pyro model.

    The model is divided into complete conditionals, one per latent; each is moved by Langevin
    proposals along its prediction error; importance weights recombine the units into weighted
    particles and an evidence estimate. Sennesh, Wu & Salvatori (2024).

    Example:
        >>> posterior = DCPC(model, num_particles=256).run(y, num_sweeps=500)
        >>> posterior.summary()

    Args:
        model: A Pyro program with continuous latents and a fixed set of sites.
        guide: A Pyro program (encoder, autoguide) over the same latents that the particles are
            drawn from, with proper weights, instead of annealing from the prior.
        num_particles: K.
        algorithm: A preset: `dcpc`, `dcpc-smc`, `dcpc-paper`, `pgd`, `lpc`, `mcpc`, `pc`, `ipc`.
        schedule: `sequential`, `coloured` or `joint`; None for the preset's.
        move: `langevin` or `gradient`, or a `Move`.
        correction: `metropolis`, `weight`, `resample` or `none`, or a `Correction`.
        preconditioner: `adapted`, `dense`, `second_moment`, `identity` or `particle_variance`, or
            a `Preconditioner`.
        step_size: Fixed step size; None adapts it by dual averaging where the correction has a
            target statistic, and is 0.01 elsewhere.
        blocks: Latents to move jointly, as in `[("alpha", "beta")]`.
        resampling: `systematic`, `stratified`, `multinomial` or `residual`.
        resample_threshold: Whole particles are resampled where ESS / K is below it.
        backend: `auto`, `graph`, `vmap` or `loop`.
        certify: Whether divided programs are compared with plain runs of the model.

    Raises:
        OptionError: An unknown name, a value out of range, or parts that do not go together.
    """

    def __init__(
        self,
        model: Model,
        guide: Model | None = None,
        *,
        num_particles: int,
        algorithm: str = "dcpc",
        schedule: str | Schedule | None = None,
        move: str | Move | None = None,
        correction: str | Correction | None = None,
        preconditioner: str | Preconditioner | None = None,
        step_size: float | None = None,
        blocks: Sequence[Sequence[str]] = (),
        resampling: str = "systematic",
        resample_threshold: float = 0.5,
        backend: str = "auto",
        certify: bool = True,
    ) -> None:
        if not callable(model):
            raise OptionError(f"model must be a Pyro program (a callable), got {model!r}")
        if isinstance(num_particles, bool) or not isinstance(num_particles, int):
            raise OptionError(f"num_particles must be an integer, got {num_particles!r}")
        if num_particles < 1:
            raise OptionError(f"num_particles must be at least 1, got {num_particles}")
        self.model = model
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
            one_block=len(blocks) == 1,
        )
        if self.algorithm.preset.single_particle and num_particles != 1:
            raise OptionError(
                f"algorithm {algorithm!r} has one particle per datum, got num_particles="
                f"{num_particles}; use num_particles=1, or algorithm='pgd' for a cloud"
            )
        self.parts = self.algorithm.parts
        self.blocks = tuple(tuple(block) for block in blocks)
        self.backend = backend
        self.certify = certify
        self._divisions: OrderedDict[tuple, Division] = OrderedDict()
        self._posterior: Posterior | None = None

    # -- what users call ---------------------------------------------------------------------

    def units(self, *args: Any, **kwargs: Any) -> Units:
        """The units of the model for these arguments; prints as a table."""
        return Units(self.division(*args, **kwargs).units)

    def run(
        self,
        *args: Any,
        num_sweeps: int = 1000,
        num_warmup: int | None = None,
        keep_every: int = 0,
        initial_values: Mapping[str, Tensor] | None = None,
        evidence: bool = True,
        conditional_ess: float = 0.9,
        seed: int | None = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> Posterior:
        """Infers the posterior of the latents given the arguments.

        The exact algorithms anneal from the prior to the posterior twice: a pilot chooses the
        temperatures and adapts the proposals, then a second run with both fixed gives an unbiased
        evidence estimate and the particles to go on with. `num_sweeps` sweeps at the posterior
        follow, the first `num_warmup` of which still adapt.

        Args:
            *args: Arguments of the model.
            num_sweeps: Sweeps at the posterior.
            num_warmup: How many of them adapt; by default half.
            keep_every: Keep every n-th of the other sweeps in `posterior.history`; 0 for none.
            initial_values: Constrained values to start latents from instead of their prior.
            evidence: Whether to spend the second annealing run on an evidence estimate.
            conditional_ess: Conditional ESS, over K, that each temperature step keeps; closer to
                one means more temperatures.
            seed: Seeds this run only; the global random state is left as it was.
            progress: Whether to show a progress bar.
            **kwargs: Keyword arguments of the model.

        Raises:
            ModelError, DataError, CertificationError: The model or data cannot be handled.
            DegenerateWeightsError: No particle has positive density.
            OptionError: An option out of range.
        """
        num_warmup = num_sweeps // 2 if num_warmup is None else num_warmup
        if num_sweeps < 0 or not 0 <= num_warmup <= num_sweeps:
            raise OptionError(
                f"num_sweeps must be at least 0 and num_warmup between 0 and num_sweeps, got "
                f"num_sweeps={num_sweeps}, num_warmup={num_warmup}"
            )
        if keep_every < 0:
            raise OptionError(f"keep_every must be at least 0, got {keep_every}")
        if not 0.0 < conditional_ess < 1.0:
            raise OptionError(f"conditional_ess must lie in (0, 1), got {conditional_ess!r}")
        with _seeded(seed), _Bar(progress) as bar:
            arguments = Arguments(args, kwargs)
            division = self._divide(arguments)
            state, estimate = self._approach_posterior(
                division, arguments, initial_values or {}, evidence, conditional_ess, bar
            )
            posterior = self._sample(
                division, arguments, state, estimate, num_sweeps, num_warmup, keep_every, bar
            )
        self._posterior = posterior
        return posterior

    def anneal(
        self,
        *args: Any,
        num_temperatures: int | None = None,
        conditional_ess: float = 0.9,
        seed: int | None = None,
        progress: bool = False,
        **kwargs: Any,
    ) -> Annealed:
        """Evidence of the arguments by annealing from the prior, and particles at the posterior.

        A pilot adapts the proposals (and chooses the temperatures, unless their number is given);
        the second run, with everything fixed, is the estimate.

        Args:
            num_temperatures: Length of a fixed ladder `(t / T)^3`; None to adapt it.
            conditional_ess: Of an adaptive ladder.

        Raises:
            EvidenceError: The correction is not exact, or a prior is improper.
        """
        arguments = Arguments(args, kwargs)
        division = self._divide(arguments)
        refusal = self._evidence_refusal(division)
        if refusal:
            raise EvidenceError(refusal)
        ladder = None if num_temperatures is None else spaced_ladder(num_temperatures)
        with _seeded(seed), _Bar(progress) as bar:
            _, annealed = self._anneal_twice(
                division, arguments, {}, {}, ladder, conditional_ess, bar
            )
        return annealed

    def get_samples(self) -> Samples:
        """Equally weighted constrained samples of the last run, `(K, *batch, *event)`."""
        return self._last().resample()

    def summary(self, prob: float = 0.9) -> None:
        """Prints a table of the last run's posterior."""
        self._last().summary(prob)

    def diagnostics(self) -> dict[str, dict[str, Any]]:
        """Diagnostics of the last run, by site."""
        return self._last().diagnostics()

    # -- the functional level, for training --------------------------------------------------

    def division(self, *args: Any, **kwargs: Any) -> Division:
        """The divided model for arguments of this shape, from a cache."""
        return self._divide(Arguments(args, kwargs))

    def init(self, *args: Any, **kwargs: Any) -> SweepState:
        """Particles from the guide, or else the prior, whose weights refer to it."""
        arguments = Arguments(args, kwargs)
        return self._start(self._divide(arguments), arguments, {}, {})

    def sweep(
        self, state: SweepState, *args: Any, adapt: bool = True, **kwargs: Any
    ) -> tuple[SweepState, SweepInfo]:
        """Reweights the particles to the present parameters, then moves every unit once.

        Args:
            state: Particles and weights.
            *args: Arguments of the model.
            adapt: Whether step sizes and preconditioners learn from the sweep.

        Raises:
            DataError: The state's particles do not fit these arguments.
            DegenerateWeightsError: No particle of a population cell has positive density.
        """
        arguments = Arguments(args, kwargs)
        division = self._divide(arguments)
        self._check_state(division, state)
        if self.parts.correction.is_exact:
            state = retarget(division, state, arguments.tensors)
        return sweep(division, state, self.parts, arguments.tensors, adapt=adapt)

    def loss(self, state: SweepState, *args: Any, **kwargs: Any) -> Tensor:
        """`- sum_cells sum_k W_k log p(x, z_k)`: its gradient trains the model's parameters."""
        arguments = Arguments(args, kwargs)
        division = self._divide(arguments)
        self._check_state(division, state)
        return loss(division, state, arguments.tensors)

    def constrain(self, latents: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Samples:
        """Constrained values of unconstrained latents `(K, *batch, *event)`."""
        arguments = Arguments(args, kwargs)
        sites = self._divide(arguments).sites
        return constrained_particles(self.model, sites, arguments, latents)

    def observation_means(self, state: SweepState, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior mean of every observed site's mean: the reconstruction of the data.

        The distributions' means (`fn.mean`) are averaged over the particles by their weights.

        Returns:
            By observed site, `(*batch, *event)`.
        """
        arguments = Arguments(args, kwargs)
        division = self._divide(arguments)
        self._check_state(division, state)
        means = map_particles(
            lambda latents: observation_means(self.model, latents, args, kwargs),
            dict(state.latents),
            division.latents,
        )
        weights = state.log_weight.normalized()
        result = {}
        for name, mean in means.items():
            batch_dims = len(division.sites[name].batch_shape)
            shape = [mean.shape[0]] + [1] * (mean.dim() - 1)
            for plate in division.population:
                shape[1 + batch_dims + plate.dim] = plate.size
            result[name] = (weights.reshape(shape) * mean).sum(0)
        return result

    # -- internals ---------------------------------------------------------------------------

    def _divide(self, arguments: Arguments) -> Division:
        key = (arguments.key, parameter_key(self.model))
        if key in self._divisions:
            self._divisions.move_to_end(key)
            return self._divisions[key]
        args, kwargs = arguments.rebuild(arguments.tensors)
        with torch.random.fork_rng(devices=_cuda_devices()):
            sites = read_sites(self.model, args, kwargs)
            division = divide(
                self.model,
                arguments,
                sites,
                self.num_particles,
                schedule=self.algorithm.schedule,
                blocks=self.blocks,
                backend=self.backend,
                certify=self.certify,
            )
        # The first run may have created parameters, which are part of the key.
        self._divisions[(arguments.key, parameter_key(self.model))] = division
        if len(self._divisions) > MAX_DIVISIONS:
            self._divisions.popitem(last=False)
        return division

    def _start(
        self,
        division: Division,
        arguments: Arguments,
        initial_values: Mapping[str, Tensor],
        references: Mapping[str, Reference],
    ) -> SweepState:
        """Particles from the guide, or from the prior with references in place of some sites."""
        if self.guide is not None and not initial_values:
            return self._start_from_guide(division, arguments)
        sites, tensors = division.sites, arguments.tensors
        latents = prior_particles(self.model, sites, arguments, self.num_particles)
        for name, reference in references.items():
            noise = torch.randn_like(latents[name])
            latents[name] = reference.loc + reference.scale * noise
        with torch.no_grad():
            log_joint = division.log_joint(latents, tensors, Target(0.0, references))
        weights = LogWeights(torch.zeros_like(log_joint))
        return SweepState(latents, weights, log_joint)

    def _start_from_guide(self, division: Division, arguments: Arguments) -> SweepState:
        guide, sites = self.guide, division.sites
        assert guide is not None
        args, kwargs = arguments.rebuild(arguments.tensors)

        def draw(_: Tensor) -> dict[str, Tensor]:
            with torch.no_grad(), pyro.validation_enabled(False):
                trace = pyro.poutine.trace(guide).get_trace(*args, **kwargs)
                trace.compute_log_prob()
            values = {n: trace.nodes[n]["value"] for n in division.latents if n in trace}
            missing = set(division.latents) - set(values)
            if missing:
                raise OptionError(
                    f"the guide does not sample latent site(s) {sorted(missing)}; it samples "
                    f"{list(trace.stochastic_nodes)}"
                )
            with torch.no_grad(), pyro.validation_enabled(False):
                replayed = pyro.poutine.trace(pyro.poutine.replay(self.model, trace))
                model_trace = replayed.get_trace(*args, **kwargs)
            result = {}
            density = []
            for name in division.latents:
                node = model_trace.nodes[name]
                transform = transform_of(node["fn"])
                u = transform.inv(node["value"])
                log_det = transform.log_abs_det_jacobian(u, node["value"])
                result[name] = u
                density.append(_cell_sum(log_det, division, sites[name].batch_shape))
            for node in trace.nodes.values():
                if node["type"] == "sample" and not site_is_subsample(node):
                    density.append(_cell_sum(node["log_prob"], division))
            result["_log_guide"] = torch.stack(torch.broadcast_tensors(*density)).sum(0)
            return result

        guide(*args, **kwargs)
        drawn = map_particles(draw, torch.zeros(self.num_particles), division.latents)
        log_guide = drawn.pop("_log_guide")
        return SweepState(drawn, LogWeights(torch.zeros_like(log_guide)), log_guide)

    def _references(
        self, division: Division, arguments: Arguments, initial_values: Mapping[str, Tensor]
    ) -> dict[str, Reference]:
        """Starting distributions of the latents with flat priors or with initial values."""
        unknown = set(initial_values) - set(division.latents)
        if unknown:
            raise OptionError(
                f"initial_values names {sorted(unknown)}, but the latents are {division.latents}"
            )
        args, kwargs = arguments.rebuild(arguments.tensors)
        given = unconstrain(self.model, initial_values, args, kwargs, set(initial_values))
        references = {name: Reference(u, INITIAL_SCALE) for name, u in given.items()}
        template = prior_particles(self.model, division.sites, arguments, 1)
        for name in division.latents:
            if division.sites[name].is_improper and name not in references:
                centre = torch.zeros_like(template[name][0])
                references[name] = Reference(centre, REFERENCE_SCALE)
        return references

    def _approach_posterior(
        self,
        division: Division,
        arguments: Arguments,
        initial_values: Mapping[str, Tensor],
        evidence: bool,
        conditional_ess: float,
        bar: _Bar,
    ) -> tuple[SweepState, Evidence]:
        """Particles to start sweeping from, and the evidence if there is an estimate."""
        tensors = arguments.tensors
        references = self._references(division, arguments, initial_values)
        refusal = self._evidence_refusal(division)
        if not self.parts.correction.is_exact:
            state = self._start(division, arguments, initial_values, references)
            return state, Evidence(refusal=refusal)
        if self.guide is not None and not initial_values:
            state = self._start(division, arguments, {}, {})
            state = retarget(division, state, tensors)
            error = annealing.genealogical_standard_error(
                state.log_weight, annealing._particle_index(state)
            )
            estimate = Evidence(state.log_weight.log_mean(), error, refusal)
        elif evidence and not refusal:
            _, annealed = self._anneal_twice(
                division, arguments, initial_values, references, None, conditional_ess, bar
            )
            state = annealed.state
            estimate = Evidence(annealed.log_evidence, annealed.log_evidence_se)
        else:
            start = self._start(division, arguments, initial_values, references)
            bar.stage("annealing")
            state = anneal(
                division,
                start,
                self.parts,
                tensors,
                references=references,
                conditional_ess=conditional_ess,
                progress=bar.temperature,
            ).state
            estimate = Evidence(refusal=refusal or "run(..., evidence=False) was asked for")
        state, _ = resample(division, state, self.parts, tensors, always=True)
        return state, estimate

    def _anneal_twice(
        self,
        division: Division,
        arguments: Arguments,
        initial_values: Mapping[str, Tensor],
        references: Mapping[str, Reference],
        ladder: Sequence[Rung] | None,
        conditional_ess: float,
        bar: _Bar,
    ) -> tuple[Annealed, Annealed]:
        results: list[Annealed] = []
        for stage in ("annealing, pilot", "annealing"):
            bar.stage(stage)
            pilot = results[0] if results else None
            results.append(
                anneal(
                    division,
                    self._start(division, arguments, initial_values, references),
                    self.parts,
                    arguments.tensors,
                    ladder=pilot.ladder if pilot else ladder,
                    references=references,
                    conditional_ess=conditional_ess,
                    adapt=pilot is None,
                    progress=bar.temperature,
                )
            )
        return results[0], results[1]

    def _sample(
        self,
        division: Division,
        arguments: Arguments,
        state: SweepState,
        estimate: Evidence,
        num_sweeps: int,
        num_warmup: int,
        keep_every: int,
        bar: _Bar,
    ) -> Posterior:
        """Sweeps at the posterior: first adapting, then frozen."""
        tensors, parts = arguments.tensors, self.parts
        kept: list[dict[str, Tensor]] = []
        totals: dict[str, Tensor] = {}
        num_bad, count, chains = 0, 0, True
        state = restart_adaptation(state, parts)
        info: SweepInfo | None = None
        bar.stage("sweeps", num_sweeps)
        for index in range(num_sweeps):
            adapt = index < num_warmup
            state, info = sweep(
                division,
                state,
                parts,
                tensors,
                adapt=adapt,
                # Step sizes need a while with the preconditioner that they will be used with.
                adapt_preconditioner=index < num_warmup // 2,
            )
            num_bad += info.num_bad
            if not adapt or num_warmup == num_sweeps:
                count += 1
                chains = chains and info.ancestors is None and equal_weights(state.log_weight)
                for name, statistic in info.statistic.items():
                    totals[name] = totals.get(name, 0.0) + statistic
                if keep_every and (index - num_warmup) % keep_every == keep_every - 1:
                    kept.append(self._equally_weighted(division, state, tensors))
            bar.advance(info)
        constrained = constrained_particles(self.model, division.sites, arguments, state.latents)
        means = {name: total / count for name, total in totals.items()}
        return Posterior(
            samples=constrained,
            state=state,
            population_axes={
                name: tuple(
                    1 + len(division.sites[name].batch_shape) + plate.dim
                    for plate in division.population
                )
                for name in division.latents
            },
            acceptance=info.by_unit(division, means) if info else {},
            step_size=info.by_unit(division, info.step_size) if info else {},
            unit_of={name: unit.name for unit in division.units for name in unit.sites},
            num_bad=num_bad,
            history=self._constrain_history(division, arguments, kept),
            is_chains=chains and bool(kept),
            evidence=estimate,
        )

    def _equally_weighted(
        self, division: Division, state: SweepState, tensors: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        if not equal_weights(state.log_weight):
            state, _ = resample(division, state, self.parts, tensors, always=True)
        return state.latents

    def _constrain_history(
        self, division: Division, arguments: Arguments, kept: Sequence[Mapping[str, Tensor]]
    ) -> Samples:
        if not kept:
            return {}
        stacked = {
            name: torch.stack([latents[name] for latents in kept], 1).flatten(0, 1)
            for name in division.latents
        }
        values = constrained_particles(self.model, division.sites, arguments, stacked)
        return {
            name: value.reshape(self.num_particles, len(kept), *value.shape[1:])
            for name, value in values.items()
        }

    def _evidence_refusal(self, division: Division) -> str:
        """Why there is no evidence estimate; empty if there is one."""
        flat = [name for name in division.latents if division.sites[name].is_improper]
        if flat:
            return (
                f"the prior of site(s) {flat} is flat (improper), so that the evidence is defined "
                "only up to an arbitrary factor; give them a proper prior to compare models"
            )
        if not self.parts.correction.is_exact:
            return (
                f"algorithm {self.algorithm.name!r} does not leave the posterior invariant, so it "
                "has no evidence estimate; use DCPC(model, num_particles=...).anneal(...) on the "
                "same model"
            )
        return ""

    def _check_state(self, division: Division, state: SweepState) -> None:
        for name in division.latents:
            expected = (self.num_particles, *division.sites[name].unconstrained_shape)
            got = tuple(state.latents[name].shape) if name in state.latents else None
            if got != expected:
                raise DataError(
                    f"the particles of site '{name}' have shape {got}, but the model's arguments "
                    f"ask for {expected}; a state belongs to the data it was initialised with: "
                    "call init(...) again for data of another shape"
                )

    def _last(self) -> Posterior:
        if self._posterior is None:
            raise OptionError("there is no posterior yet; call run(...) first")
        return self._posterior


def _cell_sum(
    log_prob: Tensor, division: Division, batch_shape: torch.Size | None = None
) -> Tensor:
    """Sums one particle's log-density over all but the population plates."""
    if batch_shape is not None and log_prob.dim() > len(batch_shape):
        log_prob = log_prob.flatten(len(batch_shape)).sum(-1)
    plates = [plate for plate in division.population if -plate.dim <= log_prob.dim()]
    return sum_to_plates(log_prob.unsqueeze(0), plates).squeeze(0)


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Seeds a block of code and leaves the global random state as it was."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=_cuda_devices()):
        torch.manual_seed(seed)
        yield


class _Bar:
    """A progress bar over the stages of a run, silent if asked to be."""

    def __init__(self, show: bool) -> None:
        self._show = show
        self._bar: tqdm | None = None
        self._shown = time.monotonic()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def stage(self, name: str, total: int | None = None) -> None:
        """Starts a stage: annealing by temperature, or a number of sweeps."""
        if self._bar is not None:
            self._bar.close()
        layout = None if total is not None else "{l_bar}{bar}| {n:.3g}/1 [{elapsed}{postfix}]"
        self._bar = tqdm(
            total=1.0 if total is None else total,
            desc=name,
            disable=not self._show,
            bar_format=layout,
        )

    def temperature(self, temperature: float) -> None:
        """The temperature that annealing has reached."""
        assert self._bar is not None
        self._bar.update(temperature - self._bar.n)

    def advance(self, info: SweepInfo) -> None:
        """One sweep is done."""
        assert self._bar is not None
        if self._show and time.monotonic() - self._shown > 0.5:
            self._shown = time.monotonic()
            ess = float(info.ess.mean())
            rates = [float(s.mean()) for s in info.statistic.values()]
            accept = sum(rates) / len(rates) if rates else math.nan
            self._bar.set_postfix_str(f"ess {ess:.0f}, acceptance {accept:.2f}", refresh=False)
        self._bar.update(1)


__all__ = ["DCPC", "Units"]
