"""The log-density of a model for samplers in JAX, starting points, and the way back to sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from numpyro.infer.util import initialize_model

from experiments.benchmarks.peers.numpyro_models import MODELS
from experiments.benchmarks.peers.sampled import Stopwatch, Task

Position = dict[str, Array]


@dataclass(frozen=True)
class Problem:
    """A model for a sampler.

    Attributes:
        log_density: Log-density of unconstrained values by latent.
        positions: Starting points, `(chains, ...)` by latent, uniform in (-2, 2).
        constrain: Values of all sites from unconstrained values of the latents.
    """

    log_density: Callable[[Position], Array]
    positions: Position
    constrain: Callable[[Position], dict[str, Array]]


def bound(task: Task) -> Callable[[], None]:
    """The model of a task in NumPyro, without arguments: its data are constants."""
    return partial(MODELS[task.name], task.data)


def prepare(task: Task, key: Array, num_chains: int) -> Problem:
    """The model's density by NumPyro, with a starting point for every chain.

    NumPyro is traced only. Run as it is, its search for starting points takes some 2 s for
    compilation, which a log-density that is written by hand does not need.
    """
    traced = []

    def trace(key: Array) -> Position:
        traced.append(initialize_model(key, bound(task)))
        return traced[0].param_info.z

    shapes = jax.eval_shape(trace, key)

    def draw(key: Array) -> Position:
        keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
        return {
            name: jax.random.uniform(keys[name], (num_chains, *z.shape), minval=-2.0, maxval=2.0)
            for name, z in shapes.items()
        }

    potential, constrain = traced[0].potential_fn, traced[0].postprocess_fn
    return Problem(lambda position: -potential(position), jax.jit(draw)(key), constrain)


def compiled(watch: Stopwatch, function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """The function, compiled for arguments like these in a stage of its own."""
    watch.start("compilation")
    return jax.jit(function).lower(*args).compile()


def timed(watch: Stopwatch, stage: str, function: Callable[..., Any], *args: Any) -> Any:
    """The value of a function that is compiled first."""
    run = compiled(watch, function, *args)
    watch.start(stage)
    return jax.block_until_ready(run(*args))


def unstacked(values: Any) -> list[Any]:
    """One tree per chain, of arrays `(chains, ...)`."""
    arrays = jax.tree.map(np.asarray, values)
    count = len(jax.tree.leaves(arrays)[0])
    return [jax.tree.map(lambda value, i=i: value[i], arrays) for i in range(count)]


def joined(trees: Sequence[Any], axis: int | None = None) -> Any:
    """Arrays of several trees end to end along an axis, or along a new first one.

    NumPy's: every shape that JAX joins it compiles for.
    """
    join = np.stack if axis is None else partial(np.concatenate, axis=axis)
    return jax.tree.map(lambda *values: join([np.asarray(value) for value in values]), *trees)
