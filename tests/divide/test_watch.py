"""Captured programs follow the Python state and the data that they were made from.

Every case is a model `x ~ Normal(m, s)`, `m ~ Normal(0, 1)`, whose scale `s` is kept somewhere in
Python. After it has changed, the loss of the same particles is that of the new scale, by the normal
density written out.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from typing import Generic, ParamSpec, TypeVar

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import nn

from dcpc import DCPC
from dcpc.divide.watch import Snapshot
from dcpc.models import PGDGenerator

GLOBAL_SCALE = 1.0
SETTINGS = types.SimpleNamespace(scale=1.0)


Item = TypeVar("Item")
Options = ParamSpec("Options")


class Config:
    scale = 1.0


def likelihood(x, scale):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(m, scale), obs=x)


def closure_number():
    scale = 1.0

    def change():
        nonlocal scale
        scale = 3.0

    return lambda x: likelihood(x, scale), change


def global_number():
    def change():
        global GLOBAL_SCALE
        GLOBAL_SCALE = 3.0

    def model(x):
        likelihood(x, GLOBAL_SCALE)

    globals()["GLOBAL_SCALE"] = 1.0
    return model, change


def global_number_of_a_helper():
    def helper():
        return GLOBAL_SCALE

    def change():
        globals()["GLOBAL_SCALE"] = 3.0

    globals()["GLOBAL_SCALE"] = 1.0
    return lambda x: likelihood(x, helper()), change


def attribute_of_a_global_object():
    SETTINGS.scale = 1.0

    def model(x):
        likelihood(x, SETTINGS.scale)

    return model, lambda: setattr(SETTINGS, "scale", 3.0)


def attribute_of_a_class():
    Config.scale = 1.0

    def model(x):
        likelihood(x, Config.scale)

    return model, lambda: setattr(Config, "scale", 3.0)


def entry_of_a_dictionary():
    options = {"likelihood": {"scale": 1.0}}

    def change():
        options["likelihood"]["scale"] = 3.0

    return lambda x: likelihood(x, options["likelihood"]["scale"]), change


def list_in_a_default():
    scales = [1.0]

    def model(x, scales=scales):
        likelihood(x, scales[0])

    return model, lambda: scales.__setitem__(0, 3.0)


def partial_keyword():
    model = functools.partial(likelihood, scale=1.0)
    return model, lambda: model.keywords.update(scale=3.0)


def object_behind_a_bound_method():
    class Experiment:
        def __init__(self):
            self.settings = {"scale": 1.0}

        def model(self, x):
            likelihood(x, self.settings["scale"])

    experiment = Experiment()
    return experiment.model, lambda: experiment.settings.update(scale=3.0)


def dataclass_in_a_closure():
    @dataclasses.dataclass
    class Settings:
        scale: float = 1.0

    settings = Settings()
    return lambda x: likelihood(x, settings.scale), lambda: setattr(settings, "scale", 3.0)


def attribute_of_a_module():
    class Model(nn.Module):
        scale = 1.0

        def forward(self, x):
            likelihood(x, self.scale)

    model = Model()
    return model, lambda: setattr(model, "scale", 3.0)


def attribute_of_a_modules_class():
    class Model(nn.Module):
        scale = 1.0

        def forward(self, x):
            likelihood(x, self.scale)

    return Model(), lambda: setattr(Model, "scale", 3.0)


def attribute_of_a_pyro_module():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.scale = 1.0

        def forward(self, x):
            likelihood(x, self.scale)

    model = Model()
    return model, lambda: setattr(model, "scale", 3.0)


def replaced_parameter():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, x):
            likelihood(x, self.scale)

    model = Model()
    return model, lambda: setattr(model, "scale", nn.Parameter(torch.tensor(3.0)))


def replaced_buffer_in_a_closure():
    holder = nn.Module()
    holder.register_buffer("scale", torch.tensor(1.0))
    return lambda x: likelihood(x, holder.scale), lambda: setattr(
        holder, "scale", torch.tensor(3.0)
    )


def swapped_submodule():
    class Scale(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = scale

        def forward(self):
            return self.scale

    outer = nn.Module()
    outer.scale = Scale(1.0)
    return lambda x: likelihood(x, outer.scale()), lambda: setattr(outer, "scale", Scale(3.0))


def parameter_in_place():
    scale = nn.Parameter(torch.tensor(1.0))

    def change():
        with torch.no_grad():
            scale.fill_(3.0)

    return lambda x: likelihood(x, scale), change


def array_in_place():
    scales = np.array([1.0])

    def change():
        scales[0] = 3.0

    return lambda x: likelihood(x, float(scales[0])), change


def data_frame_in_a_closure():
    frame = pd.DataFrame({"scale": [1.0, 2.0]})

    def change():
        frame.loc[0, "scale"] = 3.0

    return lambda x: likelihood(x, float(frame["scale"][0])), change


def conditioned_value():
    data = {"s": torch.tensor(1.0)}

    def model(x):
        s = pyro.sample("s", dist.HalfNormal(1.0))
        likelihood(x, s)

    def change():
        data["s"] = torch.tensor(3.0)

    return poutine.condition(model, data=data), change


def number_read_from_a_tensor_in_place():
    scales = torch.tensor([1.0, 1.0])

    def change():
        scales.fill_(3.0)

    return lambda x: likelihood(x, scales.mean().item()), change


def replaced_parameter_of_the_store():
    def model(x):
        likelihood(x, pyro.param("scale", torch.tensor(1.0)))

    def change():
        store = pyro.get_param_store()
        del store["scale"]
        store["scale"] = torch.tensor(3.0)

    return model, change


KINDS = [
    closure_number,
    global_number,
    global_number_of_a_helper,
    attribute_of_a_global_object,
    attribute_of_a_class,
    entry_of_a_dictionary,
    list_in_a_default,
    partial_keyword,
    object_behind_a_bound_method,
    dataclass_in_a_closure,
    attribute_of_a_module,
    attribute_of_a_modules_class,
    attribute_of_a_pyro_module,
    replaced_parameter,
    replaced_buffer_in_a_closure,
    swapped_submodule,
    parameter_in_place,
    array_in_place,
    data_frame_in_a_closure,
    conditioned_value,
    number_read_from_a_tensor_in_place,
    replaced_parameter_of_the_store,
]


def loss_of(state, x, scale, prior=0.0):
    """`- mean_k log N(m_k | 0, 1) prod_i N(x_i | m_k, scale)`, written out."""
    m = state.latents["m"].double()
    square = (x.double()[None] - m[:, None]).square().sum(1) / scale**2
    log_joint = (
        -0.5 * m.square()
        - 0.5 * square
        - len(x) * math.log(scale)
        - (len(x) + 1) * 0.5 * math.log(2 * math.pi)
    )
    return -float((log_joint + prior).mean())


def log_half_normal(s):
    return math.log(2.0) - 0.5 * s * s - 0.5 * math.log(2 * math.pi)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_change_of_what_the_model_looks_at_is_seen(kind):
    model, change = kind()
    x = torch.tensor([1.0, -0.5, 2.0])
    dcpc = DCPC(model, num_particles=5)
    state = dcpc.init(x)
    prior = log_half_normal if kind is conditioned_value else lambda s: 0.0
    for scale in (1.0, 3.0):
        assert dcpc.loss(state, x).item() == pytest.approx(loss_of(state, x, scale, prior(scale)))
        change()


@pytest.mark.parametrize("backend", ["graph", "vmap", "loop"])
def test_numbers_that_are_read_from_data_follow_the_data(backend):
    def model(x):
        likelihood(x, float(x.std()) if x.max() > 0 else x.numpy().std())

    dcpc = DCPC(model, num_particles=5, backend=backend)
    for x in (torch.tensor([1.0, 2.0, 4.0]), torch.tensor([10.0, 20.0, 0.0])):
        state = dcpc.init(x)
        assert float(dcpc.loss(state, x)) == pytest.approx(loss_of(state, x, float(x.std())))
        x.mul_(2.0)
        assert float(dcpc.loss(state, x)) == pytest.approx(loss_of(state, x, float(x.std())))


def test_the_models_of_the_package_are_watched_as_a_users_are(monkeypatch):
    model = PGDGenerator(2, [1, 2, 2], num_channels=8)
    before = Snapshot(model)
    assert before == Snapshot(model)
    monkeypatch.setattr("dcpc.models.convolutional_generator.PGD_SCALE", 0.5)
    assert before != Snapshot(model)


def test_data_that_nothing_is_read_from_share_one_capture():
    dcpc = DCPC(lambda x: likelihood(x, 1.0), num_particles=5)
    assert dcpc.division(torch.zeros(3)) is dcpc.division(torch.ones(3))


class Opaque:
    """Keeps its value where no attribute shows it."""

    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


def data_class(x, scale):
    @dataclasses.dataclass
    class Data:
        x: torch.Tensor
        scale: float

    return Data(x, scale), lambda data: (data.x, data.scale)


def data_frame(x, scale):
    frame = pd.DataFrame({"x": x.numpy(), "scale": scale})
    return frame, lambda frame: (
        torch.tensor(frame["x"].to_numpy()),
        float(frame["scale"].iloc[0]),
    )


def list_of_opaque_objects(x, scale):
    return [Opaque(x), Opaque(scale)], lambda pair: (pair[0].value, pair[1].value)


def dictionary_with_an_array(x, scale):
    data = {"x": x.numpy(), "scale": scale}
    return data, lambda data: (torch.as_tensor(data["x"]), data["scale"])


@pytest.mark.parametrize(
    "make", [data_class, data_frame, list_of_opaque_objects, dictionary_with_an_array]
)
def test_objects_among_the_arguments_follow_their_contents(make):
    first, second = torch.tensor([1.0, -0.5, 2.0]), torch.tensor([3.0, 2.5, 0.0])
    _, read = make(first, 1.0)
    dcpc = DCPC(lambda data: likelihood(*read(data)), num_particles=5)
    data, _ = make(first, 1.0)
    state = dcpc.init(data)
    assert float(dcpc.loss(state, data)) == pytest.approx(loss_of(state, first, 1.0))
    other, _ = make(second, 3.0)
    assert float(dcpc.loss(state, other)) == pytest.approx(loss_of(state, second, 3.0))


def test_type_variables_stay_what_they_are():
    """They have no attributes that can be listed from Python 3.12 on."""

    class Box(Generic[Item]):
        def __init__(self, item):
            self.item = item

    def model(x):
        return Box[Item](x), Options

    assert Snapshot(model).is_complete


def test_a_data_frame_that_was_changed_in_place_is_seen():
    frame = pd.DataFrame({"x": np.array([1.0, -0.5, 2.0], dtype=np.float32)})

    def model(frame):
        likelihood(torch.tensor(frame["x"].to_numpy()), 1.0)

    dcpc = DCPC(model, num_particles=5)
    state = dcpc.init(frame)
    frame.loc[1, "x"] = 7.0
    changed = torch.tensor([1.0, 7.0, 2.0])
    assert float(dcpc.loss(state, frame)) == pytest.approx(loss_of(state, changed, 1.0))


def test_an_object_that_hides_its_contents_and_was_changed_in_place_is_seen():
    """No attribute shows it: only a plain run of the model does."""
    pair = [Opaque(torch.tensor([1.0, -0.5, 2.0])), Opaque(1.0)]
    dcpc = DCPC(lambda pair: likelihood(pair[0].value, pair[1].value), num_particles=5)
    state = dcpc.init(pair)
    pair[1].value = 3.0
    assert dcpc.loss(state, pair).item() == pytest.approx(loss_of(state, pair[0].value, 3.0))


def test_true_one_and_one_point_zero_are_three_arguments():
    def model(x, flag):
        likelihood(x, 3.0 if flag is True else 1.0 if isinstance(flag, int) else 2.0)

    x = torch.tensor([1.0, -0.5, 2.0])
    dcpc = DCPC(model, num_particles=5)
    flags = {"true": (True, 3.0), "one": (1, 1.0), "float": (1.0, 2.0)}
    states = {name: dcpc.init(x, flag) for name, (flag, _) in flags.items()}
    for name, (flag, scale) in flags.items():
        loss = dcpc.loss(states[name], x, flag)
        assert float(loss) == pytest.approx(loss_of(states[name], x, scale))


def test_snapshots_are_equal_while_nothing_changes_and_complete_for_plain_models():
    for kind in KINDS:
        model, change = kind()
        if kind is replaced_parameter_of_the_store:
            model(torch.zeros(1))
        before = Snapshot(model)
        assert before == Snapshot(model), kind.__name__
        assert before.is_complete == (kind is not data_frame_in_a_closure), kind.__name__
        change()
        in_place = kind in (parameter_in_place, number_read_from_a_tensor_in_place)
        if before.is_complete:
            assert (before == Snapshot(model)) == in_place, kind.__name__
