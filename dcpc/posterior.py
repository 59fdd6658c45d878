"""A weighted particle posterior: what `DCPC.run` returns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from pyro.ops import stats
from torch import Tensor

from dcpc.errors import DCPCError, EvidenceError
from dcpc.recombine import LogWeights, systematic, take_particles
from dcpc.sweep import SweepState

if TYPE_CHECKING:
    import arviz

Samples = dict[str, Tensor]
MAX_ROWS = 60


@dataclass(frozen=True)
class Evidence:
    """An evidence estimate, or the reason why there is none."""

    log_evidence: Tensor | None = None
    standard_error: Tensor | None = None
    refusal: str = ""


@dataclass(frozen=True)
class Posterior:
    """Weighted particles, with what is known about them.

    Attributes:
        samples: Constrained values of the latents, `(K, *batch, *event)`: the final cloud.
        state: The state of the sampler, to go on from.
        population_axes: For every latent, the axes of its value that are population axes.
        acceptance: By unit, mean acceptance rate (metropolis), or that times the conditional ESS
            over K (weight).
        step_size: Last step size by unit.
        unit_of: Name of each latent's unit.
        num_bad: Log-densities that were NaN or infinite, over all sweeps.
        history: With `keep_every`, constrained values `(K, num_kept, *batch, *event)`: particles
            as chains. Empty otherwise.
        is_chains: Whether each particle of the history is one Markov chain: nothing was resampled
            while it was kept.
        evidence: The evidence estimate or its refusal.
    """

    samples: Samples
    state: SweepState
    population_axes: Mapping[str, tuple[int, ...]]
    acceptance: Mapping[str, float]
    step_size: Mapping[str, float]
    unit_of: Mapping[str, str]
    num_bad: int = 0
    history: Samples = field(default_factory=dict)
    is_chains: bool = False
    evidence: Evidence = field(default_factory=Evidence)

    @property
    def log_weight(self) -> Tensor:
        """Log-weights `(K, *population)`."""
        return self.state.log_weight.log_weight

    @property
    def num_particles(self) -> int:
        """K."""
        return self.state.num_particles

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
        """Standard error of `log_evidence`, `(*population)`."""
        if self.evidence.standard_error is None:
            raise EvidenceError(self.evidence.refusal)
        return self.evidence.standard_error

    def mean(self) -> Samples:
        """Posterior mean of every latent, `(*batch, *event)`."""
        return {name: (self._weights(name) * z).sum(0) for name, z in self.samples.items()}

    def std(self) -> Samples:
        """Posterior standard deviation of every latent, `(*batch, *event)`."""
        mean = self.mean()
        return {
            name: (self._weights(name) * (z - mean[name]).square()).sum(0).sqrt()
            for name, z in self.samples.items()
        }

    def quantile(self, probabilities: Sequence[float]) -> Samples:
        """Weighted quantiles of every latent, `(len(probabilities), *batch, *event)`."""
        result = {}
        for name, z in self.samples.items():
            ordered, order = z.sort(0)
            mass = self._weights(name).expand_as(z).gather(0, order).cumsum(0)
            index = torch.stack([(mass < p).sum(0) for p in probabilities])
            result[name] = ordered.gather(0, index.clamp(max=z.shape[0] - 1))
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

    def diagnostics(self) -> dict[str, dict[str, Any]]:
        """By site: `acceptance`, `step_size`, `ess`, `r_hat`, `mcse`, and the count `num_bad`.

        With a history of chains, `ess` (over all kept draws), split `r_hat` and `mcse` are
        computed from particles as chains; without one, or where particles were resampled on the
        way, `ess` is that of the weights, `mcse` the standard deviation over its square root,
        and `r_hat` NaN.
        """
        std = self.std()
        result: dict[str, dict[str, Any]] = {}
        for name, z in self.samples.items():
            chains = self.history.get(name)
            if self.is_chains and chains is not None and chains.shape[1] >= 4:
                ess = stats.effective_sample_size(chains, chain_dim=0, sample_dim=1)
                r_hat = (
                    stats.split_gelman_rubin(chains, chain_dim=0, sample_dim=1)
                    if chains.shape[0] > 1
                    else torch.full_like(ess, math.nan)
                )
                mcse = chains.flatten(0, 1).std(0) / ess.sqrt()
            else:
                weight_ess = self.ess.reshape(self._weights(name).shape[1:])
                ess = weight_ess.expand(z.shape[1:])
                r_hat = torch.full_like(std[name], math.nan)
                mcse = std[name] / ess.sqrt()
            unit = self.unit_of[name]
            result[name] = {
                "acceptance": self.acceptance.get(unit, math.nan),
                "step_size": self.step_size.get(unit, math.nan),
                "ess": ess,
                "r_hat": r_hat,
                "mcse": mcse,
                "num_bad": self.num_bad,
            }
        return result

    def summary(self, prob: float = 0.9) -> None:
        """Prints mean, standard deviation, median, interval, MCSE, ESS and R-hat of every latent.

        Args:
            prob: Mass of the equal-tailed interval.
        """
        print(self.format_summary(prob))

    def format_summary(self, prob: float = 0.9) -> str:
        """The table that `summary` prints."""
        tail = (1 - prob) / 2
        columns = (
            "mean",
            "std",
            "median",
            f"{tail:.1%}",
            f"{1 - tail:.1%}",
            "mcse",
            "ess",
            "r_hat",
        )
        mean, std = self.mean(), self.std()
        quantiles = self.quantile([0.5, tail, 1 - tail])
        diagnostics = self.diagnostics()
        rows: list[tuple[str, list[float]]] = []
        for name in self.samples:
            about = diagnostics[name]
            values = [mean[name], std[name], *quantiles[name]]
            values += [about["mcse"], about["ess"], about["r_hat"]]
            table = torch.stack([v.double().flatten() for v in values], -1).tolist()
            for index, numbers in zip(_indices(mean[name].shape), table, strict=True):
                rows.append((name + index, numbers))
        width = max(len(label) for label, _ in rows[:MAX_ROWS])
        lines = [" " * width + "".join(f"{column:>11}" for column in columns)]
        lines += [
            f"{label:<{width}}" + "".join(f"{number:>11.4g}" for number in numbers)
            for label, numbers in rows[:MAX_ROWS]
        ]
        if len(rows) > MAX_ROWS:
            lines.append(f"... and {len(rows) - MAX_ROWS} more values")
        lines.append("")
        lines.append(
            f"{self.num_particles} particles, ESS of the weights "
            f"{float(self.ess.mean()) / self.num_particles:.0%}; {self._evidence_line()}"
        )
        if self.num_bad:
            lines.append(f"{self.num_bad} log-densities were NaN or infinite and counted as zero")
        return "\n".join(lines)

    def to_arviz(self) -> arviz.InferenceData:
        """The posterior as ArviZ's `InferenceData`.

        With a history, particles are chains; without, K resampled draws are one chain.

        Raises:
            DCPCError: ArviZ is not installed.
        """
        try:
            import arviz
        except ImportError as error:
            raise DCPCError("to_arviz needs ArviZ; install it with: pip install arviz") from error
        draws = self.history or {name: z[None] for name, z in self.resample().items()}
        return arviz.from_dict(posterior={name: z.cpu().numpy() for name, z in draws.items()})

    def _weights(self, name: str) -> Tensor:
        """Normalised weights, shaped to broadcast against the samples of a latent."""
        weights = self.state.log_weight.normalized()
        z, axes = self.samples[name], self.population_axes[name]
        shape = [z.shape[0]] + [z.shape[axis] if axis in axes else 1 for axis in range(1, z.dim())]
        return weights.reshape(shape)

    def _evidence_line(self) -> str:
        if self.evidence.log_evidence is None:
            return "no evidence estimate"
        if self.evidence.log_evidence.numel() == 1:
            value, error = self.log_evidence.item(), self.log_evidence_se.item()
            return f"log evidence {value:.3f} (standard error {error:.3f})"
        return f"mean log evidence per cell {self.evidence.log_evidence.mean().item():.3f}"


def equal_weights(weights: LogWeights) -> bool:
    """Whether all particles of every cell weigh the same."""
    log_weight = weights.log_weight
    return bool((log_weight == log_weight[:1]).all())


def _indices(shape: torch.Size) -> list[str]:
    if not shape:
        return [""]
    grid = torch.cartesian_prod(*(torch.arange(size) for size in shape)).reshape(-1, len(shape))
    return ["[" + ",".join(map(str, index)) + "]" for index in grid.tolist()]
