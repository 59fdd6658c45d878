"""NUTS of NumPyro."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import Array
from numpyro.infer import NUTS

from experiments.benchmarks.peers.jax_density import (
    Position,
    compiled,
    joined,
    prepare,
    unstacked,
)
from experiments.benchmarks.peers.sampled import SAMPLING, Sampled, Stopwatch, Task

NUM_CHAINS = 4
NUM_WARMUP = 1000
NUM_SAMPLES = 1000


def sample(task: Task) -> Sampled:
    """Runs the chains one after the other: vectorised ones wait for the deepest tree.

    The kernel's transition is compiled once, for warm-up and draws of all chains. NumPyro's `MCMC`
    would compile it anew for every chain and every call of `run`, some 2 s each.
    """
    watch = Stopwatch()
    with watch.running("initial values"):
        begin, follow = jax.random.split(jax.random.key(task.seed))
        problem = prepare(task, begin, NUM_CHAINS)
        kernel = NUTS(potential_fn=lambda position: -problem.log_density(position))

        def one(state: Any, _: None) -> tuple[Any, tuple[Position, Array]]:
            state = kernel.sample(state, (), {})
            return state, (state.z, state.num_steps)

        def advance(state: Any) -> tuple[Any, tuple[dict[str, Array], Array]]:
            state, (positions, num_steps) = jax.lax.scan(one, state, None, NUM_SAMPLES)
            return state, (jax.vmap(problem.constrain)(positions), num_steps)

        keys = jax.random.split(follow, NUM_CHAINS)
        positions = unstacked(problem.positions)
        start = compiled(watch, partial(begin_chain, kernel), keys[0], positions[0])
        chains = [start(key, position) for key, position in zip(keys, positions, strict=True)]
        run = compiled(watch, advance, chains[0])
        watch.start("warm-up")
        for _ in range(NUM_WARMUP // NUM_SAMPLES):
            chains = jax.block_until_ready([run(chain)[0] for chain in chains])
        watch.start(SAMPLING)
        draws, num_steps = joined([run(chain)[1] for chain in chains])
    return Sampled(draws, watch.seconds, int(num_steps.sum()))


def begin_chain(kernel: NUTS, key: Array, position: Position) -> Any:
    """The kernel's state at a starting point."""
    return kernel.init(key, NUM_WARMUP, position)
