"""Models and encoders of the paper, and classifiers: ordinary Pyro programs and torch modules."""

from dcpc.models.classifiers import Perceptron
from dcpc.models.convolutional_generator import ConvolutionalGenerator, PGDGenerator
from dcpc.models.deep_latent_gaussian import DeepLatentGaussian
from dcpc.models.encoders import ConvolutionalEncoder, MLPEncoder
from dcpc.models.labelled_embedding import LabelledEmbedding
from dcpc.models.latent_transformer import CausalBlock, LatentTransformer

__all__ = [
    "CausalBlock",
    "ConvolutionalEncoder",
    "ConvolutionalGenerator",
    "DeepLatentGaussian",
    "LabelledEmbedding",
    "LatentTransformer",
    "MLPEncoder",
    "PGDGenerator",
    "Perceptron",
]
