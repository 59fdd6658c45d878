"""Pictures as bytes in a memory-mapped file, decoded once and fetched a batch at a time.

`Dataset.map` of `datasets` has a cache as well, from which a batch takes more than 30 times as
long: `python -m experiments.benchmarks.decoded_images`.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from dcpc.errors import DataError
from dcpc.training.data.labelled import Batch, LabelledSet

__all__ = ["PixelSet", "decode_pictures", "open_pixels", "prepare"]

LEVELS = 255


class PixelSet(LabelledSet):
    """Some of the images of a file of bytes, as floats, or as fresh binary draws at every epoch.

    A draw sets a pixel to one with the probability of its grey level, `level / 255` (to within
    2e-5; black stays zero and white one), as in Salakhutdinov and Murray, "On the quantitative
    analysis of deep belief networks", ICML 2008. It is a function of the seed, the epoch and the
    image, and therefore the same in a resumed run: Philox, a counter-based generator, is keyed by
    the first two and counts from the third.

    Args:
        pixels: All images as bytes, `(N, channels, height, width)`.
        labels: `(N,)`.
        rows: Which of them, in the order of the set's indices.
        intensity_range: Intensities of the levels 0 and 255.
        seed: Seed of the binary draws; None for grey levels.

    Attributes:
        epoch: Chooses the draws, which are fixed where nobody calls `set_epoch`.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        rows: Tensor,
        intensity_range: tuple[float, float] = (0.0, 1.0),
        seed: int | None = None,
    ) -> None:
        self.pixels = pixels
        self.labels = labels
        self.rows = rows
        self.intensity_range = intensity_range
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def all_labels(self) -> Tensor:
        return self.labels[self.rows]

    def __getitems__(self, index: Sequence[int]) -> Batch:
        indices = torch.as_tensor(index)
        rows = self.rows[indices]
        levels = self.pixels[rows]
        if self.seed is not None:
            images = self._draw(levels, rows)
        else:
            black, white = self.intensity_range
            images = levels.to(torch.get_default_dtype()).mul_((white - black) / LEVELS).add_(black)
        return images, self.labels[rows], indices

    def _draw(self, levels: Tensor, rows: Tensor) -> Tensor:
        """Bernoulli draws of bytes `(B, ...)`: a uniform 16-bit number against the level."""
        assert self.seed is not None
        size = levels[0].numel()
        key = np.array([self.seed % 2**64, self.epoch], dtype=np.uint64)
        bits = np.random.Philox(key=key)
        state = bits.state
        uniform = np.empty((len(rows), -(-size // 4)), dtype=np.uint64)  # four numbers per word
        for words, row in zip(uniform, rows.tolist(), strict=True):
            state["state"]["counter"][:] = (0, row, 0, 0)
            bits.state = state
            words[:] = bits.random_raw(len(words))
        numbers = uniform.view(np.uint16)[:, :size].reshape(levels.shape)
        drawn = torch.from_numpy(numbers < levels.numpy() * np.float32(2**16 / LEVELS))
        return drawn.to(torch.get_default_dtype())


def prepare(picture: Image.Image | None, size: int | None, channels: int) -> np.ndarray:
    """A picture as bytes `(channels, height, width)`.

    Args:
        picture: Any picture of 8 bits per channel.
        size: The shorter side is resized to it and the longer one cropped around the centre; None
            to leave the picture as it is.
        channels: 1 for grey, 3 for colour.

    Raises:
        DataError: There is no picture, or it has more than 8 bits per channel.
    """
    if picture is None:
        raise DataError("it is missing (null)")
    if picture.mode.startswith(("I", "F")):
        raise DataError(
            f"it has pixels of mode {picture.mode!r}, expected 8 bits per channel; convert it"
        )
    picture = picture.convert("L" if channels == 1 else "RGB")
    if size is not None and picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size))
    array = np.asarray(picture)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def decode_pictures(
    path: Path,
    pictures: Iterable[Image.Image],
    labels: np.ndarray,
    size: int | None,
    channels: int,
) -> None:
    """Writes pictures to `path`, bytes `(N, channels, height, width)`, and labels beside it.

    Both files appear complete or not at all. Shows a progress bar.

    Raises:
        DataError: A picture cannot be decoded or has another shape; or the disk is full.
    """
    images = _numbered(pictures, size, channels)
    first = next(images)
    shape = (len(labels), *first.shape)
    _check_space(path, first.nbytes * len(labels))
    with _appearing(_labels_path(path)) as place:
        np.save(place, labels.astype(np.int64))
    with _appearing(path) as place:
        pixels = np.lib.format.open_memmap(place, "w+", np.uint8, shape)
        pixels[0] = first
        progress = tqdm(
            images, "decoding, once", initial=1, total=len(labels), unit="image", disable=None
        )
        for row, image in enumerate(progress, start=1):
            if image.shape != first.shape:
                raise DataError(
                    f"image {row} has the shape {image.shape} (channels, height, width), the "
                    f"ones before have {first.shape}; set data.size, to which all are resized "
                    "and cropped"
                )
            pixels[row] = image
        pixels.flush()


def open_pixels(path: Path) -> tuple[Tensor, Tensor]:
    """Images `(N, channels, height, width)` as bytes, mapped rather than read, and labels `(N,)`.

    Raises:
        DataError: The files are not what `decode_pictures` writes.
    """
    try:
        # Copy on write: torch wants writable memory, and nobody writes.
        pixels = np.load(path, mmap_mode="c", allow_pickle=False)
        labels = np.load(_labels_path(path), allow_pickle=False)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or labels.shape != (len(pixels),):
            raise ValueError(
                f"expected bytes (N, channels, height, width) with N labels, got {pixels.dtype} "
                f"{pixels.shape} with labels {labels.shape}"
            )
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"data.cache_folder: the decoded images '{path}' are damaged ({error}); delete this "
            "file, and the next run decodes them again"
        ) from error
    return torch.from_numpy(pixels), torch.from_numpy(labels)


def _numbered(
    pictures: Iterable[Image.Image], size: int | None, channels: int
) -> Iterator[np.ndarray]:
    """The prepared pictures; an error says which picture it is about."""
    row = 0
    try:
        for picture in pictures:
            yield prepare(picture, size, channels)
            row += 1
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = re.sub(r" <[^>]*>", "", str(error))  # the stream that a picture was read from
        raise DataError(f"image {row} cannot be used: {reason}; repair or remove it") from error


def _labels_path(path: Path) -> Path:
    return path.with_suffix(".labels.npy")


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A file to write, which takes its name when it is complete."""
    handle, name = tempfile.mkstemp(suffix=".npy", prefix="incomplete-", dir=path.parent)
    os.close(handle)
    place = Path(name)
    try:
        yield place
        os.replace(place, path)
    finally:
        place.unlink(missing_ok=True)


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise DataError(
            f"data.cache_folder: the decoded images need {needed / 1e6:,.0f} MB, but the disk of "
            f"'{path.parent}' has {free / 1e6:,.0f} MB left; choose another folder or a smaller "
            "data.size"
        )
