"""A model bound to its data: how often the user's model runs, and what is checked when."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import gaussian_chain
from pyro.poutine.messenger import Messenger

from dcpc import DCPC
from dcpc.divide import cache
from dcpc.errors import DataError, EvidenceError, OptionError

X = torch.tensor([0.3, -1.2, 2.0])


def model(x):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


class Runs(Messenger):
    """Counts the runs of a model by its latent; a vectorised run is one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def _pyro_sample(self, msg) -> None:
        self.count += msg["name"] == "z"


def runs(act: Callable[[], object]) -> int:
    with Runs() as counter:
        act()
    return counter.count


def test_the_model_runs_twice_to_start_particles_and_not_at_all_to_sweep_them():
    """Once to look at the data and to compare, once, vectorised, to draw from the prior."""
    engine = DCPC(model, num_particles=5)
    state = engine.init(X)
    problem = engine.bind(X + 1)
    assert runs(problem.init) == 2
    assert runs(problem.init) == 1  # the data were looked at
    assert runs(lambda: problem.sweep(state)) == 0
    assert runs(lambda: problem.loss(state)) == 0
    assert runs(lambda: engine.bind(X)) == 0
    assert runs(lambda: engine.sweep(state, X - 1)) == 0
    assert runs(lambda: engine.init(X)) == 2
    # Two runs of annealing start from draws of the prior.
    assert runs(lambda: engine.anneal(X, num_temperatures=3)) == 3


def test_binding_looks_up_once(monkeypatch):
    engine = DCPC(model, num_particles=5)
    state = engine.init(X)
    looked = []
    snapshot = cache.Snapshot
    monkeypatch.setattr(cache, "Snapshot", lambda *args: looked.append(1) or snapshot(*args))
    problem = engine.bind(X)
    for _ in range(3):
        state, _ = problem.sweep(state)
        problem.loss(state)
    assert len(looked) == 1


def test_bad_data_of_a_known_shape_are_refused_when_particles_start():
    engine = DCPC(model, num_particles=5)
    engine.init(X)
    problem = engine.bind(torch.tensor([1.0, math.nan, 0.0]))
    for start in (problem.init, problem.anneal):
        with pytest.raises(DataError, match="'x' has 1 NaN"):
            start()


def test_a_problem_does_what_the_engine_does():
    chain = gaussian_chain(4)
    engine = DCPC(chain.model, num_particles=6)
    problem = engine.bind(*chain.args)
    torch.manual_seed(0)
    first, _ = problem.sweep(problem.init())
    torch.manual_seed(0)
    second, _ = engine.sweep(engine.init(*chain.args), *chain.args)
    for name in chain.names:
        assert torch.equal(first.latents[name], second.latents[name])
    assert torch.equal(problem.loss(first), engine.loss(second, *chain.args))
    torch.manual_seed(1)
    ours = problem.anneal(5).log_evidence
    theirs = engine.anneal(*chain.args, num_temperatures=5, seed=1).log_evidence
    assert torch.equal(ours, theirs)


def test_annealing_a_problem_is_refused_as_that_of_the_engine():
    chain = gaussian_chain()
    problem = DCPC(chain.model, num_particles=6, algorithm="pgd").bind(*chain.args)
    with pytest.raises(EvidenceError, match="'pgd'"):
        problem.anneal(5)
    problem = DCPC(chain.model, num_particles=6).bind(*chain.args)
    with pytest.raises(OptionError, match="num_temperatures must be at least 1"):
        problem.anneal(0)
    with pytest.raises(OptionError, match="conditional_ess must lie in"):
        problem.anneal(conditional_ess=1.5)


def two_levels(x):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        label = pyro.sample("label", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(z + label, 0.5), obs=x)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("blocks", [(), [("scale", "z")]])
def test_prediction_errors_are_gradients_of_the_joint_in_unconstrained_coordinates(blocks):
    problem = DCPC(two_levels, num_particles=4, blocks=blocks).bind(X.double())
    state = problem.init()
    errors = problem.prediction_errors(state)
    # By hand: u = log scale has the density N(0, .5^2), and its Jacobian is a part of it.
    u, z, label = (state.latents[name] for name in ("scale", "z", "label"))
    of_scale = -u / 0.5**2 + (z**2 * (-2 * u.unsqueeze(-1)).exp() - 1).sum(-1)
    of_z = -z * (-2 * u.unsqueeze(-1)).exp() + (X.double() - z - label) / 0.5**2
    assert errors.keys() == {"scale", "z"}
    torch.testing.assert_close(errors["scale"], of_scale)
    torch.testing.assert_close(errors["z"], of_z)
