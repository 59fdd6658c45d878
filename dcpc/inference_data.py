"""A posterior in the groups of ArviZ."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from dcpc.chains import Draws, arranged, thinned
from dcpc.divide import Arguments, axis_names, read_sites
from dcpc.divide.sites import Deterministic, Site, Sites
from dcpc.errors import DCPCError, OptionError, require_at_least
from dcpc.replay import (
    log_densities,
    observed_values,
    posterior_predictions,
    prior_predictions,
)
from dcpc.seeding import seeded
from dcpc.threads import exclusive
from dcpc.version import __version__

if TYPE_CHECKING:
    from dcpc.posterior import Origin, Posterior

__all__ = ["GROUPS", "inference_data"]

GROUPS = (
    "posterior",
    "sample_stats",
    "log_likelihood",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "observed_data",
)

WITHOUT_MODEL = ("posterior", "sample_stats")
"""Groups that need nothing but the draws."""

Values = dict[str, Tensor]
Groups = dict[str, Values]


def inference_data(
    posterior: Posterior,
    groups: Sequence[str] | None,
    num_draws: int | None,
    num_prior: int,
    coords: Mapping[str, Sequence],
    dims: Mapping[str, Sequence[str]],
    seed: int,
) -> Any:
    """Implements `Posterior.to_arviz`."""
    try:
        import arviz
    except ImportError as error:
        raise DCPCError("to_arviz needs ArviZ; install it with: pip install arviz") from error
    require_at_least("num_prior", num_prior, 1)
    if num_draws is not None:
        require_at_least("num_draws", num_draws, 1)
    _check_labels(coords, dims)
    with exclusive("to_arviz"), seeded(seed):
        content, axes, notes = _content(posterior, groups, num_draws, num_prior)
    names = _dimensions(content, axes, dims)
    _check_coords(content, names, coords)
    arrays = {g: {n: z.cpu().numpy() for n, z in values.items()} for g, values in content.items()}
    from_dict: Any = arviz.from_dict
    if arviz.__version__.startswith("0."):
        data = from_dict(**arrays, coords=dict(coords), dims=names)
    else:
        data = from_dict(arrays, coords=dict(coords), dims=names)
    data.attrs.update(notes)
    data.posterior.attrs.update(notes)
    return data


def _content(
    posterior: Posterior, groups: Sequence[str] | None, num_draws: int | None, num_prior: int
) -> tuple[Groups, dict[str, tuple[str, ...]], dict[str, Any]]:
    """The groups' tensors, the plates on the axes of the sites, and notes on the whole."""
    origin = posterior.origin
    sites, arguments, data = None, None, {}
    if origin is not None:
        arguments = Arguments(*origin.call)
        sites = read_sites(origin.engine.model, *arguments.rebuild(arguments.tensors))
        data = observed_values(origin.engine.model, arguments)
    left_out = dict(_missing(origin, sites, data))
    wanted = _wanted(groups, left_out)
    draws = thinned(arranged(posterior), num_draws, data if _runs_model(wanted) else {})
    content: Groups = {"posterior": draws.values, "sample_stats": _sources(draws)}
    axes = dict(posterior.axis_names)
    if origin is not None:
        assert sites is not None
        assert arguments is not None
        content |= _of_model(origin.engine.model, arguments, sites, draws, wanted, num_prior)
        content["observed_data"] = data
        everything: dict[str, Site | Deterministic] = {**sites.deterministic, **sites}
        shapes = {n: z.dim() - 2 for n, z in draws.values.items()}
        shapes |= {n: z.dim() for n, z in data.items()}
        axes |= {n: axis_names(everything[n], k) for n, k in shapes.items() if n in everything}
    notes = _notes(posterior, draws, left_out if groups is None else {})
    return {group: content[group] for group in GROUPS if group in wanted}, axes, notes


def _of_model(
    model: Any,
    arguments: Arguments,
    sites: Sites,
    draws: Draws,
    wanted: Collection[str],
    num_prior: int,
) -> Groups:
    """The groups for which the model has to be run."""
    content: Groups = {}
    latents = {name: z.flatten(0, 1) for name, z in draws.values.items() if name in sites}
    if {"log_likelihood", "sample_stats"} & set(wanted):
        likelihood, joint = log_densities(model, arguments, latents)
        content["log_likelihood"] = _in_chains(likelihood, draws.shape)
        lp = _in_chains({"lp": joint}, draws.shape)
        content["sample_stats"] = {**lp, **_sources(draws)}
    if "posterior_predictive" in wanted:
        drawn = posterior_predictions(model, arguments, latents)
        content["posterior_predictive"] = _in_chains(drawn, draws.shape)
    if {"prior", "prior_predictive"} & set(wanted):
        values, data = prior_predictions(model, arguments, num_prior)
        kept = {name: z for name, z in values.items() if name in draws.values}
        content["prior"] = _in_chains(kept, (1, num_prior))
        content["prior_predictive"] = _in_chains(data, (1, num_prior))
    return content


def _in_chains(values: Mapping[str, Tensor], shape: tuple[int, ...]) -> Values:
    return {name: z.unflatten(0, shape) for name, z in values.items()}


def _sources(draws: Draws) -> Values:
    return {"particle": draws.particle, "sweep": draws.sweep}


# -- which groups ------------------------------------------------------------------------------


def _missing(
    origin: Origin | None, sites: Sites | None, data: Mapping[str, Tensor]
) -> Iterator[tuple[str, str]]:
    """Groups that cannot be made, and why."""
    if origin is None or sites is None:
        reason = "the model and its data, which minibatches, files and pickles leave out"
        yield from ((group, f"it needs {reason}") for group in GROUPS if group not in WITHOUT_MODEL)
        return
    flat = [name for name, site in sites.items() if site.is_improper]
    if flat:
        reason = f"site '{flat[0]}' has an improper prior, which cannot be drawn from"
        yield from ((group, reason) for group in ("prior", "prior_predictive"))
    if not data:
        reason = "the model has no observed site but pyro.factor"
        names = ("log_likelihood", "posterior_predictive", "prior_predictive", "observed_data")
        yield from ((group, reason) for group in names)


def _wanted(groups: Sequence[str] | None, left_out: Mapping[str, str]) -> tuple[str, ...]:
    if groups is None:
        return tuple(group for group in GROUPS if group not in left_out)
    for group in [groups] if isinstance(groups, str) else groups:
        if group not in GROUPS:
            raise OptionError(f"groups must be some of {', '.join(GROUPS)}, got {group!r}")
        if group in left_out:
            raise OptionError(f"groups: there is no {group!r}: {left_out[group]}")
    return ("posterior", *groups)


def _runs_model(wanted: Collection[str]) -> bool:
    return bool({"log_likelihood", "posterior_predictive"} & set(wanted))


# -- names -------------------------------------------------------------------------------------


def _check_labels(coords: Any, dims: Any) -> None:
    """Checks that both are mappings to lists, and that dimensions are no variables of ArviZ."""
    for option, example, value in (
        ("coords", '{"school": ["A", "B"]}', coords),
        ("dims", '{"theta": ["school"]}', dims),
    ):
        entries = value.values() if isinstance(value, Mapping) else [value]
        wrong = next((e for e in entries if isinstance(e, str) or not hasattr(e, "__len__")), None)
        if wrong is not None or not isinstance(value, Mapping):
            got = value if wrong is None else wrong
            raise OptionError(f"{option} must map names to lists, as in {example}, got {got!r}")


def _dimensions(
    content: Groups, axes: Mapping[str, tuple[str, ...]], given: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Names of the dimensions of every variable: the user's, those of plates, or ArviZ's own.

    Raises:
        OptionError: The user's are of no variable, or not as many as the variable has.
    """
    sizes: dict[str, int] = {}
    shapes = dict(_shapes(content))
    result: dict[str, list[str]] = {}
    taken = {"chain", "draw", *shapes}
    for name in {"chain", "draw"} & shapes.keys():
        raise OptionError(
            f"site '{name}' has the name of a dimension of ArviZ; give it another one in the model"
        )
    for name, names in given.items():
        if name not in shapes:
            raise OptionError(f"dims names '{name}', but the sites are {sorted(shapes)}")
        if clash := taken & set(names):
            raise OptionError(
                f"dims['{name}'] gives an axis the name '{min(clash)}', which a site or ArviZ has; "
                "choose another one"
            )
    for name, shape in shapes.items():
        names = list(given.get(name, ()))
        if name in given and len(names) != len(shape):
            raise OptionError(
                f"dims['{name}'] must name {len(shape)} axes, those of shape {shape}, got {names}"
            )
        for axis, plate in enumerate(axes.get(name, ()) if not names else ()):
            plate = f"{plate}_plate" if plate in ("chain", "draw") else plate
            alike = bool(plate) and sizes.setdefault(plate, shape[axis]) == shape[axis]
            names.append(plate if alike and plate not in names else f"{name}_dim_{axis}")
        if names:
            result[name] = names
    return result


def _shapes(content: Groups) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Shapes of every variable; of a likelihood `(*batch)`, where no other group has its site."""
    for group in ("log_likelihood", *(g for g in content if g != "log_likelihood")):
        for name, z in content.get(group, {}).items():
            if group != "sample_stats":
                yield name, tuple(z.shape if group == "observed_data" else z.shape[2:])


def _check_coords(
    content: Groups, names: Mapping[str, Sequence[str]], coords: Mapping[str, Sequence]
) -> None:
    shapes = dict(_shapes(content))
    sizes = {
        dim: size
        for site, own in names.items()
        for dim, size in zip(own, shapes[site], strict=True)
    }
    for dim, labels in coords.items():
        if dim not in sizes:
            raise OptionError(f"coords names '{dim}', but the dimensions are {sorted(sizes)}")
        if len(labels) != sizes[dim]:
            raise OptionError(
                f"coords['{dim}'] must have {sizes[dim]} labels, one for each element of the "
                f"dimension, got {len(labels)}"
            )


def _notes(posterior: Posterior, draws: Draws, left_out: Mapping[str, str]) -> dict[str, Any]:
    """Attributes that files can hold."""
    notes: dict[str, Any] = {
        "inference_library": "dcpc",
        "inference_library_version": __version__,
        "num_particles": posterior.num_particles,
        "arrangement": draws.arrangement,
        "warnings": "\n".join(posterior.warnings),
    }
    if posterior.evidence.log_evidence is not None:
        notes["log_evidence"] = np.asarray(posterior.log_evidence.cpu()).reshape(-1)
        notes["log_evidence_se"] = np.asarray(posterior.log_evidence_se.cpu()).reshape(-1)
    if left_out:
        notes["left_out"] = "\n".join(f"{group}: {why}" for group, why in left_out.items())
    return notes
