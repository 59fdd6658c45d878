"""A predictive coding network as a Pyro model, for the engine of this package.

With preset `pc`, `DCPC` then relaxes the values as `relax` does with plain gradient descent of the
same step size; with preset `dcpc` it samples their posterior.
"""

from __future__ import annotations

import pyro
from torch import Tensor, nn

from dcpc.errors import OptionError
from dcpc.networks.gaussian_nodes import GaussianNode
from dcpc.networks.network import PredictiveCodingNetwork
from dcpc.networks.nodes import CrossEntropyNode

__all__ = ["PyroNetwork"]


class PyroNetwork(nn.Module):
    """The Pyro program `z_l ~ p(z_l | f_l(z_{l-1}))` of a network of Gaussian nodes.

    Sites are named `z1, ..., zL`; the last one is the output, which may also be a
    `CrossEntropyNode`. The energy of the network is minus the log-density, up to a constant.

    Args:
        network: The network, whose weights the program shares.

    Raises:
        OptionError: A node has no distribution.
    """

    def __init__(self, network: PredictiveCodingNetwork) -> None:
        super().__init__()
        for index, node in enumerate(network.nodes[1:], 1):
            is_output = index == network.num_stages
            if not isinstance(node, (GaussianNode, CrossEntropyNode)) or (
                isinstance(node, CrossEntropyNode) and not is_output
            ):
                raise OptionError(
                    f"node {index}, a {type(node).__name__}, is no random variable: hidden nodes "
                    "must be Gaussian, the output Gaussian or a CrossEntropyNode"
                )
        self.network = network

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The Pyro program.

        Args:
            x: Inputs, `(batch, ...)`.
            y: Observed outputs `(batch, ...)`; None to draw them.

        Returns:
            The outputs.
        """
        hidden, index = x, 0
        with pyro.plate("data", len(x)):
            for module in self.network.layers:
                if isinstance(module, (GaussianNode, CrossEntropyNode)):
                    index += 1
                    observed = y if index == self.network.num_stages else None
                    hidden = pyro.sample(f"z{index}", module.distribution(hidden), obs=observed)
                else:
                    hidden = module(hidden)
        return hidden
