"""Weights in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dcpc.networks import (
    PredictiveCodingNetwork,
    SquaredErrorNode,
    WeightsError,
    load_weights,
    save_weights,
)


def network(width: int = 3) -> PredictiveCodingNetwork:
    return PredictiveCodingNetwork(nn.Linear(2, width), nn.BatchNorm1d(width), SquaredErrorNode())


def test_saved_weights_come_back_bit_for_bit_and_without_values(tmp_path: Path) -> None:
    one = network()
    one.init(torch.randn(4, 2))
    save_weights(one, tmp_path / "weights.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]
    before = {name: value.clone() for name, value in one.state_dict().items()}
    assert not any("value" in name for name in before)
    with torch.no_grad():
        for parameter in one.weights():
            parameter.mul_(1.1).add_(0.1)
    load_weights(one, tmp_path / "weights.pt")
    for name, value in one.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_weights_of_another_architecture_are_refused_and_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    save_weights(network(width=4), path)
    one = network(width=3)
    before = {name: value.clone() for name, value in one.state_dict().items()}
    with pytest.raises(WeightsError, match=r"'layers\.0\.bias' has shape \(4,\) there and \(3,\)"):
        load_weights(one, path)
    longer = PredictiveCodingNetwork(*network(4).layers, nn.Linear(4, 1), SquaredErrorNode())
    with pytest.raises(WeightsError, match=r"'layers\.3\.bias' of this model is not in"):
        load_weights(longer, path)
    for name, value in one.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_checkpoint_of_training_holds_the_weights_of_its_network(tmp_path: Path) -> None:
    one, other = network(), network()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    state = {f"network.{name}": value for name, value in other.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "last.ckpt")
    load_weights(one, tmp_path / "last.ckpt")
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    torch.save({"epoch": 3, "state_dict": {"model.scale": torch.ones(())}}, tmp_path / "other.ckpt")
    with pytest.raises(WeightsError, match="holds no weights"):
        load_weights(one, tmp_path / "other.ckpt")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    with pytest.raises(WeightsError, match="holds no weights"):
        load_weights(one, tmp_path / "numbers.pt")


def test_files_without_weights_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is no file"):
        load_weights(network(), tmp_path / "none.pt")
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="holds no weights, or is truncated"):
        load_weights(network(), tmp_path / "broken.pt")
