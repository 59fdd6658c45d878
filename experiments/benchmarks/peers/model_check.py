"""Whether the models in NumPyro are those in Pyro."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pyro
import torch
from jax import Array
from numpyro.infer.util import initialize_model
from pyro import poutine
from pyro.infer.mcmc.util import initialize_model as initialize_pyro_model
from torch import Tensor

from experiments.benchmarks.peers.jax_density import bound
from experiments.benchmarks.peers.pyro_nuts import PLATES, uniform_start
from experiments.benchmarks.peers.sampled import Task

NUM_POINTS = 5
TOLERANCE = 1e-6
"""Largest difference of log-densities, and of quantities; and 1e-10 of what is compared."""


def check_model(task: Task) -> float:
    """Compares a model in NumPyro with the one in Pyro, in double precision.

    Log-densities in unconstrained space may differ by a constant; the values of all sites must not
    differ.

    Args:
        task: The posterior.

    Returns:
        The largest difference of differences of log-densities between random points.

    Raises:
        ValueError: They are not the same.
    """
    pyro.set_rng_seed(task.seed)
    _, pyro_potential, inverse, _ = initialize_pyro_model(
        task.model, (task.data,), max_plate_nesting=PLATES, init_strategy=uniform_start
    )
    keys = jax.random.split(jax.random.key(task.seed), NUM_POINTS)
    points, potential, constrain, _ = initialize_model(keys, bound(task))
    ours, theirs = [], []
    for number in range(NUM_POINTS):
        point = jax.tree.map(lambda value, i=number: value[i], points.z)
        unconstrained = {name: to_torch(value) for name, value in point.items()}
        ours.append(float(pyro_potential(unconstrained)))
        theirs.append(float(potential(point)))
        values = {name: inverse[name].inv(u) for name, u in unconstrained.items()}
        check_sites(task, values, constrain(point))
    difference = np.subtract(ours, theirs)
    spread = float(difference.max() - difference.min())
    if not spread <= TOLERANCE + 1e-10 * float(np.abs(ours).max()):
        raise ValueError(
            f"{task.name}: the log-densities in Pyro and in NumPyro differ by {difference} at "
            f"{NUM_POINTS} points, but must differ by a constant"
        )
    return spread


def check_sites(task: Task, values: dict[str, Tensor], theirs: dict[str, Array]) -> None:
    """Compares the values of the latents and of the deterministic sites.

    Raises:
        ValueError: A site is missing or has another value.
    """
    trace = poutine.trace(poutine.condition(task.model, values)).get_trace(task.data)
    for name in sorted(task.sites()):
        ours = trace.nodes[name]["value"].detach().numpy()
        if name not in theirs or not np.allclose(ours, theirs[name], TOLERANCE, TOLERANCE):
            raise ValueError(
                f"{task.name}: site '{name}' is {ours} in Pyro, {theirs.get(name)} in NumPyro"
            )


def to_torch(value: Any) -> Tensor:
    """A copy of an array of JAX."""
    return torch.from_numpy(np.array(value))
