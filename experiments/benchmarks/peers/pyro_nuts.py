"""NUTS of Pyro, on the density that torch's JIT compiles."""

from __future__ import annotations

from itertools import product
from typing import Any
from unittest.mock import patch

import pyro
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.mcmc import nuts
from torch import Tensor
from torch.distributions import biject_to

from experiments.benchmarks.peers.sampled import SAMPLING, Sampled, Stopwatch, Task

NUM_CHAINS = 2
NUM_WARMUP = 300
NUM_SAMPLES = 300
PLATES = 1
"""Depth of nested plates, which Pyro would read off a run of the model that draws from priors."""


def sample(task: Task) -> Sampled:
    """Runs the chains one after the other, in this process, so that its clock sees them all.

    Deterministic sites are computed after the clock has stopped.
    """
    watch = Stopwatch()
    num_gradients = 0
    integrate = nuts.velocity_verlet

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_gradients
        num_gradients += watch.stage == SAMPLING
        return integrate(*args, **kwargs)

    def begin(_: NUTS, __: object, stage: str, step: int) -> None:
        is_last = stage.startswith("Sample") or step == NUM_WARMUP - 1
        watch.start(SAMPLING if is_last else "warm-up")

    pyro.set_rng_seed(task.seed)
    chains = []
    with patch.object(nuts, "velocity_verlet", counting), watch.running("compilation"):
        for _ in range(NUM_CHAINS):
            watch.start("compilation")
            kernel = NUTS(
                task.model,
                jit_compile=True,
                ignore_jit_warnings=True,
                init_strategy=uniform_start,
                max_plate_nesting=PLATES,
            )
            mcmc = MCMC(
                kernel,
                num_samples=NUM_SAMPLES,
                warmup_steps=NUM_WARMUP,
                disable_progbar=True,
                hook_fn=begin,
            )
            mcmc.run(task.data)
            chains.append(mcmc.get_samples())
    samples = {name: torch.stack([chain[name] for chain in chains]) for name in chains[0]}
    samples |= deterministic_sites(task, samples)
    draws = {name: value.numpy() for name, value in samples.items()}
    return Sampled(draws, watch.seconds, num_gradients)


def uniform_start(site: dict[str, Any]) -> Tensor:
    """Unconstrained values uniform in (-2, 2), as NumPyro's; Pyro's needs draws of the prior."""
    bijection = biject_to(site["fn"].support)
    shape = bijection.inverse_shape(site["fn"].shape())
    return bijection(4.0 * torch.rand(shape) - 2.0)


def deterministic_sites(task: Task, samples: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values `(chains, draws, ...)` of the deterministic sites among the quantities."""
    names = sorted(task.sites() - samples.keys())
    if not names:
        return {}
    shape = next(iter(samples.values())).shape[:2]
    values: dict[str, list[Tensor]] = {name: [] for name in names}
    for index in product(*map(range, shape)):
        draw = {name: value[index] for name, value in samples.items()}
        trace = poutine.trace(poutine.condition(task.model, draw)).get_trace(task.data)
        for name in names:
            values[name].append(trace.nodes[name]["value"].detach())
    return {name: torch.stack(found).unflatten(0, shape) for name, found in values.items()}
