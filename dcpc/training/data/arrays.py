"""Images from NumPy arrays in a folder."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dcpc.errors import DataError
from dcpc.training.data.images import ImageData, check_labels
from dcpc.training.paths import local_path

__all__ = ["ArrayData", "read_array"]


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
        num_workers: Processes that prepare training batches; 0 for none beside the main one.
    """

    def __init__(
        self,
        folder: str,
        batch_size: int = 100,
        evaluation_batch_size: int = 300,
        num_held_out: int = 300,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, evaluation_batch_size, num_held_out, seed, num_workers)
        self.folder = local_path("data.folder", folder)

    def load(self) -> tuple[Tensor, Tensor]:
        """All images as floats, and their labels.

        Raises:
            DataError: A file is missing, damaged, or does not hold what it must.
        """
        if not self.folder.is_dir():
            raise DataError(
                f"data.folder: there is no folder '{self.folder}' (looked in {Path.cwd()}); it "
                "must hold images.npy, and labels.npy if there are labels"
            )
        images = read_array(self.folder / "images.npy")
        if images is None or images.ndim not in (3, 4) or not images.size:
            got = "no such file" if images is None else f"an array of shape {images.shape}"
            raise DataError(
                f"data.folder: '{self.folder / 'images.npy'}' must be an array (N, height, width) "
                f"or (N, channels, height, width), got {got}"
            )
        pixels = self._pixels(images)
        labels = read_array(self.folder / "labels.npy")
        labels = np.zeros(len(images), dtype=np.int64) if labels is None else labels
        name = f"data.folder: '{self.folder / 'labels.npy'}'"
        if labels.shape != (len(images),):
            raise DataError(
                f"{name} must hold one label per image, {len(images)}, got shape {labels.shape}"
            )
        labels = check_labels(labels, name)
        return pixels if pixels.dim() == 4 else pixels.unsqueeze(1), torch.from_numpy(labels)

    def _pixels(self, images: np.ndarray) -> Tensor:
        """Intensities of bytes or floats, of any byte order and memory layout."""
        is_byte = images.dtype == np.uint8
        if not is_byte and images.dtype.kind != "f":
            raise DataError(
                f"data.folder: '{self.folder / 'images.npy'}' must hold bytes (uint8) or floats in "
                f"[0, 1], got {images.dtype}; convert it: ones and zeros by "
                "images.astype(np.float32), levels from 0 to 255 by images.astype(np.uint8)"
            )
        if is_byte and 0 < images.max(initial=0) <= 1:
            raise DataError(
                f"data.folder: '{self.folder / 'images.npy'}' holds bytes of 0 and 1, which would "
                "be intensities of 0 and 1/255; convert them, by images.astype(np.float32)"
            )
        wide = images.dtype.itemsize > 4
        native = np.ascontiguousarray(images, dtype=np.float64 if wide else np.float32)
        pixels = torch.from_numpy(native).to(torch.get_default_dtype())
        return pixels / 255.0 if is_byte else pixels


def read_array(path: Path) -> np.ndarray | None:
    """The array of a file; None where there is no such file.

    Raises:
        DataError: The file is damaged.
    """
    if not path.exists():
        return None
    try:
        # Mapped, so that a header which promises more than there is does not fill the memory.
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a damaged header raises whatever its bytes lead to
        if "Python objects" in str(error):
            raise DataError(
                f"data.folder: '{path}' is no NumPy array of numbers: it holds Python objects, as "
                "rows of unequal shapes do, such as sequences of unequal numbers of frames; cut or "
                "pad them to one shape, and save numbers"
            ) from error
        reason = re.split(r"[.\n]", str(error))[0][:100] or type(error).__name__
        raise DataError(
            f"data.folder: '{path}' is no NumPy array, or a damaged one of "
            f"{path.stat().st_size:,} bytes ({reason}); save it anew, by np.save"
        ) from error
    _check_length(array, path)
    return np.array(array)


def _check_length(array: np.memmap, path: Path) -> None:
    """Compares a file with its header; one that is too short cannot be mapped."""
    if not array.size:
        return
    rest = path.stat().st_size - array.offset - array.nbytes
    if rest:
        raise DataError(
            f"data.folder: '{path}' has {rest:,} bytes more than an array of shape {array.shape} "
            f"and type {array.dtype}, which its header says; save it anew, by np.save"
        )
