"""The density that particles are moved on: a divided model, its data, and a temperature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dcpc.divide.discrete_unit import DiscreteGroup
from dcpc.divide.division import Division
from dcpc.divide.joint_reference import JointReference
from dcpc.divide.model import Latents
from dcpc.divide.program import Factors
from dcpc.divide.tempering import POSTERIOR, Reference, Tempering
from dcpc.divide.unit import ScoredDensity, UnitGroup, credible, sum_terms


@dataclass(frozen=True)
class Density:
    """The unnormalised density of a model's latents given its data, `p(z) p(x | z)^beta`.

    Attributes:
        division: The divided model.
        tensors: Tensors among the model's arguments.
        tempering: The temperature, and the distributions that replace priors.
    """

    division: Division
    tensors: tuple[Tensor, ...]
    tempering: Tempering = POSTERIOR

    def at(self, temperature: float, references: Mapping[str, Reference] | None = None) -> Density:
        """The density at another temperature; with other references, if they are given."""
        if references is not None:
            return replace(self, tempering=Tempering(temperature, references))
        return replace(self, tempering=replace(self.tempering, temperature=temperature))

    def starting_from(self, joint: JointReference) -> Density:
        """The density with a joint reference of all latents, which are one unit."""
        return replace(self, tempering=Tempering(joint=joint))

    def log_factors(self, latents: Latents) -> Factors:
        """Tempered log-factors of all sites at `K` particles, each `(K, *batch_shape)`."""
        return self.division.in_batches(self._log_factors, latents)

    def log_joint(self, latents: Latents) -> Tensor:
        """Log-density by population cell, `(K, *population)`, without gradients.

        Where the population plate subsamples, a cell's density is that of its own datum.
        """
        with torch.no_grad():
            return self.division.in_batches(
                lambda batch: credible(
                    self._by_cell(self.division.log_factors(batch, self.tensors), batch)
                ),
                latents,
            )

    def learnable_log_joint(self, latents: Latents) -> Tensor:
        """Log-density `(K, *population)` whose gradient reaches the model's parameters.

        Where the population plate subsamples, a cell's density counts for the whole dataset.
        Particles that are evaluated in batches are evaluated again in the backward pass.
        """
        return self.division.in_batches(
            lambda batch: self.division.over_population(self._log_factors(batch), scaled=True),
            latents,
            recompute=True,
        )

    def slope(self, latents: Latents) -> Tensor:
        """Derivative of the log-density in the temperature, `(K, *population)`.

        The log-likelihood, plus the log-ratio of prior to reference of latents that have one.
        """
        ends = self.at(0.0), self.at(1.0)

        def difference(batch: Latents) -> Tensor:
            factors = self.division.log_factors(batch, self.tensors)
            start, end = (density._by_cell(factors, batch) for density in ends)
            return end - start

        with torch.no_grad():
            return self.division.in_batches(difference, latents)

    def evaluate_leading(self, latents: Latents) -> tuple[dict[str, ScoredDensity], Tensor]:
        """The groups that move first, evaluated where they are, and the log-density of everything.

        Their log-densities are parts of it, which spares a pass through the model.

        Returns:
            Evaluations by group name, and `(K, *population)` as from `log_joint`.
        """
        evaluations = {}
        log_joint = torch.zeros((), device=next(iter(latents.values())).device)
        for group in self.division.groups[: self.division.num_leading]:
            evaluation = group.evaluate(group.pack(latents), latents, self.tensors, self.tempering)
            evaluations[group.name] = evaluation
            log_joint = log_joint + group.over_population(evaluation.log_density)
        if self.division.has_rest:
            with torch.no_grad():
                log_joint = log_joint + self.division.in_batches(self._log_rest, latents)
        return evaluations, log_joint

    def conditional(
        self, group: UnitGroup, latents: Latents, active: Tensor | None = None
    ) -> Conditional:
        """The complete conditionals of a group of units, with the other latents where they are."""
        return Conditional(self, group, latents, active)

    def active_values(self) -> dict[str, Tensor]:
        """By name of a group, which values the data make a part of the density.

        Boolean `(1, *plates, n, d)`; groups that are all active are left out.
        """
        return self.division.activity(self.tensors).groups

    def active_latents(self) -> dict[str, Tensor]:
        """By latent, which values the data make a part of the density, `(*batch, *event)`.

        Latents that are all active are left out; those that are summed out are not.
        """
        active = self.division.activity(self.tensors).latents
        whole = self.division.completion
        if whole is None:
            return active
        of_summed_out = whole.activity(self.tensors).latents
        return active | {n: v for n, v in of_summed_out.items() if n in self.division.summed_out}

    def without_prior(self) -> list[str]:
        """Latents whose prior is flat, scaled or masked: it cannot be sampled or integrated."""
        sites, activity = self.division.sites, self.division.activity(self.tensors)
        return [
            name
            for name in self.division.latents
            if sites[name].is_improper
            or name in activity.flat
            or (sites[name].is_rescaled and activity.has_active(name))
        ]

    def _by_cell(self, factors: Factors, batch: Latents) -> Tensor:
        """Log-density `(K, *population)` of one batch of particles, from the model's factors."""
        total = self.division.over_population(self._temper(factors, batch))
        if not self.tempering.starts_jointly:
            return total
        (group,) = self.division.groups
        start = group.log_reference(self.tempering, group.pack(batch), factors)
        return total + group.over_population(self.tempering.bridge(start).unsqueeze(-1))

    def _log_factors(self, batch: Latents) -> Factors:
        return self._temper(self.division.log_factors(batch, self.tensors), batch)

    def _log_rest(self, batch: Latents) -> Tensor:
        """Log-density of what the groups that move first do not touch."""
        rest = self.division.log_factors_apart_from_leading(batch, self.tensors)
        return self.division.over_population(self._temper(rest, batch))

    def _temper(self, factors: Factors, latents: Latents) -> Factors:
        return self.tempering.weigh(factors, latents, self.division.sites)


@dataclass(frozen=True)
class Conditional:
    """Complete conditionals of a group of units, as functions of the group's packed values.

    Attributes:
        density: The density that they belong to.
        group: The units.
        latents: All latents; the group's own are replaced by the values that are asked about.
        active: Which values are a part of the density, `(1, *plates, n, d)`; None for all.
    """

    density: Density
    group: UnitGroup
    latents: Latents
    active: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """The group's present values `(K, *plates, n, d)`."""
        return self.group.pack(self.latents)

    def log_density(self, value: Tensor) -> Tensor:
        """Log-densities `(K, *plates, n)`, without gradients."""
        with torch.no_grad():
            return self.group.log_density(
                value, self.latents, self.density.tensors, self.density.tempering
            )

    def log_terms(self, values: Tensor) -> list[dict[str, Tensor]]:
        """Terms of discrete units' log-densities at several values `(S, K, *plates, n, d)`.

        Returns:
            By unit and site, `(S, K, *plates)`.
        """
        assert isinstance(self.group, DiscreteGroup)
        terms = self.group.log_terms_at(
            values, self.latents, self.density.tensors, self.density.tempering
        )
        return [{name: value.to(values.dtype) for name, value in term.items()} for term in terms]

    def log_densities(self, values: Tensor) -> Tensor:
        """Log-densities `(S, K, *plates, n)` of discrete units at several values."""
        return torch.stack([sum_terms(term.values()) for term in self.log_terms(values)], -1)

    def evaluate_raw(self, value: Tensor) -> ScoredDensity:
        """Log-densities and scores as they are, NaN and infinite ones included."""
        return self.group.evaluate(
            value, self.latents, self.density.tensors, self.density.tempering
        )

    def evaluate(self, value: Tensor) -> ScoredDensity:
        """Log-densities and scores to move along."""
        return self.usable(self.evaluate_raw(value))

    def score(self, value: Tensor) -> Tensor:
        """Scores to move along, `(K, *plates, n, d)`."""
        return self.evaluate(value).score

    def usable(self, evaluation: ScoredDensity) -> ScoredDensity:
        """The evaluation with zero in the place of scores that nothing moves along.

        Those that are NaN or infinite, at both ends of a move alike, so that it stays reversible
        where only the score is bad; and those of inactive values, of which a reference
        distribution may have one: they stay, and must not count in the ratio of a move.
        """
        score = evaluation.score.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        if self.active is not None:
            score = torch.where(self.active, score, 0.0)
        return replace(evaluation, score=score)
