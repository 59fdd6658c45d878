"""Particles of a trained model.

frozen          used without any inference
particle_files  files of them: checkpoints, and small ones
"""

from dcpc.evaluation.particles.frozen import FrozenParticles, infer_and_freeze
from dcpc.evaluation.particles.particle_files import FrozenParticlesError

__all__ = [
    "FrozenParticles",
    "FrozenParticlesError",
    "infer_and_freeze",
]
