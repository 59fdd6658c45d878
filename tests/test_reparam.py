"""Other coordinates of a model's latents: the same posterior, by Pyro's own strategies."""

from __future__ import annotations

import inspect
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import kalman
from picklable import regression, regression_data
from pyro.infer.reparam import AutoReparam, LocScaleReparam
from torch import nn

from dcpc import DCPC, ConvergenceWarning, Posterior
from dcpc.advice import find_funnels
from dcpc.errors import OptionError

pytestmark = pytest.mark.usefixtures("float64")


def schools(effects, errors):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(effects)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, errors), obs=effects)


def data():
    effects = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    return effects, torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def exact():
    """Log evidence, and mean and sd of tau, on a grid; mu and theta out by hand."""
    effects, errors = data()
    log_tau = torch.linspace(-9, 6, 6001)
    tau = log_tau.exp()
    covariance = torch.diag(errors**2) + tau[:, None, None] ** 2 * torch.eye(8) + 25.0
    density = dist.MultivariateNormal(torch.zeros(8), covariance).log_prob(effects)
    density = density + dist.HalfCauchy(5.0).log_prob(tau) + log_tau
    weight = density.softmax(0)
    mean = float((weight * tau).sum())
    sd = float((weight * (tau - mean) ** 2).sum()) ** 0.5
    return float(density.logsumexp(0) + torch.log(log_tau[1] - log_tau[0])), mean, sd


@pytest.mark.parametrize(
    "reparam",
    ["noncentred", "auto", {"theta": LocScaleReparam(0.0)}, AutoReparam(centered=0.0)],
    ids=["errors", "auto", "by site", "a strategy"],
)
def test_a_hierarchy_in_other_coordinates_has_the_same_posterior(reparam):
    log_evidence, mean, sd = exact()
    engine = DCPC(schools, num_particles=400, reparam=reparam)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = engine.run(*data(), seed=0, progress=False)
    if reparam == "noncentred":
        assert posterior.unit_of.keys() == {"mu", "tau", "theta"}
    else:
        assert "theta_decentered" in posterior.unit_of
        assert "theta" not in posterior.unit_of
    table = posterior.statistics()
    assert float(table["tau"]["mean"]) == pytest.approx(mean, abs=4.5 * float(table["tau"]["mcse"]))
    assert float(table["tau"]["std"]) == pytest.approx(sd, rel=0.1)
    error = abs(float(posterior.log_evidence) - log_evidence)
    assert error < 4 * float(posterior.log_evidence_se) < 0.4
    if isinstance(reparam, dict):
        samples = posterior.samples
        theta = samples["mu"][:, None] + samples["tau"][:, None] * samples["theta_decentered"]
        torch.testing.assert_close(samples["theta"], theta)


def test_a_model_in_other_coordinates_is_named_pickled_and_asked_for_its_arguments():
    engine = DCPC(regression, num_particles=4, reparam="auto")
    assert "regression" in repr(engine)
    assert list(inspect.signature(engine.model).parameters) == ["x", "y"]
    with pytest.raises(OptionError, match="num_particles"):
        engine.run(*regression_data(), num_chains=4)
    x, y = regression_data()
    args = x.double(), y.double()
    other = pickle.loads(pickle.dumps(engine))
    options = {"num_sweeps": 5, "seed": 0, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = engine.run(*args, **options), other.run(*args, **options)
    assert torch.equal(first.samples["scale"], second.samples["scale"])


def test_parameters_of_a_module_still_learn():
    class Prior(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(self.loc, 2.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    model = Prior()
    problem = DCPC(model, num_particles=8, reparam="auto").bind(torch.ones(3))
    problem.loss(problem.init()).backward()
    assert model.loc.grad is not None
    assert float(model.loc.grad.abs()) > 0


@pytest.mark.parametrize("reparam", ["centred", 3, ["theta"]])
def test_anything_else_is_refused(reparam):
    with pytest.raises(
        OptionError, match=r"reparam must be 'noncentred', 'auto', a dictionary .* got"
    ):
        DCPC(schools, num_particles=4, reparam=reparam)


def test_a_run_that_does_not_mix_names_the_funnel_and_its_remedy():
    with pytest.warns(ConvergenceWarning) as caught:
        DCPC(schools, num_particles=20).run(*data(), num_sweeps=100, seed=0, progress=False)
    message = str(caught[0].message)
    assert "'theta' is narrow where 'tau' is small (a funnel)" in message
    assert "DCPC(..., reparam='noncentred')" in message


def test_funnels_are_found_where_a_spread_follows_a_scale_and_nowhere_else():
    def run(model, *args):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return DCPC(model, num_particles=400).run(*args, num_sweeps=40, seed=0, progress=False)

    def neal():
        v = pyro.sample("v", dist.Normal(0.0, 1.5))
        z = pyro.sample("z", dist.Normal(0.0, (v / 2).exp()))
        pyro.sample("x", dist.Normal(z, 100.0), obs=torch.tensor(0.0))

    assert find_funnels(run(schools, *data())) == [("tau", "theta")]
    assert find_funnels(run(neal)) == [("v", "z")]
    assert not find_funnels(run(regression, *(t.double() for t in regression_data())))


def test_a_posterior_by_errors_is_told_saved_and_predicted_from_by_values(tmp_path):
    effects, errors = data()
    posterior = DCPC(schools, num_particles=300, reparam="noncentred").run(
        effects, errors, num_sweeps=60, seed=0, progress=False
    )
    theta = posterior.samples["theta"]
    assert float(theta.std()) > 3.0  # of values, not of errors
    told = posterior.to_arviz(groups=["posterior", "log_likelihood"])
    values = torch.as_tensor(told.posterior["theta"].values)
    expected = dist.Normal(values, errors).log_prob(effects)
    torch.testing.assert_close(torch.as_tensor(told.log_likelihood["effect"].values), expected)
    posterior.save(tmp_path / "posterior.pt")
    loaded = Posterior.load(tmp_path / "posterior.pt")
    assert torch.equal(loaded.samples["theta"], theta)
    predicted = pyro.infer.Predictive(schools, posterior.resample())(effects, errors)
    assert predicted["effect"].shape == (300, 8)


def test_a_chain_by_errors_takes_new_observations_in():
    x = torch.tensor([0.4, -1.0, 0.3, 0.8, 1.5, 0.2])

    def chain(y):
        z = None
        for t in pyro.markov(range(len(y))):
            prior = dist.Normal(0.0, 1.0) if z is None else dist.Normal(0.9 * z, 0.5)
            z = pyro.sample(f"z_{t}", prior)
            pyro.sample(f"x_{t}", dist.Normal(z, 0.7), obs=y[t])

    exact = kalman(x)
    engine = DCPC(chain, num_particles=1500, reparam="noncentred")
    posterior = engine.run(x[:4], num_sweeps=60, seed=0, progress=False)
    longer = engine.extend(posterior, x, seed=0, progress=False)
    error = abs(float(longer.log_evidence) - exact.log_evidence)
    assert error < 4 * float(longer.log_evidence_se) < 0.4
    last, spread = longer.samples["z_5"], float(exact.covariance[-1, -1].sqrt())
    assert abs(float(last.mean() - exact.mean[-1])) < 5 * spread / 500**0.5
    assert float(last.std()) == pytest.approx(spread, rel=0.1)
