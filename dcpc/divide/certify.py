"""Checks, by numbers, that a divided program is the model it came from.

Reading a graph off a captured program is fast and nearly always right; what is left is caught
here: values that left torch, tensors that were captured where they should have been inputs,
models that draw random numbers, and plates whose elements are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dcpc.divide.model import Latents
from dcpc.divide.program import Factors, Program
from dcpc.divide.sites import Plate, Site
from dcpc.errors import CertificationError

NUM_DISCRETE_REDRAWS = 3
"""Redraws of discrete latents in the test whether a plate's elements are independent."""

NUM_PLAIN_RUNS = 2
"""Particles that are compared with a plain run of the model."""


def certify_values(
    program: Program,
    factors: Factors,
    particles: Latents,
    tensors: Sequence[Tensor],
) -> None:
    """Compares every factor of the first particles with plain sequential runs of the model.

    Args:
        program: The whole program.
        factors: Its log-factors for the particles and arguments, `(K, *batch_shape)` by site.
        particles: Unconstrained latents.
        tensors: Tensors among the model's arguments.

    Raises:
        CertificationError: Naming the site, both values, and the usual causes.
    """
    with torch.no_grad():
        for k in range(min(NUM_PLAIN_RUNS, program.num_particles)):
            particle = {name: u[k] for name, u in particles.items()}
            plain = program.single(particle, tensors)
            compare_values(program, {name: value[k] for name, value in factors.items()}, plain)


def compare_values(program: Program, factors: Factors, plain: Factors) -> None:
    """Compares one particle's factors with those of a plain run of the model.

    Raises:
        CertificationError: Naming the site, both values, and the usual causes.
    """
    for name, expected in plain.items():
        got = factors[name]
        if got.shape != expected.shape or bool(differs(got, expected).any()):
            raise CertificationError(
                f"site '{name}': the {program.name} backend gives the log-density "
                f"{_show(got)} of shape {tuple(got.shape)}, a plain run of the model "
                f"{_show(expected)} of shape {tuple(expected.shape)}. Usual causes: the "
                "model is random outside its sample sites (dropout, or a plate with "
                "subsample_size, which draws its own subsample: give it subsample= "
                "instead), keeps state between runs, or passes a latent through numpy."
            )


def changed_factors(
    program: Program,
    base: Latents,
    redrawn: Latents,
    tensors: Sequence[Tensor],
    tolerance: float | None = None,
) -> dict[str, set[str]]:
    """Factors that change when one latent is redrawn and the others stay.

    Args:
        base: One configuration of the latents, in particle axes of size one.
        redrawn: The values to perturb with, of the same shapes.
        tolerance: Relative change that counts; by default more than rounding.

    Returns:
        For every latent, the names of the factors that changed.
    """
    probes = [{**base, name: redrawn[name]} for name in program.latents]
    factors = _evaluate(program, [base, *probes], tensors)
    changed: dict[str, set[str]] = {latent: set() for latent in program.latents}
    for name, values in factors.items():
        moved = differs(values[1:], values[:1], tolerance).reshape(len(probes), -1).any(1)
        for latent, yes in zip(program.latents, moved.tolist(), strict=True):
            if yes:
                changed[latent].add(name)
    return changed


def perturbation_dependencies(
    program: Program,
    particles: Latents,
    tensors: Sequence[Tensor],
    repeats: int = 3,
    tolerance: float | None = 0.0,
) -> dict[str, frozenset[str]]:
    """The dependency graph by perturbation: the union over a few redraws.

    With tolerance zero a change in the last bit is an edge: one edge too many costs time, one
    too few would be wrong.
    """
    num_particles = next(iter(particles.values())).shape[0]
    depends: dict[str, set[str]] = {name: set() for name in program.sites}
    for repeat in range(repeats):
        base, redrawn = _pair(program, particles, repeat, num_particles)
        for latent, names in changed_factors(program, base, redrawn, tensors, tolerance).items():
            for name in names:
                depends[name].add(latent)
    for latent in program.latents:
        depends[latent].add(latent)
    return {name: frozenset(latents) for name, latents in depends.items()}


def certify_graph(
    program: Program,
    depends: Mapping[str, frozenset[str]],
    particles: Latents,
    tensors: Sequence[Tensor],
) -> None:
    """Redraws one latent at a time; only factors that the graph connects to it may change.

    Raises:
        CertificationError: Naming the latent and the site whose factor changed.
    """
    found = perturbation_dependencies(program, particles, tensors, repeats=1, tolerance=None)
    for name, latents in found.items():
        missed = latents - depends[name] - ({name} if name in program.latents else set())
        if missed:
            latent = sorted(missed)[0]
            raise CertificationError(
                f"the log-density of site '{name}' changes with latent '{latent}', but the "
                "captured program has no path from one to the other. The model probably carries "
                f"'{latent}' out of torch on the way (numpy, .tolist(), a cache). Keep it a "
                "tensor, or pass backend='loop'."
            )


def independent_plates(
    program: Program,
    moved: Sequence[str],
    touched: Sequence[str],
    plates: Sequence[Plate],
    particles: Latents,
    tensors: Sequence[Tensor],
) -> tuple[Plate, ...]:
    """The plates whose elements are independent given everything else, by perturbation.

    The elements of a plate of size N get binary codes. For every bit, the latents `moved` are
    redrawn at the indices where the bit is one, then at those where it is zero; the factors
    `touched` must not change at the other indices. Any two indices differ in some bit, so every
    ordered pair is tested, with `2 ceil(log2 N)` evaluations. A discrete latent may matter at some
    of its values only: it is redrawn several times.
    """
    repeats = NUM_DISCRETE_REDRAWS if any(program.sites[name].discrete for name in moved) else 1
    for repeat in range(repeats):
        plates = _independent(program, moved, touched, plates, particles, tensors, repeat)
    return tuple(plates)


def _independent(
    program: Program,
    moved: Sequence[str],
    touched: Sequence[str],
    plates: Sequence[Plate],
    particles: Latents,
    tensors: Sequence[Tensor],
    repeat: int,
) -> list[Plate]:
    """The plates that pass the test of `independent_plates` with one redraw of the latents."""
    num_particles = next(iter(particles.values())).shape[0]
    base, redrawn = _pair(program, particles, repeat, num_particles)
    kept = []
    for plate in plates:
        if plate.size == 1:
            kept.append(plate)
            continue
        masks = _code_masks(plate.size)
        probes = [
            {
                **base,
                **{
                    name: torch.where(
                        _along(mask, program.sites[name], plate).to(base[name].device),
                        redrawn[name],
                        base[name],
                    )
                    for name in moved
                },
            }
            for mask in masks
        ]
        factors = _evaluate(program, [base, *probes], tensors, touched)
        if all(
            _unchanged_outside(mask, factors[name][index + 1], factors[name][0], plate)
            for index, mask in enumerate(masks)
            for name in touched
        ):
            kept.append(plate)
    return kept


def _code_masks(size: int) -> list[Tensor]:
    indices = torch.arange(size, device="cpu")
    bits = [(indices >> bit) & 1 == 1 for bit in range((size - 1).bit_length())]
    return [mask for bit in bits for mask in (bit, ~bit)]


def _along(mask: Tensor, site: Site, plate: Plate) -> Tensor:
    """The mask over a plate, shaped to broadcast against an unconstrained value of the site."""
    event_dims = len(site.unconstrained_shape) - len(site.batch_shape)
    return mask.reshape(-1, *(1,) * (-plate.dim - 1 + event_dims))


def _unchanged_outside(mask: Tensor, got: Tensor, base: Tensor, plate: Plate) -> bool:
    outside = ~mask.to(got.device)
    index = outside.nonzero().squeeze(-1)
    changed = differs(got.index_select(plate.dim, index), base.index_select(plate.dim, index))
    return not bool(changed.any())


def _pair(
    program: Program, particles: Latents, repeat: int, num_particles: int
) -> tuple[Latents, Latents]:
    """Two configurations that differ in every value, each with a particle axis of size one."""
    base = {name: u[repeat % num_particles][None] for name, u in particles.items()}
    other = {}
    for name, u in particles.items():
        site = program.sites[name]
        redrawn = base[name] if site.discrete else u[(repeat + 1) % num_particles][None]
        other[name] = site.other(redrawn, 0.5 * torch.randn_like(u[:1]), shift=1 + repeat)
    return base, other


def _evaluate(
    program: Program,
    configurations: Sequence[Latents],
    tensors: Sequence[Tensor],
    names: Sequence[str] | None = None,
) -> Factors:
    """Factors at many configurations, in chunks of the particle number of the capture."""
    names = list(program.sites) if names is None else names
    run: Callable[[Latents, Sequence[Tensor]], Factors] = program.select(names)
    with torch.no_grad():
        chunks = [
            {name: value[:count] for name, value in run(latents, tensors).items()}
            for latents, count in _batches(program, configurations)
        ]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in names}


def _batches(
    program: Program, configurations: Sequence[Latents]
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Configurations in batches of the capture's size, the last one padded, with their numbers."""
    size = program.num_particles
    for start in range(0, len(configurations), size):
        chunk = list(configurations[start : start + size])
        padded = chunk + [chunk[-1]] * (size - len(chunk))
        latents = {
            name: torch.cat([configuration[name] for configuration in padded])
            for name in program.latents
        }
        yield latents, len(chunk)


def differs(got: Tensor, expected: Tensor, tolerance: float | None = None) -> Tensor:
    """Elementwise: more than rounding apart; non-finite values of one kind are equal."""
    if tolerance is None:
        tolerance = 1e-4 if got.dtype == torch.float32 else 1e-9
    scale = expected.abs().nan_to_num(posinf=1.0).clamp(min=1.0)
    close = (got - expected).abs() <= tolerance * scale
    same = (got == expected) | (got.isnan() & expected.isnan())
    return ~(close | same)


def _show(value: Tensor) -> str:
    return f"{value.sum().item():.6g}"
