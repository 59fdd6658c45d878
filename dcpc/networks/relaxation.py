"""Relaxation: values move down the energy, and with them, where a schedule says so, weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dcpc.errors import DCPCError, OptionError
from dcpc.networks.network import EnergyNetwork, sum_parts

__all__ = [
    "OptimizerFactory",
    "Phase",
    "Relaxation",
    "RelaxationError",
    "constant_drive",
    "finite_energy",
    "move",
    "relax",
    "require_separate_steps",
    "sgd",
]

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
"""Makes an optimiser of some parameters, as `partial(torch.optim.SGD, lr=0.1)` does."""


class RelaxationError(DCPCError):
    """An energy, an error or a loss became NaN or infinite; says where, and at which step."""


@dataclass(frozen=True)
class Phase:
    """Step of a phase: what moves at once, on the gradient of one evaluation of the energy.

    Attributes:
        values: Nodes, 0 to L; clamped and frozen ones stay where they are.
        weights: Stages, 1 to L.
    """

    values: Sequence[int] = ()
    weights: Sequence[int] = ()


@dataclass(frozen=True)
class Relaxation:
    """Record of a relaxation.

    Attributes:
        num_steps: Steps taken.
        change: The largest change of any entry of a value in the last step.
        energy: Mean over the samples before each step, `(num_steps,)`.
    """

    num_steps: int
    change: float
    energy: Tensor


def sgd(step_size: float) -> OptimizerFactory:
    """Plain gradient descent.

    Raises:
        OptionError: No positive step size.
    """
    if not step_size > 0.0:
        raise OptionError(f"step_size must be positive, got {step_size}")
    return partial(torch.optim.SGD, lr=step_size)


def require_separate_steps(value_optimizer: OptimizerFactory) -> None:
    """Checks that an optimiser of values steps every sample on its own gradient.

    Raises:
        OptionError: It cannot be made, asks for more than gradients, or mixes samples.
    """
    moved = []
    for other in (1.0, 100.0):
        probe = nn.Parameter(torch.zeros(2, 3))
        probe.grad = torch.tensor([[1.0, 2.0, 3.0], [other, -1.0, 1.0]])
        try:
            value_optimizer([probe]).step()
        except (TypeError, ValueError, RuntimeError) as error:
            raise OptionError(
                f"value_optimizer must make an optimiser that steps on gradients alone: {error}; "
                "take one such as torch.optim.SGD or torch.optim.Adam"
            ) from error
        moved.append(probe.detach()[0])
    if not torch.equal(*moved):
        raise OptionError(
            "value_optimizer makes a sample's step depend on the gradients of other samples, and "
            "values of different samples must not mix; take one that works entry by entry, such as "
            "torch.optim.SGD or torch.optim.Adam"
        )


def relax(
    network: EnergyNetwork,
    num_steps: int,
    value_optimizer: OptimizerFactory,
    tolerance: float = 0.0,
) -> Relaxation:
    """Moves all free values down the energy until they rest.

    Every sample moves on its own energy. The optimiser is made anew, so that nothing that it
    remembers is of another batch.

    Args:
        network: With values, as after `init`.
        num_steps: Steps at most.
        value_optimizer: Makes the values' optimiser.
        tolerance: Stops after a step that changed no entry of any sample by more than this.

    Raises:
        RelaxationError: The energy or a value is NaN or infinite.
        OptionError: A negative number of steps or tolerance, or a network without values.
    """
    if num_steps < 0 or not tolerance >= 0.0:
        raise OptionError(
            f"num_steps and tolerance must be at least 0, got {num_steps} and {tolerance}"
        )
    if not all(node.has_value for node in network.nodes):
        raise OptionError("the network has no values to relax; give it first ones: init(x)")
    values = [node.value for node in network.free_nodes()]
    change, energies = 0.0, []
    if values and num_steps:
        optimizer = value_optimizer(values)
        everything = Phase(values=range(len(network.nodes)))
        drive = constant_drive(network, everything)
        for step in range(num_steps):
            is_watched = tolerance > 0.0 or step == num_steps - 1
            before = [value.detach().clone() for value in values] if is_watched else []
            energies.append(move(network, everything, step, optimizer, drive=drive))
            if is_watched:
                change = largest_change(before, values)
                if not math.isfinite(change):
                    finite_energy(network, f"after step {step}")
                    raise RelaxationError(
                        f"a value is NaN or infinite after step {step} of the relaxation, where "
                        "the energy has no gradient; look at the energies of the nodes"
                    )
                if change <= tolerance:
                    break
    none = network.nodes[0].value.new_empty(0)
    return Relaxation(len(energies), change, torch.stack(energies) if energies else none)


@torch.enable_grad()
def move(
    network: EnergyNetwork,
    phase: Phase,
    step: int,
    value_optimizer: Optimizer | None = None,
    weight_optimizer: Optimizer | None = None,
    drive: Tensor | None = None,
) -> Tensor:
    """One phase: an evaluation of the energy, and a step of what is to move.

    Values descend the energy of their own sample, weights its mean over the samples.

    Args:
        network: With values.
        phase: Phase of the schedule, which says what moves.
        step: Number of the step, for the error message.
        value_optimizer: Optimizer of the values; required if some move.
        weight_optimizer: Optimizer of the weights; required if some move.
        drive: Output of stage 1's layers for the input, where it is known and fixed.

    Returns:
        The mean energy before the step, without a shape.

    Raises:
        RelaxationError: The energy is NaN or infinite.
    """
    values = [node.value for node in network.free_nodes(phase.values)]
    weights = network.weights(phase.weights)
    energy = finite_energy(network, f"at step {step}", drive)
    if values or weights:
        gradients = torch.autograd.grad(energy.sum(), [*values, *weights], allow_unused=True)
        for parameter, gradient in zip(values, gradients, strict=False):
            parameter.grad = gradient
        for parameter, gradient in zip(weights, gradients[len(values) :], strict=True):
            parameter.grad = None if gradient is None else gradient / len(energy)
    for optimizer, moved in ((value_optimizer, values), (weight_optimizer, weights)):
        if moved:
            assert optimizer is not None
            optimizer.step()
            for parameter in moved:
                parameter.grad = None
    return energy.detach().mean()


def finite_energy(network: EnergyNetwork, when: str, drive: Tensor | None = None) -> Tensor:
    """The energy per sample, `(batch,)`, of which the mean is a number.

    Raises:
        RelaxationError: It is NaN or infinite; names the parts that are to blame, or the largest
            one where only their sum is too large.
    """
    parts = network.all_energies(drive)
    energy = sum_parts(parts)
    if not math.isfinite(energy.detach().mean()):
        means = {name: float(part.detach().mean()) for name, part in parts.items()}
        bad = [name for name, mean in means.items() if not math.isfinite(mean)]
        bad = bad or [max(means, key=lambda name: abs(means[name]))]
        raise RelaxationError(
            f"the energy of {bad} is NaN or infinite {when} of the relaxation; lower the step size "
            "of the values, or look for NaN in the data and the weights"
        )
    return energy


def constant_drive(network: EnergyNetwork, phase: Phase) -> Tensor | None:
    """Output of stage 1's layers, if a phase leaves the input as it is."""
    return None if phase.weights or network.free_nodes([0]) else network.drive()


def largest_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest absolute difference of any entry; NaN where one is NaN."""
    changes = [(b - a.detach()).abs().max() for b, a in zip(before, after, strict=True)]
    return float(torch.stack(changes).max())
