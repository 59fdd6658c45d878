"""Classical predictive coding: an energy of values and weights, and rules of what moves when.

nodes         values and the energies of their prediction errors; gaussian_nodes: Gaussian ones
network       a feed-forward network with nodes; the interface of all networks
energy_based  the networks of equilibrium propagation
relaxation    values and weights move down the energy, phase by phase
rules         inference learning, incremental, Z-IL: schedules of what moves when
equilibrium   equilibrium propagation: two relaxations, without and with a nudge
gradients     predictive-coding gradients of an `nn.Sequential`
parameters    which parameters are values, and which are weights
bridge        a network as a Pyro model
"""

from dcpc.networks.bridge import PyroNetwork
from dcpc.networks.energy_based import ConditionalGaussian, RestrictedHopfield
from dcpc.networks.equilibrium import EquilibriumPropagation
from dcpc.networks.gaussian_nodes import (
    FactorizedGaussianNode,
    GaussianNode,
    MultivariateGaussianNode,
    ScaledGaussianNode,
    SquaredErrorNode,
)
from dcpc.networks.gradients import PCGradients, pc_gradients
from dcpc.networks.network import EnergyNetwork, PredictiveCodingNetwork
from dcpc.networks.nodes import (
    Bias,
    CrossEntropyNode,
    FixedNode,
    FloatingNode,
    FunctionNode,
    Node,
)
from dcpc.networks.parameters import (
    Partition,
    eparameters,
    get_estep_params,
    get_mstep_params,
    get_named_estep_params,
    get_named_mstep_params,
    mparameters,
    partition,
)
from dcpc.networks.relaxation import Relaxation, RelaxationError, relax, sgd
from dcpc.networks.rules import (
    Backpropagation,
    IncrementalInferenceLearning,
    InferenceLearning,
    Learned,
    LearningRule,
    ScheduledLearning,
    ZeroDivergenceLearning,
)
from dcpc.networks.weights import WeightsError, load_weights, save_weights

__all__ = [
    "Backpropagation",
    "Bias",
    "ConditionalGaussian",
    "CrossEntropyNode",
    "EnergyNetwork",
    "EquilibriumPropagation",
    "FactorizedGaussianNode",
    "FixedNode",
    "FloatingNode",
    "FunctionNode",
    "GaussianNode",
    "IncrementalInferenceLearning",
    "InferenceLearning",
    "Learned",
    "LearningRule",
    "MultivariateGaussianNode",
    "Node",
    "PCGradients",
    "Partition",
    "PredictiveCodingNetwork",
    "PyroNetwork",
    "Relaxation",
    "RelaxationError",
    "RestrictedHopfield",
    "ScaledGaussianNode",
    "ScheduledLearning",
    "SquaredErrorNode",
    "WeightsError",
    "ZeroDivergenceLearning",
    "eparameters",
    "get_estep_params",
    "get_mstep_params",
    "get_named_estep_params",
    "get_named_mstep_params",
    "load_weights",
    "mparameters",
    "partition",
    "pc_gradients",
    "relax",
    "save_weights",
    "sgd",
]
