"""Data of a user's own class that cannot be used are named before anything is run on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from dcpc.errors import DataError
from dcpc.training.data import LabelledData, LabelledSet, TensorSet, check_sets

IMAGES, LABELS = torch.zeros(6, 1, 8, 8), torch.zeros(6, dtype=torch.int64)


class Own(LabelledData):
    """A user's class, with the sets that it is given."""

    def __init__(self, training: Any, held_out: Any) -> None:
        super().__init__(2, 2, 0)
        self.training_set, self.held_out_set = training, held_out

    def setup(self, stage: str) -> None:
        """Has been done."""


class Counted(Own):
    num_held_out = 6


class Unfinished(LabelledData):
    def __init__(self) -> None:
        """Calls no other."""

    def setup(self, stage: str) -> None:
        """Makes no sets."""


class Pairs(LabelledSet):
    """Batches that are tensors by accident of NumPy only."""

    def __len__(self) -> int:
        return 6

    def __getitems__(self, index: Any) -> Any:
        return np.zeros((len(index), 4)), LABELS[list(index)], torch.as_tensor(index)


def tensors(count: int) -> TensorSet:
    return TensorSet(IMAGES[:count], LABELS[:count])


def test_sets_of_tensors_are_usable() -> None:
    check_sets(Own(tensors(4), tensors(2)))
    named = {"x": IMAGES, "seen": torch.ones(6, dtype=torch.bool)}
    check_sets(Own(TensorSet(named, LABELS), TensorSet((IMAGES, LABELS), LABELS)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Unfinished(), r"data: Unfinished\.setup must make self\.training_set, .* super"),
        (Own(tensors(4), None), r"data: Own\.setup must make self\.held_out_set"),
        (Own(tensors(0), tensors(6)), "^the training_set of Own is empty"),
        (Counted(tensors(0), tensors(6)), r"^data\.num_held_out: the training_set of Counted is"),
        (Counted(tensors(6), tensors(0)), r"^data\.num_held_out: the held_out_set of Counted is"),
        (Own(TensorDataset(IMAGES), tensors(2)), r"must be a LabelledSet, .* got TensorDataset"),
        (Own(tensors(4), Pairs()), r"a batch of Own\.held_out_set must be of tensors, got a nda"),
    ],
)
def test_sets_that_cannot_be_used_are_named(data: LabelledData, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_sets(data)


@pytest.mark.parametrize(
    ("data", "labels", "message"),
    [
        ([[1.0, 2.0]], LABELS[:1], "must be of tensors, got a list; convert it by torch.as_tensor"),
        (IMAGES, [0] * 6, "must be of tensors, got a list"),
        (IMAGES.numpy(), LABELS, "must be of tensors, got a ndarray"),
        ({"x": IMAGES, "y": "cat"}, LABELS, "must be of tensors, got a str"),
        (IMAGES[:4], LABELS, r"a row for every datum, 6, got a tensor of shape \(4, 1, 8, 8\)"),
        (torch.tensor(1.0), LABELS, r"a row for every datum, 6, got a tensor of shape \(\)"),
    ],
)
def test_a_set_is_of_tensors_of_one_length(data: Any, labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TensorSet(data, labels)
