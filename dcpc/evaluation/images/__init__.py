"""Images, scored: hidden halves that are predicted, and distances between sets of images.

completion  the hidden pixels of an image from the visible ones
forecast    the last frames of sequences from the first ones
frechet     Frechet distances between sets of images; features: what they are distances of
"""

from dcpc.evaluation.images.completion import Completion, MaskedModel, bottom_half, complete
from dcpc.evaluation.images.features import FeatureClassifier, InceptionError, InceptionFeatures
from dcpc.evaluation.images.forecast import Forecast, forecast
from dcpc.evaluation.images.frechet import (
    frechet_classifier_distance,
    frechet_distance,
    frechet_feature_distance,
    frechet_inception_distance,
)

__all__ = [
    "Completion",
    "FeatureClassifier",
    "Forecast",
    "InceptionError",
    "InceptionFeatures",
    "MaskedModel",
    "bottom_half",
    "complete",
    "forecast",
    "frechet_classifier_distance",
    "frechet_distance",
    "frechet_feature_distance",
    "frechet_inception_distance",
]
