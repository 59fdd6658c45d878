from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from dcpc.errors import DataError, OptionError
from dcpc.training import DigitsData
from dcpc.training.data import ArrayData, EpochBatches, check_images


def test_digits_are_split_into_disjoint_sets_that_hold_every_digit() -> None:
    data = DigitsData(num_held_out=297, seed=5)
    data.setup("fit")
    parts = [data.training_set, data.held_out_set]
    assert [len(part) for part in parts] == [1500, 297]
    images = torch.cat([part.data for part in parts]).flatten(1)
    labels = torch.cat([part.labels for part in parts])
    raw = torch.tensor(load_digits().images).flatten(1)
    key = torch.arange(1.0, 65.0, dtype=torch.float64).sqrt()  # tells images apart
    ours, theirs = (16.0 * images.double()) @ key, raw @ key
    order, reference = ours.argsort(), theirs.argsort()
    assert torch.allclose(ours[order], theirs[reference])
    assert torch.equal(labels[order], torch.tensor(load_digits().target)[reference])


def test_the_split_depends_on_the_seed_alone() -> None:
    held_out = []
    for seed in (0, 0, 1):
        data = DigitsData(seed=seed)
        data.setup("test")
        held_out.append(data.held_out_set.data)
    assert torch.equal(held_out[0], held_out[1])
    assert not torch.equal(held_out[0], held_out[2])


def test_every_batch_carries_the_index_of_its_data_in_the_training_set() -> None:
    data = DigitsData(batch_size=64)
    data.setup("fit")
    seen = []
    for images, labels, index in data.train_dataloader():
        assert images.shape[1:] == (1, 8, 8)
        assert torch.equal(images, data.training_set.data[index])
        assert torch.equal(labels, data.training_set.labels[index])
        seen.append(index)
    assert sorted(torch.cat(seen).tolist()) == list(range(1500))


def test_the_order_of_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_only() -> None:
    orders = {}
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        batches = EpochBatches(50, 8, seed)
        batches.set_epoch(epoch)
        torch.rand(3)  # the global random state does not matter
        assert [len(batch) for batch in batches] == [8] * 6 + [2]
        assert batches.sizes == {8: 6, 2: 1}
        orders[seed, epoch] = [index for batch in batches for index in batch]
        assert sorted(orders[seed, epoch]) == list(range(50))
        assert orders[seed, epoch] == [index for batch in batches for index in batch]
    assert len({tuple(order) for order in orders.values()}) == 3


@pytest.mark.parametrize("bad", [float("nan"), -0.1, 1.5])
def test_an_intensity_that_is_no_number_in_the_unit_interval_is_named(bad: float) -> None:
    images = torch.rand(5, 1, 2, 2)
    images[3, 0, 1, 0] = bad
    with pytest.raises(DataError, match=rf"Scans: image 3 has the intensity {bad:g}"):
        check_images(images, "Scans")


def test_sizes_out_of_range_are_named() -> None:
    with pytest.raises(OptionError, match=r"data.batch_size must be at least 1, got 0"):
        DigitsData(batch_size=0)
    with pytest.raises(OptionError, match=r"data.num_held_out must be smaller than .* 1797"):
        DigitsData(num_held_out=1797).setup("fit")


@pytest.mark.parametrize("has_labels", [True, False])
def test_images_from_arrays_are_bytes_over_255_with_their_labels(tmp_path, has_labels) -> None:
    raw = np.arange(10 * 4 * 3, dtype=np.uint8).reshape(10, 4, 3)
    np.save(tmp_path / "images.npy", raw)
    if has_labels:
        np.save(tmp_path / "labels.npy", raw[:, 0, 0].astype(np.int64))
    images, labels = ArrayData(str(tmp_path)).load()
    assert images.shape == (10, 1, 4, 3)
    np.testing.assert_allclose(images.numpy()[:, 0], raw / 255.0, rtol=1e-6)
    expected = raw[:, 0, 0] if has_labels else np.zeros(10)
    np.testing.assert_array_equal(labels.numpy(), expected)


def test_missing_data_folder_is_named_with_what_it_must_hold(tmp_path) -> None:
    with pytest.raises(DataError, match=r"data\.folder: there is no folder '.*nowhere'.*images"):
        ArrayData(str(tmp_path / "nowhere")).setup("fit")
    with pytest.raises(DataError, match=r"images\.npy' must be an array .* got no such file"):
        ArrayData(str(tmp_path)).setup("fit")


def test_arrays_of_the_wrong_shape_or_kind_are_named(tmp_path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((5, 8)))
    with pytest.raises(DataError, match=r"got an array of shape \(5, 8\)"):
        ArrayData(str(tmp_path)).load()
    np.save(tmp_path / "images.npy", np.zeros((5, 8, 8)))
    np.save(tmp_path / "labels.npy", np.zeros(4))
    with pytest.raises(DataError, match=r"one label per image, 5, got shape \(4,\)"):
        ArrayData(str(tmp_path)).load()
    (tmp_path / "images.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match=r"images\.npy' is no NumPy array"):
        ArrayData(str(tmp_path)).load()
