"""The stages of a run: towards the posterior by annealing, then sweeps at the posterior."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dcpc.annealing import Annealed, Rung, anneal, importance_evidence
from dcpc.divide import Arguments, Division, constrained_particles
from dcpc.divide.model import Model
from dcpc.initial import draw_from_guide, draw_from_prior, starting_references
from dcpc.posterior import Evidence, Posterior, Samples, equal_weights
from dcpc.progress import ProgressBar
from dcpc.sweep import (
    Parts,
    SweepInfo,
    SweepState,
    resample,
    restart_adaptation,
    retarget,
    sweep,
)


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

    def approach(self, refusal: str, estimate_evidence: bool) -> tuple[SweepState, Evidence]:
        """Particles to start sweeping from, and the evidence if there is an estimate.

        Args:
            refusal: Why there can be no evidence estimate; empty if there can.
            estimate_evidence: Whether to spend a second annealing run on one.
        """
        if not self.parts.correction.is_exact:
            return self.start(), Evidence(refusal=refusal)
        tensors = self.arguments.tensors
        if self.uses_guide:
            state = retarget(self.division, self.start(), tensors)
            evidence = Evidence(*importance_evidence(state), refusal)
        elif refusal or not estimate_evidence:
            state = self.anneal("annealing").state
            evidence = Evidence(refusal=refusal or "run(..., evidence=False) was asked for")
        else:
            annealed = self.anneal_twice()
            state = annealed.state
            evidence = Evidence(annealed.log_evidence, annealed.log_evidence_se)
        state, _ = resample(self.division, state, self.parts, tensors, always=True)
        return state, evidence

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
        self,
        state: SweepState,
        evidence: Evidence,
        num_sweeps: int,
        num_warmup: int,
        keep_every: int,
    ) -> Posterior:
        """Sweeps at the posterior: first adapting, then frozen."""
        division, tensors = self.division, self.arguments.tensors
        state = restart_adaptation(state, self.parts)
        frozen: list[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]] = []
        kept: list[dict[str, Tensor]] = []
        is_chains, num_bad = True, 0
        info: SweepInfo | None = None
        self.bar.stage("sweeps", num_sweeps)
        for index in range(num_sweeps):
            adapt = index < num_warmup
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
            if not adapt:
                frozen.append((info.statistic, info.step_size))
                is_chains = is_chains and info.ancestors is None
                if keep_every and (index - num_warmup) % keep_every == keep_every - 1:
                    is_chains = is_chains and equal_weights(state.log_weight)
                    kept.append(self._equally_weighted(state).latents)
            self.bar.advance(info)
        about = frozen or ([(info.statistic, info.step_size)] if info else [])
        return Posterior(
            samples=self._constrain(state.latents),
            state=state,
            population_axes=division.value_axes(),
            acceptance=division.by_unit(_mean([statistic for statistic, _ in about])),
            step_size=division.by_unit(_mean([step_size for _, step_size in about])),
            unit_of={name: unit.name for unit in division.units for name in unit.sites},
            num_bad=num_bad,
            history=self._constrain_history(kept),
            is_chains=is_chains and bool(kept),
            evidence=evidence,
        )

    def _equally_weighted(self, state: SweepState) -> SweepState:
        if equal_weights(state.log_weight):
            return state
        return resample(self.division, state, self.parts, self.arguments.tensors, always=True)[0]

    def _constrain(self, latents: Mapping[str, Tensor]) -> Samples:
        values = constrained_particles(self.model, self.arguments, latents)
        return {name: values[name] for name in self.division.value_axes()}

    def _constrain_history(self, kept: Sequence[Mapping[str, Tensor]]) -> Samples:
        if not kept:
            return {}
        names = self.division.latents
        stacked = {
            name: torch.stack([latents[name] for latents in kept], 1).flatten(0, 1)
            for name in names
        }
        shape = (self.num_particles, len(kept))
        return {name: value.unflatten(0, shape) for name, value in self._constrain(stacked).items()}


def _mean(entries: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Averages tensors by name over sweeps."""
    names = entries[0] if entries else ()
    return {name: torch.stack([entry[name] for entry in entries]).mean(0) for name in names}
