"""Benchmark (d): classical predictive coding against the same mathematics by hand in torch.

    python -m experiments.benchmarks.networks

An epoch of `dcpc fit`'s classifier, with Lightning's loop and its logging to memory, against a
plain loop over the same random images of MNIST's size: inference learning of 784-256-256-10, and
equilibrium propagation of a conditional Gaussian and of a restricted Hopfield network of
784-1000-10. And the exact mode of `pc_gradients` against a plain backward pass.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from pytorch_lightning import Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from dcpc.models import Perceptron
from dcpc.networks import (
    ConditionalGaussian,
    EnergyNetwork,
    EquilibriumPropagation,
    InferenceLearning,
    LearningRule,
    RestrictedHopfield,
    pc_gradients,
)
from dcpc.training import ClassifierModule, LabelledData
from dcpc.training.data import TensorSet
from experiments.benchmarks.timing import describe_machine, interleaved_medians

NUM_CLASSES = 10
BATCH_SIZE = 100
STEP_SIZE = 0.1
INFERENCE_STEPS = 8
HOPFIELD_STEPS = 50
NUDGED_STEPS = 20


class RandomImages(LabelledData):
    """Noise of MNIST's size, without held-out data."""

    def __init__(self, num_images: int) -> None:
        super().__init__(BATCH_SIZE, BATCH_SIZE, seed=0)
        self.num_images = num_images

    def setup(self, stage: str) -> None:
        pixels = torch.rand(self.num_images, 1, 28, 28)
        self.training_set = TensorSet(pixels, torch.randint(NUM_CLASSES, (self.num_images,)))


class ByHand(ABC):
    """A loop over batches, spelt out: the layers' weights, and a step of Adam per batch."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.layers = [nn.Linear(above, below) for above, below in itertools.pairwise(sizes)]
        self.weights = [parameter for layer in self.layers for parameter in layer.parameters()]
        self.optimizer = torch.optim.Adam(self.weights, 1e-3)

    def epoch(self, data: LabelledData) -> None:
        """One pass over the data."""
        for x, labels, _ in data.train_dataloader():
            self.learn(x.flatten(1), F.one_hot(labels, NUM_CLASSES).float())

    @abstractmethod
    def learn(self, x: Tensor, y: Tensor) -> None:
        """One batch."""

    def step(self, gradients: Sequence[Tensor]) -> None:
        """A step of the weights."""
        for parameter, gradient in zip(self.weights, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()

    def descend(self, energy: Callable[[list[Tensor]], Tensor], values: list[Tensor]) -> None:
        """A step of the values, in place."""
        gradients = torch.autograd.grad(energy(values).sum(), values)
        with torch.no_grad():
            for value, gradient in zip(values, gradients, strict=True):
                value.sub_(gradient, alpha=STEP_SIZE)


class InferenceLearningByHand(ByHand):
    """Squared errors between the layers, cross-entropy at the output."""

    def learn(self, x: Tensor, y: Tensor) -> None:
        def energy(values: list[Tensor]) -> Tensor:
            hidden, total = x, 0.0
            for layer, value in zip(self.layers, values, strict=False):
                total = total + 0.5 * (value - F.leaky_relu(layer(hidden))).square().sum(1)
                hidden = value
            return total - (y * self.layers[-1](hidden).log_softmax(1)).sum(1)

        values, hidden = [], x
        with torch.no_grad():
            for layer in self.layers[:-1]:
                hidden = F.leaky_relu(layer(hidden))
                values.append(hidden)
        values = [value.requires_grad_() for value in values]
        for _ in range(INFERENCE_STEPS):
            self.descend(energy, values)
        self.step(torch.autograd.grad(energy(values).mean(), self.weights))


class EquilibriumByHand(ByHand):
    """The difference of two relaxations."""

    def contrast(
        self,
        energy: Callable[[list[Tensor]], Tensor],
        cost: Callable[[Tensor], Tensor],
        values: list[Tensor],
        free_steps: int,
        nudged_steps: int,
    ) -> None:
        """Relaxes, takes the gradient, relaxes nudged, and steps by the difference."""
        for _ in range(free_steps):
            self.descend(energy, values)
        free = torch.autograd.grad(energy(values).mean(), self.weights)
        for _ in range(nudged_steps):
            self.descend(lambda values: energy(values) + cost(values[-1]), values)
        nudged = torch.autograd.grad(energy(values).mean(), self.weights)
        self.step([after - before for after, before in zip(nudged, free, strict=True)])


class GaussianByHand(EquilibriumByHand):
    """`sum_i |W_i phi_i(u_i) + b_i - u_{i+1}|^2`, from a feed-forward pass."""

    def learn(self, x: Tensor, y: Tensor) -> None:
        def predictions(values: Sequence[Tensor]) -> list[Tensor]:
            active = [x, *(value.sigmoid() for value in values)]
            return [layer(one) for layer, one in zip(self.layers, active, strict=False)]

        def energy(values: list[Tensor]) -> Tensor:
            pairs = zip(predictions(values), values, strict=True)
            return sum((prediction - value).square().sum(1) for prediction, value in pairs)

        with torch.no_grad():
            values: list[Tensor] = []
            for _ in self.layers:
                values.append(predictions(values)[-1])
        values = [value.requires_grad_() for value in values]
        target = y.argmax(1)
        self.contrast(
            energy,
            lambda output: F.cross_entropy(output, target, reduction="none"),
            values,
            0,
            NUDGED_STEPS,
        )


class HopfieldByHand(EquilibriumByHand):
    """`sum_i |u_i|^2 / 2 - phi(u_{i+1})' (W_i phi_i(u_i) + b_i)`, from zero."""

    def learn(self, x: Tensor, y: Tensor) -> None:
        def energy(values: list[Tensor]) -> Tensor:
            total, hidden = 0.5 * x.square().sum(1), x
            for layer, value in zip(self.layers, values, strict=True):
                active = value.sigmoid()
                total = total + 0.5 * value.square().sum(1) - (active * layer(hidden)).sum(1)
                hidden = active
            return total

        values = [
            torch.zeros(len(x), layer.out_features, requires_grad=True) for layer in self.layers
        ]
        self.contrast(
            energy,
            lambda output: 0.5 * (output - y).square().sum(1),
            values,
            HOPFIELD_STEPS,
            HOPFIELD_STEPS,
        )


def epoch(network: EnergyNetwork, rule: LearningRule, data: LabelledData) -> Callable[[], None]:
    """An epoch of a classifier in Lightning's loop."""
    module = ClassifierModule(network, rule)
    quiet = {name: False for name in ("logger", "enable_checkpointing", "enable_progress_bar")}

    def run() -> None:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            limit_val_batches=0,
            enable_model_summary=False,
            **quiet,
        )
        trainer.fit(module, datamodule=data)

    return run


def backward(model: nn.Sequential, x: Tensor, y: Tensor) -> Callable[[], None]:
    """A plain backward pass."""

    def run() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

    return run


def main() -> None:
    """Prints the times and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-images", type=int, default=5000, help="per epoch")
    parser.add_argument("--repeats", type=int, default=5, help="epochs of each")
    options = parser.parse_args()
    torch.manual_seed(0)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    print(describe_machine())

    deep, wide = [784, 256, 256, 10], [784, 1000, 10]
    free_and_nudged = {"free_steps": HOPFIELD_STEPS, "nudged_steps": HOPFIELD_STEPS}
    data = RandomImages(options.num_images)
    data.setup("fit")
    for name, network, rule, by_hand in (
        (
            "inference learning",
            Perceptron(deep),
            InferenceLearning(INFERENCE_STEPS),
            InferenceLearningByHand(deep),
        ),
        (
            "equilibrium propagation, Gaussian",
            ConditionalGaussian(wide),
            EquilibriumPropagation(free_steps=0, nudged_steps=NUDGED_STEPS),
            GaussianByHand(wide),
        ),
        (
            "equilibrium propagation, Hopfield",
            RestrictedHopfield(wide),
            EquilibriumPropagation("squared_error", **free_and_nudged),
            HopfieldByHand(wide),
        ),
    ):
        ours, hand = interleaved_medians(
            epoch(network, rule, data),
            lambda by_hand=by_hand: by_hand.epoch(data),
            repeats=options.repeats,
            warmup=1,
        )
        scale = 54_000 / options.num_images / 1e3
        print(
            f"{name}: {ours * scale:.1f} s for an epoch of 54,000 images, by hand "
            f"{hand * scale:.1f} s, ratio {ours / hand:.2f}"
        )

    layers = [nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(6)]
    model = nn.Sequential(*layers)
    x, y = torch.randn(256, 256), torch.randint(256, (256,))
    exact, plain = interleaved_medians(
        lambda: pc_gradients(model, F.cross_entropy, x, y), backward(model, x, y), repeats=200
    )
    print(f"exact gradients {exact:.2f} ms, backward {plain:.2f} ms, ratio {exact / plain:.2f}")


if __name__ == "__main__":
    main()
