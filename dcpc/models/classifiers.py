"""Predictive coding networks that classify: ordinary multilayer perceptrons with nodes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from dcpc.networks import CrossEntropyNode, PredictiveCodingNetwork, SquaredErrorNode
from dcpc.networks.energy_based import activation_named, require_sizes

__all__ = ["Perceptron"]


class Perceptron(PredictiveCodingNetwork):
    """Fully connected layers; squared-error nodes between them, cross-entropy at the output.

    Args:
        sizes: Sizes of the input, the hidden layers and the output (one unit per class).
        activation: Name of the nonlinearity, one of `dcpc.networks.energy_based.ACTIVATIONS`.

    Raises:
        OptionError: Fewer than two sizes, one below 1, or an unknown activation.
    """

    def __init__(self, sizes: Sequence[int], activation: str = "leaky_relu") -> None:
        require_sizes(sizes)
        modules: list[nn.Module] = []
        phi = activation_named(activation)
        for above, below in pairwise(sizes[:-1]):
            modules += [nn.Linear(above, below), phi(), SquaredErrorNode(below)]
        modules += [nn.Linear(sizes[-2], sizes[-1]), CrossEntropyNode(sizes[-1])]
        super().__init__(*modules)
