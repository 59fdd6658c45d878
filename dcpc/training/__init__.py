"""Training on PyTorch Lightning: modules, data, callbacks, and the `dcpc` command."""

from dcpc.training.amortised import AmortisedModule
from dcpc.training.data import ArrayData, DigitsData, ImageData
from dcpc.training.generative import GenerativeModule
from dcpc.training.hub import HubImages
from dcpc.training.module import ParticleModule
from dcpc.training.particles import ParticleStore, StoreError

__all__ = [
    "AmortisedModule",
    "ArrayData",
    "DigitsData",
    "GenerativeModule",
    "HubImages",
    "ImageData",
    "ParticleModule",
    "ParticleStore",
    "StoreError",
]
