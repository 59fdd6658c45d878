"""Training on Lightning: particles per datum, data, logging and the `dcpc` command."""

from dcpc.training.data import DigitsData, ImageData
from dcpc.training.module import ParticleModule
from dcpc.training.particles import ParticleStore, StoreError

__all__ = ["DigitsData", "ImageData", "ParticleModule", "ParticleStore", "StoreError"]
