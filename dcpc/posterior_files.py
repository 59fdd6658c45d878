"""Files of posteriors: `Posterior.save` and `Posterior.load`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dcpc.errors import FileError
from dcpc.io import check_entries, read_tensors, write_tensors
from dcpc.plain import Misfit, build, count_not_finite, plain

if TYPE_CHECKING:
    from dcpc.continuation import Continuation
    from dcpc.posterior import Posterior

__all__ = ["read", "write"]

FORMAT = "dcpc-posterior-5"
ROOT = "posterior"


def write(posterior: Posterior, path: str | Path) -> None:
    """Writes a posterior as plain tensors, whole or not at all.

    Raises:
        FileError: The disk is full, or the folder cannot be written to. What was there stays.
    """
    content = plain(posterior)
    counts = count_not_finite(content, ROOT)
    write_tensors({"format": FORMAT, "not_finite": counts, ROOT: content}, path)


def read(kind: type[Posterior], path: str | Path, device: torch.device | str = "cpu") -> Posterior:
    """Reads what `write` wrote, bit for bit, without running pickled code.

    Checksums, names, types, shapes and the numbers that are not finite have to be those of a
    posterior.

    Raises:
        FileError: There is no such file, it is damaged, or it is the file of something else.
    """
    check_entries(path)
    content = read_tensors(path)
    if content is None or content.get("format") != FORMAT:
        got = "other objects" if content is None else f"format {content.get('format')!r}"
        raise FileError(
            f"'{path}' is no file of Posterior.save: expected tensors in format '{FORMAT}', got "
            f"{got}"
        )
    try:
        posterior: Posterior = build(kind, content.get(ROOT), ROOT, device)
        misfit = next(_misfits(posterior), None)  # what comes after the first one builds on it
        if misfit is not None:
            entry, expected, got = misfit
            raise Misfit(f"entry '{ROOT}.{entry}' must have {expected}, got {got}")
        counts = build(dict[str, int], content.get("not_finite"), "not_finite")
        for entry, count in count_not_finite(content[ROOT], ROOT).items():
            if count != counts.get(entry):
                expected = f"{counts.get(entry, 0)} numbers that are NaN or infinite"
                raise Misfit(f"entry '{entry}' must have {expected}, got {count}")
    except Misfit as error:
        raise FileError(
            f"'{path}' holds no posterior as Posterior.save writes it: {error}; save it again"
        ) from error
    return posterior


Found = Iterator[tuple[str, str, str]]
"""Entries that do not fit the others: name, what was expected, what is there."""


def _misfits(posterior: Posterior) -> Found:
    state, samples = posterior.state, posterior.samples
    weights = posterior.log_weight
    count, population = len(weights), tuple(weights.shape[1:])
    yield from _shape("state.log_joint", state.log_joint, weights.shape)
    for name, u in state.latents.items():
        yield from _particles(f"state.latents.{name}", u, count)
        if not u.is_floating_point():
            yield f"state.latents.{name}", "floating-point numbers", str(u.dtype)
    for kind, memory in state.memory.items():
        yield from _like(f"state.memory.{kind}", memory, state.latents)
    if not samples:
        yield "samples", "at least one site", "none"
    yield from _names("population_axes", posterior.population_axes, samples)
    for name, z in samples.items():
        yield from _particles(f"samples.{name}", z, count)
        axes = posterior.population_axes[name]
        sizes = tuple(z.shape[axis] for axis in axes if 0 < axis < z.dim())
        if len(sizes) < len(axes) or sizes != population:
            yield f"population_axes.{name}", f"axes of sizes {population}", f"{axes} in {z.shape}"
    if posterior.axis_names:
        yield from _names("axis_names", posterior.axis_names, samples)
        for name, names in posterior.axis_names.items():
            if len(names) != samples[name].dim() - 1:
                expected = f"{samples[name].dim() - 1} names"
                yield f"axis_names.{name}", expected, str(len(names))
    if posterior.history:
        num_kept = next(iter(posterior.history.values())).shape[1:2].numel()
        yield from _like("history", posterior.history, samples, (count, num_kept))
    for entry, value in vars(posterior.evidence).items():
        if isinstance(value, Tensor):
            yield from _shape(f"evidence.{entry}", value, population)
    yield from _families("families", posterior.families, weights)
    for name in (*posterior.discrete, *posterior.conditional_probabilities):
        if name not in samples:
            yield "discrete", f"sites of the samples, {sorted(samples)}", name
    if posterior.continuation is not None:
        yield from _continuation(posterior.continuation, state.latents, weights)


def _continuation(told: Continuation, latents: Mapping[str, Tensor], weights: Tensor) -> Found:
    where = "continuation"
    yield from _shape(f"{where}.log_joint", told.log_joint, weights.shape)
    yield from _families(f"{where}.families", told.families, weights)
    if not (0 <= told.num_done < told.num_sweeps and 0 <= told.num_warmup <= told.num_sweeps):
        expected = f"less than num_sweeps, {told.num_sweeps}, made, and no more of them warm-up"
        yield f"{where}.num_done", expected, f"{told.num_done} and {told.num_warmup}"
    for entry in ("keep_every", "leapfrog_steps"):
        if getattr(told, entry) < 0:
            yield f"{where}.{entry}", "0 or more", str(getattr(told, entry))
    if told.kept:
        num_kept = next(iter(told.kept.values())).shape[:1].numel()
        yield from _like(f"{where}.kept", told.kept, latents, (num_kept, len(weights)))
    if told.sums.squared_moves:
        yield from _like(f"{where}.sums.squared_moves", told.sums.squared_moves, latents, ())
    for device, state in told.random_state.items():
        if state.dtype != torch.uint8 or state.dim() != 1:
            got = f"{state.dtype} {tuple(state.shape)}"
            yield f"{where}.random_state.{device}", "the bytes of a generator", got
    if told.random_state and "cpu" not in told.random_state:
        yield f"{where}.random_state", "that of the CPU", str(list(told.random_state))


def _names(entry: str, got: Mapping[str, Any], wanted: Mapping[str, Any]) -> Found:
    if got.keys() != wanted.keys():
        yield entry, f"the sites {sorted(wanted)}", str(sorted(got))


def _like(
    entry: str,
    got: Mapping[str, Tensor],
    sites: Mapping[str, Tensor],
    leading: tuple[int, ...] | None = None,
) -> Found:
    """Names and shapes are those of the sites, with other leading axes than the particles'."""
    yield from _names(entry, got, sites)
    for name, value in got.items():
        shape = sites[name].shape
        yield from _shape(
            f"{entry}.{name}", value, shape if leading is None else (*leading, *shape[1:])
        )


def _shape(entry: str, got: Tensor, wanted: tuple[int, ...]) -> Found:
    if tuple(got.shape) != tuple(wanted):
        yield entry, f"shape {tuple(wanted)}", f"{tuple(got.shape)}"


def _particles(entry: str, got: Tensor, count: int) -> Found:
    if got.dim() == 0 or len(got) != count:
        yield entry, f"{count} particles on its first axis", f"shape {tuple(got.shape)}"


def _families(entry: str, got: Tensor | None, weights: Tensor) -> Found:
    if got is None:
        return
    yield from _shape(entry, got, weights.shape)
    if got.dtype != torch.int64 or bool(((got < 0) | (got >= len(weights))).any()):
        yield entry, f"indices below {len(weights)}", f"{got.dtype} up to {got.max()}"
