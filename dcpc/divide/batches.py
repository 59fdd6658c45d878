"""Functions of particles, evaluated for some of them at a time: memory for time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint


def in_batches(
    function: Callable[..., Any], *particles: Any, size: int, recompute: bool = False
) -> Any:
    """Values of a function of `K` particles, by calls with `size` of them.

    The last batch holds the last `size` particles: what it shares with the one before is evaluated
    again and left out, so that all batches have the size that a program was captured with.

    Args:
        function: From trees of tensors `(size, ...)` to another one; row `k` of what it returns
            depends on row `k` of its arguments alone.
        *particles: Its arguments, of tensors `(K, ...)`; the first is a tensor or a dictionary.
        size: Particles at once. There is one call where it is at least `K`.
        recompute: Whether a batch is evaluated once more in the backward pass, so that nothing is
            kept for it until then.
    """
    first = particles[0]
    count = len(first if isinstance(first, Tensor) else next(iter(first.values())))
    if count <= size:
        return function(*particles)
    if recompute:
        function = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    parts, structure = [], None
    for done in range(0, count, size):
        start = min(done, count - size)
        batch = pytree.tree_map(partial(_rows, start=start, size=size), particles)
        values, structure = pytree.tree_flatten(function(*batch))
        parts.append([value[done - start :] for value in values])
    assert structure is not None
    return pytree.tree_unflatten([torch.cat(rows) for rows in zip(*parts, strict=True)], structure)


def _rows(value: Tensor, start: int, size: int) -> Tensor:
    return value.narrow(0, start, size)
