"""The exchangeable parts of a sweep, and what they learn about a group of units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dcpc.conquer import DualAveraging, Jump, Move, Preconditioner
from dcpc.conquer.jump import mixture_of
from dcpc.divide import Conditional, UnitGroup
from dcpc.recombine import LogWeights, Resampler
from dcpc.recombine.correction import Correction, Metropolis

DEFAULT_STEP_SIZE = 0.01
"""Step size of the corrections that have no target to adapt it to."""


@dataclass(frozen=True)
class Adaptation:
    """Adaptation state of a group of units, as dicts of tensors.

    Attributes:
        preconditioner: What the preconditioner knows.
        step_size: What the step size's rule knows.
        reference: The mixture that values are proposed from besides the move, as from
            `conquer.jump.state_of`; empty for none.
    """

    preconditioner: dict[str, Tensor]
    step_size: dict[str, Tensor]
    reference: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Adaptation:
        """The state on a device."""
        return Adaptation(
            {name: value.to(device) for name, value in self.preconditioner.items()},
            {name: value.to(device) for name, value in self.step_size.items()},
            {name: value.to(device) for name, value in self.reference.items()},
        )


@dataclass(frozen=True)
class Parts:
    """The exchangeable parts of a sweep.

    Attributes:
        move: Proposal.
        correction: Correction of the proposal.
        preconditioner: Scale of the proposal.
        resampler: Resampling scheme.
        resample_threshold: Whole particles are resampled in the population cells where ESS / K
            is below it.
        step_size: Fixed step size, or None for one that is adapted where the correction has a
            target, else the default of 0.01.
        dual_averaging: The rule of adaptation.
        blocks: Parts of units of several latents; None for the same.
        subsampled: Parts of the units whose log-densities are estimated from a subsample; None for
            the same.
    """

    move: Move
    correction: Correction
    preconditioner: Preconditioner
    resampler: Resampler
    resample_threshold: float = 0.5
    step_size: float | None = None
    dual_averaging: DualAveraging = field(default_factory=DualAveraging)
    blocks: Parts | None = None
    subsampled: Parts | None = None

    def of(self, group: UnitGroup) -> Parts:
        """The parts that a group moves by."""
        if self.blocks and any(len(unit.sites) > 1 for unit in group.units):
            return self.blocks
        return self.subsampled if self.subsampled and group.is_subsampled else self

    @property
    def adapts_step_size(self) -> bool:
        """Whether the step size is adapted."""
        return self.step_size is None and self.target is not None

    @property
    def target(self) -> float | None:
        """Value of the correction's statistic that step sizes are adapted to."""
        return self.correction.target_for(self.move)

    def initial_step_size(self, group: UnitGroup) -> float:
        """Before adaptation: `d^(-1/3)`, the scaling of MALA's optimum with dimension."""
        if self.step_size is not None:
            return self.step_size
        return group.size ** (-1.0 / 3.0) if self.adapts_step_size else DEFAULT_STEP_SIZE

    def init_memory(self, latents: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Memory of particles that have not moved yet, by kind and by latent."""
        memory: dict[str, dict[str, Tensor]] = {}
        for name, u in latents.items():
            for kind, value in self.move.init_memory(u).items():
                memory.setdefault(kind, {})[name] = value
        return memory

    def init_adaptation(self, group: UnitGroup, score: Tensor) -> Adaptation:
        """Adaptation state before any sweep.

        Args:
            group: The units.
            score: Any scores `(K, *plates, n, d)` of theirs, for shapes.
        """
        step_size = score.new_full((len(group.units),), self.initial_step_size(group))
        return Adaptation(
            preconditioner=self.preconditioner.init(score, group.population),
            step_size=self.dual_averaging.init(step_size),
        )

    def learn_preconditioner(
        self,
        learned: Adaptation,
        unit: Conditional,
        score: Tensor,
        weights: LogWeights,
    ) -> Adaptation:
        """Adaptation state after seeing the values and the scores of a sweep.

        Args:
            learned: The state before.
            unit: The units' conditionals, at the values.
            score: Their scores `(K, *plates, n, d)`, zero where values are not active.
            weights: The particles' weights.
        """
        group, active = unit.group, unit.active
        if active is not None:
            # The mean of squares over the population's cells becomes one over the active cells.
            share = active.to(score.dtype)
            if group.population:
                share = share.mean(tuple(range(1, 1 + group.population)), keepdim=True)
            score = score / share.clamp(min=1e-12).sqrt()
        state = self.preconditioner.update(learned.preconditioner, score, group.population)
        if self.preconditioner.sees_values:
            mass = weights.log_weight.softmax(0)
            mass = mass.reshape(mass.shape + (1,) * (len(group.plates) - group.population))
            state = self.preconditioner.see_values(state, unit.value, mass)
        return replace(learned, preconditioner=state)

    def learn_step_size(self, learned: Adaptation, statistic: Tensor | None) -> Adaptation:
        """Adaptation state after a sweep in which the correction's statistic `(n,)` was this."""
        if not self.adapts_step_size or statistic is None:
            return learned
        assert self.target is not None
        error = self.target - statistic
        return replace(learned, step_size=self.dual_averaging.update(learned.step_size, error))

    def jumping(self, learned: Adaptation) -> Parts:
        """Parts that propose from the mixture that is known; weights do not move."""
        move = Jump(mixture_of(learned.reference))
        return replace(self, move=move, correction=Metropolis())

    def restart(self, learned: Adaptation) -> Adaptation:
        """Lets the step size adapt anew from where it is: the density has changed."""
        return replace(learned, step_size=self.dual_averaging.restart(learned.step_size))
