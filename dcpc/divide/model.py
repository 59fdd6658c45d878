"""A Pyro program read as a list of sites and run as a function of unconstrained latents.

The two things that the rest of the package needs from a Pyro program are here: what its
sites are (`read_sites`), and the value of every site's factor for given unconstrained values
(`log_factors`), written for a single particle with plain Pyro semantics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from dcpc.divide.handlers import (
    Draw,
    InitialiseFlat,
    Substitute,
    improper,
    is_random,
    layers,
    mean_of,
    quiet,
    transform_of,
)
from dcpc.errors import DataError, ModelError

Model = Callable[..., Any]
Latents = Mapping[str, Tensor]


@dataclass(frozen=True)
class Plate:
    """A vectorised plate around a site: its axis `dim` (negative, from the right) and sizes."""

    name: str
    dim: int
    size: int


@dataclass(frozen=True)
class Site:
    """A sample statement of the program.

    Attributes:
        name: Name of the site.
        is_observed: Whether the value is data.
        plates: Vectorised plates around the site, outermost (most negative dim) first.
        batch_shape: Batch shape of the site's log-density.
        unconstrained_shape: Shape `(*batch, *event)` of the unconstrained value `u`; empty for
            observed sites.
        scale: Product of `full_size / size` over the plates that subsample.
        is_improper: Whether the prior is flat, so that it cannot be sampled or integrated.
    """

    name: str
    is_observed: bool
    plates: tuple[Plate, ...]
    batch_shape: torch.Size
    unconstrained_shape: torch.Size = torch.Size()
    scale: float = 1.0
    is_improper: bool = False
    support: str = ""


def read_sites(model: Model, args: tuple, kwargs: dict) -> dict[str, Site]:
    """Runs the program once and describes its sites, in program order.

    Raises:
        ModelError: A latent is discrete, or its support has no bijection to the reals, or there
            are no latents, or no observations.
        DataError: An observed value is NaN, or lies outside its distribution's support.
    """
    with torch.no_grad(), quiet(), pyro.validation_enabled(True):
        trace = pyro.poutine.trace(InitialiseFlat()(model)).get_trace(*args, **kwargs)
        sites = {
            name: _observed_site(site) if site["is_observed"] else _latent_site(site)
            for name, site in trace.nodes.items()
            if is_random(site)
        }
    if not any(not site.is_observed for site in sites.values()):
        raise ModelError(
            "the model has no latent sample site, so there is nothing to infer; got sites "
            f"{sorted(sites) or 'none'}. Add a pyro.sample statement without obs=, or use plain "
            "maximum likelihood."
        )
    if not any(site.is_observed for site in sites.values()):
        raise ModelError(
            "the model has no observed sample site, so its posterior is its prior; got latents "
            f"{sorted(sites)}. Pass obs= to a pyro.sample statement or wrap the model in "
            "pyro.condition."
        )
    return sites


def log_factors(
    model: Model, latents: Latents, args: tuple, kwargs: dict, sites: Mapping[str, Site]
) -> dict[str, Tensor]:
    """Log-density of every site at unconstrained values, for one particle.

    The factor of a latent is `log p(T(u) | pa) + log |det dT/du|` with `T = biject_to(support)`;
    the factor of an observed site is `log p(x | pa)`. Scales and masks of Pyro's handlers apply.

    Args:
        latents: Unconstrained value `(*batch, *event)` of every latent.

    Returns:
        Log-factor of every site, each of shape `batch_shape` of that site.
    """
    with Substitute(latents, sites) as substitute, quiet(), pyro.validation_enabled(False):
        model(*args, **kwargs)
    missing = [name for name in sites if name not in substitute.log_factors]
    if missing:
        raise ModelError(
            f"site '{missing[0]}' was there in the first run of the model but not in this one; "
            "the set of sites must not change between runs (static structure)"
        )
    return {name: substitute.log_factors[name] for name in sites}


def sample_prior(model: Model, args: tuple, kwargs: dict) -> dict[str, Tensor]:
    """One ancestral sample of the latents, unconstrained.

    Flat priors are replaced by a uniform distribution of half-width `handlers.INITIAL_RADIUS`.
    """
    with torch.no_grad(), quiet(), pyro.validation_enabled(False):
        drawn = Draw()(InitialiseFlat()(model))
        trace = pyro.poutine.trace(drawn).get_trace(*args, **kwargs)
        return {
            name: transform_of(site["fn"]).inv(site["value"])
            for name, site in trace.nodes.items()
            if is_random(site) and not site["is_observed"]
        }


def constrain(model: Model, latents: Latents, args: tuple, kwargs: dict) -> dict[str, Tensor]:
    """Constrained values `T(u)` of one particle's latents."""
    substitute = Substitute(latents, None)
    with torch.no_grad(), quiet(), pyro.validation_enabled(False), substitute:
        model(*args, **kwargs)
    return substitute.values


def observation_means(
    model: Model, latents: Latents, args: tuple, kwargs: dict
) -> dict[str, Tensor]:
    """Means of the observed sites' distributions given one particle's latents."""
    with torch.no_grad(), quiet(), pyro.validation_enabled(False):
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
    with torch.no_grad(), quiet(), pyro.validation_enabled(False):
        substituted = pyro.poutine.condition(model, data=dict(values))
        trace = pyro.poutine.trace(InitialiseFlat()(substituted)).get_trace(*args, **kwargs)
        return {
            name: transform_of(site["fn"]).inv(site["value"])
            for name, site in trace.nodes.items()
            if name in names
        }


def _latent_site(msg: Any) -> Site:
    fn, name = msg["fn"], msg["name"]
    if getattr(fn, "has_enumerate_support", False) or fn.support.is_discrete:
        raise ModelError(
            f"site '{name}' is a discrete latent ({type(fn).__name__}); only continuous latents "
            "are supported for now. Marginalise it (for example with dist.MixtureSameFamily) or "
            "observe it."
        )
    try:
        transform = transform_of(fn)
    except NotImplementedError:
        raise ModelError(
            f"site '{name}' has support {fn.support}, for which torch.distributions.biject_to "
            "knows no bijection to the reals; reparameterise the site (for example with "
            "pyro.infer.reparam) or register a bijection."
        ) from None
    flat = improper(fn)
    batch_shape = msg["value"].shape[: msg["value"].dim() - fn.event_dim]
    return Site(
        name=name,
        is_observed=False,
        plates=_plates(msg),
        batch_shape=torch.Size(batch_shape),
        unconstrained_shape=transform.inv(msg["value"]).shape,
        scale=_subsample_scale(msg),
        is_improper=flat,
        support=str(fn.support).removesuffix("()"),
    )


def _observed_site(msg: Any) -> Site:
    fn, name, value = msg["fn"], msg["name"], msg["value"]
    log_factor_shape = torch.broadcast_shapes(
        fn.batch_shape, value.shape[: max(value.dim() - fn.event_dim, 0)]
    )
    _check_observation(msg)
    return Site(
        name=name,
        is_observed=True,
        plates=_plates(msg),
        batch_shape=log_factor_shape,
        scale=_subsample_scale(msg),
        support=str(fn.support).removesuffix("()") if hasattr(fn, "support") else "",
    )


def _check_observation(msg: Any) -> None:
    fn, name, value = msg["fn"], msg["name"], msg["value"]
    if not isinstance(value, Tensor) or value.numel() == 0:
        return
    masked = msg["mask"] is not None or any(
        isinstance(part, dist.MaskedDistribution) for part in layers(fn)
    )
    if masked:
        return
    if value.is_floating_point() and bool(value.isnan().any()):
        raise DataError(
            f"the observed value of site '{name}' has {int(value.isnan().sum())} NaN among "
            f"{value.numel()} entries; remove them, or mask them with pyro.poutine.mask"
        )
    if not all(getattr(part, "_validate_args", True) for part in layers(fn)):
        return
    try:
        support = fn.support
    except NotImplementedError:
        return
    valid = support.check(value)
    if not bool(valid.all()):
        outside = value[~valid] if valid.shape == value.shape else value
        raise DataError(
            f"the observed value of site '{name}' lies outside the support {support} of "
            f"{type(fn).__name__}: got, for example, {outside.flatten()[0].item():.6g}. Rescale "
            "the data, or choose another likelihood (validate_args=False on the distribution "
            "switches this check off)."
        )


def _plates(msg: Any) -> tuple[Plate, ...]:
    frames = sorted((f for f in msg["cond_indep_stack"] if f.vectorized), key=lambda f: f.dim)
    return tuple(Plate(frame.name, frame.dim, frame.size) for frame in frames)


def _subsample_scale(msg: Any) -> float:
    scale = 1.0
    for frame in msg["cond_indep_stack"]:
        if frame.full_size is not None and frame.size:
            scale *= frame.full_size / frame.size
    return scale


__all__ = [
    "Latents",
    "Model",
    "Plate",
    "Site",
    "constrain",
    "improper",
    "log_factors",
    "read_sites",
    "sample_prior",
    "transform_of",
    "unconstrain",
]
