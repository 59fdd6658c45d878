"""What is measured on data that were never trained on, each quantity under its own name."""

from dcpc.evaluation.bounds import (
    PRIOR_SAMPLES,
    Bounds,
    ImportanceSampler,
    guide_bounds,
    prior_sample_estimate,
)
from dcpc.evaluation.completion import Completion, MaskedModel, bottom_half, complete
from dcpc.evaluation.features import FeatureClassifier, InceptionError, InceptionFeatures
from dcpc.evaluation.frechet import (
    frechet_classifier_distance,
    frechet_distance,
    frechet_feature_distance,
    frechet_inception_distance,
)
from dcpc.evaluation.frozen import FrozenParticles, infer_and_freeze
from dcpc.evaluation.held_out import (
    Evaluation,
    evaluate,
    format_table,
    held_out_inference,
    summarise,
)
from dcpc.evaluation.neighbours import Neighbours, nearest_neighbours
from dcpc.evaluation.particle_files import FrozenParticlesError
from dcpc.evaluation.pseudo_posterior import PseudoPosterior
from dcpc.evaluation.samples import (
    Decoded,
    decode,
    latent_traversal,
    matching_site,
    prior_samples,
)
from dcpc.evaluation.temperatures import Setting, TemperatureStudy, temperature_study

__all__ = [
    "PRIOR_SAMPLES",
    "Bounds",
    "Completion",
    "Decoded",
    "Evaluation",
    "FeatureClassifier",
    "FrozenParticles",
    "FrozenParticlesError",
    "ImportanceSampler",
    "InceptionError",
    "InceptionFeatures",
    "MaskedModel",
    "Neighbours",
    "PseudoPosterior",
    "Setting",
    "TemperatureStudy",
    "bottom_half",
    "complete",
    "decode",
    "evaluate",
    "format_table",
    "frechet_classifier_distance",
    "frechet_distance",
    "frechet_feature_distance",
    "frechet_inception_distance",
    "guide_bounds",
    "held_out_inference",
    "infer_and_freeze",
    "latent_traversal",
    "matching_site",
    "nearest_neighbours",
    "prior_sample_estimate",
    "prior_samples",
    "summarise",
    "temperature_study",
]
