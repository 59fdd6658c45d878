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


def test_images_with_labels_are_copied_behind_the_others():
    data = half_labelled(20)
    copied = HalfLabelledData(DigitsData(), 20, labelled_copies=3)
    copied.setup("fit")
    assert len(copied.training_set) == 1500 + 2 * 20
    every = copied.training_set.__getitems__(range(1540))
    once = data.training_set.first(1500)
    rows = once[0]["seen"].nonzero()[:, 0].repeat(2)
    for name in ("x", "label", "seen"):
        torch.testing.assert_close(every[0][name], torch.cat([once[0][name], once[0][name][rows]]))
    assert torch.equal(every[1], torch.cat([once[1], once[1][rows]]))
    assert torch.equal(copied.training_set.all_labels(), every[1])
    assert every[2].tolist() == list(range(1540))  # each with particles of its own
    assert len(copied.held_out_set) == 297


@pytest.mark.parametrize("number", [9, 1501])
def test_impossible_numbers_of_labels_are_refused(number):
    with pytest.raises(OptionError, match=rf"num_labelled.*classes, 10.*1500, got {number}"):
        half_labelled(number)
