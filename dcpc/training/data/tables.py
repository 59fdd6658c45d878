"""Tables of images and labels, as the package `datasets` reads them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dcpc.errors import DataError, OptionError
from dcpc.training.data.images import check_labels

__all__ = ["Table", "find_image_column", "pictures", "read_labels", "read_table"]

Table = Any
"""A `datasets.Dataset`: the package is optional."""

LOCAL = re.compile(r"^[/.~]|^[A-Za-z]:|/.*/")
"""Paths that cannot be names on the hub, which are `name` or `owner/name`."""

MAX_REASON = 200
"""Characters of another package's message that are shown."""


def read_table(path: str, config_name: str | None, split: str) -> Table:
    """The table of a data set, with its images not yet decoded.

    Args:
        path: A name on the hub, or a folder.
        config_name: Which configuration of the data set, where it has several.
        split: Which of its splits.

    Raises:
        DataError: The data set or the package `datasets` is missing, or a file is damaged.
        OptionError: The data set has no such configuration or split.
    """
    is_folder = Path(path).is_dir()
    if not is_folder and LOCAL.search(path):
        raise DataError(f"data.path: there is no folder '{path}' ({_how_to_get()})")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            "HubImages needs the package 'datasets', which is not installed: pip install "
            "-c constraints.txt '.[data]' in the folder of dcpc, or pip install datasets"
        ) from error
    if is_folder:
        _check_parquet(Path(path))
    try:
        with _without_logs(datasets):
            return datasets.load_dataset(path, config_name, split=split)
    except datasets.exceptions.DatasetGenerationError as error:
        raise DataError(
            f"data.path: '{path}' cannot be read: {_innermost(error)}; its files must be "
            "pictures, or tables of the same columns"
        ) from error
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        what = "no images are in" if is_folder else "there is no folder and no data set"
        raise DataError(
            f"data.path: {what} '{path}', or it could not be reached: "
            f"{_first_line(error)} ({_how_to_get()})"
        ) from error
    except ValueError as error:
        raise OptionError(
            f"data.config_name or data.split does not fit '{path}': {_first_line(error)}"
        ) from error


def find_image_column(source: Table, wanted: str | None) -> str:
    """The column of images: the one wanted, or else the only one.

    Raises:
        DataError: There is none, or there are several.
    """
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


def read_labels(source: Table, wanted: str | None) -> np.ndarray:
    """The labels `(N,)`; zeros where there are none.

    Raises:
        DataError: Labels that are no classes.
    """
    found = [n for n, f in source.features.items() if type(f).__name__ == "ClassLabel"]
    if wanted is None and not found:
        return np.zeros(len(source), dtype=np.int64)
    column = _column(source, "label", wanted, found)
    values = np.asarray(source.with_format("arrow")[column][:])
    return check_labels(values, f"data.label_column: the column '{column}'")


def pictures(source: Table, column: str) -> Iterator[Image.Image]:
    """The pictures of a column, decoded one by one."""
    for row in source.select_columns([column]):
        yield row[column]


def _check_parquet(folder: Path) -> None:
    """Opens every parquet file of a folder: later errors do not name it.

    Raises:
        DataError: One is damaged.
    """
    parquet = importlib.import_module("pyarrow.parquet")
    for file in sorted(folder.rglob("*.parquet")):
        try:
            parquet.read_schema(file)
        except (OSError, ValueError) as error:
            raise DataError(
                f"data.path: '{file}' is no parquet file, or a damaged one of "
                f"{file.stat().st_size:,} bytes ({_first_line(error)}); fetch it again"
            ) from error


@contextmanager
def _without_logs(datasets: Any) -> Iterator[None]:
    """A block of code in which `datasets` logs nothing: what it raises says the same."""
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)


def _innermost(error: BaseException) -> str:
    """The message of the first cause, shortened to a line."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return " ".join(str(error).split())[:MAX_REASON] or type(error).__name__


def _how_to_get() -> str:
    return (
        f"looked in {Path.cwd()}). Check the name and the network, or on a machine that has one "
        "run 'hf download --repo-type dataset ylecun/mnist --local-dir data/mnist', say, and name "
        "that folder (see 'Data sets' in configs/README.md"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
