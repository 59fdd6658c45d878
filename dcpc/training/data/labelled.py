"""Data with labels, of which some are trained on and some are held out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dcpc.errors import DataError, require_at_least

__all__ = [
    "Batch",
    "EpochShuffle",
    "LabelledData",
    "LabelledSet",
    "ResumableLoader",
    "TensorSet",
    "check_finite",
]

Batch = tuple[Tensor, Tensor, Tensor]


def check_finite(batch: Batch) -> None:
    """Checks that a batch's data are finite.

    Raises:
        DataError: Naming the first datum that is not.
    """
    data, _, index = batch
    if bool(data.isfinite().all()):
        return
    row = int((~data.isfinite()).flatten(1).any(1).nonzero()[0])
    raise DataError(
        f"datum {int(index[row])} of the training set holds NaN or an infinity; drop or repair it"
    )


class EpochShuffle(Sampler[int]):
    """A permutation per epoch that depends on the seed and the epoch's number only.

    A resumed run therefore visits the data in the order in which the first one would have.
    Lightning calls `set_epoch`.

    Args:
        size: Number of data.
        seed: Seed of all permutations.
        follow: Is told every epoch's number too: a data set that changes from epoch to epoch.

    Attributes:
        start: Number of data to leave out at the beginning of the next permutation.
    """

    def __init__(self, size: int, seed: int, follow: Callable[[int], None] | None = None) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0
        self.start = 0
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
        return iter(torch.randperm(self.size, generator=generator)[self.start :].tolist())


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
        """Follow a new epoch of training."""


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


class ResumableLoader(DataLoader[Batch]):
    """Batches of a training set, which a checkpoint taken within an epoch continues.

    Lightning keeps `state_dict()` in its checkpoints, and gives it back before the next epoch.

    Args:
        data: The training set.
        batch_size: Data per batch.
        sampler: The order of the data.
    """

    sampler: EpochShuffle

    def __init__(self, data: LabelledSet, batch_size: int, sampler: EpochShuffle) -> None:
        # The set collates: its `__getitems__` returns a batch.
        super().__init__(data, batch_size=batch_size, sampler=sampler, collate_fn=_unchanged)
        self._num_done = 0
        self._saved = {"epoch": -1, "num_batches": 0}

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the number of its batches that were fetched."""
        return {"epoch": self.sampler.epoch, "num_batches": self._num_done}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues the epoch of `state_dict()`."""
        self._saved = dict(state)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """The batches of the sampler's epoch, or the rest of it: a generator, begun when used."""
        resumes = self._saved["epoch"] == self.sampler.epoch
        self._num_done = self._saved["num_batches"] if resumes else 0
        self._saved = {"epoch": -1, "num_batches": 0}
        assert self.batch_size is not None
        self.sampler.start = self._num_done * self.batch_size
        for batch in super().__iter__():
            self._num_done += 1
            yield batch


class LabelledData(LightningDataModule):
    """Base class: a subclass says what there is to train on, and what is held out.

    A batch is `(data, labels, index)`: data `(B, *shape)`, labels `(B,)`, and each datum's index in
    its own set, by which its particles are found.

    Args:
        batch_size: Training data per batch.
        evaluation_batch_size: Held-out data per batch.
        seed: Seed of the shuffling.
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
        return ResumableLoader(self.training_set, self.batch_size, sampler)

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
