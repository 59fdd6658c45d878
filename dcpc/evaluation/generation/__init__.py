"""Data that a model generates.

samples           from its prior, from given latents, along one coordinate
pseudo_posterior  latents like those of the training data, to generate from
neighbours        the training data nearest to what was generated
"""

from dcpc.evaluation.generation.neighbours import Neighbours, nearest_neighbours
from dcpc.evaluation.generation.pseudo_posterior import PseudoPosterior
from dcpc.evaluation.generation.samples import (
    Decoded,
    decode,
    latent_shapes,
    latent_traversal,
    matching_site,
    prior_samples,
)

__all__ = [
    "Decoded",
    "Neighbours",
    "PseudoPosterior",
    "decode",
    "latent_shapes",
    "latent_traversal",
    "matching_site",
    "nearest_neighbours",
    "prior_samples",
]
