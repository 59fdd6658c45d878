"""Data that a model generates: from its prior, from given latents, along one coordinate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import pyro
import torch
from torch import Tensor

from dcpc.divide.handlers import (
    AtMeans,
    Substitute,
    WithoutData,
    is_random,
    mean_of,
    running,
    transform_of,
)
from dcpc.divide.model import Model
from dcpc.errors import DataError, OptionError
from dcpc.observed import Observed, as_arguments, main_tensor, named_tensors, num_data
from dcpc.seeding import seeded

__all__ = [
    "Decoded",
    "Generator",
    "decode",
    "latent_shapes",
    "latent_traversal",
    "matching_site",
    "prior_samples",
]


@runtime_checkable
class Generator(Protocol):
    """A model that draws its data by a method of its own.

    A program that is given data to look at, as an autoregressive one is, draws them anew only
    datum by datum, position by position.
    """

    def generate(self, num_data: int, /) -> tuple[Tensor, Tensor]:
        """Draws data, and tells the mean that each was drawn around; `(num_data, ...)` both."""


class Decoded(NamedTuple):
    """Generated data, and the decoder's mean that each was drawn around; `(N, *shape)` both."""

    samples: Tensor
    means: Tensor


def prior_samples(model: Model, x: Observed, seed: int) -> Decoded:
    """Draws as many data as `x` holds from the model, by ancestral sampling.

    Args:
        model: A Pyro program of `x`.
        x: Data to match in number, shape, type and device, all of the model's arguments; their
            values do not matter.
        seed: Seed of the draws; the global random state is left as it was.
    """
    if not isinstance(model, Generator):
        return decode(model, {}, x, seed)
    with seeded(seed), torch.no_grad():
        samples, means = model.generate(num_data(x))
    shape = main_tensor(x).shape
    return Decoded(samples.reshape(shape), means.reshape(shape))


def decode(
    model: Model, latents: Mapping[str, Tensor], x: Observed, seed: int, at_means: bool = False
) -> Decoded:
    """Generates data from given values of some latents.

    Args:
        model: A Pyro program of `x`.
        latents: Unconstrained values `(N, *event)` by site, on any device. The others are drawn
            from their conditional distributions, top down.
        x: Data to match in number, shape, type and device; their values do not matter.
        seed: Seed of the draws; the global random state is left as it was.
        at_means: Whether the other latents take their conditional means instead.

    Raises:
        OptionError: A value that is no latent of the model, or of another shape.
        DataError: No observed site of the model is `x`.
    """
    main, (args, kwargs) = main_tensor(x), as_arguments(x)
    latents = {name: u.to(main.device) for name, u in latents.items()}
    program = Substitute(latents, None)(WithoutData()(model))
    if at_means:
        program = AtMeans()(program)
    if latents:
        _check(model, latents, x)
    with seeded(seed), torch.no_grad(), running(model, args, kwargs):
        nodes = pyro.poutine.trace(program).get_trace(*args, **kwargs).nodes
    observed: dict[str, Any] = {n: site for n, site in nodes.items() if _was_observed(site)}
    return Decoded(
        samples=matching_site({name: site["value"] for name, site in observed.items()}, x),
        means=matching_site({name: mean_of(site["fn"]) for name, site in observed.items()}, x),
    )


def latent_traversal(
    model: Model,
    latents: Mapping[str, Tensor],
    site: str,
    dim: int,
    values: Sequence[float],
    x: Observed,
) -> Tensor:
    """Decoder's means as one coordinate of a latent moves and all else stays.

    Latents that are not given, which hang on the one that moves, take their conditional means.

    Args:
        model: A Pyro program of `x`.
        latents: Unconstrained values `(B, *event)` by site, that of `site` among them.
        site: The latent that moves.
        dim: Which coordinate of its flattened event.
        values: Where it moves to, in unconstrained coordinates.
        x: Data to match, `(B, *shape)`.

    Returns:
        `(B, len(values), *shape)`.

    Raises:
        OptionError: `site` is not among the latents, or has no such coordinate.
        DataError: No observed site of the model is `x`.
    """
    if site not in latents:
        raise OptionError(f"site must be one of the given latents {list(latents)}, got {site!r}")
    size = latents[site][0].numel()
    if not 0 <= dim < size:
        raise OptionError(f"dim must lie in [0, {size}) for site '{site}', got {dim}")
    means = []
    for value in values:
        moved = latents[site].clone()
        moved.view(len(moved), -1)[:, dim] = value
        means.append(decode(model, {**latents, site: moved}, x, seed=0, at_means=True).means)
    return torch.stack(means, 1)


def latent_shapes(model: Model, x: Observed) -> dict[str, torch.Size]:
    """Shapes `(*batch, *event)` of the latents' unconstrained values, by name, in program order.

    Runs the model once; the values of `x` do not matter, and the global random state stays.
    """
    args, kwargs = as_arguments(x)
    with seeded(0), torch.no_grad(), running(model, args, kwargs):
        nodes = pyro.poutine.trace(WithoutData()(model)).get_trace(*args, **kwargs).nodes
    return {
        name: transform_of(site["fn"]).inv(site["value"]).shape
        for name, site in nodes.items()
        if is_random(site) and not _was_observed(site)
    }


def matching_site(values: Mapping[str, Tensor], x: Observed) -> Tensor:
    """Selects the values of the first tensor of the data, in its shape.

    It is the observed site with as many elements; where several have, the one of that tensor's
    name. Where none has, it is those sites that have as many elements as one frame of data
    `(B, T, ...)`, stacked in the order of the program, if there are `T` of them.

    Args:
        values: Values or means of the observed sites, in the order of the program, each
            `(B, *event)`.
        x: Data `(B, *shape)`.

    Raises:
        DataError: No site is the data, or several are, or sites of frames are not as many as these.
    """
    name, first = named_tensors(x)[0]
    alike = {n: value for n, value in values.items() if value.numel() == first.numel()}
    if len(alike) > 1:
        named = {n: value for n, value in alike.items() if n in (name, f"{name}_observed")}
        alike = named or alike
    if len(alike) == 1:
        return next(iter(alike.values())).reshape(first.shape)
    frames = [] if alike else sites_of_frames(values, first)
    if frames:
        shape = (len(first), *first.shape[2:])
        return torch.stack([values[name].reshape(shape) for name in frames], 1)
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    raise DataError(
        f"one observed site of the model must have as many elements as the data, "
        f"{tuple(first.shape)}, to be compared with them, or its name; or one site for each of "
        f"their {first.shape[1] if first.dim() > 1 else 1} frames; got {len(alike)} of the sites "
        f"{shapes}"
    )


def sites_of_frames(values: Mapping[str, Tensor], x: Tensor) -> list[str]:
    """Sites that are one frame each of data `(B, T, ...)`, in the order of the program.

    None where those that have as many elements as a frame are not `T`.
    """
    if x.dim() < 2 or not x.shape[1]:
        return []
    size = x.numel() // x.shape[1]
    names = [name for name, value in values.items() if value.numel() == size]
    return names if len(names) == x.shape[1] else []


def _check(model: Model, latents: Mapping[str, Tensor], x: Observed) -> None:
    """Compares given latents with those that the model draws."""
    shapes = latent_shapes(model, x)
    for name, value in latents.items():
        if name not in shapes:
            raise OptionError(f"the model has no latent {name!r}; its latents are {list(shapes)}")
        if value.shape != shapes[name]:
            raise OptionError(
                f"the values of site '{name}' must have shape {tuple(shapes[name])} for "
                f"{num_data(x)} data, got {tuple(value.shape)}"
            )


def _was_observed(site: Mapping[str, Any]) -> bool:
    return is_random(site) and bool((site["infer"] or {}).get("was_observed"))
