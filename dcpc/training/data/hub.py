"""Images from the Hugging Face hub or from a local folder."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from dcpc.errors import DataError, OptionError
from dcpc.training.data.images import ImageData
from dcpc.training.data.labelled import LabelledSet
from dcpc.training.data.pixels import PixelSet, decode_pictures, open_pixels
from dcpc.training.data.tables import (
    Table,
    find_image_column,
    pictures,
    read_labels,
    read_table,
)
from dcpc.training.paths import local_path

__all__ = ["HubImages"]

MAX_SIZE = 512
INTENSITY_RANGES = ((0.0, 1.0), (-1.0, 1.0))


class HubImages(ImageData):
    """A data set of the hub or of a local folder, decoded once.

    The images of `split` are divided by `seed` into a training part and a held-out part; the two
    caps then shorten either part, so that held-out images stay the same whatever `num_training`.
    What is decoded lies in `cache_folder` as bytes, and is memory-mapped; no later run decodes it
    again, unless the data, the size or the channels change.

    Args:
        path: A name on the hub, for example `ylecun/mnist`, or a folder of parquet files or of
            pictures, in one sub-folder per class if they have labels.
        config_name: Which configuration of the data set, where it has several.
        split: Which of its splits.
        image_column: Where the images are; null finds the only column of images.
        label_column: Where the labels are, classes or integers; null finds the only column of
            classes, and gives every image the label 0 if there is none.
        size: Height and width, to which images are resized and cropped around the centre, their
            proportions kept; null where all images have one shape.
        channels: 1 for grey, 3 for colour.
        intensity_range: `[0, 1]` or `[-1, 1]`: the intensities of black and of white.
        binarise: Every pixel is a draw of 0 or 1 with its intensity as the probability: a fresh one
            at every visit in training, a fixed one in held-out data.
        batch_size: Training data per batch.
        evaluation_batch_size: Held-out data per batch.
        held_out_fraction: Fraction of the images that is never trained on.
        num_training: Number of training images that are used; null for all.
        num_held_out: Number of held-out images that are used; null for all.
        seed: Seed of the split, the shuffling and the binary draws.
        cache_folder: Where decoded images are kept; null for `dcpc` in `$XDG_CACHE_HOME` or
            `~/.cache`.
        num_workers: Processes that prepare training batches; 0 for none beside the main one.

    Raises:
        OptionError: An argument is out of range or does not fit another one.
    """

    def __init__(
        self,
        path: str,
        config_name: str | None = None,
        split: str = "train",
        image_column: str | None = None,
        label_column: str | None = None,
        size: int | None = None,
        channels: int = 1,
        intensity_range: tuple[float, float] = (0.0, 1.0),
        binarise: bool = False,
        batch_size: int = 256,
        evaluation_batch_size: int = 500,
        held_out_fraction: float = 0.1,
        num_training: int | None = None,
        num_held_out: int | None = None,
        seed: int = 0,
        cache_folder: str | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, evaluation_batch_size, num_held_out, seed, num_workers)
        _check_options(size, channels, intensity_range, binarise, held_out_fraction, num_training)
        if not path:
            raise OptionError("data.path must be a name on the hub or a folder, got ''")
        self.path = str(local_path("data.path", path)) if path.startswith("~") else path
        self.config_name = config_name
        self.split_name = split
        self.image_column = image_column
        self.label_column = label_column
        self.size = size
        self.channels = channels
        self.intensity_range = (intensity_range[0], intensity_range[1])
        self.binarise = binarise
        self.held_out_fraction = held_out_fraction
        self.num_training = num_training
        self.cache_folder = (
            local_path("data.cache_folder", cache_folder)
            if cache_folder
            else _default_cache_folder()
        )

    def load(self) -> tuple[Tensor, Tensor]:
        """All images as bytes, mapped from the cache, and their labels.

        Raises:
            DataError: The data set or the package `datasets` is missing, or an image is unusable.
        """
        folder = Path(self.path)
        source = None
        if folder.is_dir():
            identity = _folder_identity(folder)
        else:
            source = read_table(self.path, self.config_name, self.split_name)
            identity = [source._fingerprint]
        cached = self._cached_file(identity)
        if not cached.exists():
            self._decode(source, cached)
        return open_pixels(cached)

    def count_held_out(self, num_images: int) -> int:
        return round(self.held_out_fraction * num_images)

    def split(self, num_images: int) -> tuple[Tensor, Tensor]:
        """Rows of the training part and of the held-out part, each up to its cap.

        Raises:
            OptionError: A part is empty, or shorter than its cap.
        """
        training, held_out = super().split(num_images)
        if not len(held_out):
            raise OptionError(
                f"data.held_out_fraction of {self.held_out_fraction} leaves none of {num_images} "
                "images to hold out; raise it"
            )
        return (
            _cap("num_training", training, self.num_training),
            _cap("num_held_out", held_out, self.num_held_out),
        )

    def image_set(self, images: Tensor, labels: Tensor, rows: Tensor) -> LabelledSet:
        seed = self.seed if self.binarise else None
        return PixelSet(images, labels, rows, self.intensity_range, seed)

    def _cached_file(self, identity: list[Any]) -> Path:
        """The file of this data set's images in this size, with these channels."""
        columns = (self.image_column, self.label_column)
        key = [*identity, self.config_name, self.split_name, *columns]
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        name = re.sub(r"\W+", "-", Path(self.path).name)
        return self.cache_folder / f"{name}-{self.channels}x{self.size or 'original'}-{digest}.npy"

    def _decode(self, source: Table | None, cached: Path) -> None:
        if source is None:
            source = read_table(self.path, self.config_name, self.split_name)
        if not len(source):
            raise DataError(f"data.path: '{self.path}' has no images")
        column = find_image_column(source, self.image_column)
        labels = read_labels(source, self.label_column)
        try:
            self.cache_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"data.cache_folder: cannot write to '{self.cache_folder}' ({error.strerror}); "
                "choose another one"
            ) from error
        decode_pictures(cached, pictures(source, column), labels, self.size, self.channels)


def _check_options(
    size: int | None,
    channels: int,
    intensity_range: tuple[float, float],
    binarise: bool,
    held_out_fraction: float,
    num_training: int | None,
) -> None:
    if size is not None and not 1 <= size <= MAX_SIZE:
        raise OptionError(f"data.size must be between 1 and {MAX_SIZE} pixels, got {size}")
    if channels not in (1, 3):
        raise OptionError(f"data.channels must be 1 for grey or 3 for colour, got {channels}")
    if tuple(intensity_range) not in INTENSITY_RANGES:
        raise OptionError(
            f"data.intensity_range must be [0, 1] or [-1, 1], got {list(intensity_range)}"
        )
    if binarise and intensity_range[0] != 0:
        raise OptionError(
            "data.binarise draws pixels of 0 and 1, so data.intensity_range must be [0, 1], got "
            f"{list(intensity_range)}"
        )
    if not 0.0 < held_out_fraction < 1.0:
        raise OptionError(
            f"data.held_out_fraction must be between 0 and 1, exclusive, got {held_out_fraction}"
        )
    if num_training is not None and num_training < 1:
        raise OptionError(f"data.num_training must be at least 1, got {num_training}")


def _cap(name: str, rows: Tensor, cap: int | None) -> Tensor:
    if cap is not None and cap > len(rows):
        raise OptionError(f"data.{name} must be at most {len(rows)}, all there are, got {cap}")
    return rows[:cap]


def _default_cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dcpc"


def _folder_identity(folder: Path) -> list[Any]:
    """Fingerprint of a folder: names, sizes and times of its files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(str(path.relative_to(folder)), path.stat()) for path in files]
    return [
        str(folder.resolve()),
        *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats),
    ]
