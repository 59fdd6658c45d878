"""How good draws are: agreement with reference moments, R-hat and effective sample size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import arviz as az
import numpy as np
import torch

from dcpc.draws import r_hat as superchain_r_hat
from dcpc.draws import rank_normalised

MANY = 16
"""Chains above which they are many and short: R-hat is that of superchains."""


@dataclass(frozen=True)
class Score:
    """Quality of the draws of some quantities: of the worst of them, if nothing else is said.

    Attributes:
        mean_error: Largest difference of a mean from the reference's, in its standard deviations.
        sd_ratios: Smallest and largest ratio of a standard deviation to the reference's.
        r_hat: Largest R-hat.
        ess: Smallest bulk ESS by ArviZ.
        ess_by_chains: The same by the spread of the chains' means; None of few chains.
        worst: The quantity with the smallest ESS.
    """

    mean_error: float
    sd_ratios: tuple[float, float]
    r_hat: float
    ess: float
    ess_by_chains: float | None
    worst: str


def by_label(draws: Mapping[str, np.ndarray], axes: int = 2) -> dict[str, np.ndarray]:
    """Draws `(chains, draws)` by Stan's names, `beta[1]` and so on.

    Args:
        draws: By site, `(chains, draws, *batch, *event)`.
        axes: Number of axes to keep, of other arrays than draws.
    """
    result = {}
    for name, values in draws.items():
        if values.ndim == axes:
            result[name] = values
        else:
            flat = values.reshape(*values.shape[:axes], -1)
            result |= {f"{name}[{i + 1}]": flat[..., i] for i in range(flat.shape[-1])}
    return result


def score(draws: Mapping[str, np.ndarray], reference: Mapping[str, Any]) -> Score:
    """Scores draws `(chains, draws, ...)` by site on the quantities of a reference."""
    labelled = by_label(draws)
    quantities = {name: labelled[name] for name in reference["mean"]}
    errors, ratios = [], []
    for name, values in quantities.items():
        mean, sd = reference["mean"][name], reference["sd"][name]
        errors.append(abs(float(values.mean()) - mean) / sd)
        ratios.append(float(values.std()) / sd)
    is_many = len(next(iter(quantities.values()))) > MANY
    ess = {name: bulk_ess(values) for name, values in quantities.items()}
    worst = min(ess, key=ess.__getitem__)
    return Score(
        max(errors),
        (min(ratios), max(ratios)),
        max(r_hat(values) for values in quantities.values()),
        ess[worst],
        min(map(ess_by_chains, quantities.values())) if is_many else None,
        worst,
    )


def bulk_ess(draws: np.ndarray) -> float:
    """ArviZ's bulk ESS of draws `(chains, draws)`: rank-normalised and split chains.

    Of many short chains it is biased: its sum of autocorrelations ends at the length of a split
    chain. Of 1,000 chains of 100 draws with autocorrelation r from each to the next it is 1.3 times
    the truth at r = -.3, 1.04 times at 0 and .7 times at .9.
    """
    return float(az.ess(draws, method="bulk"))


def ess_by_chains(draws: np.ndarray) -> float:
    """Bulk ESS of independent chains by the spread of their means, of more than `MANY`.

    The variance of the mean over M chains is that of a chain's mean over M, whatever the
    autocorrelation: with rank-normalised draws `z` of variance `v`, `ESS = v M / var(mean z)`. No
    bias, and a relative error of `sqrt(2 / M)`: 4 % of 1,000 chains, 9 % of 256.
    """
    z = rank_normalised(torch.from_numpy(np.array(draws))[None])[0].numpy()
    return float(z.var() * len(z) / z.mean(1).var(ddof=1))


def r_hat(draws: np.ndarray) -> float:
    """Rank-normalised split R-hat of draws `(chains, draws)`, the larger of bulk and folded.

    Of more than `MANY` chains it is that of `dcpc.draws.r_hat`, which compares superchains: the
    first and the second half of the chains in the first and the second half of the draws.
    """
    if len(draws) <= MANY:
        return float(az.rhat(draws, method="rank"))
    return float(superchain_r_hat(torch.from_numpy(np.array(draws))[None]))
