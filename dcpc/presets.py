"""Presets: every relative of DCPC is the same sweep with other parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from dcpc.conquer import (
    MOVES,
    PRECONDITIONERS,
    Covariance,
    Kinetic,
    Langevin,
    Move,
    NoisyMoment,
    Preconditioner,
    SecondMoment,
    StochasticLangevin,
)
from dcpc.divide.graph import SCHEDULES, Schedule
from dcpc.errors import OptionError
from dcpc.parts import Parts
from dcpc.recombine import RESAMPLERS
from dcpc.recombine.correction import (
    CORRECTIONS,
    Correction,
    LocalMetropolis,
    Metropolis,
    Uncorrected,
)

Part = TypeVar("Part")


STOCHASTIC_STEP_SIZE = 1.0
"""Step size, in units of the second moment of noisy scores, of stochastic-gradient moves."""


JOINT_MOVE = Langevin(leapfrog_steps=4, jitter=0.9)
"""Move of all latents at once; the scale of a posterior may vary by as much as the jitter."""

JOINT_ACCEPTANCE = 0.75
"""Acceptance rate that its step size is adapted to."""


@dataclass(frozen=True)
class Preset:
    """A name for a choice of parts.

    Attributes:
        schedule: Order in which units move.
        move: Proposal; a name or an object.
        correction: Correction of the proposal.
        preconditioner: Scale of the proposal; a name or an object.
        single_particle: Whether the method has one particle per datum.
        step_parameters_every_sweep: Whether training steps the parameters after every sweep of
            a batch, instead of once per batch.
        is_stochastic: Whether units that see their children in a subsample only move by stochastic
            gradients.
        warm_starts_every_visit: Whether training draws a datum's particles from the guide at every
            visit, where there is a guide, instead of keeping them.
        source: Where the method comes from.
    """

    schedule: str
    move: str | Move
    correction: str | Correction
    preconditioner: str | Preconditioner
    source: str
    single_particle: bool = False
    step_parameters_every_sweep: bool = False
    warm_starts_every_visit: bool = False
    is_stochastic: bool = False


PRESETS: dict[str, Preset] = {
    "dcpc": Preset(
        "coloured", "langevin", "metropolis", "adapted", "resample-move SMC; exact; the default"
    ),
    "dcpc-smc": Preset(
        "coloured", "langevin", "weight", "adapted", "properly weighted DCPC; exact"
    ),
    "sgld": Preset(
        "global",
        "langevin",
        LocalMetropolis(),
        "adapted",
        "Welling & Teh (2011); global latents by stochastic gradients, local ones by Metropolis",
        is_stochastic=True,
    ),
    "dcpc-paper": Preset(
        "sequential",
        "langevin",
        "resample",
        "particle_variance",
        "Sennesh, Wu & Salvatori (2024), Algorithm 1; its posterior is too narrow",
    ),
    "pgd": Preset("joint", "langevin", "none", "identity", "Kuntz, Lim & Johansen (2023)"),
    "mpgd": Preset("joint", Kinetic(), "none", "identity", "Lim, Kuntz, Power & Johansen (2024)"),
    "lpc": Preset(
        "joint",
        "langevin",
        "none",
        SecondMoment(exponent=0.5),
        "Zahid, Guo & Fountas (2024)",
        warm_starts_every_visit=True,
    ),
    "mcpc": Preset(
        "joint",
        "langevin",
        "none",
        "identity",
        "Oliviers, Bogacz & Meulemans (2024)",
        single_particle=True,
    ),
    "pc": Preset(
        "joint", "gradient", "none", "identity", "Rao & Ballard (1999)", single_particle=True
    ),
    "ipc": Preset(
        "joint",
        "gradient",
        "none",
        "identity",
        "Salvatori et al. (2024)",
        single_particle=True,
        step_parameters_every_sweep=True,
    ),
}
"""The algorithms by name.

`dcpc` is a resample-move sampler: whenever the target changes (temperature, parameters), weights
take the ratio of the densities, whole particles are resampled where the ESS is low, and every
unit moves by Metropolis-adjusted Langevin steps. `dcpc-paper` resamples each unit's values on
their own, as published; on the chain z1 ~ N(0, 1), z2 ~ N(z1, .3^2), x = 2 ~ N(z2, 1) its
posterior variances come out at .2, where .52 is right, and its evidence estimate is no bound.
"""


@dataclass(frozen=True)
class Algorithm:
    """A preset with its parts resolved to objects, as an inference class uses it.

    Attributes:
        name: Name of the preset.
        preset: The preset.
        schedule: Order in which units move.
        parts: Parts of the sweeps.
        joint: Parts that move all latents as one unit, where there are particles enough for it.
    """

    name: str
    preset: Preset
    schedule: Schedule
    parts: Parts
    joint: Parts

    def check(self, one_block: bool) -> None:
        """Checks that the parts go together, by what they say of themselves.

        Args:
            one_block: Whether the latents are declared to be a single block.

        Raises:
            OptionError: They do not.
        """
        parts, correction = self.parts, _name(self.parts.correction, CORRECTIONS)
        if not self.schedule.separates and parts.correction.compares and not one_block:
            raise OptionError(
                f"schedule {_name(self.schedule, SCHEDULES)} moves units that touch at once, which "
                f"correction {correction} does not allow: its ratio is that of one unit. Use "
                "schedule='coloured', or correction='none', or declare all latents one block with "
                "blocks=[(...all latents...)]"
            )
        if parts.correction.compares and not parts.move.is_reversible:
            raise OptionError(
                f"move {_name(parts.move, MOVES)} has no way back, so that correction "
                f"{correction} cannot weigh it; use move='langevin' or correction='none'"
            )
        if parts.correction.needs_density and not parts.move.has_density:
            raise OptionError(
                f"correction {correction} weighs by the density of the proposal, which move "
                f"{parts.move} does not have; use move='langevin' (of one leapfrog step), or "
                "correction='metropolis' or 'weight'"
            )
        if parts.correction.is_exact and parts.preconditioner.uses_current_scores:
            raise OptionError(
                f"preconditioner {_name(parts.preconditioner, PRECONDITIONERS)} depends on the "
                f"particles that it moves, which makes correction {correction} wrong; use "
                "preconditioner='adapted'"
            )


def build_algorithm(
    name: str,
    *,
    schedule: str | Schedule | None = None,
    move: str | Move | None = None,
    correction: str | Correction | None = None,
    preconditioner: str | Preconditioner | None = None,
    resampling: str = "systematic",
    resample_threshold: float = 0.5,
    step_size: float | None = None,
) -> Algorithm:
    """A preset, any part of which may be overridden by name or by object.

    Raises:
        OptionError: An unknown name, or a number out of range.
    """
    preset = lookup("algorithm", name, PRESETS)
    parts = Parts(
        move=_part("move", move or preset.move, MOVES, Move),
        correction=_part("correction", correction or preset.correction, CORRECTIONS, Correction),
        preconditioner=_part(
            "preconditioner",
            preconditioner or preset.preconditioner,
            PRECONDITIONERS,
            Preconditioner,
        ),
        resampler=lookup("resampling", resampling, RESAMPLERS),
        resample_threshold=_in_range("resample_threshold", resample_threshold, 0.0, 1.0),
        step_size=step_size,
    )
    if preset.is_stochastic:
        parts = replace(parts, subsampled=_stochastic_parts(parts))
    if step_size is not None and not 0.0 < step_size < float("inf"):
        raise OptionError(
            f"step_size must be a positive number, got {step_size!r}; leave it out (None) to have "
            "it adapted"
        )
    chosen = schedule or preset.schedule
    resolved = lookup("schedule", chosen, SCHEDULES) if isinstance(chosen, str) else chosen
    if not isinstance(resolved, Schedule):
        raise OptionError(
            f"schedule must be one of {', '.join(SCHEDULES)} or an instance of Schedule, "
            f"got {chosen!r}"
        )
    joint = _joint_parts(parts, move is None, preconditioner is None, correction is None)
    return Algorithm(name, preset, resolved, parts, joint)


def _joint_parts(
    parts: Parts, default_move: bool, default_preconditioner: bool, default_correction: bool
) -> Parts:
    """Parts that move all latents at once, those that the user chose excepted."""
    if default_move and default_preconditioner:
        parts = replace(parts, move=JOINT_MOVE, preconditioner=Covariance())
        if default_correction and isinstance(parts.correction, Metropolis):
            parts = replace(parts, correction=Metropolis(JOINT_ACCEPTANCE))
    return parts


def _stochastic_parts(parts: Parts) -> Parts:
    """Parts of the units whose scores are estimates; their steps are in units of the estimates."""
    return replace(
        parts,
        move=StochasticLangevin(),
        correction=Uncorrected(),
        preconditioner=NoisyMoment(),
        step_size=STOCHASTIC_STEP_SIZE,
    )


def lookup(option: str, name: Any, registry: Mapping[str, Part]) -> Part:
    """An entry of a registry, or an error that lists them."""
    if name not in registry:
        raise OptionError(f"unknown {option} {name!r}; choose one of {', '.join(registry)}")
    return registry[name]


def _part(option: str, part: Any, registry: Mapping[str, type[Part]], base: type[Part]) -> Part:
    if isinstance(part, str):
        lookup(option, part, registry)
        return registry[part]()
    if not isinstance(part, base):
        raise OptionError(
            f"{option} must be one of {', '.join(registry)} or an instance of {base.__name__}, "
            f"got {part!r}"
        )
    return part


def _name(part: Any, registry: Mapping[str, Any]) -> str:
    """Display name of a part: its registry name, else its class name."""
    for name, kind in registry.items():
        if part is kind or type(part) is kind:
            return repr(name)
    return repr(type(part).__name__)


def _in_range(option: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise OptionError(f"{option} must lie in [{low:g}, {high:g}], got {value!r}")
    return value


__all__ = ["JOINT_MOVE", "PRESETS", "Algorithm", "Preset", "build_algorithm", "lookup"]
