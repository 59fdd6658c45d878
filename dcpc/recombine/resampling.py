"""Resampling schemes: functions of one signature from normalised weights to ancestor indices.

In every scheme the number of offspring of particle k has the mean `K w_k`; they differ in its
variance (Douc, Cappe & Moulines 2005). All cells of a population are resampled at once and
independently, with torch's global generator. Costs: `O(K log K)` per cell.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dcpc.errors import DegenerateWeightsError

__all__ = [
    "RESAMPLERS",
    "Resampler",
    "multinomial",
    "residual",
    "stratified",
    "systematic",
    "take_particles",
]

Resampler = Callable[[Tensor], Tensor]

# Counts this close to an integer, relatively, are that integer: `K * (1 / K)` may fall short of 1.
_COUNT_TOLERANCE = 1e-9


def systematic(weights: Tensor) -> Tensor:
    """Systematic resampling: one uniform `u` per cell, positions `(k + u) / K`.

    Particle k has `floor(K w_k)` or `ceil(K w_k)` offspring (Kitagawa 1996; Carpenter, Clifford &
    Fearnhead 1999).

    Args:
        weights: shape `(K, *population)`, not negative, summing to one over the particles.

    Returns:
        Ancestors, integers in `[0, K)` of shape `(K, *population)`, increasing along the particles.

    Raises:
        DegenerateWeightsError: if the weights of a cell are all zero or not finite.
    """
    rows = _rows(weights)
    slots = torch.arange(rows.shape[-1], dtype=rows.dtype, device=rows.device)
    uniform = torch.rand_like(rows[..., :1])
    return _invert_cdf(rows, (slots + uniform) / rows.shape[-1]).movedim(-1, 0)


def stratified(weights: Tensor) -> Tensor:
    """Stratified resampling: one uniform `u_k` per slot, positions `(k + u_k) / K`.

    The number of offspring of a particle differs from `K w_k` by less than two (Kitagawa 1996).

    Args:
        weights: shape `(K, *population)`, not negative, summing to one over the particles.

    Returns:
        Ancestors, integers in `[0, K)` of shape `(K, *population)`, increasing along the particles.

    Raises:
        DegenerateWeightsError: if the weights of a cell are all zero or not finite.
    """
    rows = _rows(weights)
    slots = torch.arange(rows.shape[-1], dtype=rows.dtype, device=rows.device)
    return _invert_cdf(rows, (slots + torch.rand_like(rows)) / rows.shape[-1]).movedim(-1, 0)


def multinomial(weights: Tensor) -> Tensor:
    """Multinomial resampling: K independent draws, the scheme of highest variance (Gordon 1993).

    Args:
        weights: shape `(K, *population)`, not negative, summing to one over the particles.

    Returns:
        Ancestors, integers in `[0, K)` of shape `(K, *population)`, in no order.

    Raises:
        DegenerateWeightsError: if the weights of a cell are all zero or not finite.
    """
    rows = _rows(weights)
    return _invert_cdf(rows, torch.rand_like(rows)).movedim(-1, 0)


def residual(weights: Tensor) -> Tensor:
    """Residual resampling: `floor(K w_k)` offspring for certain, the rest multinomially.

    The rest is drawn in proportion to `K w_k - floor(K w_k)` (Liu & Chen 1998).

    Args:
        weights: shape `(K, *population)`, not negative, summing to one over the particles.

    Returns:
        Ancestors, integers in `[0, K)` of shape `(K, *population)`, the certain ones first.

    Raises:
        DegenerateWeightsError: if the weights of a cell are all zero or not finite.
    """
    rows = _rows(weights)
    num_particles = rows.shape[-1]
    expected = num_particles * rows / rows.sum(-1, keepdim=True)
    certain = torch.floor(expected * (1 + _COUNT_TOLERANCE))
    ends = certain.cumsum(-1)
    slots = torch.arange(num_particles, dtype=rows.dtype, device=rows.device).expand_as(rows)
    is_certain = slots < ends[..., -1:]
    from_certain = torch.searchsorted(ends, slots.contiguous(), right=True)
    from_rest = _invert_cdf((expected - certain).clamp(min=0), torch.rand_like(rows))
    return torch.where(is_certain, from_certain, from_rest).movedim(-1, 0)


RESAMPLERS: dict[str, Resampler] = {
    "systematic": systematic,
    "stratified": stratified,
    "multinomial": multinomial,
    "residual": residual,
}


def take_particles(value: Tensor, ancestors: Tensor, population_axes: tuple[int, ...]) -> Tensor:
    """Replace every particle by its ancestor, in each population cell by that cell's.

    Args:
        value: shape `(K, ...)`, the population's axes anywhere among the others.
        ancestors: integers of shape `(K, *population)`.
        population_axes: the positive axes of `value` that are the population's, in its order.

    Returns:
        A tensor of `value`'s shape; `ancestors` is broadcast over the axes that are not named.

    Raises:
        ValueError: if `value` does not have the shape of `ancestors` along those axes.
    """
    axes = (0, *population_axes)
    if tuple(value.shape[axis] for axis in axes) != tuple(ancestors.shape):
        raise ValueError(
            f"value has shape {tuple(value.shape)}, of which the axes {axes} must have the shape "
            f"{tuple(ancestors.shape)} of the ancestors: (num_particles, *population)"
        )
    if axes == (0,):
        return value.index_select(0, ancestors)
    leading = tuple(range(len(axes)))
    if axes == leading and value.dim() == len(axes):
        return value.gather(0, ancestors)
    rows = value.movedim(axes, leading)
    num_cells = ancestors[0].numel()
    cells = torch.arange(num_cells, device=ancestors.device)
    index = (ancestors.reshape(-1, num_cells) * num_cells + cells).flatten()
    # Whole rows are copied at once, which beats gathering element by element.
    taken = rows.flatten(0, len(population_axes)).index_select(0, index)
    return taken.view(rows.shape).movedim(leading, axes)


def along_population(cells: Tensor, value: Tensor, population_axes: tuple[int, ...]) -> Tensor:
    """A tensor by particle and cell, with axes of one where it is to broadcast against a value.

    Args:
        cells: shape `(K, *population)`.
        value: shape `(K, ...)`, the population's axes anywhere among the others.
        population_axes: the positive axes of `value` that are the population's, in its order.
    """
    shape = [len(cells)] + [1] * (value.dim() - 1)
    for axis, size in zip(population_axes, cells.shape[1:], strict=True):
        shape[axis] = size
    order = sorted(range(len(population_axes)), key=lambda i: population_axes[i])
    return cells.permute(0, *(1 + i for i in order)).reshape(shape)


def _rows(weights: Tensor) -> Tensor:
    """Weights as `(*population, K)` in double precision, each cell with a finite positive sum."""
    rows = weights.movedim(0, -1).to(torch.float64).contiguous()
    total = rows.sum(-1)
    if not ((total > 0) & (total < torch.inf)).all():
        raise DegenerateWeightsError(
            "the weights of a population cell are all zero or not finite, so that it cannot be "
            "resampled. Pass normalised weights, as LogWeights.normalized() gives them"
        )
    return rows


def _invert_cdf(weights: Tensor, positions: Tensor) -> Tensor:
    """First index whose cumulative weight exceeds the position's share of the total.

    Never an index of zero weight, nor one that does not exist, however the sums were rounded.

    Args:
        weights: shape `(*population, K)`.
        positions: shape `(*population, K)`, in `[0, 1]`.
    """
    # A parallel scan may move over a zero weight: the running maximum stands still there.
    cdf = weights.cumsum(-1).masked_fill(weights <= 0, 0.0).cummax(-1).values
    total = cdf[..., -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    return torch.searchsorted(cdf, torch.minimum(positions * total, below_total), right=True)
