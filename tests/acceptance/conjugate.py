"""Exact posteriors by enumeration of the discrete latents and conjugacy of the others.

Given all discrete latents, a Dirichlet (or Beta) prior and counts give a Dirichlet posterior in
closed form; the posterior is the mixture of these over all assignments of the discrete latents.
All in double precision.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tests.acceptance.case import Reference


def dirichlet_evidence(prior: Tensor, counts: Tensor) -> Tensor:
    """`log int Dirichlet(p | prior) prod_k p_k^counts_k dp`, over the last axis."""
    before, after = prior.sum(-1), (prior + counts).sum(-1)
    ratio = torch.lgamma(prior + counts) - torch.lgamma(prior)
    return before.lgamma() - after.lgamma() + ratio.sum(-1)


def dirichlet_moments(concentration: Tensor) -> tuple[Tensor, Tensor]:
    """First and second moments of the entries of a Dirichlet vector."""
    total = concentration.sum(-1, keepdim=True)
    mean = concentration / total
    return mean, mean * (concentration + 1) / (total + 1)


def assignments(sizes: Sequence[int]) -> Tensor:
    """All values of some discrete variables, `(number, variables)`."""
    return torch.tensor(list(itertools.product(*(range(size) for size in sizes))))


def mixture(
    log_weight: Tensor,
    moments: Mapping[str, tuple[Tensor, Tensor]],
    discrete: Mapping[str, tuple[Tensor, int]],
) -> Reference:
    """The posterior from its components.

    Args:
        log_weight: Log-evidence of each assignment, `(M)`.
        moments: By quantity, its first and second moments given each assignment, `(M, ...)`.
        discrete: By latent, its value in each assignment, `(M, *batch)`, and how many there are.
    """
    weight = log_weight.double().softmax(0)

    def average(value: Tensor) -> Tensor:
        return torch.tensordot(weight, value.double(), 1)

    mean = {name: average(first) for name, (first, _) in moments.items()}
    square = {name: average(second) for name, (_, second) in moments.items()}
    return Reference(
        mean=mean,
        std={name: (square[name] - mean[name] ** 2).clamp(min=0).sqrt() for name in mean},
        probabilities={
            name: torch.stack([average(value == k) for k in range(size)], -1)
            for name, (value, size) in discrete.items()
        },
    )


def count(pairs: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """How often each combination of values occurs in each assignment.

    Args:
        pairs: Integers `(M, n)`, one tensor for each position of the combination.
        sizes: Numbers of values.

    Returns:
        `(M, *sizes)` counts.
    """
    index = pairs[0]
    for value, size in zip(pairs[1:], sizes[1:], strict=True):
        index = index * size + value
    flat = torch.zeros(len(index), int(torch.tensor(sizes).prod()), dtype=torch.float64)
    flat.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float64))
    return flat.reshape(-1, *sizes)


def grid_posterior(
    log_density: Callable[[Mapping[str, Tensor]], Tensor],
    axes: Mapping[str, Tensor],
    marginals: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
    quantities: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
) -> Reference:
    """A posterior of few dimensions on a grid of equal steps.

    Args:
        log_density: From the coordinates `(G)` by name, log-density with respect to them, `(G)`.
        axes: By coordinate, its equally spaced values.
        marginals: From the coordinates, by discrete latent, its conditional probabilities
            `(G, *batch, S)`.
        quantities: From the coordinates, what is compared, `(G, ...)`; by default they themselves.
    """
    mesh = torch.meshgrid(*(axis.double() for axis in axes.values()), indexing="ij")
    at = {name: value.flatten() for name, value in zip(axes, mesh, strict=True)}
    weight = log_density(at).softmax(0)
    values = dict(at) if quantities is None else dict(quantities(at))
    mean = {name: torch.tensordot(weight, value, 1) for name, value in values.items()}
    spread = {
        name: torch.tensordot(weight, (value - mean[name]) ** 2, 1).sqrt()
        for name, value in values.items()
    }
    shares = {} if marginals is None else marginals(at)
    return Reference(
        mean,
        spread,
        probabilities={name: torch.tensordot(weight, p, 1) for name, p in shares.items()},
    )
