"""Images of which few have labels that a model sees."""

from __future__ import annotations

import pytest
import torch

from dcpc.errors import OptionError
from dcpc.training.data import DigitsData, HalfLabelledData
from dcpc.training.data.half_labelled import choose_labelled


def half_labelled(num_labelled: int = 300, seed: int = 0) -> HalfLabelledData:
    data = HalfLabelledData(DigitsData(), num_labelled, seed)
    data.setup("fit")
    return data


def test_as_many_labels_of_every_class_are_seen():
    data = half_labelled()
    observed, labels, _ = data.training_set.first(1500)
    assert int(observed["seen"].sum()) == 300
    assert torch.bincount(labels[observed["seen"]]).tolist() == [30] * 10


def test_labels_that_are_not_seen_are_not_there():
    data = half_labelled()
    observed, labels, _ = data.training_set.first(1500)
    seen = observed["seen"]
    assert torch.equal(observed["label"][seen], labels[seen])
    assert not bool(observed["label"][~seen].any())
    held_out, true, _ = data.held_out_set.first(297)
    assert not bool(held_out["seen"].any())
    assert not bool(held_out["label"].any())
    assert bool(true.any())  # to measure by


def test_images_and_split_are_those_of_the_images_alone():
    images = DigitsData()
    images.setup("fit")
    data = half_labelled()
    for name in ("training_set", "held_out_set"):
        alone, labels, index = getattr(images, name).first(50)
        observed, own_labels, own_index = getattr(data, name).first(50)
        assert torch.equal(observed["x"], alone)
        assert torch.equal(own_labels, labels)
        assert torch.equal(own_index, index)


def test_the_choice_is_the_seeds():
    first, again, other = (
        half_labelled(seed=seed).training_set.first(1500)[0]["seen"] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_classes_that_run_out_leave_their_labels_to_the_others():
    labels = torch.tensor([0] * 2 + [1] * 10)
    seen = choose_labelled(labels, 8, seed=0)
    assert torch.bincount(labels[seen]).tolist() == [2, 6]


@pytest.mark.parametrize("number", [9, 1501])
def test_impossible_numbers_of_labels_are_refused(number):
    with pytest.raises(OptionError, match=rf"num_labelled.*classes, 10.*1500, got {number}"):
        half_labelled(number)
