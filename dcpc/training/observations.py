"""Whether there is something to learn from every datum of a batch."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from torch import Tensor

from dcpc.divide.handlers import is_random, running
from dcpc.divide.masking import element_mask
from dcpc.divide.model import Model
from dcpc.errors import DataError
from dcpc.observed import Observed, as_arguments, num_data
from dcpc.seeding import random_state_kept

__all__ = ["check_observed"]


def check_observed(model: Model, data: Observed, index: Tensor, dim: int) -> None:
    """Checks that no mask takes all observations of a datum away.

    Args:
        model: The Pyro program.
        data: Its arguments.
        index: Indices of the data in the training set, `(B,)`.
        dim: Axis of the plate over the data among the batch dimensions, negative.

    Raises:
        DataError: Naming the first datum that has none.
    """
    args, kwargs = as_arguments(data)
    with random_state_kept(), torch.no_grad(), running(model, args, kwargs):
        nodes: dict[str, Any] = pyro.poutine.trace(model).get_trace(*args, **kwargs).nodes
    observed = {n: s for n, s in nodes.items() if is_random(s) and s["is_observed"]}
    has_any = torch.zeros(num_data(data), dtype=torch.bool, device=index.device)
    for site in observed.values():
        has_any = has_any | _observes(site, dim).to(index.device)
    if bool(has_any.all()):
        return
    raise DataError(
        f"datum {int(index[int((~has_any).nonzero()[0])])} of the training set has no observation: "
        f"the masks of {sorted(observed)} take all of it away; drop the datum"
    )


def _observes(site: Any, dim: int) -> Tensor:
    """Data of which a site observes something, boolean `(B,)` or of one element for all."""
    shape = site["fn"].batch_shape
    mask = element_mask(site, shape)
    if site["mask"] is False:
        mask = torch.zeros_like(mask)
    if -dim > len(shape):
        return mask.any().reshape(1)
    return mask.movedim(dim, 0).flatten(1).any(1) if mask.dim() > 1 else mask
