"""Data with labels, of which some are trained on and some are held out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dcpc.errors import DataError, require_at_least, require_seed
from dcpc.observed import Observed, mapped, named_tensors
from dcpc.training.data.loading import EpochBatches, ResumableLoader

__all__ = [
    "Batch",
    "LabelledData",
    "LabelledSet",
    "SharedEpochSet",
    "TensorSet",
    "check_finite",
    "check_sets",
]

Batch = tuple[Observed, Tensor, Tensor]

AT_ONCE = 1024
"""Data that are fetched at once for the sake of their labels."""


def check_finite(batch: Batch) -> None:
    """Checks that a batch's data are finite.

    Raises:
        DataError: Naming the first datum that is not.
    """
    data, _, index = batch
    for name, values in named_tensors(data):
        if bool(values.sum().isfinite()) or bool(values.isfinite().all()):
            continue
        row = int((~values.isfinite()).flatten(1).any(1).nonzero()[0])
        where = f" in '{name}'" if name else ""
        raise DataError(
            f"datum {int(index[row])} of the training set holds NaN or an infinity{where}; drop or "
            "repair it"
        )


def check_sets(data: LabelledData) -> None:
    """Checks that data that were set up can be trained on and measured.

    Raises:
        DataError: A set is missing or empty, or its batches are no tensors.
    """
    kind = type(data).__name__
    for name in ("training_set", "held_out_set"):
        made = getattr(data, name, None)
        if made is None:
            raise DataError(
                f"data: {kind}.setup must make self.{name}, and {kind}.__init__ must call "
                "super().__init__(batch_size, evaluation_batch_size, seed)"
            )
        if not isinstance(made, LabelledSet):
            raise DataError(
                f"data: {kind}.{name} must be a LabelledSet, such as TensorSet(data, labels), got "
                f"{type(made).__name__}"
            )
        if not len(made):
            option = "data.num_held_out: " if hasattr(data, "num_held_out") else ""
            raise DataError(
                f"{option}the {name} of {kind} is empty; hold out at least one datum, and fewer "
                "than there are"
            )
        check_tensors(*made.first(1), f"a batch of {kind}.{name}")


def check_tensors(observed: Any, labels: Any, index: Any, where: str) -> None:
    """Checks that a batch, or a whole set, is of tensors with one row for every datum.

    Raises:
        DataError: Naming `where`.
    """
    if isinstance(observed, Mapping):
        parts = list(observed.values())
    else:
        parts = list(observed) if isinstance(observed, tuple) else [observed]
    for part in (*parts, labels, index):
        if not isinstance(part, Tensor):
            raise DataError(
                f"data: {where} must be of tensors, got a {type(part).__name__}; convert it by "
                "torch.as_tensor"
            )
        if part.dim() == 0 or len(part) != len(index):
            raise DataError(
                f"data: {where} must have a row for every datum, {len(index)}, got a tensor of "
                f"shape {tuple(part.shape)}"
            )


class LabelledSet(Dataset[Batch], ABC):
    """Data with labels and indices, fetched a whole batch at a time."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of data."""

    @abstractmethod
    def __getitems__(self, index: Sequence[int]) -> Batch:
        """The data of a batch, their labels, and `index` itself."""

    def all_labels(self) -> Tensor:
        """Labels of all data, `(N,)`; by fetching these, where a set knows no shorter way."""
        parts = torch.arange(len(self)).split(AT_ONCE)
        return torch.cat([self.__getitems__(part.tolist())[1] for part in parts])

    def truth(self, index: Tensor) -> Mapping[str, Tensor]:
        """True values of sites, where they are known: to measure by, and never shown to a model.

        Args:
            index: Indices of the data, `(B,)`.

        Returns:
            By the name of a site, its true values, `(B, ...)`.
        """
        return {}

    def first(self, count: int) -> Batch:
        """The first `count` data as one batch, or all there are."""
        return self.__getitems__(range(min(count, len(self))))

    def __getitem__(self, index: int) -> Batch:
        data, labels, indices = self.__getitems__([index])
        return mapped(lambda values: values[0], data), labels[0], indices[0]

    def set_epoch(self, epoch: int) -> None:
        """Follow a new epoch of training."""


class SharedEpochSet(LabelledSet):
    """A set whose copies in worker processes learn of a new epoch through shared memory.

    The workers live as long as the loader, and copy the set once: without this, a set that changes
    from epoch to epoch would stay at the first one.

    Args:
        data: The set.
    """

    def __init__(self, data: LabelledSet) -> None:
        self.data = data
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, index: Sequence[int]) -> Batch:
        self.data.set_epoch(int(self._epoch))
        return self.data.__getitems__(index)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)
        self.data.set_epoch(epoch)


class TensorSet(LabelledSet):
    """Data that lie ready in memory.

    Args:
        data: Tensors `(N, *shape)`.
        labels: `(N,)`.

    Raises:
        DataError: They are no tensors, or not of one length.
    """

    def __init__(self, data: Observed, labels: Tensor) -> None:
        check_tensors(data, labels, labels, "a TensorSet")
        self.data, self.labels = data, labels

    def __len__(self) -> int:
        return len(self.labels)

    def all_labels(self) -> Tensor:
        return self.labels

    def __getitems__(self, index: Sequence[int]) -> Batch:
        rows = torch.as_tensor(index)
        return mapped(lambda values: values[rows], self.data), self.labels[rows], rows


class LabelledData(LightningDataModule, ABC):
    """Base class: a subclass says what there is to train on, and what is held out.

    A batch is `(data, labels, index)`: the model's arguments (a tensor `(B, *shape)`, a tuple of
    such tensors, or a mapping of them by the arguments' names), labels `(B,)` to measure by, and
    each datum's index in its own set, by which its particles are found.

    Args:
        batch_size: Training data per batch.
        evaluation_batch_size: Held-out data per batch.
        seed: Seed of the shuffling.
        num_workers: Processes that prepare training batches; 0 for none beside the main one.

    Raises:
        OptionError: A number out of range.
    """

    def __init__(
        self, batch_size: int, evaluation_batch_size: int, seed: int, num_workers: int = 0
    ) -> None:
        super().__init__()
        require_at_least("data.batch_size", batch_size, 1)
        require_at_least("data.evaluation_batch_size", evaluation_batch_size, 1)
        require_seed("data.seed", seed)
        require_at_least("data.num_workers", num_workers, 0)
        self.batch_size = batch_size
        self.evaluation_batch_size = evaluation_batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.training_set: LabelledSet | None = None
        self.held_out_set: LabelledSet | None = None

    @abstractmethod
    def setup(self, stage: str) -> None:
        """Makes the two sets, once."""

    def train_dataloader(self) -> DataLoader:
        assert self.training_set is not None
        data = SharedEpochSet(self.training_set) if self.num_workers else self.training_set
        trainer = self.trainer
        rank, num_processes = (
            (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        )
        batches = EpochBatches(
            len(data), self.batch_size, self.seed, data.set_epoch, rank, num_processes
        )
        return ResumableLoader(data, batches, self.num_workers)

    def val_dataloader(self) -> DataLoader:
        assert self.held_out_set is not None
        return _loader(self.held_out_set, self.evaluation_batch_size)

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader:
        return self.val_dataloader()


def _loader(data: LabelledSet, batch_size: int) -> DataLoader:
    return DataLoader(data, batch_size=batch_size, collate_fn=_unchanged)


def _unchanged(batch: Any) -> Any:
    return batch
