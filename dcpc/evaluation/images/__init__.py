"""Images, scored: hidden halves that are predicted, and distances between sets of images.

completion  the hidden pixels of an image from the visible ones
frechet     Frechet distances between sets of images; features: what they are distances of
"""

from dcpc.evaluation.images.completion import Completion, MaskedModel, bottom_half, complete
from dcpc.evaluation.images.features import FeatureClassifier, InceptionError, InceptionFeatures
from dcpc.evaluation.images.frechet import (
    frechet_classifier_distance,
    frechet_distance,
    frechet_feature_distance,
    frechet_inception_distance,
)

__all__ = [
    "Completion",
    "FeatureClassifier",
    "InceptionError",
    "InceptionFeatures",
    "MaskedModel",
    "bottom_half",
    "complete",
    "frechet_classifier_distance",
    "frechet_distance",
    "frechet_feature_distance",
    "frechet_inception_distance",
]
