"""A Pyro program read as a list of sites and run as a function of unconstrained latents.

The two things that the rest of the package needs from a Pyro program are here: what its
sites are (`read_sites`), and the value of every site's factor for given unconstrained values
(`log_factors`), written for a single particle with plain Pyro semantics.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import ComposeTransform, IndependentTransform, Transform

from dcpc.errors import DataError, ModelError

Model = Callable[..., Any]
Latents = Mapping[str, Tensor]

INITIAL_RADIUS = 2.0
"""Half-width of the uniform distribution (unconstrained space) that flat priors start from."""


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
    with torch.no_grad(), _quiet(), pyro.validation_enabled(True):
        trace = pyro.poutine.trace(_InitialiseFlat()(model)).get_trace(*args, **kwargs)
        sites = {
            name: _observed_site(site) if site["is_observed"] else _latent_site(site)
            for name, site in trace.nodes.items()
            if _is_random(site)
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
    with _Substitute(latents, sites) as substitute, _quiet(), pyro.validation_enabled(False):
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

    Flat priors are replaced by a uniform distribution of half-width `INITIAL_RADIUS`.
    """
    with torch.no_grad(), _quiet(), pyro.validation_enabled(False):
        drawn = _Draw()(_InitialiseFlat()(model))
        trace = pyro.poutine.trace(drawn).get_trace(*args, **kwargs)
        return {
            name: transform_of(site["fn"]).inv(site["value"])
            for name, site in trace.nodes.items()
            if _is_random(site) and not site["is_observed"]
        }


def constrain(model: Model, latents: Latents, args: tuple, kwargs: dict) -> dict[str, Tensor]:
    """Constrained values `T(u)` of one particle's latents."""
    substitute = _Substitute(latents, None)
    with torch.no_grad(), _quiet(), pyro.validation_enabled(False), substitute:
        model(*args, **kwargs)
    return substitute.values


def observation_means(
    model: Model, latents: Latents, args: tuple, kwargs: dict
) -> dict[str, Tensor]:
    """Means of the observed sites' distributions given one particle's latents."""
    with torch.no_grad(), _quiet(), pyro.validation_enabled(False):
        substituted = pyro.poutine.trace(_Substitute(latents, None)(model))
        trace = substituted.get_trace(*args, **kwargs)
        return {
            name: _mean(site["fn"])
            for name, site in trace.nodes.items()
            if _is_random(site) and site["is_observed"]
        }


def unconstrain(
    model: Model, values: Latents, args: tuple, kwargs: dict, names: set[str]
) -> dict[str, Tensor]:
    """Unconstrained values `T^-1(z)` of one particle's constrained latents."""
    with torch.no_grad(), _quiet(), pyro.validation_enabled(False):
        substituted = pyro.poutine.condition(model, data=dict(values))
        trace = pyro.poutine.trace(_InitialiseFlat()(substituted)).get_trace(*args, **kwargs)
        return {
            name: transform_of(site["fn"]).inv(site["value"])
            for name, site in trace.nodes.items()
            if name in names
        }


def transform_of(fn: Any) -> Transform:
    """The bijection from unconstrained space to the support of a distribution."""
    return biject_to(fn.support)


def improper(fn: Any) -> bool:
    """Whether a distribution is a flat prior: `ImproperUniform`, or one with `.mask(False)`."""
    return any(
        isinstance(part, dist.ImproperUniform)
        or (isinstance(part, dist.MaskedDistribution) and part._mask is False)
        for part in _layers(fn)
    )


class _Substitute(Messenger):
    """Replaces latents by the images of unconstrained values and records the log-factors."""

    def __init__(self, latents: Latents, sites: Mapping[str, Site] | None) -> None:
        super().__init__()
        self.latents = latents
        self.sites = sites
        self.values: dict[str, Tensor] = {}
        self.log_factors: dict[str, Tensor] = {}
        self.current_site: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is None:
            indices = msg["fn"]()
            whole = len(indices) == msg["fn"].size
            msg["value"] = indices.as_subclass(_Indices) if whole else indices
        if msg["name"] not in self.latents:
            return
        u = self.latents[msg["name"]]
        transform = transform_of(msg["fn"])
        value = transform(u)
        msg["value"], msg["done"] = value, True
        self.values[msg["name"]] = value
        if self.sites is not None and not _is_identity(transform):
            msg["infer"] = {
                **msg["infer"],
                "_log_det_jacobian": transform.log_abs_det_jacobian(u, value),
            }

    def _pyro_post_sample(self, msg: Any) -> None:
        if self.sites is None or not _is_random(msg):
            return
        name = msg["name"]
        if name not in self.sites:
            raise ModelError(
                f"site '{name}' appeared in this run of the model but not in the first one; the "
                "set of sites must not change between runs (static structure)"
            )
        with _unvalidated(msg["fn"]):
            log_factor = msg["fn"].log_prob(msg["value"])
        log_det = msg["infer"].get("_log_det_jacobian")
        if log_det is not None:
            extra = log_det.dim() - log_factor.dim()
            log_factor = log_factor + (
                log_det.sum(tuple(range(-extra, 0))) if extra > 0 else log_det
            )
        self.log_factors[name] = _scale_and_mask(log_factor, msg["scale"], msg["mask"])


class _Indices(Tensor):
    """A plate's indices. Iterated over, as a sequential plate does, they give plain integers.

    Pyro would take them out of torch one by one, which a program that is captured cannot.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]
        return iter(range(len(self)))


class _InitialiseFlat(Messenger):
    """Gives sites with an `ImproperUniform` prior a value, which Pyro cannot sample."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["done"] or msg["is_observed"] or not improper(fn):
            return
        base = next((part for part in _layers(fn) if isinstance(part, dist.ImproperUniform)), None)
        if base is None:
            return
        transform = transform_of(fn)
        shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)
        msg["value"] = transform((2 * torch.rand(shape) - 1) * INITIAL_RADIUS)
        msg["done"] = True


class _Draw(Messenger):
    """Samples by inverse CDF where a distribution's own sampler cannot be vectorised.

    Some samplers of torch (Cauchy, Exponential, Laplace) fill a tensor in place, which `vmap`
    refuses.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or not _is_random(msg):
            return
        fn = msg["fn"]
        try:
            msg["value"] = fn()
        except RuntimeError as error:
            if "inplace randomness" not in str(error):
                raise
            base = fn
            while isinstance(base, torch.distributions.Independent):
                base = base.base_dist
            msg["value"] = base.icdf(torch.rand(fn.batch_shape + fn.event_shape))
        msg["done"] = True


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
        isinstance(part, dist.MaskedDistribution) for part in _layers(fn)
    )
    if masked:
        return
    if value.is_floating_point() and bool(value.isnan().any()):
        raise DataError(
            f"the observed value of site '{name}' has {int(value.isnan().sum())} NaN among "
            f"{value.numel()} entries; remove them, or mask them with pyro.poutine.mask"
        )
    if not all(getattr(part, "_validate_args", True) for part in _layers(fn)):
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


def _is_random(msg: Any) -> bool:
    """A site with a density: not a deterministic, not a plate's subsample."""
    return (
        msg["type"] == "sample"
        and not site_is_subsample(msg)
        and not msg["infer"].get("_deterministic", False)
    )


def _mean(fn: Any) -> Tensor:
    return fn.mean


def _layers(fn: Any) -> Iterator[Any]:
    """The distribution and those that it wraps (Independent, Masked, Expanded)."""
    while fn is not None:
        yield fn
        fn = getattr(fn, "base_dist", None)


def _is_identity(transform: Transform) -> bool:
    if isinstance(transform, IndependentTransform):
        return _is_identity(transform.base_transform)
    return isinstance(transform, ComposeTransform) and not transform.parts


def _scale_and_mask(value: Tensor, scale: Any, mask: Any) -> Tensor:
    if mask is False:
        return torch.zeros_like(value)
    if not (isinstance(scale, float | int) and scale == 1):
        value = value * scale
    if mask is None or mask is True:
        return value
    return torch.where(mask, value, value.new_zeros(()))


@contextmanager
def _unvalidated(fn: Any) -> Iterator[None]:
    """Switches off the validation of a distribution that was made outside of the model.

    An expanded prior, such as a `PyroSample`'s, remembers the setting that it was made under.
    Validation branches on values, which neither `vmap` nor a capture can.
    """
    validated = [part for part in _nested(fn) if part.__dict__.get("_validate_args")]
    for part in validated:
        part._validate_args = False
    try:
        yield
    finally:
        for part in validated:
            part._validate_args = True


def _nested(fn: Any) -> Iterator[Any]:
    """The distribution and all that it is made of."""
    yield fn
    for part in list(vars(fn).values()):
        if isinstance(part, torch.distributions.Distribution):
            yield from _nested(part)


@contextmanager
def _quiet() -> Iterator[None]:
    """Pyro warns on every run about, for example, undeclared batch dimensions; once is enough."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


__all__ = [
    "INITIAL_RADIUS",
    "Latents",
    "Model",
    "Plate",
    "Site",
    "constrain",
    "constraints",
    "improper",
    "log_factors",
    "read_sites",
    "sample_prior",
    "transform_of",
    "unconstrain",
]
