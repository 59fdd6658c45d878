"""Two interleaved half circles: the smallest problem that no linear classifier solves."""

from __future__ import annotations

import math

import torch
from sklearn.datasets import make_moons

from dcpc.errors import OptionError, require_at_least, require_seed
from dcpc.training.data.labelled import LabelledData, TensorSet

__all__ = ["MoonsData"]


class MoonsData(LabelledData):
    """scikit-learn's two moons, points `(2,)` with labels 0 and 1.

    Args:
        num_training: Points to train on.
        num_held_out: Points to measure on.
        noise: Standard deviation of the points around the half circles.
        training_seed: Seed of the training points.
        held_out_seed: Seed of the held-out points.
        batch_size: Training data per batch.
        evaluation_batch_size: Held-out data per batch.
        seed: Seed of the shuffling.
        num_workers: Processes that prepare training batches; 0 for none beside the main one.

    Raises:
        OptionError: A number out of range, or one seed for all points.
    """

    def __init__(
        self,
        num_training: int = 1024,
        num_held_out: int = 512,
        noise: float = 0.2,
        training_seed: int = 42,
        held_out_seed: int = 0,
        batch_size: int = 32,
        evaluation_batch_size: int = 512,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, evaluation_batch_size, seed, num_workers)
        require_at_least("data.num_training", num_training, 1)
        require_at_least("data.num_held_out", num_held_out, 1)
        if not 0.0 <= noise < math.inf:
            raise OptionError(f"data.noise must be at least 0, got {noise}; give a finite number")
        require_seed("data.training_seed", training_seed)
        require_seed("data.held_out_seed", held_out_seed)
        if training_seed == held_out_seed:
            raise OptionError(
                f"data.training_seed and data.held_out_seed are both {training_seed}, so that the "
                "held-out points would be those that were trained on; give two"
            )
        self.num_training = num_training
        self.num_held_out = num_held_out
        self.noise = noise
        self.training_seed = training_seed
        self.held_out_seed = held_out_seed

    def setup(self, stage: str) -> None:
        self.training_set = self._draw(self.num_training, self.training_seed)
        self.held_out_set = self._draw(self.num_held_out, self.held_out_seed)

    def _draw(self, num_points: int, seed: int) -> TensorSet:
        points, labels = make_moons(num_points, noise=self.noise, random_state=seed)
        return TensorSet(
            torch.as_tensor(points, dtype=torch.get_default_dtype()), torch.as_tensor(labels)
        )
