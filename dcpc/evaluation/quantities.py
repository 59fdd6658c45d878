"""Names, units and meanings of the quantities that are measured on held-out data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dcpc.tables import table

__all__ = [
    "QUANTITIES",
    "Quantity",
    "Result",
    "describe_conditions",
    "format_results",
    "held_out_tag",
    "mean_error",
    "quantity",
    "results",
    "sign_rule",
]

RMSE = "_rmse"
"""Ends the name of the root mean square error of a site whose true values are known."""


@dataclass(frozen=True)
class Quantity:
    """A quantity that is measured on held-out data.

    Args:
        label: Its name in a table.
        unit: Unit of the value and of its standard error.
        meaning: Explanation in a few words.
        places: Decimal places in a table.
        better: Which values are better. Likelihoods and their bounds are losses, minus their
            logarithms, so that `higher` is the exception.
        is_diagnostic: Whether it tells of the inference rather than of the model.
    """

    label: str
    unit: str
    meaning: str
    places: int = 2
    better: Literal["lower", "higher"] = "lower"
    is_diagnostic: bool = False


QUANTITIES = {
    "evidence_nll": Quantity(
        "evidence NLL",
        "nats per datum",
        "by annealing",
    ),
    "reconstruction_cross_entropy": Quantity(
        "reconstruction cross-entropy",
        "nats per datum",
        "of the particle-averaged decoder mean",
    ),
    "reconstruction_mse": Quantity(
        "reconstruction MSE", "per pixel", "of the same, in intensities from 0 to 1", places=4
    ),
    "ess_percent": Quantity(
        "ESS %",
        "percent of the particles",
        "after annealing",
        places=0,
        better="higher",
        is_diagnostic=True,
    ),
    "negative_elbo": Quantity("negative ELBO", "nats per datum", "of the encoder"),
    "importance_weighted_nll": Quantity(
        "importance-weighted NLL",
        "nats per datum",
        "of the encoder",
    ),
    "prior_sample_nll": Quantity(
        "prior-sample NLL",
        "nats per datum",
        "by samples of the prior: far too high",
    ),
    "bits_per_symbol": Quantity(
        "bits per symbol",
        "bits per symbol",
        "the evidence NLL to the base of 2",
        places=4,
    ),
    "prior_sample_bits_per_symbol": Quantity(
        "prior-sample bits per symbol",
        "bits per symbol",
        "the prior-sample NLL likewise",
        places=4,
    ),
    "forward_pass_bits_per_symbol": Quantity(
        "forward-pass bits per symbol",
        "bits per symbol",
        "of the network without noise, every latent at its mean: another model",
        places=4,
    ),
    "completion_cross_entropy": Quantity(
        "completion cross-entropy",
        "nats per datum",
        "of the upper half of an image given its lower half",
    ),
    "completion_mse": Quantity("completion MSE", "per pixel", "of the same", places=4),
    "forecast_mse": Quantity(
        "forecast MSE", "per pixel", "of the last frames given those before", places=4
    ),
    "repeated_frame_mse": Quantity(
        "repeated frame MSE", "per pixel", "of the last frame seen, in their place", places=4
    ),
    "error_percent": Quantity(
        "labels that are wrong", "percent of the data", "of the most probable classes"
    ),
    "expected_calibration_error": Quantity(
        "expected calibration error",
        "probability",
        "confidence against the share that is right",
        places=4,
    ),
    "label_log_loss": Quantity(
        "log loss of labels", "nats per datum", "minus the label's log-probability", places=4
    ),
    "accuracy": Quantity(
        "accuracy", "share of the data", "labels that are right", places=4, better="higher"
    ),
}
"""By name, in the order of a table."""


@dataclass(frozen=True)
class Result:
    """A quantity, measured.

    Attributes:
        quantity: The quantity.
        value: Mean over the held-out data, as a rule.
        standard_error: Standard error of the value; None where it is not known.
    """

    quantity: Quantity
    value: float
    standard_error: float | None = None

    def __str__(self) -> str:
        places = self.quantity.places
        error = self.standard_error
        return f"{self.value:.{places}f}" + ("" if error is None else f" ± {error:.{places}f}")


def quantity(name: str) -> Quantity | None:
    """The quantity of a name; None of an unknown one."""
    if name.endswith(RMSE):
        site = name.removesuffix(RMSE)
        return Quantity(
            f"{site} RMSE", "as the site", "of the posterior mean, against the truth", places=3
        )
    return QUANTITIES.get(name)


def held_out_tag(name: str, group: str = "held_out") -> str:
    """Tag of a measurement in TensorBoard, `group/name`, or `sweep/group_name` of diagnostics.

    TensorBoard sorts groups and tags: what tells of the model comes first.
    """
    kind = quantity(name)
    return f"sweep/{group}_{name}" if kind is not None and kind.is_diagnostic else f"{group}/{name}"


def results(
    measurements: Mapping[str, float], standard_errors: Mapping[str, float] | None = None
) -> dict[str, Result]:
    """Measurements with their standard errors and explanations, in the order of a table.

    Args:
        measurements: Values by name; names that are no quantity are left out.
        standard_errors: Standard errors by the same names, as far as they are known.
    """
    errors = standard_errors or {}
    names = [*(n for n in QUANTITIES if n in measurements), *measurements]
    found = {name: quantity(name) for name in names}
    return {
        name: Result(kind, measurements[name], errors.get(name))
        for name, kind in found.items()
        if kind is not None
    }


def mean_error(values: Tensor) -> float:
    """Standard error of the mean of independent values; NaN of a single one."""
    return float(values.double().std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def describe_conditions(conditions: Mapping[str, float]) -> str:
    """Number of data, and of particles and temperatures of annealing, in words."""
    told = f"{conditions['num_data']:.0f} held-out data"
    if "num_temperatures" in conditions:
        told += (
            f", {conditions['num_particles']:.0f} particles annealed over "
            f"{conditions['num_temperatures']:.0f} temperatures"
        )
    return told


def sign_rule(measured: Mapping[str, Result]) -> str:
    """Which values are better, and what follows the `±`."""
    higher = [r.quantity.label for r in measured.values() if r.quantity.better == "higher"]
    if len(higher) == len(measured):
        rule = "Higher is better"
    else:
        rule = "Lower is better" + (f", except for {', '.join(higher)}" if higher else "")
    nll = "; NLLs are minus log p(x), or bounds above it" if "evidence_nll" in measured else ""
    return f"{rule}{nll}. ±: one standard error over the data."


def format_results(
    measured: Mapping[str, Result],
    conditions: Mapping[str, float],
    style: Literal["plain", "github"] = "plain",
) -> str:
    """A table of results between what was measured on and which values are better.

    Args:
        measured: By name.
        conditions: `num_data`, and `num_particles` and `num_temperatures` where data were annealed.
        style: `plain` for a terminal, `github` for Markdown.
    """
    rows: Sequence[tuple[str, str, str]] = [
        (r.quantity.label, str(r), f"{r.quantity.unit}, {r.quantity.meaning}")
        for r in measured.values()
    ]
    heading, rule = describe_conditions(conditions), sign_rule(measured)
    if style == "github":
        columns = ("quantity", "value", "unit, meaning")
        return f"{heading}\n\n{table(columns, rows, style, [1])}\n\n{rule}"
    lines = [f"  {line}" for line in table((), rows, style).splitlines()]
    return "\n".join([heading, *lines, rule])
