"""Particles that are kept, moved and learned from in coordinates of choice."""

from __future__ import annotations

from dataclasses import replace

from dcpc.divide.transport import transport
from dcpc.problem import Problem
from dcpc.sweep import SweepState

__all__ = ["transported"]


def transported(state: SweepState, source: Problem, target: Problem) -> SweepState:
    """Particles in the coordinates of another problem: the same model and data, held otherwise.

    Weights stay. The log-joint that they refer to is that of the new coordinates, so that a
    reweighting there multiplies them by the ratio of the densities *of these*: particles that are
    carried along with `e` take `p(x, e)` under new parameters over `p(x, e)` under those before.
    What moves keep of the particles stays as it is.

    Args:
        state: Particles of the source.
        source: The problem whose coordinates they are in.
        target: The one whose coordinates they are to be in.

    Raises:
        ModelError: A latent that the coordinates of others are relative to is summed out.
    """
    if source.division is target.division:
        return state
    latents, gain = transport(source.division, target.division, state.latents, source.arguments)
    return replace(state, latents=latents, log_joint=state.log_joint + gain, scored={})
