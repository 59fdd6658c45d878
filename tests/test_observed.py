"""Data of a batch as a model's arguments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dcpc.errors import DataError
from dcpc.observed import (
    as_arguments,
    call,
    check_signature,
    main_tensor,
    mapped,
    named_tensors,
    num_data,
    split,
)

X, Y = torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("data", "args", "kwargs"),
    [
        (X, (X,), {}),
        ((X, Y), (X, Y), {}),
        ({"x": X, "label": Y}, (), {"x": X, "label": Y}),
    ],
)
def test_data_become_arguments(data, args, kwargs):
    assert as_arguments(data) == (args, kwargs)
    assert main_tensor(data) is X
    assert num_data(data) == 3
    received = call(lambda *a, **k: (a, k), data, "first", flag=1)
    assert received == (("first", *args), {**kwargs, "flag": 1})


def test_names_are_those_of_arguments_or_places():
    assert [name for name, _ in named_tensors({"x": X, "label": Y})] == ["x", "label"]
    assert [name for name, _ in named_tensors((X, Y))] == ["0", "1"]
    assert [name for name, _ in named_tensors(X)] == [""]


@pytest.mark.parametrize("data", [X, (X, Y), {"x": X, "label": Y}])
def test_parts_hold_all_data_in_order(data):
    parts = split(data, 2)
    assert [num_data(part) for part in parts] == [2, 1]
    for (_, whole), *rows in zip(
        named_tensors(data), *(named_tensors(part) for part in parts), strict=True
    ):
        assert torch.equal(torch.cat([values for _, values in rows]), whole)
    doubled = mapped(lambda values: 2 * values, data)
    assert torch.equal(main_tensor(doubled), 2 * X)
    assert type(doubled) is type(data)


def test_no_data_are_refused():
    with pytest.raises(DataError, match="no data"):
        main_tensor({})


class Model(nn.Module):
    def forward(self, x, label=None):
        return x, label


@pytest.mark.parametrize("model", [Model(), lambda x, label=None: None])
def test_arguments_that_a_model_does_not_take_are_named(model):
    check_signature(model, X)
    check_signature(model, (X, Y))
    check_signature(model, {"x": X, "label": Y})
    with pytest.raises(DataError, match=r"\['x', 'seen'\].*\(x, label=None\).*'seen'"):
        check_signature(model, {"x": X, "seen": Y})
    with pytest.raises(DataError, match=r"\['label'\].*missing.*'x'"):
        check_signature(model, {"label": Y})
    with pytest.raises(DataError, match="3 without names"):
        check_signature(model, (X, Y, Y))
