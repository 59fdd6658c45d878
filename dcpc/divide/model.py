"""A Pyro program run as a function of unconstrained latents, for a single particle.

Written with plain Pyro semantics: the value of every site's factor (`log_factors`), draws from
the prior, constrained and unconstrained values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import reduce
from typing import Any

import pyro
import torch
from torch import Tensor

from dcpc.divide.handlers import (
    AtMeans,
    Draw,
    InitialiseFlat,
    Substitute,
    Until,
    is_random,
    mean_of,
    running,
    transform_of,
)
from dcpc.divide.sites import Site
from dcpc.divide.vectorised import drawing
from dcpc.errors import ModelError

Model = Callable[..., Any]
Latents = Mapping[str, Tensor]


def log_factors(
    model: Model, latents: Latents, args: tuple, kwargs: dict, sites: Mapping[str, Site]
) -> dict[str, Tensor]:
    """Log-density of every site at unconstrained values, for one particle.

    The factor of a latent is `log p(T(u) | pa) + log |det dT/du|` with `T = biject_to(support)`;
    the factor of an observed site is `log p(x | pa)`. Scales and masks of Pyro's handlers act on
    `log p` and not on the Jacobian, as in Pyro's own potential; the scale of plates that
    subsample is left out (it is `Site.scale`). All factors have the latents' dtype.

    Args:
        latents: Unconstrained value `(*batch, *event)` of every latent.

    Returns:
        Log-factor of every site, each of shape `batch_shape` of that site.
    """
    return log_factors_and_masks(model, latents, args, kwargs, sites, ())[0]


def log_factors_and_masks(
    model: Model,
    latents: Latents,
    args: tuple,
    kwargs: dict,
    sites: Mapping[str, Site],
    masked: Collection[str],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The log-factors, and for the latents `masked` which batch elements their densities have."""
    substitute = Substitute(latents, sites, masked)
    with running(model, args, kwargs), substitute:
        model(*args, **kwargs)
    missing = [name for name in sites if name not in substitute.log_factors]
    if missing:
        raise ModelError(
            f"site '{missing[0]}' was there in the first run of the model but not in this one; "
            "the set of sites must not change between runs (static structure)"
        )
    dtype = reduce(torch.promote_types, (u.dtype for u in latents.values()))
    factors = {name: substitute.log_factors[name].to(dtype) for name in sites}
    return factors, {name: substitute.masks[name] for name in masked}


def sample_prior(
    model: Model,
    args: tuple,
    kwargs: dict,
    names: Collection[str],
    given: Latents | None = None,
    *,
    at_means: bool = False,
) -> dict[str, Tensor]:
    """One ancestral sample of the latents, unconstrained; the model runs as far as that takes.

    Flat priors are replaced by a uniform distribution of half-width `handlers.INITIAL_RADIUS`.

    Args:
        names: The latents.
        given: Values that some of them have.
        at_means: Whether the others take their conditional means, top down, instead of draws.
    """
    with torch.no_grad(), running(model, args, kwargs), drawing():
        draws = Draw()
        start = Substitute(given or {}, None)
        program = InitialiseFlat()(start(Until(names)(model)))
        draws(AtMeans()(program) if at_means else program)(*args, **kwargs)
        return draws.unconstrained


def constrain(model: Model, latents: Latents, args: tuple, kwargs: dict) -> dict[str, Tensor]:
    """Constrained values `T(u)` of one particle's latents, and its deterministic values."""
    substitute = Substitute(latents, None)
    with torch.no_grad(), running(model, args, kwargs), substitute:
        model(*args, **kwargs)
    return substitute.values


def observation_means(
    model: Model, latents: Latents, args: tuple, kwargs: dict
) -> dict[str, Tensor]:
    """Means of the observed sites' distributions given one particle's latents."""
    with torch.no_grad(), running(model, args, kwargs):
        substituted = pyro.poutine.trace(Substitute(latents, None)(model))
        trace = substituted.get_trace(*args, **kwargs)
        return {
            name: mean_of(site["fn"])
            for name, site in trace.nodes.items()
            if is_random(site) and site["is_observed"]
        }


def unconstrain(
    model: Model, values: Latents, args: tuple, kwargs: dict, names: set[str]
) -> dict[str, Tensor]:
    """Unconstrained values `T^-1(z)` of one particle's constrained latents."""
    with torch.no_grad(), running(model, args, kwargs):
        substituted = pyro.poutine.condition(model, data=dict(values))
        trace = pyro.poutine.trace(InitialiseFlat()(substituted)).get_trace(*args, **kwargs)
        return {
            name: transform_of(site["fn"]).inv(site["value"])
            for name, site in trace.nodes.items()
            if name in names
        }


def constrained_shapes(
    model: Model, args: tuple, kwargs: dict, names: Collection[str]
) -> dict[str, tuple[torch.Size, Any]]:
    """Shapes of latents' constrained values, and their supports, in one run of the model."""
    with torch.no_grad(), running(model, args, kwargs):
        trace = pyro.poutine.trace(InitialiseFlat()(model)).get_trace(*args, **kwargs)
        nodes: dict[str, Any] = trace.nodes
        return {
            name: (site["value"].shape, site["fn"].support)
            for name, site in nodes.items()
            if name in names
        }
