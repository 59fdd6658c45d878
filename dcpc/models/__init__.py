"""Models and encoders of the paper, and classifiers: ordinary Pyro programs and torch modules."""

from dcpc.models.bouncing_digit import BouncingDigit
from dcpc.models.classifiers import Perceptron
from dcpc.models.convolutional_generator import ConvolutionalGenerator, PGDGenerator
from dcpc.models.deep_latent_gaussian import DeepLatentGaussian
from dcpc.models.encoders import (
    ConvolutionalEncoder,
    EmbeddingEncoder,
    MLPEncoder,
    TopDownEncoder,
)
from dcpc.models.labelled_embedding import LabelledEmbedding
from dcpc.models.labelled_style import LabelledStyle
from dcpc.models.latent_transformer import CausalBlock, LatentTransformer
from dcpc.models.sequence_memory import SequenceMemory

__all__ = [
    "BouncingDigit",
    "CausalBlock",
    "ConvolutionalEncoder",
    "ConvolutionalGenerator",
    "DeepLatentGaussian",
    "EmbeddingEncoder",
    "LabelledEmbedding",
    "LabelledStyle",
    "LatentTransformer",
    "MLPEncoder",
    "PGDGenerator",
    "Perceptron",
    "SequenceMemory",
    "TopDownEncoder",
]
