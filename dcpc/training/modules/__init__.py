"""Lightning modules: what is trained, how, and what is measured of it.

base        `MeasuredModule`: the optimiser, held-out measurements, resumable randomness
generative  `GenerativeModule`, around a Pyro program of images: evidence, reconstructions
particle    `ParticleModule`, by particles that every datum keeps
amortised   `AmortisedModule`, a variational autoencoder
classifier  `ClassifierModule`, around an energy network
"""

from dcpc.training.modules.amortised import AmortisedModule
from dcpc.training.modules.base import LearningRateSchedule, MeasuredModule
from dcpc.training.modules.classifier import ClassifierModule
from dcpc.training.modules.generative import GenerativeModule
from dcpc.training.modules.particle import ParticleModule

__all__ = [
    "AmortisedModule",
    "ClassifierModule",
    "GenerativeModule",
    "LearningRateSchedule",
    "MeasuredModule",
    "ParticleModule",
]
