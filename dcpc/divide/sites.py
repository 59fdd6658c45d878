"""The sites of a Pyro program: what `read_sites` finds out in one ordinary run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from traceback import walk_tb
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from dcpc.divide.handlers import (
    InitialiseFlat,
    TensorObservations,
    draws_subsample,
    improper,
    is_deterministic,
    is_identity,
    is_random,
    layers,
    plate_scale,
    quiet,
    running,
)
from dcpc.divide.masking import is_masked, selected
from dcpc.divide.supports import transform_of
from dcpc.divide.supports.discrete import DiscreteSupport, discrete_support, is_discrete
from dcpc.divide.supports.standardised import Standardised
from dcpc.errors import DataError, ModelError

NUM_RUNS = 4
"""Runs of the model by which a support is known to depend on a latent."""

Runs = Callable[[], list[dict[str, Any]]]
"""The messages of some more runs of the program, by site."""


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
        is_rescaled: Whether a handler raises the density to a power (`poutine.scale`).
        is_masked: Whether a tensor masks out elements of a latent.
        is_unbounded: Whether a latent is its own unconstrained value.
        is_standardised: Whether a latent's unconstrained value is standardised.
        discrete: Support of a discrete latent's components; None of a continuous one.
        is_enumerated: Whether the author wants a discrete latent summed out.
        support: Support of the distribution, for tables.
    """

    name: str
    is_observed: bool
    plates: tuple[Plate, ...]
    batch_shape: torch.Size
    unconstrained_shape: torch.Size = torch.Size()
    scale: float = 1.0
    is_improper: bool = False
    is_rescaled: bool = False
    is_masked: bool = False
    is_unbounded: bool = False
    is_standardised: bool = False
    discrete: DiscreteSupport | None = None
    is_enumerated: bool = False
    support: str = field(default="", compare=False)

    def other(self, u: Tensor, noise: Tensor, shift: int = 1) -> Tensor:
        """Other values of a latent, to see what depends on it.

        Args:
            u: Unconstrained values `(..., *batch, *event)`.
            noise: What to add to those of a continuous latent.
            shift: Which other value to take of a discrete one.
        """
        return u + noise if self.discrete is None else self.discrete.other(u, shift)

    def axis(self, plate: Plate) -> int | None:
        """Axis of a plate in the value; None where the value is the same for all of it."""
        axis = len(self.batch_shape) + plate.dim
        return axis if axis >= 0 and self.batch_shape[axis] == plate.size else None


@dataclass(frozen=True)
class Deterministic:
    """A value that the latents determine: `pyro.deterministic`, or a latent `Delta`.

    Attributes:
        plates: Vectorised plates around it, outermost first.
        shape: Shape of its value.
        event_dim: Number of event dimensions; the whole value where the author gave none.
    """

    plates: tuple[Plate, ...]
    shape: torch.Size
    event_dim: int

    def axis(self, plate: Plate) -> int | None:
        """Axis of a plate in the value; None where no axis of that size is at its place.

        A `pyro.deterministic` without `event_dim` declares all of its value an event; its plates
        are then looked for where a value without an event has them.
        """
        if plate not in self.plates:
            return None
        event_dim = 0 if self.event_dim == len(self.shape) else self.event_dim
        axis = len(self.shape) - event_dim + plate.dim
        return axis if axis >= 0 and self.shape[axis] == plate.size else None


def axis_names(site: Site | Deterministic, num_axes: int) -> tuple[str, ...]:
    """Names of a value's axes: those of plates, and empty ones for the others."""
    names = [""] * num_axes
    for plate in site.plates:
        axis = site.axis(plate)
        if axis is not None:
            names[axis] = plate.name
    return tuple(names)


class Sites(dict[str, Site]):
    """The random sites of a program by name, in program order.

    Attributes:
        deterministic: Its deterministic values by name.
    """

    def __init__(
        self,
        random: Mapping[str, Site],
        deterministic: Mapping[str, Deterministic] | None = None,
    ) -> None:
        super().__init__(random)
        self.deterministic = dict(deterministic or {})

    @property
    def latents(self) -> list[str]:
        """Names of the latents."""
        return [name for name, site in self.items() if not site.is_observed]

    @property
    def masked(self) -> list[str]:
        """Names of the latents that a tensor masks."""
        return [name for name, site in self.items() if site.is_masked]


def read_sites(
    model: Any, args: tuple, kwargs: dict, handler: TensorObservations | None = None
) -> Sites:
    """Runs the program once and describes its sites, in program order.

    Args:
        model: The Pyro program.
        args: Its arguments.
        kwargs: Its keyword arguments.
        handler: A handler to run it under, which may give latents their values.

    Raises:
        ModelError: A latent's support has no bijection to the reals, or is a discrete one that is
            not known or depends on a latent, or there are no latents, or no observations, or
            latents and observations on different devices.
        DataError: An observed value that is not masked out is NaN, or lies outside its
            distribution's support.
    """
    nodes = _nodes(model, args, kwargs, handler)
    _check_devices(nodes)
    again = cache(lambda: [_nodes(model, args, kwargs) for _ in range(NUM_RUNS)])
    with torch.no_grad(), quiet():
        for site in nodes.values():
            _check_subsample(site)
            _check_delta(site)
            _check_mask(site)
        sites = {
            name: _observed_site(site, again) if site["is_observed"] else _latent_site(site, again)
            for name, site in nodes.items()
            if is_random(site)
        }
        deterministic = {
            name: Deterministic(
                _plates(site, site["value"].shape), site["value"].shape, site["fn"].event_dim
            )
            for name, site in nodes.items()
            if is_deterministic(site)
        }
    _check_some(sites)
    return Sites(sites, deterministic)


def _nodes(
    model: Any, args: tuple, kwargs: dict, handler: TensorObservations | None = None
) -> dict[str, Any]:
    """The messages of one ordinary run of the program, by site."""
    handler = TensorObservations() if handler is None else handler
    with torch.no_grad(), running(model, args, kwargs, validates=True):
        handled = pyro.poutine.trace(InitialiseFlat()(handler(model)))
        try:
            return handled.get_trace(*args, **kwargs).nodes
        except ValueError as error:
            _raise_of_mask(error)
            raise


def _raise_of_mask(error: ValueError) -> None:
    """Turns Pyro's complaint about a mask into one that names the site."""
    what = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if "obs_mask" not in what and "BoolTensor" not in what:
        return
    calls = [f for f, _ in walk_tb(error.__traceback__) if f.f_code.co_name == "sample"]
    names = [str(frame.f_locals["name"]) for frame in calls if "name" in frame.f_locals]
    site = f"site '{names[0]}': " if names else ""
    raise DataError(
        f"{site}{what}. A mask is a boolean tensor with one entry per element of the site's "
        "plates; make it by mask.bool(), in the order of the data"
    ) from error


def _check_devices(nodes: Mapping[str, Any]) -> None:
    """Latents on the CPU do not meet data on an accelerator: one number may, particles may not."""
    places = {
        name: (msg["value"].device, msg["is_observed"])
        for name, msg in nodes.items()
        if is_random(msg) and isinstance(msg["value"], Tensor)
    }
    latent = next((n for n, (at, seen) in places.items() if at.type == "cpu" and not seen), None)
    other = next((n for n, (at, _) in places.items() if at.type != "cpu"), None)
    if latent is not None and other is not None:
        raise ModelError(
            f"the model has site '{latent}' on cpu and site '{other}' on {places[other][0]}; pass "
            "the data as arguments, which a model of plain numbers follows, make its constants on "
            "the same device, or call torch.set_default_device"
        )


def _check_some(sites: Mapping[str, Site]) -> None:
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


def _check_delta(msg: Any) -> None:
    """A latent `Delta` is a deterministic value, unless it has a density of its own."""
    if not is_deterministic(msg) or msg["is_observed"]:
        return
    for part in layers(msg["fn"]):
        if isinstance(part, dist.Delta) and bool((part.log_density != 0).any()):
            raise ModelError(
                f"site '{msg['name']}' is a latent Delta with a log_density, which is no "
                "distribution to infer; use pyro.deterministic for its value and pyro.factor for "
                "its log_density"
            )


def _check_subsample(msg: Any) -> None:
    """A plate that draws a subsample makes the density another one in every run.

    Raises:
        ModelError: It does.
    """
    if draws_subsample(msg):
        fn = msg["fn"]
        raise ModelError(
            f"plate '{msg['name']}' draws a subsample of {fn.subsample_size} of {fn.size} "
            "in every run of the model (subsample_size=), so that the density is "
            "another one each time; pass all the data, or give the plate its subsample "
            "(subsample=); algorithm='sgld' takes minibatches where latents lie outside of it"
        )


def _check_mask(msg: Any) -> None:
    """A mask has to fit the batch shape of its site.

    Raises:
        DataError: It does not.
    """
    if not is_random(msg) or not isinstance(msg["mask"], Tensor):
        return
    mask, fn = msg["mask"], msg["fn"]
    batch_shape = msg["value"].shape[: max(msg["value"].dim() - fn.event_dim, 0)]
    try:
        torch.broadcast_shapes(mask.shape, fn.batch_shape, batch_shape)
    except RuntimeError:
        raise DataError(
            f"site '{msg['name']}' has a mask of shape {tuple(mask.shape)}, but its batch shape is "
            f"{tuple(batch_shape)}; give it a mask that broadcasts to that"
        ) from None


def _latent_site(msg: Any, again: Runs) -> Site:
    fn, name = msg["fn"], msg["name"]
    try:
        transform = transform_of(fn)
        discrete = _discrete(msg, again) if is_discrete(fn) else None
    except NotImplementedError:
        raise ModelError(
            f"site '{name}' has support {fn.support}, for which torch.distributions.biject_to "
            "knows no bijection to the reals; reparameterise the site (for example with "
            "pyro.infer.reparam) or register a bijection."
        ) from None
    scale, rescaled = plate_scale(msg)
    batch_shape = msg["value"].shape[: msg["value"].dim() - fn.event_dim]
    return Site(
        name=name,
        is_observed=False,
        plates=_plates(msg, batch_shape),
        batch_shape=torch.Size(batch_shape),
        unconstrained_shape=transform.inv(msg["value"]).shape,
        scale=scale,
        is_improper=improper(msg),
        is_rescaled=rescaled,
        is_masked=is_masked(msg),
        is_unbounded=is_identity(transform),
        is_standardised=isinstance(fn, Standardised),
        discrete=discrete,
        is_enumerated=discrete is not None and bool(msg["infer"].get("enumerate")),
        support=str(fn.support).removesuffix("()"),
    )


def _discrete(msg: Any, again: Runs) -> DiscreteSupport:
    """Support of a discrete latent, the same in every run of the model.

    Raises:
        ModelError: The support depends on a latent, or is not one that is known.
    """
    fn, name = msg["fn"], msg["name"]
    try:
        support = discrete_support(fn)
    except NotImplementedError:
        raise ModelError(
            f"site '{name}' is a discrete latent with support {fn.support} "
            f"({type(fn).__name__}); those that are known are integers, one-hot vectors and "
            "multinomial counts. Write it with one of Pyro's distributions over these."
        ) from None
    if any(_bounds(fn.support) != _bounds(nodes[name]["fn"].support) for nodes in again()):
        raise ModelError(
            f"site '{name}' is a discrete latent whose support {fn.support} depends on another "
            "latent, so that its values cannot be enumerated; give it a fixed bound and the "
            "probability zero beyond the other latent (for example by a pyro.factor)"
        )
    return support


def _observed_site(msg: Any, again: Runs) -> Site:
    fn, name, value = msg["fn"], msg["name"], msg["value"]
    batch_shape = torch.broadcast_shapes(
        fn.batch_shape, value.shape[: max(value.dim() - fn.event_dim, 0)]
    )
    _check_observation(msg, again)
    scale, rescaled = plate_scale(msg)
    return Site(
        name=name,
        is_observed=True,
        plates=_plates(msg, batch_shape),
        batch_shape=batch_shape,
        scale=scale,
        is_rescaled=rescaled,
        support=str(fn.support).removesuffix("()") if hasattr(fn, "support") else "",
    )


def _check_observation(msg: Any, again: Runs) -> None:
    """Checks the entries of an observed value that no mask takes out.

    A support with a latent in it, as of `Uniform(0, theta)`, is no fault of the data: where they
    lie outside of it, a particle has density zero.
    """
    fn, name, value = msg["fn"], msg["name"], msg["value"]
    if not isinstance(value, Tensor) or value.numel() == 0:
        return
    if any(isinstance(part, _NAN_MEANS_MASKED) for part in layers(fn)):
        return
    mask = selected(msg)
    mask = torch.ones_like(value, dtype=torch.bool) if mask is None else mask
    num_nan = int((value.isnan() & mask).sum()) if value.is_floating_point() else 0
    if num_nan:
        raise DataError(
            f"the observed value of site '{name}' has {num_nan} NaN among "
            f"{value.numel()} entries; remove them, or mask them with pyro.poutine.mask"
        )
    if not all(getattr(part, "_validate_args", True) for part in layers(fn)):
        return
    try:
        support = fn.support
    except NotImplementedError:
        return
    outside = _outside(support, value, mask)
    if len(outside) and all(
        _bounds(support) == _bounds(nodes[name]["fn"].support) for nodes in again()
    ):
        raise DataError(
            f"the observed value of site '{name}' lies outside the support {support} of "
            f"{type(fn).__name__}: got, for example, {outside[0].item():.6g}. Rescale "
            "the data, or choose another likelihood (validate_args=False on the distribution "
            "switches this check off)."
        )


def _outside(support: Any, value: Tensor, mask: Tensor) -> Tensor:
    """Entries that a mask leaves in and that are outside of a support, `(n)`.

    An event of which a part is masked out is not looked at where its entries depend on each other.
    """
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    valid = support.check(value)
    for _ in range(value.dim() - valid.dim()):
        valid = valid.unsqueeze(-1)
    if support.event_dim:
        mask = mask.flatten(-support.event_dim).all(-1)[(..., *(None,) * support.event_dim)]
    wrong = ~valid & mask
    shape = torch.broadcast_shapes(value.shape, wrong.shape)
    return value.expand(shape)[wrong.expand(shape)]


def _bounds(constraint: Any) -> list[Any]:
    """The numbers in a support, which change from run to run where a latent is among them."""
    result: list[Any] = [type(constraint)]
    for value in vars(constraint).values():
        if isinstance(value, constraints.Constraint):
            result += _bounds(value)
        elif isinstance(value, Tensor):
            result.append(value.tolist())
        elif isinstance(value, int | float):
            result.append(value)
    return result


_NAN_MEANS_MASKED = (dist.NanMaskedNormal, dist.NanMaskedMultivariateNormal)


def _plates(msg: Any, batch_shape: torch.Size) -> tuple[Plate, ...]:
    """The vectorised plates around a site; a plate without a size takes that of its axis."""
    frames = sorted((f for f in msg["cond_indep_stack"] if f.vectorized), key=lambda f: f.dim)
    plates = []
    for frame in frames:
        if frame.size != -1:
            plates.append(Plate(frame.name, frame.dim, int(frame.size)))
        elif -frame.dim <= len(batch_shape):
            plates.append(Plate(frame.name, frame.dim, batch_shape[frame.dim]))
    return tuple(plates)


__all__ = ["Deterministic", "Plate", "Site", "Sites", "read_sites"]
