"""Recombine: the units' importance weights become one weighted particle posterior."""

from dcpc.recombine.resampling import (
    RESAMPLERS,
    Resampler,
    multinomial,
    residual,
    stratified,
    systematic,
    take_particles,
)
from dcpc.recombine.weights import LogWeights, zero_density

__all__ = [
    "RESAMPLERS",
    "LogWeights",
    "Resampler",
    "multinomial",
    "residual",
    "stratified",
    "systematic",
    "take_particles",
    "zero_density",
]
