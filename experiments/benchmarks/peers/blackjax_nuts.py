"""NUTS of BlackJAX: as few chains as are usual, and as many as a vector unit is good for."""

from __future__ import annotations

from functools import partial
from typing import Any

import blackjax
import jax
import numpy as np
from blackjax.adaptation.base import get_filter_adapt_info_fn
from jax import Array

from experiments.benchmarks.peers.jax_density import (
    Position,
    Problem,
    compiled,
    joined,
    prepare,
    unstacked,
)
from experiments.benchmarks.peers.sampled import SAMPLING, Sampled, Stopwatch, Task

Adapted = tuple[Any, dict[str, Any], Position]
"""The state, the parameters and the visited positions of a chain."""

NUM_FEW = 4
NUM_MANY = 256
NUM_WARMUP = 1000
NUM_SAMPLES = 1000
ROUND = 50
"""Draws of each of many chains at a time; the first round is left out, as they forget in it which
chain they started from."""

NUM_ROUNDS = 2
"""Rounds that are kept."""


def sample_few(task: Task) -> Sampled:
    """Adapts four chains, each for itself, and draws from them, one after the other.

    Vectorised, four chains wait for the deepest tree, and take twice the time to compile.
    """
    watch = Stopwatch()
    with watch.running("initial values"):
        start, adapt, draw = jax.random.split(jax.random.key(task.seed), 3)
        problem = prepare(task, start, NUM_FEW)
        adapted = adapt_few(watch, problem, adapt)
        states = [(state, parameters) for state, parameters, _ in adapted]
        keys = jax.random.split(draw, NUM_FEW)
        run = compiled(watch, partial(chain, problem, NUM_SAMPLES), keys[0], *states[0])
        watch.start(SAMPLING)
        chains = [run(key, *state)[1:] for key, state in zip(keys, states, strict=True)]
        draws, num_gradients = joined(chains)
    return Sampled(draws, watch.seconds, int(num_gradients.sum()))


def sample_many(task: Task) -> Sampled:
    """Adapts four chains, and starts many from states of their second halves.

    Chains that start from one of the four lie side by side, so that R-hat compares their origins.
    All of them have the geometric mean of the four step sizes and the mean of the four metrics.
    """
    watch = Stopwatch()
    with watch.running("initial values"):
        start, adapt, draw = jax.random.split(jax.random.key(task.seed), 3)
        problem = prepare(task, start, NUM_FEW)
        adapted = joined(adapt_few(watch, problem, adapt))
        parameters, positions = shared_proposal(adapted[1]), spread_starts(adapted[2])
        begin = jax.vmap(partial(blackjax.nuts.init, logdensity_fn=problem.log_density))
        states = jax.jit(begin)(positions)
        many = jax.vmap(partial(chain, problem, ROUND), in_axes=(0, 0, None))
        keys = jax.random.split(draw, (1 + NUM_ROUNDS, NUM_MANY))
        run = compiled(watch, many, keys[0], states, parameters)
        watch.start("discarded draws")
        states, *_ = jax.block_until_ready(run(keys[0], states, parameters))
        watch.start(SAMPLING)
        rounds = []
        for key in keys[1:]:
            states, draws, num_gradients = run(key, states, parameters)
            rounds.append((draws, num_gradients))
        draws, num_gradients = joined(rounds, axis=1)
    return Sampled(draws, watch.seconds, int(num_gradients.sum()))


def adapt_few(watch: Stopwatch, problem: Problem, key: Array) -> list[Adapted]:
    """Adapts each of the few chains."""
    keys = jax.random.split(key, NUM_FEW)
    positions = unstacked(problem.positions)
    run = compiled(watch, partial(adaptation, problem), keys[0], positions[0])
    watch.start("adaptation")
    adapted = [run(key, position) for key, position in zip(keys, positions, strict=True)]
    return jax.block_until_ready(adapted)


def shared_proposal(parameters: dict[str, Any]) -> dict[str, Any]:
    """One step size and one metric from those of the few chains."""
    return {
        "step_size": np.exp(np.log(parameters["step_size"]).mean()),
        "inverse_mass_matrix": jax.tree.map(
            lambda value: value.mean(0), parameters["inverse_mass_matrix"]
        ),
    }


def spread_starts(visited: Position) -> Position:
    """Starting points `(NUM_MANY, ...)` among the states that the few chains have visited."""
    steps = np.linspace(NUM_WARMUP // 2, NUM_WARMUP - 1, NUM_MANY // NUM_FEW).astype(int)
    return jax.tree.map(lambda value: value[:, steps].reshape(NUM_MANY, *value.shape[2:]), visited)


def adaptation(problem: Problem, key: Array, position: Position) -> Adapted:
    """State, parameters, and the positions that were visited of one chain's adaptation."""
    positions_only = get_filter_adapt_info_fn(state_keys={"position"})
    warmup = blackjax.window_adaptation(
        blackjax.nuts, problem.log_density, adaptation_info_fn=positions_only
    )
    (state, parameters), info = warmup.run(key, position, num_steps=NUM_WARMUP)
    return state, parameters, info.state.position


def chain(
    problem: Problem, num_samples: int, key: Array, state: Any, parameters: dict[str, Any]
) -> tuple[Any, dict[str, Array], Array]:
    """Last state, draws and the numbers of gradients of one chain."""
    step = blackjax.nuts(problem.log_density, **parameters).step

    def one(state: Any, key: Array) -> tuple[Any, tuple[Position, Array]]:
        state, info = step(key, state)
        return state, (state.position, info.num_integration_steps)

    state, (positions, num_steps) = jax.lax.scan(one, state, jax.random.split(key, num_samples))
    return state, jax.vmap(problem.constrain)(positions), num_steps
