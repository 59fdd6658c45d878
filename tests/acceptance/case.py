"""A row of the acceptance table: a program, its data, and what its posterior has to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reference:
    """A posterior by an independent oracle.

    Attributes:
        mean: By quantity, its posterior mean.
        std: By quantity, its posterior standard deviation.
        error: By quantity, the oracle's own Monte Carlo standard error of the mean; absent of what
            is exact.
        probabilities: By discrete latent, probabilities of its values, `(*batch, S)`.
    """

    mean: Mapping[str, Tensor] = field(default_factory=dict)
    std: Mapping[str, Tensor] = field(default_factory=dict)
    error: Mapping[str, Tensor] = field(default_factory=dict)
    probabilities: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """A Pyro program as its users write it.

    Attributes:
        name: Name of the row.
        source: Where its original is.
        model: The program.
        args: Its arguments.
        oracle: How the reference is found, in words.
        reference: Finds it.
        kwargs: Keyword arguments of the program.
        quantities: What is compared, from the samples by site, each `(K, ...)`; by default the
            sites that the reference names.
        options: Options of the engine.
        num_particles: Particles of the comparison.
        num_sweeps: Sweeps of the comparison.
        unseen: By discrete latent, elements `(*batch)` that a mask takes out.
        remark: What differs from the original, and why.
    """

    name: str
    source: str
    model: Callable
    args: tuple
    oracle: str
    reference: Callable[[], Reference]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    quantities: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    num_particles: int = 300
    num_sweeps: int = 200
    unseen: Mapping[str, Tensor] = field(default_factory=dict)
    remark: str = ""


def generator(seed: int) -> torch.Generator:
    """A generator for synthetic data."""
    return torch.Generator().manual_seed(seed)


def bits(seed: int, *shape: int, chance: float = 0.5) -> Tensor:
    """Independent zeros and ones."""
    return (torch.rand(shape, generator=generator(seed)) < chance).float()
