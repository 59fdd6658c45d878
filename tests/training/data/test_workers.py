"""Worker processes change nothing but who prepares the batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dcpc.errors import OptionError
from dcpc.training import DigitsData, MoonsData
from dcpc.training.command import main
from dcpc.training.data import ArrayData, LabelledData, PixelSet
from dcpc.training.data.labelled import Batch, LabelledSet


class BinaryData(LabelledData):
    """Grey pictures, drawn anew in every epoch."""

    def setup(self, stage: str) -> None:
        levels = np.random.default_rng(3).integers(0, 256, (23, 1, 5, 4), dtype=np.uint8)
        pixels, labels = torch.from_numpy(levels), torch.arange(23)
        self.training_set = PixelSet(pixels, labels, torch.arange(20), seed=7)
        self.held_out_set = PixelSet(pixels, labels, torch.arange(20, 23), seed=7)


def epochs(num_workers: int, numbers: Sequence[int], break_at: int | None = None) -> list[Tensor]:
    """The images of some epochs, one after the other, from one loader as Lightning uses it."""
    data = BinaryData(6, 3, seed=1, num_workers=num_workers)
    data.setup("fit")
    loader = data.train_dataloader()
    found = []
    for epoch in numbers:
        loader.batch_sampler.set_epoch(epoch)
        batches = []
        for number, batch in enumerate(loader):
            if break_at is not None and number == break_at:
                break
            batches.append(batch)
        images, labels, index = (torch.cat(parts) for parts in zip(*batches, strict=True))
        found += [images, labels, index]
    return found


def test_batches_of_two_workers_are_those_of_none_in_every_epoch() -> None:
    alone, helped = epochs(0, (0, 1, 2)), epochs(2, (0, 1, 2))
    assert len(alone) == len(helped) == 9
    assert all(torch.equal(*pair) for pair in zip(alone, helped, strict=True))
    by_index = [alone[3 * epoch][alone[3 * epoch + 2].argsort()] for epoch in range(3)]
    assert not torch.equal(by_index[0], by_index[1])  # binary pixels are drawn anew
    assert not torch.equal(by_index[1], by_index[2])


def test_an_epoch_that_was_broken_off_leaves_nothing_in_the_workers() -> None:
    alone, helped = epochs(0, (0, 1, 5), break_at=2), epochs(2, (0, 1, 5), break_at=2)
    assert all(torch.equal(*pair) for pair in zip(alone, helped, strict=True))


def test_workers_that_start_in_a_later_epoch_know_it() -> None:
    assert torch.equal(epochs(1, (4,))[0], epochs(0, (3, 4))[3])


def test_any_set_that_follows_the_epoch_does_so_in_the_workers() -> None:
    class Epochs(LabelledSet):
        epoch = -1

        def __len__(self) -> int:
            return 4

        def __getitems__(self, index: Sequence[int]) -> Batch:
            rows = torch.as_tensor(index)
            return torch.full((len(rows),), self.epoch), rows, rows

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    class Data(LabelledData):
        def setup(self, stage: str) -> None:
            self.training_set = self.held_out_set = Epochs()

    data = Data(2, 2, seed=0, num_workers=1)
    data.setup("fit")
    loader = data.train_dataloader()
    for epoch in (3, 4, 9):
        loader.batch_sampler.set_epoch(epoch)
        assert torch.cat([seen for seen, _, _ in loader]).tolist() == [epoch] * 4


def test_held_out_data_need_no_workers() -> None:
    data = DigitsData(num_workers=2)
    data.setup("fit")
    assert data.train_dataloader().num_workers == 2
    assert data.val_dataloader().num_workers == 0


@pytest.mark.parametrize("kind", [DigitsData, MoonsData, lambda **more: ArrayData("x", **more)])
def test_a_number_of_workers_or_a_seed_out_of_range_is_named(kind: type) -> None:
    with pytest.raises(OptionError, match=r"data\.num_workers must be at least 0, got -1"):
        kind(num_workers=-1)
    for seed in (-1, 2**32):
        with pytest.raises(OptionError, match=rf"data\.seed must be a seed .*, got {seed}"):
            kind(seed=seed)


@pytest.mark.parametrize("key", ["training_seed", "held_out_seed"])
def test_seeds_of_the_moons_are_seeds(key: str) -> None:
    with pytest.raises(OptionError, match=rf"data\.{key} must be a seed .*, got -1"):
        MoonsData(**{key: -1})


def test_a_run_with_workers_learns_the_same_weights(tmp_path: Path) -> None:
    weights = []
    for num_workers in (0, 2):
        folder = tmp_path / str(num_workers)
        main(
            [
                "fit",
                "--config=configs/digits.json",
                f"--trainer.default_root_dir={folder}",
                "--trainer.max_epochs=2",
                "--trainer.limit_train_batches=2",
                "--trainer.limit_val_batches=0",
                "--trainer.log_every_n_steps=1",
                f"--data.num_workers={num_workers}",
            ]
        )
        weights.append(torch.load(folder / "last.ckpt", weights_only=True)["state_dict"])
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
