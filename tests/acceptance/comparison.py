"""Runs a program and compares its posterior with the reference: one row of the table."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pyro
import torch
from torch import Tensor

from dcpc import DCPC
from dcpc.draws import describe
from dcpc.posterior import Posterior
from tests.acceptance.case import Program

LARGEST_Z = 4.0
SD_RATIOS = (0.9, 1.1)
LARGEST_DIFFERENCE = 0.02


@dataclass(frozen=True)
class Row:
    """What a row of the table says.

    Attributes:
        program: The program.
        backend: What it runs on: `graph`, `vmap` or `loop`.
        z: Largest difference of a mean, in Monte Carlo standard errors; zero without means.
        sd_ratios: Smallest and largest ratio of standard deviations to those of the reference.
        probability: Largest difference of a probability; zero without discrete latents.
        seconds: Wall time of division and run.
    """

    program: Program
    backend: str
    z: float
    sd_ratios: tuple[float, float]
    probability: float
    seconds: float

    @property
    def agrees(self) -> bool:
        """Whether all differences are in the bounds."""
        low, high = self.sd_ratios
        return (
            self.z <= LARGEST_Z
            and SD_RATIOS[0] <= low
            and high <= SD_RATIOS[1]
            and self.probability <= LARGEST_DIFFERENCE
        )


def compare(program: Program, seed: int = 0) -> Row:
    """Divides, runs and compares a program."""
    pyro.clear_param_store()
    start = time.perf_counter()
    engine = DCPC(program.model, num_particles=program.num_particles, **program.options)
    backend = engine.division(*program.args, **program.kwargs).program.name
    posterior = engine.run(
        *program.args,
        num_sweeps=program.num_sweeps,
        seed=seed,
        progress=False,
        **program.kwargs,
    )
    seconds = time.perf_counter() - start
    row = Row(program, backend, 0.0, (1.0, 1.0), 0.0, seconds)
    return against_reference(row, posterior)


def against_reference(row: Row, posterior: Posterior) -> Row:
    """The row with its differences filled in."""
    program, reference = row.program, row.program.reference()
    found = statistics(posterior, program)
    z, ratios, differences = [], [], []
    for name, mean in reference.mean.items():
        about, own_error = found[name], reference.error.get(name, torch.zeros(()))
        error = (about["mcse"].double() ** 2 + own_error**2).sqrt()
        z.append(((about["mean"] - mean).abs() / error).max())
        ratios.append((about["std"] / reference.std[name]).flatten())
    for name, probabilities in reference.probabilities.items():
        got = posterior.probabilities(name)
        size = min(got.shape[-1], probabilities.shape[-1])
        off = (got[..., :size] - probabilities[..., :size]).abs().amax(-1)
        off = off.masked_fill(program.unseen.get(name, torch.tensor(False)), 0.0)
        differences.append(torch.maximum(off.max(), probabilities[..., size:].sum(-1).max()))
    if z:
        every = torch.cat(ratios)
        limits = (float(every.min()), float(every.max()))
        row = replace(row, z=float(torch.stack(z).max()), sd_ratios=limits)
    if differences:
        row = replace(row, probability=float(torch.stack(differences).max()))
    return row


def statistics(posterior: Posterior, program: Program) -> Mapping[str, Mapping[str, Tensor]]:
    """Mean, standard deviation and Monte Carlo standard error of each quantity."""
    if program.quantities is None:
        return posterior.statistics()
    draws = {}
    for name, value in posterior.samples.items():
        kept = posterior.draws(name)  # (n, K, sweeps)
        draws[name] = kept.movedim(0, -1).unflatten(-1, value.shape[1:] or (1,))
        draws[name] = draws[name].reshape(*kept.shape[1:], *value.shape[1:])
    return {name: _describe(value, posterior) for name, value in program.quantities(draws).items()}


def _describe(value: Tensor, posterior: Posterior) -> dict[str, Tensor]:
    """Statistics of a quantity `(K, sweeps, ...)`."""
    shape = value.shape[2:]
    flat = value.flatten(2) if shape else value.unsqueeze(-1)
    families = None
    if posterior.families is not None and posterior.is_chains:
        own = posterior.families  # of the cells that the quantity has
        own = own[(slice(None), *map(slice, shape[: own.dim() - 1]))]
        own = own.reshape(own.shape + (1,) * (1 + len(shape) - own.dim()))
        families = own.expand(len(value), *shape).reshape(len(value), -1).T
    about = describe(flat.movedim(2, 0), [0.5], families, posterior.is_chains)
    return {key: about[key].reshape(shape) for key in ("mean", "std", "mcse")}
