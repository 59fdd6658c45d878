"""Whether the effective sample size tells the error of the mean: from many runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tabulate import tabulate

from experiments.benchmarks.peers import SAMPLERS, Task
from experiments.benchmarks.peers.scores import MANY, bulk_ess, by_label, ess_by_chains

ESTIMATORS = {"ArviZ's bulk ESS": bulk_ess, "ESS by chains' means": ess_by_chains}

HEADER = ("sampler", "estimator", "variance over seeds / expected, mean of quantities", "range")


def check_ess(
    samplers: Sequence[str], task: Task, reference: Mapping[str, Any], num_seeds: int
) -> str:
    """Ratios of the variance of the posterior mean over seeds to `sd^2 / ESS`, as a table.

    Above one the ESS is too large, below too small. Of n seeds a quantity's ratio is known to
    `sqrt(2 / (n - 1))`: .29 of 24. The quantities of a posterior are not independent.
    """
    lines = []
    for sampler in samplers:
        sample = SAMPLERS[sampler].load()
        runs = []
        for seed in range(num_seeds):
            draws = by_label(sample(replace(task, seed=seed)).draws)
            runs.append([draws[name] for name in reference["mean"]])
            print(f"{SAMPLERS[sampler].title}: seed {seed} of {num_seeds}", flush=True)
        for title, estimate in ESTIMATORS.items():
            if estimate is ess_by_chains and len(runs[0][0]) <= MANY:
                continue
            ratios = variance_ratios(runs, estimate)
            span = f"{ratios.min():.2f} to {ratios.max():.2f}"
            lines.append((SAMPLERS[sampler].title, title, f"{ratios.mean():.2f}", span))
    return tabulate(lines, HEADER, "github", disable_numparse=True)


def variance_ratios(runs: Sequence[Sequence[np.ndarray]], estimate: Any) -> np.ndarray:
    """The ratio of every quantity, from draws `(chains, draws)` by run and quantity."""
    mean = np.array([[values.mean() for values in run] for run in runs])
    expected = np.array([[values.var() / estimate(values) for values in run] for run in runs])
    return mean.var(0, ddof=1) / expected.mean(0)
