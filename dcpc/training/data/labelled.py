"""Data with labels, of which some are trained on and some are held out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dcpc.errors import DataError, OptionError, require_at_least
from dcpc.evaluation.intensities import IntensityRange

__all__ = [
    "ArrayData",
    "Batch",
    "DigitsData",
    "EpochShuffle",
    "ImageData",
    "LabelledData",
    "LabelledSet",
    "TensorSet",
    "check_images",
]

Batch = tuple[Tensor, Tensor, Tensor]


class EpochShuffle(Sampler[int]):
    """A permutation per epoch that depends on the seed and the epoch's number only.

    A resumed run therefore visits the data in the order in which the first one would have.
    Lightning calls `set_epoch`.

    Args:
        size: Number of data.
        seed: Of all permutations.
        follow: Is told every epoch's number too: a data set that changes from epoch to epoch.
    """

    def __init__(self, size: int, seed: int, follow: Callable[[int], None] | None = None) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0
        self.follow = follow

    def set_epoch(self, epoch: int) -> None:
        """Chooses the permutation."""
        self.epoch = epoch
        if self.follow is not None:
            self.follow(epoch)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        return iter(torch.randperm(self.size, generator=generator).tolist())


class LabelledSet(Dataset[Batch]):
    """Data with labels and indices, fetched a whole batch at a time."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of data."""

    @abstractmethod
    def __getitems__(self, index: Sequence[int]) -> Batch:
        """The data of a batch, their labels, and `index` itself."""

    def first(self, count: int) -> Batch:
        """The first `count` data as one batch, or all there are."""
        return self.__getitems__(range(min(count, len(self))))

    def __getitem__(self, index: int) -> Batch:
        data, labels, indices = self.__getitems__([index])
        return data[0], labels[0], indices[0]

    def set_epoch(self, epoch: int) -> None:
        """Hears about a new epoch of training."""


class TensorSet(LabelledSet):
    """Data that lie ready in memory.

    Args:
        data: `(N, *shape)`.
        labels: `(N,)`.
    """

    def __init__(self, data: Tensor, labels: Tensor) -> None:
        self.tensors = data, labels, torch.arange(len(data))

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitems__(self, index: Sequence[int]) -> Batch:
        rows = torch.as_tensor(index)
        data, labels, indices = (tensor[rows] for tensor in self.tensors)
        return data, labels, indices


class LabelledData(LightningDataModule):
    """Base class: a subclass says what there is to train on, and what is held out.

    A batch is `(data, labels, index)`: data `(B, *shape)`, labels `(B,)`, and each datum's index in
    its own set, by which its particles are found.

    Args:
        batch_size: Training data per batch.
        evaluation_batch_size: Held-out data per batch.
        seed: Of the shuffling.
    """

    def __init__(self, batch_size: int, evaluation_batch_size: int, seed: int) -> None:
        super().__init__()
        require_at_least("data.batch_size", batch_size, 1)
        require_at_least("data.evaluation_batch_size", evaluation_batch_size, 1)
        self.batch_size = batch_size
        self.evaluation_batch_size = evaluation_batch_size
        self.seed = seed
        self.training_set: LabelledSet | None = None
        self.held_out_set: LabelledSet | None = None

    @abstractmethod
    def setup(self, stage: str) -> None:
        """Makes the two sets, once."""

    def train_dataloader(self) -> DataLoader:
        assert self.training_set is not None
        sampler = EpochShuffle(len(self.training_set), self.seed, self.training_set.set_epoch)
        return _loader(self.training_set, self.batch_size, sampler)

    def val_dataloader(self) -> DataLoader:
        assert self.held_out_set is not None
        return _loader(self.held_out_set, self.evaluation_batch_size)

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader:
        return self.val_dataloader()


class ImageData(LabelledData):
    """Base class: images from wherever a subclass finds them, split by a seed.

    Images are `(channels, height, width)`, with intensities in `intensity_range`.

    Args:
        batch_size: Training data per batch.
        evaluation_batch_size: Held-out data per batch.
        num_held_out: How many images are never trained on; None where the subclass decides.
        seed: Of the split and of the shuffling.

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
    ) -> None:
        super().__init__(batch_size, evaluation_batch_size, seed)
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
        """How many of all images are never trained on."""
        assert self.num_held_out is not None
        return self.num_held_out

    def image_set(self, images: Tensor, labels: Tensor, rows: Tensor) -> LabelledSet:
        """The set that consists of some rows of all images."""
        return TensorSet(images[rows], labels[rows])


class DigitsData(ImageData):
    """scikit-learn's 1797 handwritten digits, 8 x 8 pixels, intensities 0 to 16 scaled to [0, 1].

    They come with scikit-learn: nothing is downloaded.
    """

    def load(self) -> tuple[Tensor, Tensor]:
        digits = load_digits()
        images = torch.as_tensor(digits.images, dtype=torch.get_default_dtype()) / 16.0
        return images.unsqueeze(1), torch.as_tensor(digits.target)


class ArrayData(ImageData):
    """Your own images, as NumPy arrays in a folder.

    `images.npy` holds `(N, height, width)` or `(N, channels, height, width)`: floats in [0, 1], or
    bytes, which are divided by 255. `labels.npy`, `(N,)`, is optional; without it all labels are 0.

    Args:
        folder: Where the two files are.
        batch_size: Training data per batch.
        evaluation_batch_size: Held-out data per batch.
        num_held_out: How many images are never trained on.
        seed: Of the split and of the shuffling.
    """

    def __init__(
        self,
        folder: str,
        batch_size: int = 100,
        evaluation_batch_size: int = 300,
        num_held_out: int = 300,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, evaluation_batch_size, num_held_out, seed)
        self.folder = Path(folder)

    def load(self) -> tuple[Tensor, Tensor]:
        if not self.folder.is_dir():
            raise DataError(
                f"data.folder: there is no folder '{self.folder}' (looked in {Path.cwd()}); it "
                "must hold images.npy, and labels.npy if there are labels"
            )
        images = self._array("images.npy")
        if images is None or images.ndim not in (3, 4):
            got = "no such file" if images is None else f"an array of shape {images.shape}"
            raise DataError(
                f"data.folder: '{self.folder / 'images.npy'}' must be an array (N, height, width) "
                f"or (N, channels, height, width), got {got}"
            )
        pixels = torch.from_numpy(images).to(torch.get_default_dtype())
        if images.dtype == np.uint8:
            pixels = pixels / 255.0
        labels = self._array("labels.npy")
        labels = np.zeros(len(images), dtype=np.int64) if labels is None else labels
        if labels.shape != (len(images),):
            raise DataError(
                f"data.folder: '{self.folder / 'labels.npy'}' must hold one label per image, "
                f"{len(images)}, got shape {labels.shape}"
            )
        return pixels if pixels.dim() == 4 else pixels.unsqueeze(1), torch.from_numpy(labels)

    def _array(self, name: str) -> np.ndarray | None:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"data.folder: '{path}' is no NumPy array: {error}") from error


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


def _loader(data: LabelledSet, batch_size: int, sampler: EpochShuffle | None = None) -> DataLoader:
    # The set collates: its `__getitems__` returns a batch.
    return DataLoader(data, batch_size=batch_size, sampler=sampler, collate_fn=_unchanged)


def _unchanged(batch: Any) -> Any:
    return batch
