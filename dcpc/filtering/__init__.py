"""Time that goes on: the particles of a chain take in new observations, at a constant cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dcpc.divide.sites import read_sites
from dcpc.errors import OptionError
from dcpc.filtering.evidence import RunningError
from dcpc.filtering.filter import Filter, advance
from dcpc.filtering.genealogy import Generation
from dcpc.filtering.growth import Call, Growth
from dcpc.filtering.posterior import FilteredPosterior, posterior_of
from dcpc.filtering.steps import Steps
from dcpc.filtering.window import NUM_FREE, Bind
from dcpc.posterior import Posterior
from dcpc.problem import Problem
from dcpc.progress import ProgressBar
from dcpc.sweep import SweepState

__all__ = ["NUM_SWEEPS", "FilteredPosterior", "check_posterior", "extend"]

NUM_SWEEPS = 4
"""Sweeps after each observation by default."""


def extend(
    posterior: Posterior,
    call: Call,
    *,
    whole: Callable[[Call], Problem],
    bind: Bind,
    num_sweeps: int,
    bar: ProgressBar,
) -> FilteredPosterior:
    """Takes new observations in, one step after the other, as `DCPC.extend` describes it.

    Args:
        posterior: What the engine's `run` or `extend` returned.
        call: Arguments of the model, the old data in front.
        whole: Binds the engine's model to the arguments of a run.
        bind: Binds it to those of a window.
        num_sweeps: Sweeps after each observation.
        bar: Where progress is shown.

    Raises:
        DataError: The arguments are not the old ones with new rows.
        ModelError: The model is no chain of steps that are alike.
        DegenerateWeightsError: No particle has positive density.
    """
    assert posterior.origin is not None
    old = posterior.origin.call
    growth = Growth.between(posterior.origin.engine.model, old, call)
    if isinstance(posterior, FilteredPosterior):
        known = posterior.filter
    else:
        known = _start(posterior, growth, whole(old))
    bar.stage("observations", growth.num_new)
    for _ in range(growth.num_new):
        known = advance(known, growth, bind, num_sweeps)
        bar.step()
    return posterior_of(known)


def check_posterior(posterior: Any, engine: Any) -> None:
    """Looks whether a posterior is one that an engine can extend.

    Raises:
        OptionError: It is not.
    """
    if not isinstance(posterior, Posterior):
        raise OptionError(
            f"extend needs the posterior of run(...) or extend(...), got {posterior!r}"
        )
    why = ""
    if posterior.origin is None:
        why = "came from a file, a pickle or a run over minibatches, without engine and data"
    elif posterior.origin.engine is not engine:
        why = "was made by another engine"
    elif posterior.is_partial:
        why = "is partial: resume(...) it first"
    elif not posterior.is_exact:
        why = f"is that of algorithm {engine.algorithm.name!r}, which is not exact"
    if why:
        raise OptionError(
            f"extend needs a posterior that run(...) or extend(...) of this very engine returned; "
            f"this one {why}; call run(...) of DCPC(model, ...) on all the data"
        )


def _start(posterior: Posterior, growth: Growth, problem: Problem) -> Filter:
    """The filter after a run, before any new observation."""
    num_steps, division = growth.num_steps - growth.num_new, problem.division
    longer = read_sites(problem.model, *growth.cut(0, num_steps + 1))
    steps = Steps.between(division.model_sites, longer, num_steps)
    weights, error = posterior.state.log_weight, posterior.evidence.standard_error
    weights = weights.add(-weights.log_mean())
    nothing = torch.zeros_like(weights.log_mean())
    first_free = num_steps + 1 - NUM_FREE
    final = {
        name: z
        for name, z in posterior.samples.items()
        if (step := steps.step_of(name)) is not None and step < first_free
    }
    return Filter(
        num_steps=num_steps,
        steps=steps,
        order=steps.order(division.graph),
        state=SweepState(dict(posterior.state.latents), weights, posterior.state.log_joint),
        run=posterior.evidence,
        log_evidence=nothing.double(),
        error=RunningError.start(nothing if error is None else error, weights),
        last=Generation(final, None, None),
    )
