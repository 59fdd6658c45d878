"""A model's arguments from files of their names."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dcpc.errors import DataError, OptionError
from dcpc.training.data import NamedArrayData


@pytest.fixture
def folder(tmp_path):
    np.save(tmp_path / "x.npy", np.linspace(0, 1, 60).reshape(20, 3))
    np.save(tmp_path / "count.npy", np.arange(20, dtype=np.int16))
    np.save(tmp_path / "seen.npy", np.arange(20) % 2 == 0)
    np.save(tmp_path / "labels.npy", np.arange(20) % 3)
    return tmp_path


def test_files_are_arguments_of_their_names(folder):
    data = NamedArrayData(str(folder), num_held_out=5)
    data.setup("fit")
    observed, labels, index = data.training_set.first(15)
    assert list(observed) == ["count", "seen", "x"]
    assert observed["x"].dtype == torch.get_default_dtype()
    assert observed["count"].dtype == torch.int64
    assert observed["seen"].dtype == torch.bool
    rows = observed["count"]
    assert torch.equal(labels, rows % 3)
    assert torch.equal(observed["seen"], rows % 2 == 0)
    assert torch.equal(index, torch.arange(15))
    held_out = data.held_out_set.first(5)[0]["count"]
    assert sorted([*rows.tolist(), *held_out.tolist()]) == list(range(20))


def test_the_first_argument_is_chosen(folder):
    data = NamedArrayData(str(folder), arguments=["x", "seen"], num_held_out=5)
    data.setup("fit")
    assert list(data.training_set.first(2)[0]) == ["x", "seen"]


def test_without_labels_all_are_zero(folder):
    (folder / "labels.npy").unlink()
    data = NamedArrayData(str(folder), num_held_out=5)
    data.setup("fit")
    assert not bool(data.training_set.all_labels().any())


def test_frames_of_unequal_number_are_refused(folder):
    np.save(folder / "frames.npy", np.zeros((19, 4)))
    with pytest.raises(DataError, match=r"equally many rows.*'frames': 19.*'x': 20"):
        NamedArrayData(str(folder), num_held_out=5).setup("fit")


def test_what_is_missing_is_named(folder, tmp_path_factory):
    with pytest.raises(DataError, match=r"mask\.npy; there are arrays of \['count', 'seen', 'x'\]"):
        NamedArrayData(str(folder), arguments=["x", "mask"]).setup("fit")
    with pytest.raises(DataError, match=r"no folder"):
        NamedArrayData(str(folder / "nowhere")).setup("fit")
    with pytest.raises(DataError, match=r"NAME\.npy"):
        NamedArrayData(str(tmp_path_factory.mktemp("empty"))).setup("fit")
    np.save(folder / "words.npy", np.array(["a"] * 20))
    with pytest.raises(DataError, match=r"words\.npy' must hold numbers"):
        NamedArrayData(str(folder), num_held_out=5).setup("fit")


def test_something_is_left_to_train_on(folder):
    with pytest.raises(OptionError, match=r"num_held_out.*20, got 20"):
        NamedArrayData(str(folder), num_held_out=20).setup("fit")


def test_sequences_of_unequal_numbers_of_frames_are_one_error(tmp_path):
    ragged = np.empty(3, dtype=object)
    for row, count in enumerate((4, 4, 5)):
        ragged[row] = np.zeros((count, 1, 2, 2))
    np.save(tmp_path / "frames.npy", ragged, allow_pickle=True)
    expected = r"frames\.npy' is no NumPy array .* unequal numbers of frames; cut or pad them"
    with pytest.raises(DataError, match=expected):
        NamedArrayData(str(tmp_path)).setup("fit")
