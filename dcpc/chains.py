"""Draws of a posterior in chains, as ArviZ and other tools for samplers take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dcpc.posterior import Posterior

__all__ = ["Draws", "arranged", "thinned"]

MAX_CHAINS = 16
"""Particles that are exported as one chain each."""

NUM_CHAINS = 4
"""Chains into which more particles are put end to end."""

MAX_BYTES = 1 << 28
"""Size of the likelihoods and predictions, beyond which fewer draws are exported: 256 MiB."""


@dataclass(frozen=True)
class Draws:
    """Draws in chains, with where they come from.

    Attributes:
        values: `(chains, draws, *batch, *event)` by site.
        particle: Index of each draw's particle, `(chains, draws)`.
        sweep: Index of the sweep that was kept, `(chains, draws)`.
        arrangement: What the chains are, in words.
    """

    values: dict[str, Tensor]
    particle: Tensor
    sweep: Tensor
    arrangement: str

    @property
    def shape(self) -> torch.Size:
        """Numbers of chains and of draws."""
        return self.particle.shape


def arranged(posterior: Posterior) -> Draws:
    """All draws that can be exported, in chains."""
    history = posterior.history
    if not history:
        values = posterior.resample()
        index = _scattered(posterior, posterior.num_particles)
        text = "particles, resampled where their weights differ, in random order"
        return Draws(_rows(values, index), index, torch.zeros_like(index), text)
    count, kept = next(iter(history.values())).shape[:2]
    flat = {name: z.flatten(0, 1) for name, z in history.items()}
    if not posterior.is_chains:
        index = _scattered(posterior, count * kept)
        text = (
            "draws of all particles and sweeps in random order, as many as they are worth: "
            "particles are no chains where they were resampled"
        )
    elif count <= MAX_CHAINS:
        index = torch.arange(count * kept).view(count, kept)
        text = "every chain is a particle"
    else:
        index = torch.arange(count // NUM_CHAINS * NUM_CHAINS * kept).view(NUM_CHAINS, -1)
        text = f"every chain is {count // NUM_CHAINS} particles, one after the other"
    return Draws(_rows(flat, index), index // kept, index % kept, text)


def _scattered(posterior: Posterior, count: int) -> Tensor:
    """One chain `(1, n)` of indices of draws that are no chain: as many as the effective ones.

    The effective ones are those of the value for which they are fewest.
    """
    about = posterior.statistics().values()
    ess = torch.cat([each["ess_bulk"].flatten().double() for each in about])
    fewest = ess[ess.isfinite()].min().item() if bool(ess.isfinite().any()) else count
    return torch.randperm(count)[None, : max(1, min(count, round(fewest)))]


def _rows(values: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    return {name: z[index.to(z.device)] for name, z in values.items()}


def thinned(draws: Draws, num_draws: int | None, data: Mapping[str, Tensor]) -> Draws:
    """Evenly spaced draws of every chain: `num_draws` in all, or what memory allows."""
    chains, length = draws.shape
    most = length if num_draws is None else max(1, num_draws // chains)
    size = 2 * sum(z.numel() * max(z.element_size(), 4) for z in data.values())
    if size:
        most = min(most, max(1, MAX_BYTES // (size * chains)))
    if most >= length:
        return draws
    rows = torch.arange(most) * length // most
    return Draws(
        {name: z[:, rows.to(z.device)] for name, z in draws.values.items()},
        draws.particle[:, rows],
        draws.sweep[:, rows],
        f"{draws.arrangement}; thinned from {length} draws",
    )
