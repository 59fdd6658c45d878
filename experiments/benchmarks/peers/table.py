"""The rows of the comparison as tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from experiments.benchmarks.peers import SAMPLERS
from experiments.benchmarks.peers.sampled import IMPORTS

Row = Mapping[str, Any]

TARGET = 4000
"""Effective draws that a user waits for."""

LARGEST_ERROR = 0.15
SD_RATIOS = (0.85, 1.15)
LARGEST_R_HAT = 1.05

HEADER = (
    "model",
    "sampler",
    "largest error of a mean (sd)",
    "ratios of sd",
    "R-hat",
    "bulk ESS, ArviZ",
    "by chains' means",
    "by DCPC itself",
    "set-up (CPU s)",
    "sampling (CPU s)",
    "ESS per CPU s, with set-up",
    "without",
    f"CPU s to {TARGET:,} effective draws",
    "CPU microseconds per gradient",
)


def agrees(row: Row) -> bool:
    """Whether the draws are those of the reference, by the bounds of its tests."""
    low, high = row["sd_ratios"]
    return (
        row["mean_error"] < LARGEST_ERROR
        and SD_RATIOS[0] < low <= high < SD_RATIOS[1]
        and row["r_hat"] < LARGEST_R_HAT
    )


def counted_ess(row: Row) -> float:
    """The bulk ESS that rates are made of: ArviZ's of few chains.

    Of many short ones it is that by the chains' means, or DCPC's own where that is smaller.
    """
    if row["ess_by_chains"] is None:
        return row["ess"]
    return min(row["ess_by_chains"], row["own_ess"] or math.inf)


def rate(row: Row, *, with_set_up: bool) -> float:
    """Bulk ESS of the worst quantity per CPU second."""
    return counted_ess(row) / (row["sampling"] + with_set_up * row["set_up"])


def seconds_to_target(row: Row) -> float:
    """CPU seconds of the set-up and of as many draws as `TARGET` effective ones take."""
    return row["set_up"] + row["sampling"] * TARGET / counted_ess(row)


def microseconds_per_gradient(row: Row) -> float:
    """CPU microseconds of the sampling per gradient for one chain, all else included."""
    return 1e6 * row["sampling"] / row["num_gradients"] if row["num_gradients"] else math.nan


def number(value: float | None) -> str:
    """Three digits, or nothing."""
    if value is None or math.isnan(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cells(row: Row) -> tuple[str, ...]:
    """A row as strings; in bold where it does not agree with the reference."""
    title = SAMPLERS[row["sampler"]].title
    if "failure" in row:
        return (row["model"], f"**{title}**", row["failure"], *("",) * (len(HEADER) - 3))
    return (
        row["model"],
        title if agrees(row) else f"**{title}**",
        f"{row['mean_error']:.3f}",
        "{:.2f} to {:.2f}".format(*row["sd_ratios"]),
        f"{row['r_hat']:.3f}",
        f"{row['ess']:,.0f} ({row['worst']})",
        number(row["ess_by_chains"]),
        number(row["own_ess"]),
        number(row["set_up"]),
        number(row["sampling"]),
        number(rate(row, with_set_up=True)),
        number(rate(row, with_set_up=False)),
        number(seconds_to_target(row)),
        number(microseconds_per_gradient(row)),
    )


def main_table(rows: Sequence[Row]) -> str:
    """All rows, model by model."""
    return tabulate([cells(row) for row in rows], HEADER, "github", disable_numparse=True)


def ratio_table(rows: Sequence[Row]) -> str:
    """Medians and ranges of DCPC's figures over each sampler's, where both agree."""
    good = {(row["sampler"], row["model"]): row for row in rows if "failure" not in row}
    good = {key: row for key, row in good.items() if agrees(row)}
    measures: list[Callable[[Row], float]] = [
        lambda row: rate(row, with_set_up=True),
        lambda row: rate(row, with_set_up=False),
        lambda row: 1.0 / seconds_to_target(row),
    ]
    lines = []
    for sampler in dict.fromkeys(row["sampler"] for row in rows):
        models = [m for s, m in good if s == sampler and ("dcpc", m) in good]
        if sampler == "dcpc" or not models:
            continue
        line = [SAMPLERS[sampler].title, str(len(models))]
        for measure in measures:
            ratios = [measure(good["dcpc", m]) / measure(good[sampler, m]) for m in models]
            low, high = min(ratios), max(ratios)
            line.append(f"{number(statistics.median(ratios))} ({number(low)} to {number(high)})")
        lines.append(line)
    header = (
        "DCPC over",
        "models where both agree",
        "ESS per CPU s with set-up: median (range)",
        "without",
        f"speed to {TARGET:,} effective draws",
    )
    return tabulate(lines, header, "github", disable_numparse=True)


def stage_table(rows: Sequence[Row], sampler: str) -> str:
    """CPU seconds of a sampler by stage and model."""
    chosen = [row for row in rows if row["sampler"] == sampler and "failure" not in row]
    stages = list(dict.fromkeys(stage for row in chosen for stage in row["stages"]))
    stages = [stage for stage in stages if stage != IMPORTS]
    lines = [
        (row["model"], *(number(row["stages"].get(stage)) for stage in stages)) for row in chosen
    ]
    return tabulate(lines, ("model", *stages), "github", disable_numparse=True)
