"""`dcpc`, with all settings at their defaults but the number of particles."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any
from unittest.mock import patch

from dcpc import DCPC, inference
from dcpc.problem import Problem
from dcpc.recorder import Recorder
from dcpc.sweep import SweepState
from experiments.benchmarks.peers.sampled import SAMPLING, SUMMARY, Sampled, Stopwatch, Task


def sample(task: Task) -> Sampled:
    """Runs `DCPC(model, num_particles=...).run(data)`; its particles are the chains.

    The stages begin where the engine calls the methods that they are named after. A sweep counts
    as one gradient of every particle per score of the move, and one for a jump: it takes the score
    of every unit.

    Raises:
        RuntimeError: Particles were resampled while they were kept, so that they are no chains.
    """
    watch = Stopwatch()
    num_scores = 0
    is_tuned = False

    def begin_sweeps(*_: Any, **__: Any) -> str:
        nonlocal is_tuned
        is_tuned = True
        return "warm-up"

    def stage_of_sweep(problem: Problem, state: SweepState, adapt: bool = True, **_: Any) -> str:
        nonlocal num_scores
        if not is_tuned:
            return "tuning"
        if adapt:
            return "warm-up"
        jumps = any(learned.reference for learned in state.adaptation.values())
        num_scores += problem.parts.move.num_scores + jumps
        return SAMPLING

    with ExitStack() as stack:
        stages: list[tuple[Any, str, Callable[..., str]]] = [
            (Problem, "anneal_once", lambda problem, start, stage, *_, **__: stage),
            (inference, "sweep_to_end", begin_sweeps),
            (Problem, "sweep", stage_of_sweep),
            (Recorder, "posterior", lambda *_, **__: SUMMARY),
        ]
        for owner, name, stage_of in stages:
            method = begins(watch, getattr(owner, name), stage_of)
            stack.enter_context(patch.object(owner, name, method))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # the posterior keeps them
        stack.enter_context(watch.running("capture"))
        engine = DCPC(task.model, num_particles=task.num_particles)
        posterior = engine.run(task.data, seed=task.seed, progress=False)
    if not posterior.is_chains:
        raise RuntimeError("particles were resampled while they were kept: they are no chains")
    return Sampled(
        {name: value.numpy() for name, value in posterior.history.items()},
        watch.seconds,
        num_scores * task.num_particles,
        " ".join(posterior.warnings),
        {name: about["ess_bulk"].numpy() for name, about in posterior.statistics().items()},
    )


def begins(
    watch: Stopwatch, method: Callable[..., Any], stage_of: Callable[..., str]
) -> Callable[..., Any]:
    """The method, with a stage that begins whenever it is called."""

    @wraps(method)
    def timed(*args: Any, **kwargs: Any) -> Any:
        watch.start(stage_of(*args, **kwargs))
        return method(*args, **kwargs)

    return timed
