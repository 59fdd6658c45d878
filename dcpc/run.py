"""The stages of a run: towards the posterior by annealing, then sweeps at the posterior."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dcpc.annealing import Annealed, Rung, anneal, importance_evidence
from dcpc.conquer import Identity
from dcpc.convergence import SweepRecord, find_problems
from dcpc.divide import Arguments, Division, constrained_particles
from dcpc.divide.model import Model
from dcpc.draws import MIN_DRAWS
from dcpc.initial import draw_from_guide, draw_from_prior, starting_references
from dcpc.posterior import Evidence, Posterior, Samples, equal_weights
from dcpc.progress import ProgressBar
from dcpc.recombine import take_particles
from dcpc.sweep import (
    Parts,
    SweepInfo,
    SweepState,
    resample,
    restart_adaptation,
    retarget,
    sweep,
)

MAX_KEPT = 100
"""Sweeps kept of each particle by default, or as many more as it takes to `MIN_KEPT_DRAWS`."""

MIN_KEPT_DRAWS = 4000
"""Draws to keep by default of few particles."""

MAX_HISTORY_BYTES = 1 << 26
"""Size of a history that is kept by default: 64 MiB."""

NUM_PRIOR_DRAWS = 8192
"""Prior draws that a start elsewhere is compared with."""

MAX_PRIOR_ROUNDS = 64
"""Evaluations of the model that these may take, where there are few particles."""

CONSTRAIN_AT_ONCE = 4096
"""Particles whose constrained values are computed at once."""


@dataclass(frozen=True)
class Start:
    """Particles to start sweeping from.

    Attributes:
        state: Equally weighted particles.
        evidence: The evidence if there is an estimate.
        families: Index of the initial particle that each descends from, `(K, *population)`; None
            where none were resampled.
    """

    state: SweepState
    evidence: Evidence
    families: Tensor | None = None


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
        self, before: SweepState, after: SweepState, info: SweepInfo, division: Division
    ) -> None:
        """Adds up how far particles moved in a sweep, from where their ancestors were."""
        for name, u in after.latents.items():
            start = before.latents[name]
            if info.ancestors is not None:
                start = take_particles(start, info.ancestors, division.population_axes(name))
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
        self.num_bad += info.num_bad
        self.count += 1

    def mean(self, total: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Averages over the sweeps."""
        return {name: value / self.count for name, value in total.items()}


@dataclass(frozen=True)
class Run:
    """One problem on its way to its posterior.

    Attributes:
        model: The Pyro program, with its guide if it has one.
        division: The program divided.
        arguments: Its arguments.
        parts: What sweeps are made of.
        num_particles: K.
        bar: Where progress is shown.
        initial_values: Constrained values to start latents from.
        conditional_ess: What a step of an adaptive ladder keeps, over K.
    """

    model: Model
    guide: Model | None
    division: Division
    arguments: Arguments
    parts: Parts
    num_particles: int
    bar: ProgressBar
    initial_values: Mapping[str, Tensor]
    conditional_ess: float

    @property
    def uses_guide(self) -> bool:
        """Whether particles start from the guide; initial values take precedence over it."""
        return self.guide is not None and not self.initial_values

    def start(self) -> SweepState:
        """Particles where they start, with weights that refer to it."""
        if self.guide is not None and self.uses_guide:
            return draw_from_guide(
                self.model, self.guide, self.division, self.arguments, self.num_particles
            )
        references = starting_references(
            self.model, self.division, self.arguments, self.initial_values
        )
        return draw_from_prior(
            self.model, self.division, self.arguments, self.num_particles, references
        )

    def approach(self, refusal: str, estimate_evidence: bool) -> Start:
        """Particles to start sweeping from, and the evidence if there is an estimate.

        Args:
            refusal: Why there can be no evidence estimate; empty if there can.
            estimate_evidence: Whether to spend a second annealing run on one.
        """
        if not self.parts.correction.is_exact:
            return Start(self.start(), Evidence(refusal=refusal))
        tensors = self.arguments.tensors
        families = None
        if self.uses_guide:
            state = retarget(self.division, self.start(), tensors)
            evidence = Evidence(*importance_evidence(state), refusal)
        elif refusal or not estimate_evidence:
            annealed = self.anneal("annealing")
            state, families = annealed.state, annealed.eve
            evidence = Evidence(refusal=refusal or "run(..., evidence=False) was asked for")
        else:
            annealed = self.anneal_twice()
            state, families = annealed.state, annealed.eve
            evidence = Evidence(annealed.log_evidence, annealed.log_evidence_se)
        if evidence.log_evidence is not None and (self.uses_guide or self.initial_values):
            evidence = replace(evidence, misses_prior_mass=self._prior_finds_more(evidence))
        state, ancestors = resample(self.division, state, self.parts, tensors, always=True)
        return Start(state, evidence, _descended(families, ancestors))

    def _prior_finds_more(self, evidence: Evidence) -> bool:
        """Whether draws of the prior alone show more evidence than a start elsewhere has found.

        A guide or initial values may cover one mode of several, of which their own weights know
        nothing. The mean likelihood of prior draws is an estimate too, and in low dimension a good
        one: less 4 of its standard errors, it must not exceed the other plus 4 of its own.
        """
        assert evidence.log_evidence is not None
        assert evidence.standard_error is not None
        chunks = []
        for _ in range(min(MAX_PRIOR_ROUNDS, math.ceil(NUM_PRIOR_DRAWS / self.num_particles))):
            start = draw_from_prior(
                self.model, self.division, self.arguments, self.num_particles, {}
            )
            with torch.no_grad():
                log_joint = self.division.log_joint(start.latents, self.arguments.tensors)
            chunks.append((log_joint - start.log_joint).nan_to_num(nan=-math.inf).double())
        log_likelihood = torch.cat(chunks)
        largest = log_likelihood.amax(0)
        likelihood = (log_likelihood - largest).exp()
        error = likelihood.std(0) / math.sqrt(len(likelihood))
        lower = (likelihood.mean(0) - 4.0 * error).clamp(min=0.0).log() + largest
        upper = evidence.log_evidence + 4.0 * evidence.standard_error.nan_to_num(posinf=0.0)
        return bool((lower > upper).any())

    def anneal(
        self, stage: str, ladder: Sequence[Rung] | None = None, adapt: bool = True
    ) -> Annealed:
        """Brings particles from the prior (or the references) to the posterior."""
        self.bar.stage(stage)
        references = starting_references(
            self.model, self.division, self.arguments, self.initial_values
        )
        start = draw_from_prior(
            self.model, self.division, self.arguments, self.num_particles, references
        )
        return anneal(
            self.division,
            start,
            self.parts,
            self.arguments.tensors,
            ladder=ladder,
            references=references,
            conditional_ess=self.conditional_ess,
            adapt=adapt,
            progress=self.bar.temperature,
        )

    def anneal_twice(self, ladder: Sequence[Rung] | None = None) -> Annealed:
        """A pilot that adapts, then a run in which nothing does and `Zhat` is unbiased."""
        pilot = self.anneal("annealing, pilot", ladder)
        return self.anneal("annealing", pilot.ladder, adapt=False)

    def sample(
        self, start: Start, num_sweeps: int, num_warmup: int, keep_every: int | None
    ) -> Posterior:
        """Sweeps at the posterior: first adapting, then frozen.

        Args:
            start: Particles.
            num_sweeps: Sweeps.
            num_warmup: How many of them adapt.
            keep_every: Every how many of the others are kept; 0 for none, None to choose.
        """
        division, tensors = self.division, self.arguments.tensors
        state = restart_adaptation(start.state, self.parts)
        families = start.families
        if keep_every is None:
            keep_every = self._thinning(state, num_sweeps - num_warmup)
        frozen = _Frozen()
        kept: list[dict[str, Tensor]] = []
        is_chains, num_bad = True, 0
        self.bar.stage("sweeps", num_sweeps)
        for index in range(num_sweeps):
            adapt = index < num_warmup
            before = state
            state, info = sweep(
                division,
                state,
                self.parts,
                tensors,
                adapt=adapt,
                # Step sizes need a while with the preconditioner that they will be used with.
                adapt_preconditioner=index < num_warmup // 2,
            )
            num_bad += info.num_bad
            families = _descended(families, info.ancestors)
            if not adapt:
                frozen.follow(before, state, info, division)
                is_chains = is_chains and info.ancestors is None
                if keep_every and (index - num_warmup) % keep_every == keep_every - 1:
                    is_chains = is_chains and equal_weights(state.log_weight)
                    kept.append(self._equally_weighted(state).latents)
            if not adapt or index == num_sweeps - 1:
                frozen.add(info)
            self.bar.advance(info)
        posterior = Posterior(
            samples=self._constrain(state.latents),
            state=state,
            population_axes=division.value_axes(),
            acceptance=division.by_unit(frozen.mean(frozen.statistic)),
            step_size=division.by_unit(frozen.mean(frozen.step_size)),
            unit_of={name: unit.name for unit in division.units for name in unit.sites},
            num_bad=num_bad,
            history=self._constrain_history(kept),
            is_chains=is_chains and bool(kept),
            evidence=start.evidence,
            # Where whole particles are resampled on the way, the cloud's series of means tells.
            families=families if is_chains or len(kept) < MIN_DRAWS else None,
            is_exact=self.parts.correction.is_exact,
        )
        record = self._record(num_sweeps, frozen, state, is_chains)
        return replace(posterior, warnings=find_problems(posterior, record))

    def _thinning(self, state: SweepState, num_sweeps: int) -> int:
        """How often to keep a sweep, for a history that is long enough, and small enough."""
        if num_sweeps == 0:
            return 0
        size = sum(z.numel() * z.element_size() for z in self._constrain(state.latents).values())
        most = max(MAX_KEPT, MIN_KEPT_DRAWS // self.num_particles)
        most = min(most, MAX_HISTORY_BYTES // size)
        return math.ceil(num_sweeps / most) if most else 0

    def _record(
        self, num_sweeps: int, frozen: _Frozen, state: SweepState, is_chains: bool
    ) -> SweepRecord:
        """How the sweeps went, for the judgement of the posterior."""
        units = self.division.units
        moved = sum(math.prod(plate.size for plate in unit.plates) for unit in units)
        proposals = self.num_particles * moved * max(frozen.count, 1)
        return SweepRecord(
            num_sweeps=num_sweeps,
            target=self.parts.correction.target,
            sizes={unit.name: unit.size for unit in units},
            adapts_step_size=self.parts.adapts_step_size,
            is_preconditioned=not isinstance(self.parts.preconditioner, Identity),
            is_random=self.parts.move.is_reversible,
            bad_share=frozen.num_bad / proposals,
            undefined=self._undefined(state) if frozen.num_bad else (),
            # Particles that are no chains share ancestors that their series may not show.
            forgotten={} if is_chains else frozen.forgotten(state),
            bad_scores=self.division.by_unit(frozen.bad_scores),
            active=self.division.activity(self.arguments.tensors).latents,
        )

    def _undefined(self, state: SweepState) -> list[str]:
        """Sites whose log-density is NaN or plus infinity where a latent is moved by about its sd.

        Minus infinity is none of these: hard edges (a uniform likelihood) are part of some models.
        """
        found: set[str] = set()
        with torch.no_grad():
            for name, u in state.latents.items():
                moved = u + 0.7 * (u.roll(1, 0) - u.roll(2, 0))
                factors = self.division.log_factors(
                    {**state.latents, name: moved}, self.arguments.tensors
                )
                found |= {
                    n for n, f in factors.items() if bool((f.isnan() | (f == math.inf)).any())
                }
        return sorted(found)

    def _equally_weighted(self, state: SweepState) -> SweepState:
        if equal_weights(state.log_weight):
            return state
        return resample(self.division, state, self.parts, self.arguments.tensors, always=True)[0]

    def _constrain(self, latents: Mapping[str, Tensor]) -> Samples:
        values = constrained_particles(self.model, self.arguments, latents)
        return {name: values[name] for name in self.division.value_axes()}

    def _constrain_history(self, kept: Sequence[Mapping[str, Tensor]]) -> Samples:
        """Values `(K, num_kept, *batch, *event)` of the clouds that were kept."""
        step = max(1, CONSTRAIN_AT_ONCE // self.num_particles)
        parts: list[Samples] = []
        for first in range(0, len(kept), step):
            clouds = kept[first : first + step]
            stacked = {
                name: torch.stack([latents[name] for latents in clouds], 1).flatten(0, 1)
                for name in self.division.latents
            }
            shape = (self.num_particles, len(clouds))
            values = self._constrain(stacked)
            parts.append({name: value.unflatten(0, shape) for name, value in values.items()})
        names = parts[0] if parts else ()
        return {name: torch.cat([part[name] for part in parts], 1) for name in names}


def _descended(families: Tensor | None, ancestors: Tensor | None) -> Tensor | None:
    """Families after whole particles were resampled; the ancestors' own where there were none."""
    if ancestors is None or families is None:
        return ancestors if families is None else families
    return take_particles(families, ancestors, tuple(range(1, families.dim())))
