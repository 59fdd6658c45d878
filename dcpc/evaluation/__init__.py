"""Measurements on data that were never trained on, each quantity under its own name.

evidence    how probable held-out data are: annealing, its temperatures, bounds
images      how good images are: completion of halves, forecasts of frames, Frechet distances
generation  data that a model generates, from its prior or from a pseudo-posterior; neighbours
particles   particles of a trained model, in files and without inference

classes     labels that a model predicts: error and calibration

quantities  names, units and meanings of what is measured, and tables of it

`batches` and `intensities` are what these share.
"""

from dcpc.evaluation.classes import Calibration, calibration, class_probabilities
from dcpc.evaluation.evidence import (
    PRIOR_SAMPLES,
    Bounds,
    Evaluation,
    ImportanceSampler,
    Setting,
    TemperatureStudy,
    evaluate,
    format_table,
    forward_pass,
    guide_bounds,
    held_out_inference,
    per_datum,
    prior_sample_estimate,
    summarise,
    temperature_study,
)
from dcpc.evaluation.generation import (
    Decoded,
    Neighbours,
    PseudoPosterior,
    decode,
    latent_traversal,
    matching_site,
    nearest_neighbours,
    prior_samples,
)
from dcpc.evaluation.images import (
    Completion,
    FeatureClassifier,
    Forecast,
    InceptionError,
    InceptionFeatures,
    MaskedModel,
    bottom_half,
    complete,
    forecast,
    frechet_classifier_distance,
    frechet_distance,
    frechet_feature_distance,
    frechet_inception_distance,
)
from dcpc.evaluation.particles import FrozenParticles, FrozenParticlesError, infer_and_freeze
from dcpc.evaluation.quantities import (
    Quantity,
    Result,
    format_results,
    held_out_tag,
    mean_error,
    quantity,
    results,
)

__all__ = [
    "PRIOR_SAMPLES",
    "Bounds",
    "Calibration",
    "Completion",
    "Decoded",
    "Evaluation",
    "FeatureClassifier",
    "Forecast",
    "FrozenParticles",
    "FrozenParticlesError",
    "ImportanceSampler",
    "InceptionError",
    "InceptionFeatures",
    "MaskedModel",
    "Neighbours",
    "PseudoPosterior",
    "Quantity",
    "Result",
    "Setting",
    "TemperatureStudy",
    "bottom_half",
    "calibration",
    "class_probabilities",
    "complete",
    "decode",
    "evaluate",
    "forecast",
    "format_results",
    "format_table",
    "forward_pass",
    "frechet_classifier_distance",
    "frechet_distance",
    "frechet_feature_distance",
    "frechet_inception_distance",
    "guide_bounds",
    "held_out_inference",
    "held_out_tag",
    "infer_and_freeze",
    "latent_traversal",
    "matching_site",
    "mean_error",
    "nearest_neighbours",
    "per_datum",
    "prior_sample_estimate",
    "prior_samples",
    "quantity",
    "results",
    "summarise",
    "temperature_study",
]
