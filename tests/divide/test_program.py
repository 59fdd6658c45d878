"""Captured programs follow the model: new data, parameters, modes and arguments; never stale."""

from __future__ import annotations

import gc
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import plain_log_factors
from pyro.nn import PyroModule
from torch import nn
from torch.distributions import constraints

from dcpc import DCPC
from dcpc.divide import Arguments, divide, read_sites
from dcpc.divide.graph import SCHEDULES
from dcpc.errors import CertificationError, ModelError, OptionError
from dcpc.models import DeepLatentGaussian

pytestmark = pytest.mark.usefixtures("float64")
backends = pytest.mark.parametrize("backend", ["graph", "vmap", "loop"])
K = 3


def log_joint(engine: DCPC, latents, *args, **kwargs) -> torch.Tensor:
    """The log-joint of K particles by the package."""
    return engine.bind(*args, **kwargs).density.log_joint(latents)


def plain(model, latents, *args, **kwargs) -> torch.Tensor:
    """The log-joint of K particles by an ordinary Pyro trace."""
    return torch.stack(
        [
            sum(
                v.sum()
                for v in plain_log_factors(
                    model, {n: u[k] for n, u in latents.items()}, args, kwargs
                ).values()
            )
            for k in range(K)
        ]
    )


def check(engine: DCPC, latents, *args, **kwargs) -> None:
    torch.testing.assert_close(
        log_joint(engine, latents, *args, **kwargs), plain(engine.model, latents, *args, **kwargs)
    )


def regression(x, y, width=1.0, *, power=1):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    offset = pyro.param("offset", torch.tensor(0.5))
    scale = pyro.param("scale", torch.tensor(width), constraint=constraints.positive)
    pyro.sample("y", dist.Normal(slope * x**power + offset, scale).to_event(1), obs=y)


LATENTS = {"slope": torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)}


@backends
def test_new_data_of_the_same_shape_are_used(backend):
    engine = DCPC(regression, num_particles=K, backend=backend)
    for seed in range(3):
        torch.manual_seed(seed)
        check(engine, LATENTS, torch.randn(4), torch.randn(4))
    assert len(engine._divisions) == 1


@backends
def test_a_changed_number_of_data_is_divided_anew(backend):
    engine = DCPC(regression, num_particles=K, backend=backend)
    for size in (4, 3, 4, 1):
        check(engine, LATENTS, torch.randn(size), torch.randn(size))


@backends
def test_parameters_that_are_updated_in_place_are_used(backend):
    engine = DCPC(regression, num_particles=K, backend=backend)
    x, y = torch.randn(4), torch.randn(4)
    check(engine, LATENTS, x, y)
    for name in ("offset", "scale"):
        with torch.no_grad():
            pyro.get_param_store()._params[name].add_(0.7)
        check(engine, LATENTS, x, y)
    assert len(engine._divisions) == 1


@backends
def test_parameters_that_are_replaced_are_used(backend):
    engine = DCPC(regression, num_particles=K, backend=backend)
    x, y = torch.randn(4), torch.randn(4)
    check(engine, LATENTS, x, y)
    pyro.get_param_store()["offset"] = torch.tensor(-2.0)
    check(engine, LATENTS, x, y)
    pyro.clear_param_store()
    pyro.param("scale", torch.tensor(0.2), constraint=constraints.positive)
    check(engine, LATENTS, x, y)


@backends
def test_arguments_that_are_not_tensors_are_part_of_the_key(backend):
    engine = DCPC(regression, num_particles=K, backend=backend)
    x, y = torch.randn(4), torch.randn(4)
    for power in (1, 2, 1, 3):
        check(engine, LATENTS, x, y, power=power)


@backends
def test_gradients_reach_the_parameters_and_equal_autograd_on_a_plain_trace(backend):
    engine = DCPC(regression, num_particles=K, backend=backend)
    x, y = torch.randn(4), torch.randn(4)
    torch.manual_seed(0)
    state = engine.init(x, y)
    engine.loss(state, x, y).backward()
    store = pyro.get_param_store()._params
    got = {name: value.grad.clone() for name, value in store.items()}
    for value in store.values():
        value.grad = None
    total = 0.0
    for k in range(K):
        model = pyro.poutine.condition(regression, {"slope": state.latents["slope"][k]})
        total = total - pyro.poutine.trace(model).get_trace(x, y).log_prob_sum() / K
    total.backward()
    for name, value in store.items():
        torch.testing.assert_close(got[name], value.grad)


class Net(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.norm = nn.BatchNorm1d(1)

    def forward(self, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            mean = self.linear(z[..., None]).squeeze(-1)
            if not self.training:
                mean = 2 * mean
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def test_training_and_evaluation_mode_have_their_own_programs():
    torch.manual_seed(0)
    model = Net()
    engine = DCPC(model, num_particles=K)
    y, latents = torch.randn(5), {"z": torch.randn(K, 5)}
    for mode in (True, False, True):
        model.train(mode)
        got = log_joint(engine, latents, y)
        torch.testing.assert_close(got.sum(-1), plain(model, latents, y).detach())


def test_optimiser_steps_and_loaded_weights_of_a_module_are_seen():
    torch.manual_seed(0)
    model = Net()
    engine = DCPC(model, num_particles=K)
    y, latents = torch.randn(5), {"z": torch.randn(K, 5)}
    engine.division(y)
    state = {name: value + 0.5 for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    got = log_joint(engine, latents, y)
    torch.testing.assert_close(got.sum(-1), plain(model, latents, y).detach())


def test_a_module_whose_parameter_is_replaced_is_divided_anew():
    torch.manual_seed(0)
    model = Net()
    engine = DCPC(model, num_particles=K)
    y, latents = torch.randn(5), {"z": torch.randn(K, 5)}
    engine.division(y)
    model.linear.weight = nn.Parameter(torch.tensor([[7.0]]))
    got = log_joint(engine, latents, y)
    torch.testing.assert_close(got.sum(-1), plain(model, latents, y).detach())


@backends
def test_subsampling_scales_what_training_sees_and_not_what_a_cell_is(backend):
    def model(y):
        with pyro.plate("data", 100, subsample_size=5, subsample=torch.arange(5)):
            z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    y, latents = torch.randn(5), {"z": torch.randn(K, 5)}
    engine = DCPC(model, num_particles=K, backend=backend)
    division = engine.division(y)
    assert division.population_scale == 20.0
    per_datum = dist.Normal(0.0, 1.0).log_prob(latents["z"])
    per_datum = per_datum + dist.Normal(latents["z"], 0.5).log_prob(y)
    torch.testing.assert_close(log_joint(engine, latents, y), per_datum)
    (group,) = division.groups
    value = group.pack(latents)
    evaluation = group.evaluate(value, latents, (y,))
    torch.testing.assert_close(evaluation.log_density.squeeze(-1), per_datum)
    torch.testing.assert_close(evaluation.score[..., 0, 0], -latents["z"] + 4 * (y - latents["z"]))
    state = engine.init(y)
    state = type(state)(latents, state.log_weight, state.log_joint)
    torch.testing.assert_close(engine.loss(state, y), -20 * per_datum.sum() / K)


def test_global_latents_see_the_scale_of_a_subsampled_plate():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 50, subsample=torch.arange(5)):
            pyro.sample("y", dist.Normal(mu, 0.5), obs=y)

    y, mu = torch.randn(5), torch.randn(K)
    engine = DCPC(model, num_particles=K)
    expected = dist.Normal(0.0, 1.0).log_prob(mu)
    expected = expected + 10 * dist.Normal(mu[:, None], 0.5).log_prob(y).sum(-1)
    torch.testing.assert_close(log_joint(engine, {"mu": mu}, y), expected)


def test_handlers_scale_and_mask_apply():
    mask = torch.tensor([True, False, True])

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3), pyro.poutine.scale(scale=3.0), pyro.poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y, z = torch.randn(3), torch.randn(K)
    expected = dist.Normal(0.0, 1.0).log_prob(z)
    expected = expected + 3 * dist.Normal(z, 1.0).log_prob(y[0])
    expected = expected + 3 * dist.Normal(z, 1.0).log_prob(y[2])
    engine = DCPC(model, num_particles=K)
    torch.testing.assert_close(log_joint(engine, {"z": z}, y), expected)


def pair(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    c = pyro.sample("c", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(a + b.sum() + c, 1.0), obs=x)


def divided(model, *args, **options):
    arguments = Arguments(args, {})
    return divide(model, arguments, read_sites(model, args, {}), K, **options)


def test_a_block_is_one_unit_with_the_union_of_the_factors():
    division = divided(pair, torch.tensor(1.0), blocks=[("b", "a")])
    block = next(unit for unit in division.units if len(unit.sites) == 2)
    assert block.name == "a+b"
    assert block.size == 3
    assert block.parents == frozenset()
    assert block.children == {"x"}
    assert block.blanket == {"x", "c"}
    latents = {"a": torch.randn(K), "b": torch.randn(K, 2), "c": torch.randn(K)}
    group = next(g for g in division.groups if g.units[0] is block)
    value = group.pack(latents)
    torch.testing.assert_close(value[:, 0], torch.cat([latents["a"][:, None], latents["b"]], -1))
    evaluation = group.evaluate(value, latents, (torch.tensor(1.0),))
    error = 1.0 - latents["a"] - latents["b"].sum(-1) - latents["c"]
    torch.testing.assert_close(evaluation.score[:, 0], error[:, None] - value[:, 0])


def test_joint_schedule_is_one_group_of_everything():
    division = divided(pair, torch.tensor(1.0), schedule=SCHEDULES["joint"])
    (group,) = division.groups
    assert [unit.name for unit in group.units] == ["a+b+c"]
    assert group.size == 4


def test_block_over_a_plate_keeps_the_plate():
    def model(x):
        with pyro.plate("data", 4):
            a = pyro.sample("a", dist.Normal(torch.zeros(4), 1.0))
            b = pyro.sample("b", dist.Normal(torch.zeros(4, 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(a + b.sum(-1), 1.0), obs=x)

    division = divided(model, torch.randn(4), blocks=[("a", "b")])
    (unit,) = division.units
    assert unit.size == 3
    assert [plate.name for plate in unit.plates] == ["data"]
    (group,) = division.groups
    latents = {"a": torch.randn(K, 4), "b": torch.randn(K, 4, 2)}
    value = group.pack(latents)
    assert value.shape == (K, 4, 1, 3)
    for name, u in group.unpack(value).items():
        assert torch.equal(u, latents[name])


def test_reference_to_an_unknown_latent_in_a_block_lists_the_latents():
    with pytest.raises(OptionError, match=r"blocks: 'nothing' is not a latent.*'a', 'b', 'c'"):
        divided(pair, torch.tensor(1.0), blocks=[("a", "nothing")])
    with pytest.raises(OptionError, match="latent 'a' is in"):
        divided(pair, torch.tensor(1.0), blocks=[("a", "b"), ("a", "c")])


@pytest.mark.parametrize("length", [3, 8])
def test_a_chain_of_any_length_takes_two_colours(length):
    def model(x):
        z = torch.zeros(())
        for t in range(length):
            z = pyro.sample(f"z{t}", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    division = divided(model, torch.tensor(1.0))
    assert len(division.groups) == 2
    assert sum(len(group.units) for group in division.groups) == length


def test_sequential_schedule_goes_from_the_data_to_the_roots():
    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        c = pyro.sample("c", dist.Normal(b, 1.0))
        pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    division = divided(model, torch.tensor(1.0), schedule=SCHEDULES["sequential"])
    assert [group.name for group in division.groups] == ["c", "b", "a"]


def test_models_that_are_random_outside_their_sites_are_refused():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + torch.randn(()), 1.0), obs=x)

    with pytest.raises(CertificationError, match=r"'x'.*random outside its sample sites"):
        divided(model, torch.tensor(1.0))


def test_a_latent_that_leaves_torch_by_a_cache_is_found_by_perturbation():
    """The capture cannot see through a Python list that holds a stale tensor."""
    calls = []

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        calls.append(1)
        pyro.sample("x", dist.Normal(z + len(calls), 1.0), obs=x)

    with pytest.raises(CertificationError, match="'x'"):
        divided(model, torch.tensor(1.0))


def test_a_site_that_comes_and_goes_is_an_error_that_names_it():
    calls = []

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        calls.append(1)
        if len(calls) > 1:
            z = pyro.sample("late", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ModelError, match=r"'late'.*static structure"):
        divided(model, torch.tensor(1.0))


@pytest.mark.parametrize("size", [2, 5, 8])
def test_every_ordered_pair_of_plate_elements_is_tested(size):
    """One directed link between two elements, wherever it is, ties the plate."""
    for source in range(size):
        for sink in range(size):
            if source == sink:
                continue

            def model(x, source=source, sink=sink):
                with pyro.plate("n", size):
                    z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0))
                    unit = torch.zeros(size)
                    unit[sink] = 1.0
                    pyro.sample("x", dist.Normal(z + unit * z[..., source, None], 1.0), obs=x)

            if size == 8 and (source + 3 * sink) % 5:
                continue
            (unit,) = divided(model, torch.zeros(size), certify=False).units
            assert unit.plates == ()


def test_units_print_as_a_table():
    text = str(DCPC(pair, num_particles=2).units(torch.tensor(1.0)))
    assert text.splitlines()[0].split() == [
        "unit", "parents", "children", "blanket", "plates", "size", "support",
    ]  # fmt: skip
    assert "b, c, x" in text


def test_a_units_density_is_a_constant_of_the_parameters_and_the_wholes_is_not():
    model = DeepLatentGaussian([2, 3], [1, 2, 2])
    engine = DCPC(model, num_particles=3)
    x = torch.rand(4, 1, 2, 2)
    state = engine.init(x)
    assert all(parameter.requires_grad for parameter in model.parameters())
    for group in engine.division(x).groups:
        latents = {name: u.detach() for name, u in state.latents.items()}
        density = group.log_density(group.pack(latents), latents, (x,))
        assert not density.requires_grad
    assert engine.loss(state, x).requires_grad


@pytest.mark.parametrize("was_on", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_leaves_the_collection_of_garbage_as_it_was(was_on, fails):
    during = []

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        during.append(gc.isenabled())
        if fails and z > 0:
            pass
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    if not was_on:
        gc.disable()
    try:
        arguments, sites = Arguments((), {}), read_sites(model, (), {})
        during.clear()
        with pytest.raises(ModelError) if fails else nullcontext():
            divide(model, arguments, sites, K)
        assert during
        assert not any(during)
        assert gc.isenabled() is was_on
    finally:
        gc.enable()
