"""Lightning modules: what is trained, how, and what is measured of it.

base        `MeasuredModule`: the optimiser, held-out measurements, resumable randomness
generative  `GenerativeModule`, around a Pyro program of images: evidence, reconstructions
particle    `ParticleModule`, by particles that every datum keeps
warm_start  where particles start, and what an encoder learns from in turn
parameterization  the coordinates that particles are kept, moved and learned from in
amortised   `AmortisedModule`, a variational autoencoder
classifier  `ClassifierModule`, around an energy network
"""

from dcpc.training.modules.amortised import AmortisedModule
from dcpc.training.modules.base import LearningRateSchedule, MeasuredModule
from dcpc.training.modules.classifier import ClassifierModule
from dcpc.training.modules.generative import GenerativeModule, HeldOut
from dcpc.training.modules.parameterization import Parameterization
from dcpc.training.modules.particle import ParticleModule
from dcpc.training.modules.warm_start import Start

__all__ = [
    "AmortisedModule",
    "ClassifierModule",
    "GenerativeModule",
    "HeldOut",
    "LearningRateSchedule",
    "MeasuredModule",
    "Parameterization",
    "ParticleModule",
    "Start",
]
