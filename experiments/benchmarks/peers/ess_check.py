"""Whether the effective sample size tells the error of the mean: from many runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from tabulate import tabulate

from experiments.benchmarks.peers import SAMPLERS, Sampled, Task
from experiments.benchmarks.peers.scores import MANY, bulk_ess, by_label, ess_by_chains

HEADER = (
    "sampler",
    "estimator",
    "variance of the mean over seeds, over sd^2 / ESS: mean of the quantities",
    "range",
)


def check_ess(samplers: Sequence[str], task: Task, num_seeds: int) -> str:
    """Ratios of the variance of the posterior mean over seeds to `sd^2 / ESS`, as a table.

    Above one the ESS is too large, below too small. Of n seeds a quantity's ratio is known to
    `sqrt(2 / (n - 1))`: .29 of 24. The quantities of a posterior are not independent.
    """
    lines = []
    for sampler in samplers:
        title = SAMPLERS[sampler].title
        sample = SAMPLERS[sampler].load()
        means, expected = [], defaultdict(list)
        for seed in range(num_seeds):
            sampled = sample(replace(task, seed=seed))
            labelled = by_label(sampled.draws)
            draws = [labelled[name] for name in task.quantities]
            means.append([values.mean() for values in draws])
            for name, estimates in estimated(sampled, task, draws).items():
                variances = [values.var() for values in draws]
                expected[name].append(np.divide(variances, estimates))
        variance = np.var(means, 0, ddof=1)
        for name, variances in expected.items():
            ratios = variance / np.mean(variances, 0)
            span = f"{ratios.min():.2f} to {ratios.max():.2f}"
            lines.append((title, name, f"{ratios.mean():.2f}", span))
            print(*lines[-1], sep=" | ", flush=True)
    return tabulate(lines, HEADER, "github", disable_numparse=True)


def estimated(sampled: Sampled, task: Task, draws: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """ESS of every quantity by estimator; those that do not apply are left out."""
    result = {"ArviZ": [bulk_ess(values) for values in draws]}
    if len(draws[0]) > MANY:
        result["chains' means"] = [ess_by_chains(values) for values in draws]
    if sampled.own_ess:
        own = by_label(sampled.own_ess, axes=0)
        result["DCPC itself"] = [float(own[name]) for name in task.quantities]
    return result
