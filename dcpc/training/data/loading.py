"""Batches of a training set: in an order that can be repeated, shared out, and continued."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dcpc.errors import OptionError

__all__ = ["EpochBatches", "ResumableLoader"]


class EpochBatches(Sampler[list[int]]):
    """Batches of a permutation that depends on the seed and the epoch's number only.

    A resumed run therefore visits the data in the order in which the first one would have.
    Lightning calls `set_epoch`. Several processes share the data out: each has those whose index is
    its rank modulo the number of processes, in every epoch, and all have equally many batches, of
    sizes that differ by one at most.

    Args:
        size: Number of data.
        batch_size: Data per batch and process.
        seed: Seed of all permutations.
        follow: Is told every epoch's number too: a data set that changes from epoch to epoch.
        rank: Number of this process.
        num_processes: Number of processes.

    Attributes:
        start: Number of batches to leave out at the beginning of the next epoch.

    Raises:
        OptionError: There are fewer data than processes.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        follow: Callable[[int], None] | None = None,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        if size < num_processes:
            raise OptionError(
                f"trainer.devices={num_processes} processes cannot share {size} training data; use "
                "fewer"
            )
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.follow = follow
        self.rank = rank
        self.num_processes = num_processes
        self.epoch = 0
        self.start = 0
        self.sampler = self  # where Lightning looks for `set_epoch`

    def set_epoch(self, epoch: int) -> None:
        """Chooses the permutation."""
        self.epoch = epoch
        if self.follow is not None:
            self.follow(epoch)

    def __len__(self) -> int:
        most, least = -(-self.size // self.num_processes), self.size // self.num_processes
        return min(-(-most // self.batch_size), least)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        order = torch.randperm(self.size, generator=generator)
        return iter([part.tolist() for part in self._parts(order)[self.start :]])

    @cached_property
    def sizes(self) -> Counter[int]:
        """Number of batches of an epoch, by the number of data in them."""
        return Counter(len(part) for part in self._parts(torch.arange(self.size)))

    def _parts(self, order: Tensor) -> tuple[Tensor, ...]:
        """The batches of this process."""
        if self.num_processes == 1:
            return order.split(self.batch_size)
        return order[order % self.num_processes == self.rank].tensor_split(len(self))


class ResumableLoader(DataLoader[Any]):
    """Batches of a training set, which a checkpoint taken within an epoch continues.

    Lightning keeps `state_dict()` in its checkpoints, and gives it back before the next epoch.

    Args:
        data: The training set, whose `__getitems__` returns a batch.
        batches: The order of the data.
        num_workers: Processes that prepare batches; 0 for none.
    """

    def __init__(self, data: Dataset[Any], batches: EpochBatches, num_workers: int = 0) -> None:
        super().__init__(
            data,
            batch_sampler=batches,
            collate_fn=_unchanged,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
        )
        self.batches = batches
        self._num_done = 0
        self._saved: dict[str, int] = {}

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the number of its batches that were fetched by every process."""
        return {
            "epoch": self.batches.epoch,
            "num_batches": self._num_done,
            "num_processes": self.batches.num_processes,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues the epoch of `state_dict()`.

        Raises:
            OptionError: The epoch was begun by another number of processes.
        """
        is_within = state["num_batches"] * state["num_processes"] * self.batches.batch_size < (
            self.batches.size
        )
        if is_within and state["num_processes"] != self.batches.num_processes:
            raise OptionError(
                f"the checkpoint was saved within an epoch of {state['num_processes']} processes, "
                f"which {self.batches.num_processes} cannot finish; use trainer.devices="
                f"{state['num_processes']} until its end"
            )
        self._saved = dict(state)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The batches of the epoch, or the rest of it: a generator, begun when used."""
        resumes = self._saved.get("epoch") == self.batches.epoch
        self._num_done = self._saved["num_batches"] if resumes else 0
        self._saved = {}
        self.batches.start = self._num_done
        for batch in super().__iter__():
            self._num_done += 1
            yield batch


def _unchanged(batch: Any) -> Any:
    return batch
