"""Images with labels, split by a seed: what every data set of images shares."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor

from dcpc.errors import DataError, OptionError, require_at_least
from dcpc.evaluation.intensities import IntensityRange
from dcpc.training.data.labelled import LabelledData, LabelledSet, TensorSet

__all__ = ["ImageData", "check_images", "check_labels"]


class ImageData(LabelledData):
    """Base class: images from wherever a subclass finds them, split by a seed.

    Images are `(channels, height, width)`, with intensities in `intensity_range`.

    Args:
        batch_size: Training data per batch.
        evaluation_batch_size: Held-out data per batch.
        num_held_out: Number of images that are never trained on; None where the subclass decides.
        seed: Seed of the split and the shuffling.
        num_workers: Processes that prepare training batches; 0 for none beside the main one.

    Attributes:
        intensity_range: The intensities of black and of white.
    """

    intensity_range: IntensityRange = (0.0, 1.0)

    def __init__(
        self,
        batch_size: int = 100,
        evaluation_batch_size: int = 300,
        num_held_out: int | None = 297,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, evaluation_batch_size, seed, num_workers)
        if num_held_out is not None:
            require_at_least("data.num_held_out", num_held_out, 1)
        self.num_held_out = num_held_out

    @abstractmethod
    def load(self) -> tuple[Tensor, Tensor]:
        """All images `(N, channels, height, width)`, and their labels `(N,)`.

        Images are floats in [0, 1], or bytes where the subclass has an `image_set` of its own.
        """

    def setup(self, stage: str) -> None:
        """Loads, checks and splits the images, once."""
        if self.training_set is not None:
            return
        images, labels = self.load()
        check_images(images, type(self).__name__)
        training, held_out = self.split(len(images))
        self.training_set = self.image_set(images, labels, training)
        self.held_out_set = self.image_set(images, labels, held_out)

    def split(self, num_images: int) -> tuple[Tensor, Tensor]:
        """Rows of the training images and of the held-out ones, drawn by the seed alone.

        Raises:
            OptionError: Nothing would be left to train on.
        """
        num_held_out = self.count_held_out(num_images)
        if num_held_out >= num_images:
            raise OptionError(
                f"data.num_held_out must be smaller than the number of images, {num_images}, got "
                f"{num_held_out}"
            )
        order = torch.randperm(num_images, generator=torch.Generator().manual_seed(self.seed))
        return order[num_held_out:], order[:num_held_out]

    def count_held_out(self, num_images: int) -> int:
        """Number of images that are never trained on."""
        assert self.num_held_out is not None
        return self.num_held_out

    def image_set(self, images: Tensor, labels: Tensor, rows: Tensor) -> LabelledSet:
        """The set that consists of some rows of all images."""
        return TensorSet(images[rows], labels[rows])


def check_images(images: Tensor, source: str) -> None:
    """Checks that all intensities are numbers in [0, 1].

    Raises:
        DataError: Naming the first image that is not.
    """
    if images.dtype == torch.uint8:
        return  # every byte is a grey level
    valid = (images >= 0) & (images <= 1)  # NaN is neither
    if bool(valid.all()):
        return
    first = int((~valid).flatten(1).any(1).nonzero()[0])
    value = float(images[first][~valid[first]][0])
    raise DataError(
        f"{source}: image {first} has the intensity {value:g}, expected numbers in [0, 1]; drop "
        "or repair the image, or rescale the data"
    )


def check_labels(labels: np.ndarray, source: str) -> np.ndarray:
    """Labels as 64-bit integers of this machine's byte order.

    Args:
        labels: `(N,)`.
        source: Where they are from, for the error.

    Raises:
        DataError: They are no integers, or one is missing, negative or too large, by its index.
    """
    expected = f"{source} must hold classes or integers of at least 0, one per image"
    if labels.dtype.kind not in "iub":
        missing = (n for n, label in enumerate(labels) if label is None or label != label)
        first = next(missing, 0)
        value = labels[first : first + 1].tolist()
        raise DataError(f"{expected}, got {value[0]!r} ({labels.dtype}) at index {first}")
    wrong = (labels < 0) | (labels > np.iinfo(np.int64).max)
    if wrong.any():
        first = int(wrong.argmax())
        raise DataError(f"{expected}, got {labels[first]} at index {first}; number the classes")
    return labels.astype(np.int64)
