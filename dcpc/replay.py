"""Runs of a model at given draws of its latents: densities of its data, and new data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from dcpc.divide import Arguments
from dcpc.divide.handlers import (
    Given,
    InitialiseFlat,
    WithoutData,
    is_random,
    running,
    unvalidated,
)
from dcpc.divide.masking import layers, masked_log_prob
from dcpc.divide.model import Model
from dcpc.divide.program import map_particles
from dcpc.divide.vectorised import drawing

__all__ = ["log_densities", "observed_values", "posterior_predictions", "prior_predictions"]

Values = Mapping[str, Tensor]

DRAWS_AT_ONCE = 4096
"""Draws that the model is run at together, at most."""

NUMBERS_AT_ONCE = 1 << 24
"""Numbers of these draws and of their copies of the data, beyond which they are fewer."""

LOG_JOINT = "log joint"
"""Key of the joint density beside those of the sites, whose names have no blank."""


def observed_values(model: Model, arguments: Arguments) -> dict[str, Tensor]:
    """The data of the observed sites, `(*batch, *event)`; those of `pyro.factor` have none."""
    args, kwargs = arguments.rebuild(arguments.tensors)
    with torch.no_grad(), running(model, args, kwargs):
        nodes = _nodes(InitialiseFlat()(Given({})(model)), args, kwargs)
    return {name: site["value"] for name, site in nodes.items() if _is_datum(site)}


def log_densities(
    model: Model, arguments: Arguments, draws: Values
) -> tuple[dict[str, Tensor], Tensor]:
    """Log-densities of the observed sites, and of everything, at draws of the latents.

    Args:
        model: A Pyro program.
        arguments: Its arguments.
        draws: Constrained values of all latents, `(N, *batch, *event)`.

    Returns:
        By observed site `log p(x | pa)`, `(N, *batch)`: zero where a mask takes an element out,
        and without the scale of handlers and of plates that subsample. And the log-joint `(N)` of
        constrained values, with these scales.
    """
    args, kwargs = arguments.rebuild(arguments.tensors)

    def densities(values: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad(), running(model, args, kwargs):
            nodes = _nodes(Given(values)(model), args, kwargs)
            result, joint = {}, torch.zeros(())
            for name, site in nodes.items():
                if not is_random(site):
                    continue
                with unvalidated(site["fn"]):
                    log_prob = masked_log_prob(site)
                joint = joint + (log_prob * site["scale"]).sum()
                if _is_datum(site):
                    result[name] = log_prob
        return {**result, LOG_JOINT: joint}

    found = _in_parts(densities, draws, arguments)
    return found, found.pop(LOG_JOINT)


def posterior_predictions(model: Model, arguments: Arguments, draws: Values) -> dict[str, Tensor]:
    """New data of every observed site at each draw of the latents, `(N, *batch, *event)`.

    Args:
        model: A Pyro program.
        arguments: Its arguments; the values of observed sites do not matter.
        draws: Constrained values of all latents, `(N, *batch, *event)`.
    """
    return _in_parts(lambda values: _draw(model, arguments, values)[1], draws, arguments)


def prior_predictions(
    model: Model, arguments: Arguments, count: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draws of the prior: latents and deterministic values, and the data that follow from them.

    Args:
        model: A Pyro program with proper priors.
        arguments: Its arguments; the values of observed sites do not matter.
        count: Number of draws N.

    Returns:
        Constrained values `(N, *batch, *event)` by site: of latents and deterministic sites, and of
        observed ones.
    """

    def draw(_: dict[str, Tensor]) -> dict[str, Tensor]:
        values, data = _draw(model, arguments, {})
        data_names.update(data)
        return {**values, **data}

    data_names: set[str] = set()
    drawn = _in_parts(draw, {"": torch.zeros(count)}, arguments)
    values = {name: value for name, value in drawn.items() if name not in data_names}
    return values, {name: value for name, value in drawn.items() if name in data_names}


def _draw(
    model: Model, arguments: Arguments, given: Values
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One run of the model without its data: values that are no data, and new data."""
    args, kwargs = arguments.rebuild(arguments.tensors)
    with torch.no_grad(), running(model, args, kwargs), drawing():
        replayed = Given(given)
        nodes = _nodes(replayed(WithoutData()(model)), args, kwargs)
    drawn = {name: site["value"] for name, site in nodes.items() if is_random(site)}
    data = {name: value for name, value in drawn.items() if _was_datum(nodes[name])}
    values = {name: value for name, value in drawn.items() if name not in data}
    return {**values, **replayed.values}, data


def _in_parts(
    function: Callable[[dict[str, Tensor]], dict[str, Tensor]], draws: Values, arguments: Arguments
) -> dict[str, Tensor]:
    """A function of one draw, mapped over draws `(N, ...)`, as many at a time as memory allows."""
    count = len(next(iter(draws.values())))
    size = sum(z[0].numel() for z in draws.values()) + sum(t.numel() for t in arguments.tensors)
    step = max(1, min(DRAWS_AT_ONCE, NUMBERS_AT_ONCE // size))
    parts = [
        map_particles(function, {n: z[first : first + step] for n, z in draws.items()})
        for first in range(0, count, step)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _nodes(program: Model, args: tuple, kwargs: dict) -> dict[str, Any]:
    return pyro.poutine.trace(program).get_trace(*args, **kwargs).nodes


def _is_datum(site: Any) -> bool:
    return is_random(site) and site["is_observed"] and not _is_factor(site)


def _was_datum(site: Any) -> bool:
    return bool((site["infer"] or {}).get("was_observed")) and not _is_factor(site)


def _is_factor(site: Any) -> bool:
    return any(isinstance(part, dist.Unit) for part in layers(site["fn"]))
