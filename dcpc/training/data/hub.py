"""Images from the Hugging Face hub or from a local folder."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dcpc.errors import DataError, OptionError
from dcpc.training.data.images import ImageData, check_labels
from dcpc.training.data.labelled import LabelledSet
from dcpc.training.data.pixels import PixelSet, decode_pictures, open_pixels
from dcpc.training.paths import local_path

__all__ = ["HubImages"]

Table = Any
"""A `datasets.Dataset`: the package is optional."""

MAX_SIZE = 512
INTENSITY_RANGES = ((0.0, 1.0), (-1.0, 1.0))
LOCAL = re.compile(r"^[/.~]|^[A-Za-z]:|/.*/")
"""Paths that cannot be names on the hub, which are `name` or `owner/name`."""


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
            source = self._read()
            identity = [source._fingerprint]
        cached = self._cached_file(identity)
        if not cached.exists():
            self._decode(self._read() if source is None else source, cached)
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

    def _read(self) -> Table:
        """The data set's table, with its images not yet decoded."""
        if not Path(self.path).is_dir() and LOCAL.search(self.path):
            raise DataError(f"data.path: there is no folder '{self.path}' ({_how_to_get()})")
        try:
            datasets = importlib.import_module("datasets")
        except ImportError as error:
            raise DataError(
                "HubImages needs the package 'datasets', which is not installed: pip install "
                "-c constraints.txt '.[data]' in the folder of dcpc, or pip install datasets"
            ) from error
        try:
            return datasets.load_dataset(self.path, self.config_name, split=self.split_name)
        except (OSError, datasets.exceptions.DatasetsError) as error:
            is_folder = Path(self.path).is_dir()
            what = "no images are in" if is_folder else "there is no folder and no data set"
            raise DataError(
                f"data.path: {what} '{self.path}', or it could not be reached: "
                f"{_first_line(error)} ({_how_to_get()})"
            ) from error
        except ValueError as error:
            raise OptionError(
                f"data.config_name or data.split does not fit '{self.path}': {error}"
            ) from error

    def _cached_file(self, identity: list[Any]) -> Path:
        """The file of this data set's images in this size, with these channels."""
        columns = (self.image_column, self.label_column)
        key = [*identity, self.config_name, self.split_name, *columns]
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        name = re.sub(r"\W+", "-", Path(self.path).name)
        return self.cache_folder / f"{name}-{self.channels}x{self.size or 'original'}-{digest}.npy"

    def _decode(self, source: Table, cached: Path) -> None:
        if not len(source):
            raise DataError(f"data.path: '{self.path}' has no images")
        image_column = _image_column(source, self.image_column)
        labels = _labels(source, self.label_column)
        try:
            self.cache_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"data.cache_folder: cannot write to '{self.cache_folder}' ({error.strerror}); "
                "choose another one"
            ) from error
        decode_pictures(cached, _pictures(source, image_column), labels, self.size, self.channels)


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


def _image_column(source: Table, wanted: str | None) -> str:
    return _column(source, "image", wanted, [n for n, f in source.features.items() if _is_image(f)])


def _is_image(feature: object) -> bool:
    return type(feature).__name__ == "Image"


def _column(source: Table, kind: str, wanted: str | None, found: list[str]) -> str:
    """The column wanted, or else the only one found."""
    columns = ", ".join(source.features)
    if wanted is not None:
        if wanted in source.features and (kind != "image" or wanted in found):
            return wanted
        raise DataError(
            f"data.{kind}_column: there is no {kind} column '{wanted}' among the columns {columns}"
        )
    if len(found) != 1:
        count = "no column" if not found else f"{len(found)} columns ({', '.join(found)})"
        raise DataError(
            f"data.path: the data set has {count} of {kind}s among its columns {columns}; expected "
            f"one, or name it with data.{kind}_column"
        )
    return found[0]


def _labels(source: Table, wanted: str | None) -> np.ndarray:
    """The labels `(N,)`; zeros where there are none."""
    found = [n for n, f in source.features.items() if type(f).__name__ == "ClassLabel"]
    if wanted is None and not found:
        return np.zeros(len(source), dtype=np.int64)
    column = _column(source, "label", wanted, found)
    values = np.asarray(source.with_format("arrow")[column][:])
    return check_labels(values, f"data.label_column: the column '{column}'")


def _pictures(source: Table, column: str) -> Iterator[Image.Image]:
    for row in source.select_columns([column]):
        yield row[column]


def _how_to_get() -> str:
    return (
        f"looked in {Path.cwd()}). Check the name and the network, or on a machine that has one "
        "run 'hf download --repo-type dataset ylecun/mnist --local-dir data/mnist', say, and name "
        "that folder (see 'Data sets' in configs/README.md"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
