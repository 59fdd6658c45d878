"""Images with labels, split once into a training set and held-out data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset

from dcpc.errors import DataError, OptionError

__all__ = ["ArrayData", "DigitsData", "EpochShuffle", "ImageData", "check_images"]


class EpochShuffle(Sampler[int]):
    """A permutation per epoch that depends on the seed and the epoch's number only.

    A resumed run therefore visits the data in the order in which the first one would have.
    Lightning calls `set_epoch`.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the permutation."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        return iter(torch.randperm(self.size, generator=generator).tolist())


class ImageData(LightningDataModule):
    """Base class: a subclass says where the images come from.

    A batch is `(images, labels, index)`: images `(B, channels, height, width)` in [0, 1], labels
    `(B,)`, and each datum's index in its own set, by which its particles are found.

    Args:
        batch_size: Training data per batch.
        evaluation_batch_size: Held-out data per batch.
        num_held_out: How many images are never trained on.
        seed: Of the split and of the shuffling.
    """

    def __init__(
        self,
        batch_size: int = 100,
        evaluation_batch_size: int = 300,
        num_held_out: int = 297,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("batch_size", batch_size),
            ("evaluation_batch_size", evaluation_batch_size),
            ("num_held_out", num_held_out),
        ):
            if value < 1:
                raise OptionError(f"data.{name} must be at least 1, got {value}")
        self.batch_size = batch_size
        self.evaluation_batch_size = evaluation_batch_size
        self.num_held_out = num_held_out
        self.seed = seed
        self.training_set: TensorDataset | None = None
        self.held_out_set: TensorDataset | None = None

    @abstractmethod
    def load(self) -> tuple[Tensor, Tensor]:
        """All images `(N, channels, height, width)` in [0, 1], and their labels `(N,)`."""

    def setup(self, stage: str) -> None:
        """Loads, checks and splits the images, once."""
        if self.training_set is not None:
            return
        images, labels = self.load()
        check_images(images, type(self).__name__)
        if self.num_held_out >= len(images):
            raise OptionError(
                f"data.num_held_out must be smaller than the number of images, {len(images)}, got "
                f"{self.num_held_out}"
            )
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        training, held_out = order[self.num_held_out :], order[: self.num_held_out]
        self.training_set = _indexed(images[training], labels[training])
        self.held_out_set = _indexed(images[held_out], labels[held_out])

    def train_dataloader(self) -> DataLoader:
        assert self.training_set is not None
        sampler = EpochShuffle(len(self.training_set), self.seed)
        return DataLoader(self.training_set, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        assert self.held_out_set is not None
        return DataLoader(self.held_out_set, batch_size=self.evaluation_batch_size)

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader:
        return self.val_dataloader()


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
    valid = (images >= 0) & (images <= 1)  # NaN is neither
    if bool(valid.all()):
        return
    first = int((~valid).flatten(1).any(1).nonzero()[0])
    value = float(images[first][~valid[first]][0])
    raise DataError(
        f"{source}: image {first} has the intensity {value:g}, expected numbers in [0, 1]; drop "
        "or repair the image, or rescale the data"
    )


def _indexed(images: Tensor, labels: Tensor) -> TensorDataset:
    return TensorDataset(images, labels, torch.arange(len(images)))
