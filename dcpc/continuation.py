"""State of a run so far, as tensors: to judge it by, and to continue it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from dcpc.divide import Division
from dcpc.recombine import take_particles
from dcpc.sweep import SweepInfo, SweepState

__all__ = ["Continuation", "SweepSums"]


@dataclass
class SweepSums:
    """Sums over the sweeps that do not adapt.

    Attributes:
        statistic: By group name, `(n,)`.
        step_size: By group name, `(n,)`.
        bad_scores: By group name, `(n,)`.
        probabilities: By enumerated discrete latent, `(*batch, *event, S)`.
        squared_moves: By latent, mean squared move of a particle, summed over the sweeps,
            `(*batch, *event)`.
        num_bad: Log-densities that were NaN or infinite.
        count: Number of sweeps.
    """

    statistic: dict[str, Tensor] = field(default_factory=dict)
    step_size: dict[str, Tensor] = field(default_factory=dict)
    bad_scores: dict[str, Tensor] = field(default_factory=dict)
    probabilities: dict[str, Tensor] = field(default_factory=dict)
    squared_moves: dict[str, Tensor] = field(default_factory=dict)
    num_bad: int = 0
    count: int = 0

    def copy(self) -> SweepSums:
        """Sums that can be added to apart from these."""
        return replace(
            self,
            statistic=dict(self.statistic),
            step_size=dict(self.step_size),
            bad_scores=dict(self.bad_scores),
            probabilities=dict(self.probabilities),
            squared_moves=dict(self.squared_moves),
        )

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
            (self.probabilities, info.probabilities),
        ):
            for name, value in new.items():
                total[name] = total[name] + value if name in total else value
        self.num_bad += int(info.num_bad)
        self.count += 1

    def mean(self, total: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Averages over the sweeps."""
        return {name: value / self.count for name, value in total.items()}


@dataclass(frozen=True)
class Continuation:
    """State of an interrupted run, besides its particles.

    Attributes:
        num_done: Number of sweeps that were made.
        num_sweeps: Number of sweeps that were asked for.
        num_warmup: Number of these that adapt.
        keep_every: Interval between the sweeps that are kept; 0 for none.
        kept: Unconstrained values of the sweeps that were kept, `(num_kept, K, *batch, *event)` by
            latent.
        sums: Of the sweeps that did not adapt.
        is_chains: Whether nothing was resampled since the warm-up.
        families: As in a posterior, kept whatever it is worth in the end.
        log_joint: Log-density of the particles, `(K, *population)`, by which the model and the data
            are known again.
        random_state: State of the run's own generators by device; empty for a run without a seed,
            which draws from the global ones.
        leapfrog_steps: Leapfrog steps of the moves, where their number was tuned; 0 elsewhere.
    """

    num_done: int
    num_sweeps: int
    num_warmup: int
    keep_every: int
    kept: Mapping[str, Tensor]
    sums: SweepSums
    is_chains: bool
    families: Tensor | None
    log_joint: Tensor
    random_state: Mapping[str, Tensor]
    leapfrog_steps: int = 0

    @property
    def num_left(self) -> int:
        """Number of sweeps that are still to be made."""
        return self.num_sweeps - self.num_done
