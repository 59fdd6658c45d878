"""Images from NumPy arrays in a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dcpc.errors import DataError
from dcpc.training.data.images import ImageData

__all__ = ["ArrayData"]


class ArrayData(ImageData):
    """Your own images, as NumPy arrays in a folder.

    `images.npy` holds `(N, height, width)` or `(N, channels, height, width)`: floats in [0, 1], or
    bytes, which are divided by 255. `labels.npy`, `(N,)`, is optional; without it all labels are 0.

    Args:
        folder: Where the two files are.
        batch_size: Training data per batch.
        evaluation_batch_size: Held-out data per batch.
        num_held_out: Number of images that are never trained on.
        seed: Seed of the split and the shuffling.
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
