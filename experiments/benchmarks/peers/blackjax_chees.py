"""ChEES-HMC of BlackJAX: trajectories of one length for all chains, adapted over all of them."""

from __future__ import annotations

from typing import Any

import blackjax
import jax
import numpy as np
import optax
from blackjax.adaptation.base import get_filter_adapt_info_fn
from jax import Array

from experiments.benchmarks.peers.jax_density import Position, prepare, timed
from experiments.benchmarks.peers.sampled import SAMPLING, Sampled, Stopwatch, Task

NUM_CHAINS = 256
NUM_WARMUP = 1000
NUM_SAMPLES = 100
LEARNING_RATE = 0.02
INITIAL_STEP_SIZE = 0.1


def sample(task: Task) -> Sampled:
    """Adapts and draws with vectorised chains, which all take as many steps at a time."""
    watch = Stopwatch()
    with watch.running("initial values"):
        start, adapt, draw = jax.random.split(jax.random.key(task.seed), 3)
        problem = prepare(task, start, NUM_CHAINS)
        kernel: dict[str, Any] = {}  # functions among the parameters, which jit cannot return

        def adaptation(key: Array, positions: Position) -> tuple[Any, dict[str, Any]]:
            warmup = blackjax.chees_adaptation(
                problem.log_density,
                NUM_CHAINS,
                adaptation_info_fn=get_filter_adapt_info_fn(),
                mass_matrix_estimation="diagonal",
            )
            (states, parameters), _ = warmup.run(
                key, positions, INITIAL_STEP_SIZE, optax.adam(LEARNING_RATE), NUM_WARMUP
            )
            kernel.update({name: value for name, value in parameters.items() if callable(value)})
            return states, {k: value for k, value in parameters.items() if not callable(value)}

        def sampling(key: Array, states: Any, parameters: dict[str, Any]) -> tuple[Any, Array]:
            step = blackjax.dynamic_hmc(problem.log_density, **parameters, **kernel).step

            def one(states: Any, key: Array) -> tuple[Any, tuple[Position, Array]]:
                states, info = jax.vmap(step)(jax.random.split(key, NUM_CHAINS), states)
                return states, (states.position, info.num_integration_steps)

            keys = jax.random.split(key, NUM_SAMPLES)
            _, (positions, num_steps) = jax.lax.scan(one, states, keys)
            by_chain = jax.tree.map(lambda value: value.swapaxes(0, 1), positions)
            return jax.vmap(jax.vmap(problem.constrain))(by_chain), num_steps.sum()

        states, parameters = timed(watch, "adaptation", adaptation, adapt, problem.positions)
        draws, num_gradients = timed(watch, SAMPLING, sampling, draw, states, parameters)
    return Sampled(jax.tree.map(np.asarray, draws), watch.seconds, int(num_gradients))
