"""A weighted particle posterior: what `DCPC.run` returns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcpc import posterior_files
from dcpc.continuation import Continuation
from dcpc.divide.supports.discrete import ONE_HOT, DiscreteSupport
from dcpc.draws import MIN_DRAWS, describe, design_effect, quantiles
from dcpc.errors import EvidenceError, OptionError
from dcpc.inference_data import inference_data
from dcpc.recombine import LogWeights, systematic, take_particles
from dcpc.sweep import SweepState
from dcpc.tables import format_posterior, html_posterior, summarise_posterior

Samples = dict[str, Tensor]


@dataclass(frozen=True)
class Evidence:
    """An evidence estimate, or the reason why there is none.

    Attributes:
        log_evidence: `log Zhat`, `(*population)`.
        standard_error: Its standard error.
        refusal: Why there is none.
        misses_prior_mass: Whether draws of the prior show an evidence that is larger by far.
    """

    log_evidence: Tensor | None = None
    standard_error: Tensor | None = None
    refusal: str = ""
    misses_prior_mass: bool = False


@dataclass(frozen=True)
class Origin:
    """Where a posterior comes from.

    Attributes:
        engine: The `DCPC` that made it.
        call: Positional and keyword arguments of the model.
    """

    engine: Any
    call: tuple[tuple, dict]


@dataclass(frozen=True, repr=False)
class Posterior:
    """Weighted particles, with what is known about them.

    Mean, standard deviation, quantiles, and how well they are known describe the same draws: the
    history of the particles where at least 16 sweeps were kept, else the final weighted particles.

    Attributes:
        samples: Constrained values of the latents and deterministic sites, `(K, *batch, *event)`:
            the final particles.
        state: The state of the sampler, to go on from.
        population_axes: For every site, the axes of its value that are population axes.
        acceptance: By unit, mean acceptance rate (metropolis), or that times the conditional ESS
            over K (weight).
        step_size: Last step size by unit.
        unit_of: Name of each latent's unit.
        joined: By name of a unit of several latents that the run itself has joined, why.
        num_bad: Log-densities that were NaN or infinite, over all sweeps.
        history: Constrained values of the sweeps that were kept, `(K, num_kept, *batch, *event)`.
            Empty if none were.
        is_chains: Whether each particle of the history is one Markov chain: nothing was resampled
            while it was kept.
        evidence: The evidence estimate or its refusal.
        families: Index of the particle in the beginning that each one descends from,
            `(K, *population)`; None where particles were never resampled or are no chains.
        is_exact: Whether the algorithm leaves the posterior invariant.
        warnings: Warnings that `DCPC.run` issued.
        num_masked: By latent, number of values that are masked out: they are no part of the
            posterior, and keep their draws of the prior.
        continuation: Where the run was interrupted, what it needs to go on; else None.
        discrete: Supports of the discrete latents.
        conditional_probabilities: By enumerated discrete latent, the mean over particles and sweeps
            of the conditional probabilities that it was drawn from, as `probabilities` gives them.
        local_samples: Of a run over minibatches, constrained values of the latents of single data,
            `(K, *batch, *event)` with all data on the axis of their plate: the final particles.
        axis_names: By site, names of the plates on the axes `(*batch, *event)` of its values; empty
            ones for axes that are no plates.
    """

    samples: Mapping[str, Tensor]
    state: SweepState
    population_axes: Mapping[str, tuple[int, ...]]
    acceptance: Mapping[str, float]
    step_size: Mapping[str, float]
    unit_of: Mapping[str, str]
    joined: Mapping[str, str] = field(default_factory=dict)
    num_bad: int = 0
    history: Samples = field(default_factory=dict)
    is_chains: bool = False
    evidence: Evidence = field(default_factory=Evidence)
    families: Tensor | None = None
    is_exact: bool = True
    warnings: tuple[str, ...] = ()
    num_masked: Mapping[str, int] = field(default_factory=dict)
    continuation: Continuation | None = None
    discrete: Mapping[str, DiscreteSupport] = field(default_factory=dict)
    conditional_probabilities: Mapping[str, Tensor] = field(default_factory=dict)
    local_samples: Samples = field(default_factory=dict)
    axis_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def found_blocks(self) -> dict[tuple[str, ...], str]:
        """By latents that the run itself has joined to a unit, why."""
        return {
            tuple(name for name, of in self.unit_of.items() if of == unit): reason
            for unit, reason in self.joined.items()
        }

    def extend(self, *longer_args: Any, **options: Any) -> Posterior:
        """Takes in new observations of a chain: `DCPC.extend` of the engine that made this.

        Args:
            *longer_args: Arguments of the model, the old data in front of the new ones.
            **options: Those of `DCPC.extend`, and keyword arguments of the model.

        Raises:
            OptionError: It came from a file, a pickle or another process.
        """
        origin = self.origin
        if origin is None:
            raise OptionError(
                "extend needs the engine and the data that the posterior was made of, which files "
                "and pickles leave out; call run(...) of DCPC(model, ...) on all the data, and "
                "extend what it returns"
            )
        return origin.engine.extend(self, *longer_args, **options)

    @cached_property
    def origin(self) -> Origin | None:
        """The engine and the arguments it was made of; None if it came from a file or a pickle."""
        return None  # until `made_by` notes them: they are no part of what is saved

    def made_by(self, engine: Any, call: tuple[tuple, dict]) -> Posterior:
        """Notes the engine and the call, for `extend`; returns the posterior."""
        vars(self)["origin"] = Origin(engine, call)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without the engine and the arguments."""
        return {name: value for name, value in vars(self).items() if name != "origin"}

    @property
    def is_partial(self) -> bool:
        """Whether the run was interrupted; `DCPC.resume` makes the sweeps that are left."""
        return self.continuation is not None

    def save(self, path: str | Path) -> None:
        """Writes the posterior into a file of plain tensors, for `load`.

        All that it tells is in the file, and nothing of the model. The file is there as a whole or
        as it was, whatever happens meanwhile.

        Args:
            path: The file; its folder is made.

        Raises:
            FileError: The disk is full, or the folder cannot be written to.
        """
        posterior_files.write(self, path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Posterior:
        """Reads a posterior from a file of `save`, bit for bit.

        No pickled code is run. The model is not needed but to sweep on: by an engine that is made
        as the one was, with `resume` or `sweep`.

        Args:
            path: The file.
            device: Where its tensors are to be: the model's device, to sweep on.

        Raises:
            FileError: There is no such file, it is damaged, or it is the file of something else.
        """
        return posterior_files.read(cls, path, device)

    @property
    def log_weight(self) -> Tensor:
        """Log-weights `(K, *population)`."""
        return self.state.log_weight.log_weight

    @property
    def num_particles(self) -> int:
        """K."""
        return self.state.num_particles

    @property
    def num_kept(self) -> int:
        """Number of sweeps in the history."""
        return next(iter(self.history.values())).shape[1] if self.history else 0

    @property
    def describes_history(self) -> bool:
        """Whether moments and their quality are those of the history."""
        return self.num_kept >= MIN_DRAWS

    @property
    def ess(self) -> Tensor:
        """Effective sample size of the weights, `(*population)`, between 1 and K."""
        return self.state.log_weight.ess()

    @property
    def log_evidence(self) -> Tensor:
        """`log Zhat` from annealing (or from a guide's weights), `(*population)`.

        Raises:
            EvidenceError: With the reason, where there is no estimate.
        """
        if self.evidence.log_evidence is None:
            raise EvidenceError(self.evidence.refusal)
        return self.evidence.log_evidence

    @property
    def log_evidence_se(self) -> Tensor:
        """Standard error of `log_evidence`, `(*population)`; infinite where it is not known."""
        if self.evidence.standard_error is None:
            raise EvidenceError(self.evidence.refusal)
        return self.evidence.standard_error

    def mean(self) -> Samples:
        """Posterior mean of every site, `(*batch, *event)`."""
        if self.describes_history:
            return {name: z.flatten(0, 1).mean(0) for name, z in self._kept.items()}
        return {name: (self._weights(name) * z).sum(0) for name, z in self._numbers.items()}

    def std(self) -> Samples:
        """Posterior standard deviation of every site, `(*batch, *event)`."""
        if self.describes_history:
            return {name: z.flatten(0, 1).std(0) for name, z in self._kept.items()}
        mean = self.mean()
        return {
            name: (self._weights(name) * (z - mean[name]).square()).sum(0).sqrt()
            for name, z in self._numbers.items()
        }

    def quantile(self, probabilities: Sequence[float]) -> Samples:
        """Posterior quantiles of every site, `(len(probabilities), *batch, *event)`.

        Weights differ from cell to cell, and Pyro's `weighed_quantile` takes one vector of them.
        """
        if self.describes_history:
            return {
                name: quantiles(self.draws(name), probabilities).reshape(-1, *z.shape[1:])
                for name, z in self._numbers.items()
            }
        result = {}
        for name, z in self._numbers.items():
            ordered, order = z.sort(0)
            mass = self._weights(name).expand_as(z).gather(0, order).cumsum(0)
            index = torch.stack([(mass < p).sum(0) for p in probabilities])
            result[name] = ordered.gather(0, index.clamp(max=z.shape[0] - 1))
        return result

    def probabilities(self, name: str) -> Tensor:
        """Posterior probabilities of a discrete latent's values.

        Of a latent that is enumerated they are the mean of the conditional probabilities that it
        was drawn from, over the particles and the sweeps that were not warm-up (Rao-Blackwell: no
        worse than the frequencies of the draws). Of others they are these frequencies.

        Args:
            name: A discrete latent.

        Returns:
            `(*batch, *event, S)`, which sum to one: of the integers from the support's smallest one
            on; of one-hot vectors `(*batch, S)`, of their entries.

        Raises:
            OptionError: There is no such discrete latent.
        """
        if name not in self.discrete:
            where = "; local_samples has its draws" if name in self.local_samples else ""
            raise OptionError(
                f"probabilities: '{name}' is not a discrete latent; these are "
                f"{list(self.discrete) or 'none'}{where}"
            )
        if name in self.conditional_probabilities:
            return self.conditional_probabilities[name]
        support = self.discrete[name]
        if support.kind == ONE_HOT:
            return self.mean()[name]
        lower = int(support.lower)
        if self.describes_history:
            z = self._kept[name].flatten(0, 1)
            weights = torch.full_like(z, 1.0 / len(z))
        else:
            z = self._numbers[name]
            weights = self._weights(name).expand_as(z)
        index = z.long() - lower
        count = int(index.max()) + 1 if math.isinf(support.num_values) else int(support.num_values)
        shares = [torch.where(index == value, weights, 0.0).sum(0) for value in range(count)]
        return torch.stack(shares, -1)

    def mode(self, name: str) -> Tensor:
        """Most probable value of each element of a discrete latent, from `probabilities`.

        Args:
            name: A discrete latent.

        Returns:
            `(*batch, *event)` integers; of one-hot vectors the index of the one, `(*batch)`.

        Raises:
            OptionError: There is no such discrete latent.
        """
        index = self.probabilities(name).argmax(-1)
        return (
            index if self.discrete[name].kind == ONE_HOT else index + int(self.discrete[name].lower)
        )

    def statistics(self, prob: float = 0.9) -> dict[str, dict[str, Tensor]]:
        """Statistics of every site, all of the same draws.

        Args:
            prob: Mass of the equal-tailed interval.

        Returns:
            By site: `mean`, `std`, `median`, the ends of the interval (named by their
            probabilities, as `5.0%` and `95.0%`), `mcse` (Monte Carlo standard error of the
            mean), `ess_bulk`, `ess_tail` and `r_hat` (rank-normalised; Vehtari et al. 2021), each
            `(*batch, *event)`. Without a history both ESS are that of the weights, over the design
            effect of particles that descend from the same one, and R-hat is NaN.
        """
        if prob not in self._statistics:
            tail = (1 - prob) / 2
            names = {"median": 0.5, f"{tail:.1%}": tail, f"{1 - tail:.1%}": 1 - tail}
            about = self._describe_history if self.describes_history else self._describe_particles
            self._statistics[prob] = about(names)
        return self._statistics[prob]

    def diagnostics(self) -> dict[str, dict[str, Any]]:
        """Diagnostics of the sampler, by site.

        Returns:
            By site: `acceptance` and `step_size` of its unit (NaN for deterministic sites), the
            count `num_bad`, and `ess_bulk` (also as `ess`), `ess_tail`, `r_hat` and `mcse` from
            `statistics()`.
        """
        result: dict[str, dict[str, Any]] = {}
        for name, about in self.statistics().items():
            unit = self.unit_of.get(name, "")
            result[name] = {
                "acceptance": self.acceptance.get(unit, math.nan),
                "step_size": self.step_size.get(unit, math.nan),
                "num_bad": self.num_bad,
                "ess": about["ess_bulk"],
                **{key: about[key] for key in ("ess_bulk", "ess_tail", "r_hat", "mcse")},
            }
        return result

    def resample(self) -> Samples:
        """K equally weighted samples (systematic resampling of whole particles).

        They feed `pyro.infer.Predictive(model, posterior_samples=...)` unchanged.
        """
        ancestors = systematic(self.state.log_weight.normalized())
        return {
            name: take_particles(z, ancestors, self.population_axes[name])
            for name, z in self.samples.items()
        }

    def summary(self, prob: float = 0.9) -> None:
        """Prints a table of every site's `statistics`, and what is wrong with them.

        Args:
            prob: Mass of the equal-tailed interval.
        """
        print(self.format_summary(prob))

    def format_summary(self, prob: float = 0.9) -> str:
        """The text that `summary` prints."""
        return format_posterior(self, prob)

    def __repr__(self) -> str:
        return summarise_posterior(self)

    def _repr_html_(self) -> str:
        return html_posterior(self)

    def to_arviz(
        self,
        *,
        groups: Sequence[str] | None = None,
        num_draws: int | None = 4000,
        num_prior: int = 500,
        coords: Mapping[str, Sequence] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        seed: int = 0,
    ) -> Any:
        """The posterior in ArviZ's groups, for its plots, `az.loo`, `az.compare` and files.

        `posterior`, `sample_stats` (log-joint `lp` in constrained coordinates, and the particle and
        kept sweep of each draw), `log_likelihood`, `posterior_predictive`, `prior`,
        `prior_predictive` and `observed_data`. The groups but for the first two need the model and
        its data: a posterior from a file has them again after `made_by`. Dimensions have the names
        of plates.

        With a history, particles are chains; more than 16 particles are put end to end in four
        chains, whose R-hat and ESS in ArviZ then are those of the cloud (a thousand short chains
        have an R-hat above 1.01 whenever their draws are correlated). Particles that were resampled
        on the way are no chains (`dcpc-smc`): one chain then holds draws in random order, as many
        as the least known value has effective ones. `sample_stats.arrangement` tells.

        Log-likelihoods are those of single elements of observed sites given the latents, discrete
        ones included; masked elements have zero, and are to be left out before `az.loo`. What a
        `pyro.factor` adds is in `lp` only.

        Args:
            groups: Those to make beside `posterior`; None for all that can be made. Those that
                cannot, such as the prior of a flat prior, are named in the attribute `left_out`.
            num_draws: Draws of all chains together, evenly spaced among those that were kept; None
                for all of them. Likelihoods and predictions beyond 256 MiB lower it.
            num_prior: Draws of the prior.
            coords: Labels of dimensions, as in `{"schools": ["A", "B", ...]}`.
            dims: Names of a site's dimensions instead of those of its plates.
            seed: Seed of the predictions; the global random state is left as it was.

        Returns:
            ArviZ's `InferenceData`; with ArviZ 1.0 and later, xarray's `DataTree`.

        Raises:
            DCPCError: ArviZ is not installed.
            OptionError: An unknown group, site or dimension, or labels that are not as many.
            ThreadError: Another thread is in an inference.
        """
        return inference_data(self, groups, num_draws, num_prior, coords or {}, dims or {}, seed)

    def draws(self, name: str) -> Tensor:
        """The history of a site's values, `(n, K, num_kept)` for n values."""
        z = self._kept[name]
        return z.reshape(*z.shape[:2], -1).movedim(2, 0)

    def families_of(self, name: str) -> Tensor | None:
        """Index of each particle's ancestor for each of a site's values, `(n, K)`."""
        if self.families is None:
            return None
        z = self.samples[name]
        families = self._like(name, self.families).expand(z.shape)
        return families.reshape(z.shape[0], -1).T

    @cached_property
    def _numbers(self) -> Samples:
        """The samples as numbers that have moments: deterministic sites may be of other types."""
        return {name: _as_numbers(z) for name, z in self.samples.items()}

    @cached_property
    def _kept(self) -> Samples:
        return {name: _as_numbers(z) for name, z in self.history.items()}

    @cached_property
    def _statistics(self) -> dict[float, dict[str, dict[str, Tensor]]]:
        return {}

    def _describe_history(self, names: Mapping[str, float]) -> dict[str, dict[str, Tensor]]:
        result = {}
        for name, z in self.samples.items():
            families = self.families_of(name) if self.is_chains else None
            about = describe(self.draws(name), list(names.values()), families, self.is_chains)
            tails = dict(zip(names, about.pop("quantiles"), strict=True))
            result[name] = _in_order({**about, **tails}, names, z.shape[1:])
        return result

    def _describe_particles(self, names: Mapping[str, float]) -> dict[str, dict[str, Tensor]]:
        mean, std = self.mean(), self.std()
        tails = self.quantile(list(names.values()))
        result = {}
        for name, z in self._numbers.items():
            weights = self._weights(name).expand(z.shape).reshape(z.shape[0], -1).T
            values = z.reshape(z.shape[0], -1).T
            effect = design_effect(values, self.families_of(name), weights)
            ess = weights.square().sum(1).reciprocal() / effect.to(weights)
            ess = ess.masked_fill((values == values[:, :1]).all(1), math.nan).reshape(z.shape[1:])
            mcse = (std[name] / ess.sqrt()).nan_to_num(nan=0.0)
            about = {"mean": mean[name], "std": std[name], "mcse": mcse}
            about |= {"ess_bulk": ess, "ess_tail": ess, "r_hat": torch.full_like(ess, math.nan)}
            about |= dict(zip(names, tails[name], strict=True))
            result[name] = _in_order(about, names, z.shape[1:])
        return result

    def _weights(self, name: str) -> Tensor:
        """Normalised weights, shaped to broadcast against the samples of a site."""
        return self._like(name, self.state.log_weight.normalized())

    def _like(self, name: str, by_cell: Tensor) -> Tensor:
        """Numbers `(K, *population)`, shaped to broadcast against the samples of a site."""
        z, axes = self.samples[name], self.population_axes[name]
        shape = [z.shape[0]] + [z.shape[axis] if axis in axes else 1 for axis in range(1, z.dim())]
        return by_cell.reshape(shape)


def equal_weights(weights: LogWeights) -> bool:
    """Whether all particles of every cell weigh the same."""
    log_weight = weights.log_weight
    return bool((log_weight == log_weight[:1]).all())


def _in_order(
    about: Mapping[str, Tensor], quantile_names: Mapping[str, float], shape: torch.Size
) -> dict[str, Tensor]:
    columns = ("mean", "std", *quantile_names, "mcse", "ess_bulk", "ess_tail", "r_hat")
    return {column: about[column].reshape(shape) for column in columns}


def _as_numbers(values: Tensor) -> Tensor:
    return values if values.is_floating_point() else values.to(torch.get_default_dtype())
