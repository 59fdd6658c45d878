"""Samples of a model's observed site, in the shape of its data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from torch import Tensor

from dcpc.divide.model import Model
from dcpc.errors import DataError

__all__ = ["matching_site", "prior_samples"]


def prior_samples(model: Model, x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Draws as many data as `x` holds from the model, by ancestral sampling.

    Returns:
        The samples, and the decoder's mean that each was drawn around, both shaped like `x`.
    """
    devices = list(range(torch.cuda.device_count())) if x.is_cuda else []
    with torch.random.fork_rng(devices), torch.no_grad(), pyro.validation_enabled(False):
        torch.manual_seed(seed)
        trace = pyro.poutine.trace(pyro.poutine.uncondition(model)).get_trace(x)
    observed: dict[str, Any] = {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and (site["infer"] or {}).get("was_observed")
    }
    samples = matching_site({name: site["value"] for name, site in observed.items()}, x)
    means = matching_site({name: site["fn"].mean for name, site in observed.items()}, x)
    return samples, means


def matching_site(values: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The observed site whose value is `x`, in the shape of `x`.

    Raises:
        DataError: No site has as many elements as `x`.
    """
    for value in values.values():
        if value.numel() == x.numel():
            return value.reshape(x.shape)
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    raise DataError(
        f"no observed site of the model has as many elements as the data, {tuple(x.shape)}: got "
        f"{shapes}, so there is nothing to compare reconstructions with"
    )
