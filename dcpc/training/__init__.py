"""Training on PyTorch Lightning: modules, data, callbacks, and the `dcpc` command."""

from dcpc.training.amortised import AmortisedModule
from dcpc.training.classifier import ClassifierModule
from dcpc.training.data import ArrayData, DigitsData, ImageData, LabelledData
from dcpc.training.decision_boundary import DecisionBoundary
from dcpc.training.generative import GenerativeModule
from dcpc.training.hub import HubImages
from dcpc.training.measured import MeasuredModule
from dcpc.training.module import ParticleModule
from dcpc.training.moons import MoonsData
from dcpc.training.particles import ParticleStore, StoreError

__all__ = [
    "AmortisedModule",
    "ArrayData",
    "ClassifierModule",
    "DecisionBoundary",
    "DigitsData",
    "GenerativeModule",
    "HubImages",
    "ImageData",
    "LabelledData",
    "MeasuredModule",
    "MoonsData",
    "ParticleModule",
    "ParticleStore",
    "StoreError",
]
