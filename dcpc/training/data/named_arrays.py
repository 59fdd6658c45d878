"""A model's arguments from NumPy arrays in a folder, one file for each."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dcpc.errors import DataError, OptionError, require_at_least
from dcpc.training.data.arrays import read_array
from dcpc.training.data.images import check_labels
from dcpc.training.data.labelled import LabelledData, TensorSet
from dcpc.training.paths import local_path

__all__ = ["NamedArrayData"]


class NamedArrayData(LabelledData):
    """Your own data for a model of any arguments: `NAME.npy`, `(N, ...)`, is the argument `NAME`.

    Numbers with a decimal point become torch's default type, integers 64-bit integers, and truth
    values stay what they are. `labels.npy`, `(N,)`, is no argument, but what held-out data are
    measured by; without it all labels are 0.

    Args:
        folder: Where the files are.
        arguments: Names of the arguments, the one that is reconstructed and shown first; null for
            those of all files, in alphabetical order.
        batch_size: Training data per batch.
        evaluation_batch_size: Held-out data per batch.
        num_held_out: Number of data that are never trained on.
        seed: Seed of the split and the shuffling.
        num_workers: Processes that prepare training batches; 0 for none beside the main one.

    Raises:
        OptionError: A number out of range.
    """

    def __init__(
        self,
        folder: str,
        arguments: list[str] | None = None,
        batch_size: int = 100,
        evaluation_batch_size: int = 300,
        num_held_out: int = 300,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, evaluation_batch_size, seed, num_workers)
        require_at_least("data.num_held_out", num_held_out, 1)
        self.folder = local_path("data.folder", folder)
        self.arguments = arguments
        self.num_held_out = num_held_out

    def setup(self, stage: str) -> None:
        """Loads, checks and splits the arrays, once.

        Raises:
            DataError: A file is missing, damaged, or of another length.
            OptionError: Nothing would be left to train on.
        """
        if self.training_set is not None:
            return
        data, labels = self.load()
        if self.num_held_out >= len(labels):
            raise OptionError(
                f"data.num_held_out must be smaller than the number of data, {len(labels)}, got "
                f"{self.num_held_out}"
            )
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))
        held_out, training = order[: self.num_held_out], order[self.num_held_out :]
        self.training_set, self.held_out_set = (
            TensorSet({name: values[rows] for name, values in data.items()}, labels[rows])
            for rows in (training, held_out)
        )

    def load(self) -> tuple[dict[str, Tensor], Tensor]:
        """All data by the names of arguments, and their labels."""
        if not self.folder.is_dir():
            raise DataError(
                f"data.folder: there is no folder '{self.folder}' (looked in {Path.cwd()}); it "
                "must hold an array NAME.npy for every argument NAME of the model"
            )
        files = sorted(path.stem for path in self.folder.glob("*.npy") if path.stem != "labels")
        names = files if self.arguments is None else self.arguments
        missing = [name for name in names if name not in files]
        if missing or not names:
            raise DataError(
                f"data.arguments: '{self.folder}' must hold {(missing or ['NAME'])[0]}.npy; there "
                f"are arrays of {files}"
            )
        data = {name: self._read(name) for name in names}
        sizes = {name: len(values) for name, values in data.items()}
        if len(set(sizes.values())) > 1:
            raise DataError(
                f"data.folder: the arrays of '{self.folder}' must have equally many rows, one per "
                f"datum, got {sizes}"
            )
        return data, self._labels(next(iter(sizes.values())))

    def _read(self, name: str) -> Tensor:
        path = self.folder / f"{name}.npy"
        array = read_array(path)
        assert array is not None
        if array.dtype.kind not in "fiub" or array.ndim == 0 or not array.size:
            raise DataError(
                f"data.folder: '{path}' must hold numbers or truth values, one row per datum, got "
                f"an array of shape {array.shape} and type {array.dtype}"
            )
        if array.dtype.kind == "b":
            return torch.from_numpy(array)
        if array.dtype.kind == "f":
            return torch.from_numpy(array.astype("f8")).to(torch.get_default_dtype())
        return torch.from_numpy(array.astype("i8"))

    def _labels(self, count: int) -> Tensor:
        path = self.folder / "labels.npy"
        labels = read_array(path)
        if labels is None:
            return torch.zeros(count, dtype=torch.int64)
        if labels.shape != (count,):
            raise DataError(
                f"data.folder: '{path}' must hold one label per datum, {count}, got shape "
                f"{labels.shape}"
            )
        return torch.from_numpy(check_labels(labels, f"data.folder: '{path}'"))
