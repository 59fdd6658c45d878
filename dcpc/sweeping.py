"""The sweeps at the posterior, which an interrupt ends early and which may go on from there."""

from __future__ import annotations

import torch

from dcpc.approach.joint import joint_problem
from dcpc.continuation import Continuation
from dcpc.errors import DataError, OptionError
from dcpc.interruption import Interruption
from dcpc.posterior import Posterior
from dcpc.problem import Problem
from dcpc.progress import ProgressBar
from dcpc.recorder import Recorder
from dcpc.seeding import random_state
from dcpc.sweep import SweepState

TOLERANCE = 1e-3
"""Tolerance of log-densities, absolute and relative, of the same model and data.

The same program gives the same bits; another machine sums in another order.
"""


def sweep_to_end(
    problem: Problem, state: SweepState, recorder: Recorder, bar: ProgressBar, *, is_seeded: bool
) -> Posterior:
    """Makes the sweeps that a recorder waits for, or those until an interrupt.

    Args:
        problem: A model bound to its data.
        state: Particles that weigh by the posterior.
        recorder: What follows the sweeps.
        bar: Where progress is shown.
        is_seeded: Whether the random state is the run's own, to be kept where it is interrupted.
    """
    bar.stage("sweeps", recorder.num_left)
    state = problem.scored(state)
    with Interruption() as interruption:
        while recorder.num_left and not interruption.is_requested:
            before = state
            state, info = problem.sweep(
                before,
                adapt=recorder.num_done < recorder.num_warmup,
                # Step sizes need a while with the preconditioner they will be used with.
                adapt_preconditioner=recorder.num_done < recorder.num_warmup // 2,
                retargets=False,
            )
            recorder.add(before, state, info)
            bar.advance(info)
        return recorder.posterior(state, random_state() if is_seeded else {})


def continuation_of(posterior: Posterior) -> Continuation:
    """State for the continuation of an interrupted run.

    Raises:
        OptionError: It was not interrupted.
    """
    if not isinstance(posterior, Posterior) or posterior.continuation is None:
        what = "a complete one" if isinstance(posterior, Posterior) else repr(posterior)
        raise OptionError(
            f"resume needs the posterior of an interrupted run (one that is_partial), got {what}; "
            "for more sweeps use run(..., num_sweeps=...), or sweep(posterior.state, ...)"
        )
    return posterior.continuation


def with_blocks_of(problem: Problem, posterior: Posterior) -> Problem:
    """The problem with the blocks that a run has found by itself."""
    assert posterior.continuation is not None
    steps, found = posterior.continuation.leapfrog_steps, set(posterior.unit_of.values())
    if not steps and found == {unit.name for unit in problem.division.units}:
        return problem
    reasons = posterior.found_blocks
    if len(found) > 1:
        return _lengthened(problem.with_blocks(reasons) if reasons else problem, steps)
    joint = joint_problem(problem) or problem  # that it is another engine's, is found out later
    return _lengthened(joint.because(reasons), steps)


def _lengthened(problem: Problem, steps: int) -> Problem:
    """The problem with moves of a length that was tuned; 0 where it was not."""
    is_tuned = steps > 0 and problem.tunes_moves
    return problem.with_leapfrog_steps(steps) if is_tuned else problem


def check_continuation(problem: Problem, state: SweepState, continuation: Continuation) -> None:
    """Checks that a run goes on with the model and the data that it was interrupted with.

    Raises:
        OptionError: The units of the engine are others.
        DataError: The particles have another shape or another log-density.
    """
    log_joint = problem.log_joint(state)
    groups = {group.name for group in problem.division.groups if not group.is_discrete}
    adapted = set(state.adaptation)
    if adapted and adapted != groups:
        raise OptionError(
            f"the interrupted run moved the units {sorted(adapted)}, this engine moves "
            f"{sorted(groups)}; make it with the algorithm, schedule and blocks of that run"
        )
    if problem.tuned_steps != continuation.leapfrog_steps:
        raise OptionError(
            f"the interrupted run tuned its moves to {continuation.leapfrog_steps} leapfrog steps "
            f"(0: not tuned), this engine to {problem.tuned_steps}; make it with the move and the "
            "blocks of that run"
        )
    before = continuation.log_joint.to(log_joint)
    if before.shape != log_joint.shape or not torch.allclose(
        log_joint, before, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True
    ):
        raise DataError(
            "the particles of the interrupted run have another log-density under these arguments; "
            "resume it with the arguments, and the parameters, that the model had then"
        )
