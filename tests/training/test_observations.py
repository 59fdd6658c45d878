"""A model that cannot be run on its data is named, with the user's line."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from dcpc.errors import DataError, ModelError
from dcpc.training.observations import check_runs


class Pixels(nn.Module):
    """Images of 64 pixels, of batches that it normalises."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(3, 64), nn.BatchNorm1d(64))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x.flatten(1))


class Convolution(Pixels):
    def forward(self, x: Tensor) -> None:
        super().forward(torch.conv2d(x, torch.ones(1, 1, 3, 3), padding=1))


class Loose(Pixels):
    def forward(self, x: Tensor) -> None:
        super().forward(x * pyro.param("gain", torch.tensor(1.0)))


class Held(PyroModule):
    """Parameters that modules hold, of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = PyroParam(torch.tensor(1.0), dist.constraints.positive)
        self.decoder = nn.Linear(3, 64)

    def forward(self, x: Tensor) -> None:
        decoder = pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), self.scale).to_event(1), obs=x.flatten(1))


class Faulty(Pixels):
    def forward(self, x: Tensor) -> None:
        raise ZeroDivisionError


def test_a_model_is_run_once_and_stays_as_it_was() -> None:
    model = Pixels()
    model.decoder[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    check_runs(model, torch.zeros(1, 1, 8, 8))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    assert model.training
    assert not model.decoder[0].training


def test_data_of_another_shape_are_named_with_the_reason() -> None:
    with pytest.raises(DataError, match=r"^model\.model: Pixels .* shape \[3, 8, 8\] each: .*192"):
        check_runs(Pixels(), torch.zeros(2, 3, 8, 8))


def test_a_parameter_that_no_module_holds_is_refused_since_training_would_leave_it() -> None:
    pyro.clear_param_store()
    with pytest.raises(ModelError, match=r"pyro\.param 'gain' of Loose would not be trained"):
        check_runs(Loose(), torch.zeros(2, 1, 8, 8))
    check_runs(Held(), torch.zeros(2, 1, 8, 8))


def test_the_line_of_the_users_own_code_is_named() -> None:
    line = Convolution.forward.__code__.co_firstlineno + 1
    with pytest.raises(DataError, match=rf"Convolution .*\(test_observations\.py, line {line}\)"):
        check_runs(Convolution(), torch.zeros(2, 3, 8, 8))


def test_other_errors_of_a_users_model_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        check_runs(Faulty(), torch.zeros(2, 1, 8, 8))
