"""Convergence of the annealed evidence with the length of the ladder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcpc.divide.model import Model
from dcpc.errors import OptionError, require_at_least
from dcpc.evaluation.batches import (
    BATCH_SIZE,
    batches,
    gradients_allowed,
)
from dcpc.evaluation.evidence.held_out import held_out_inference
from dcpc.inference import DCPC
from dcpc.seeding import derived_seed
from dcpc.tables import table

__all__ = ["Estimate", "Setting", "TemperatureStudy", "temperature_study"]


class Setting(NamedTuple):
    """Budget of an annealing run per datum."""

    num_temperatures: int
    num_particles: int


class Estimate(NamedTuple):
    """A mean over data, in nats, and its standard error; NaN where there is one datum."""

    mean: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.standard_error:.2f}"


@dataclass(frozen=True)
class TemperatureStudy:
    """Evidence NLL of the same data at several settings.

    The log of an unbiased estimate is too low on average (Jensen): the NLL of any ladder is too
    high, in practice by less the longer it is, and it stands still once it can be trusted.

    Attributes:
        evidence_nll: Minus the annealed `log p(x)` in nats, `(N,)`, by setting.
    """

    evidence_nll: Mapping[Setting, Tensor]

    def nll(self, setting: Setting) -> Estimate:
        """Mean evidence NLL over the data; its error is mostly the spread between data."""
        return _estimate(self.evidence_nll[setting])

    def change(self, old: Setting, new: Setting) -> Estimate:
        """Mean of the paired differences, datum by datum, `NLL(new) - NLL(old)`.

        The spread between data cancels; what is left is the noise of the two annealing runs and
        the change itself.
        """
        return _estimate(self.evidence_nll[new] - self.evidence_nll[old])

    def on_more_temperatures(self, setting: Setting) -> Estimate | None:
        """The change on doubling the temperatures; None where that was not run."""
        return self._on(setting, Setting(2 * setting.num_temperatures, setting.num_particles))

    def on_more_particles(self, setting: Setting) -> Estimate | None:
        """The change on doubling the particles; None where that was not run."""
        return self._on(setting, Setting(setting.num_temperatures, 2 * setting.num_particles))

    def format(self) -> str:
        """A Markdown table, in nats per datum."""
        sizes = ("temperatures", "particles")
        header = (*sizes, "evidence NLL", *(f"change on doubling {size}" for size in sizes))
        rows = []
        for setting in self.evidence_nll:
            changes = (self.on_more_temperatures(setting), self.on_more_particles(setting))
            cells = ("" if change is None else f"{change}" for change in changes)
            rows.append([*map(str, setting), f"{self.nll(setting)}", *cells])
        return table(header, rows, "github", right=range(5))

    def _on(self, old: Setting, new: Setting) -> Estimate | None:
        return self.change(old, new) if new in self.evidence_nll else None


def temperature_study(
    model: Model,
    x: Tensor,
    num_temperatures: Sequence[int] = (100, 200, 400),
    num_particles: Sequence[int] = (8, 16, 32),
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    **options: Any,
) -> TemperatureStudy:
    """Anneals the same data with every combination of temperatures and particles.

    Costs `2 num_temperatures` sweeps of `num_particles` particles per datum and combination. The
    global random state is left as it was.

    Args:
        model: The Pyro program.
        x: Data, `(N, *shape)`.
        num_temperatures: Lengths of annealing ladders.
        num_particles: Numbers of particles.
        seed: From it every combination gets a seed of its own, so that their noise is independent.
        batch_size: Data annealed at once.
        **options: Options of `held_out_inference`.

    Raises:
        OptionError: No setting, or an impossible one.
        EvidenceError: The algorithm is not exact, or a prior is improper.
    """
    if not num_temperatures or not num_particles:
        raise OptionError(
            "num_temperatures and num_particles must hold at least one number each, got "
            f"{list(num_temperatures)} and {list(num_particles)}"
        )
    for length in num_temperatures:
        require_at_least("every one of num_temperatures", length, 1)
    nll = {}
    for count in num_particles:
        inference = held_out_inference(model, count, **options)
        for length in num_temperatures:
            nll[Setting(length, count)] = _evidence_nll(inference, x, length, seed, batch_size)
    return TemperatureStudy(nll)


def _evidence_nll(
    inference: DCPC, x: Tensor, num_temperatures: int, seed: int, batch_size: int
) -> Tensor:
    with gradients_allowed():
        parts = [
            inference.anneal(
                part,
                num_temperatures=num_temperatures,
                seed=derived_seed(seed, inference.num_particles, num_temperatures, number),
            ).log_evidence
            for number, part in enumerate(batches(x, batch_size))
        ]
    return -torch.cat(parts)


def _estimate(values: Tensor) -> Estimate:
    count = len(values)
    error = float(values.std()) / math.sqrt(count) if count > 1 else math.nan
    return Estimate(float(values.mean()), error)
