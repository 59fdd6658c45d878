"""A Lightning module around an energy network: classification by a learning rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from dcpc.errors import DataError, require_at_least
from dcpc.evaluation import mean_error
from dcpc.evaluation.batches import gradients_allowed
from dcpc.networks import EnergyNetwork, LearningRule
from dcpc.observed import main_tensor
from dcpc.seeding import random_state_kept
from dcpc.training.data import Batch, LabelledData
from dcpc.training.modules.base import LearningRateSchedule, MeasuredModule

__all__ = ["ClassifierModule"]


class ClassifierModule(MeasuredModule):
    """Trains an energy network to name the class of its input.

    In a step the rule learns from a batch, with the labels, one-hot, as the output's data.

    Args:
        network: The network: its input takes the data, flattened unless told otherwise, its output
            has one unit per class.
        rule: The learning rule.
        num_classes: Number of classes.
        flatten: Whether a datum is a vector to the network, as opposed to an image.
        learning_rate: Adam learning rate; ignored when `--optimizer` is given.
        learning_rate_schedule: `cosine` lowers the rate to zero over the run, by
            `trainer.max_epochs`, `trainer.max_steps` or `trainer.max_time`, whichever is nearest;
            null keeps it.

    Raises:
        OptionError: A number out of range, or a network that the rule cannot train.
    """

    headline = "accuracy"
    averages_gradients = False

    def __init__(
        self,
        network: EnergyNetwork,
        rule: LearningRule,
        num_classes: int = 10,
        flatten: bool = True,
        learning_rate: float = 1e-3,
        learning_rate_schedule: LearningRateSchedule | None = None,
    ) -> None:
        super().__init__(learning_rate, learning_rate_schedule)
        require_at_least("model.num_classes", num_classes, 2)
        rule.check(network)
        self.network = network
        self.rule = rule
        self.num_classes = num_classes
        self.flatten = flatten
        self.automatic_optimization = False
        self._is_right: list[Tensor] = []

    def settings(self) -> dict[str, str]:
        return super().settings() | {"model.rule": type(self.rule).__name__}

    @property
    def charts(self) -> dict[str, str]:
        return {
            "held-out accuracy": "held_out/accuracy$",
            "energy before and after inference": "train/.*energy.*",
        }

    def setup(self, stage: str) -> None:
        """Looks at the labels, and predicts a datum: data that do not fit are an error at once.

        Raises:
            DataError: The network takes data of another size, or has no class of a label.
        """
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, LabelledData) or data.held_out_set is None:
            return
        if stage != "predict":  # which does not look at labels
            for name, part in (("training", data.training_set), ("held-out", data.held_out_set)):
                if part is not None:
                    self._check_labels(part.all_labels(), torch.arange(len(part)), name)
        x = main_tensor(data.held_out_set.first(1)[0])
        try:
            with random_state_kept():
                self.predict(x.to(self.device))
        except (RuntimeError, DataError) as error:
            shape = list(self._input(x).shape[1:])
            raise DataError(
                f"the data are of shape {shape} each, which model.network does not take: "
                f"{' '.join(str(error).split())}; set the first of model.network.sizes to "
                f"{math.prod(shape)}, or choose other data"
            ) from error

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.weights(), lr=self.learning_rate)

    def learn(self, batch: Batch) -> None:
        """Lets the rule learn from a batch."""
        x, labels, index = main_tensor(batch[0]), *batch[1:]
        self._check_labels(labels, index, "training")
        # Lightning's wrapper has an optimiser's methods, and counts its steps.
        optimizer = cast(torch.optim.Optimizer, self.optimizers())
        learned = self.rule.learn(self.network, self._input(x), self._targets(labels), optimizer)
        energies = {"energy_before_inference": learned.energy[0], "energy": learned.energy[-1]}
        if learned.relaxations:
            nudged = learned.relaxations[1].energy  # with the cost
            energies = {"nudged_energy_before_inference": nudged[0], "nudged_energy": nudged[-1]}
        for name, energy in energies.items():
            shown = not name.endswith("before_inference")
            self.log(f"train/{name}", energy, prog_bar=shown, batch_size=len(x))

    def predict(self, x: Tensor) -> Tensor:
        """The network's outputs `(B, num_classes)` for data `(B, *shape)`, in evaluation mode."""
        was_training = self.network.training
        self.network.eval()
        try:
            with gradients_allowed():
                return self.rule.predict(self.network, self._input(x.clone())).detach()
        finally:
            self.network.train(was_training)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The network's outputs, and the class that is largest there."""
        x, labels, index = main_tensor(batch[0]), *batch[1:]
        outputs = self.predict(x)
        return {"index": index, "labels": labels, "outputs": outputs, "classes": outputs.argmax(1)}

    def start_measurements(self) -> None:
        self._is_right = []

    def measure(self, batch: Batch, batch_idx: int, is_test: bool) -> None:
        predicted = self.predict_step(batch, batch_idx)
        self._is_right.append(predicted["classes"] == predicted["labels"])

    def measurements(self) -> dict[str, float]:
        right = torch.cat(self._is_right).float()
        return {"accuracy": float(right.mean()), "num_data": float(len(right))}

    def describe(self, measurements: Mapping[str, float]) -> str:
        return f"accuracy {100 * measurements['accuracy']:.2f} %"

    def standard_errors(self) -> dict[str, float]:
        return {"accuracy": mean_error(torch.cat(self._is_right).float())}

    def conditions(self, is_test: bool) -> dict[str, int]:
        return {"num_data": sum(map(len, self._is_right))}

    def _input(self, x: Tensor) -> Tensor:
        return x.flatten(1) if self.flatten else x

    def _check_labels(self, labels: Tensor, index: Tensor, name: str) -> None:
        """Refuses labels that are no class, naming the first one and its datum."""
        wrong = (labels < 0) | (labels >= self.num_classes)
        if not bool(wrong.any()):
            return
        first = int(wrong.nonzero()[0])
        highest = int(labels.max())
        fix = (
            "number the classes from 0"
            if int(labels[first]) < 0
            else f"raise it to {highest + 1}, and the size of the network's output with it"
        )
        raise DataError(
            f"datum {int(index[first])} of the {name} set has the label {int(labels[first])}, but "
            f"model.num_classes is {self.num_classes}; {fix}"
        )

    def _targets(self, labels: Tensor) -> Tensor:
        return F.one_hot(labels, self.num_classes).to(self.network.weights()[0].dtype)
