"""Runs over minibatches, against closed forms and the posterior of all the data."""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from dcpc import DCPC
from dcpc.conquer import NoisyMoment, StochasticLangevin
from dcpc.conquer.move import Start
from dcpc.errors import DataError, ModelError, OptionError

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::dcpc.ConvergenceWarning"),
]


def regression(x, y, batch_size):
    """A slope and a noise scale; no latents of single data."""
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=batch_size) as index:
        pyro.sample("y", dist.Normal(slope * x[index], noise), obs=y[index])


def hierarchy(x, batch_size):
    """A mean and a spread of latents of single data."""
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    spread = pyro.sample("spread", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=batch_size) as index:
        z = pyro.sample("z", dist.Normal(mean, spread))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])


def hierarchy_of(index, x, size):
    """The same of a minibatch, whose indices are given."""
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    spread = pyro.sample("spread", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", size, subsample=index):
        z = pyro.sample("z", dist.Normal(mean, spread))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def hierarchy_on_a_grid(x):
    """Means and standard deviations of mean and spread, by a sum over a grid."""
    count, total, squares = len(x), x.sum(), x.square().sum()
    centre, width = float(x.mean()), float(x.std())
    mean = torch.linspace(centre - 6 * width / count**0.5, centre + 6 * width / count**0.5, 301)
    spread = torch.linspace(0.6 * width, 1.3 * width, 301)
    m, s = torch.meshgrid(mean, spread, indexing="ij")
    variance = s**2 + 0.25
    log_joint = -count / 2 * variance.log() - (squares - 2 * m * total + count * m**2) / (
        2 * variance
    )
    log_joint += dist.LogNormal(0.0, 1.0).log_prob(s) + dist.Normal(0.0, 10.0).log_prob(m)
    weights = log_joint.flatten().softmax(0).reshape(m.shape)
    result = {}
    for name, value in (("mean", m), ("spread", s)):
        first = (weights * value).sum()
        result[name] = first, ((weights * value.square()).sum() - first.square()).sqrt()
    return result


def compare(posterior, exact, mean_error, sd_ratio):
    for name, (mean, sd) in exact.items():
        assert abs(float((posterior.mean()[name] - mean) / sd)) < mean_error
        assert sd_ratio[0] < float(posterior.std()[name] / sd) < sd_ratio[1]


def data(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 1.3 + 1.1 * torch.randn(count, generator=generator, dtype=torch.float64)


@pytest.mark.slow
def test_ten_thousand_data_in_batches_of_a_hundred():
    x = data(10_000)
    engine = DCPC(hierarchy, num_particles=20, algorithm="sgld")
    posterior = engine.run(x, 100, num_sweeps=12_000, seed=0, progress=False)
    exact = hierarchy_on_a_grid(x)
    compare(posterior, exact, 0.2, (0.8, 1.25))
    spread = float(exact["spread"][0])
    precision = 4.0 + spread**-2
    local = posterior.local_samples["z"]
    mean = (4.0 * x + exact["mean"][0] / spread**2) / precision
    assert float((local.mean(0) - mean).square().mean().sqrt()) < 1.3 * (precision * 20) ** -0.5
    assert abs(float(local.std(0).mean()) * precision**0.5 - 1) < 0.1


def test_a_hierarchy_of_five_hundred_data():
    x = data(500)
    engine = DCPC(hierarchy, num_particles=20, algorithm="sgld")
    posterior = engine.run(x, 50, num_sweeps=700, seed=0, progress=False)
    compare(posterior, hierarchy_on_a_grid(x), 0.5, (0.8, 1.25))
    assert posterior.local_samples["z"].shape == (20, 500)
    assert not posterior.is_exact
    assert "approximate" in posterior.format_summary()


@pytest.mark.slow
def test_minibatches_of_a_loader():
    x = data(500)
    rows = TensorDataset(torch.arange(500), x)
    sampler = RandomSampler(rows, replacement=True)
    loader = DataLoader(rows, batch_size=50, sampler=sampler)
    engine = DCPC(partial(hierarchy_of, size=500), num_particles=20, algorithm="sgld")
    posterior = engine.run_over(loader, index=0, num_sweeps=3000, seed=0, progress=False)
    compare(posterior, hierarchy_on_a_grid(x), 0.35, (0.8, 1.25))


def test_a_regression_without_latents_of_single_data():
    x = torch.linspace(-1, 1, 400)
    y = 2.0 * x + 0.5 * torch.randn(400)
    engine = DCPC(regression, num_particles=20, algorithm="sgld")
    posterior = engine.run(x, y, 40, num_sweeps=2000, seed=0, progress=False)
    slope = (x * y).sum() / x.square().sum()
    noise = ((y - slope * x).square().sum() / 399).sqrt()
    exact = {
        "slope": (slope, noise / x.square().sum().sqrt()),
        "noise": (noise, noise / (2 * 400) ** 0.5),
    }
    compare(posterior, exact, 0.35, (0.8, 1.25))
    assert posterior.local_samples == {}


def test_noise_of_scores_takes_the_place_of_injected_noise():
    """On a Gaussian with noisy scores the stationary covariance is the exact one.

    Steps of `u' = u + eta P (-A u + V^(1/2) xi) + ...` with known A and V: the variance of what is
    injected and of the score's noise add up to `2 eta P`.
    """
    torch.manual_seed(1)
    precision = torch.tensor([[2.0, 0.6], [0.6, 1.0]])
    noise_root = torch.tensor([[5.0, 0.0], [2.0, 3.0]])
    moment, move, value = NoisyMoment(), StochasticLangevin(), torch.zeros(400, 1, 2)
    state, kept = None, []
    for step in range(1500):
        score = -value @ precision + torch.randn_like(value) @ noise_root.T
        state = moment.init(score, 0) if state is None else state
        state = moment.update(state, score, 0) if step < 500 else state
        start = Start(value, score, torch.ones(1), moment.metric(state, score), lambda u: u)
        value = move.propose(start).value
        if step >= 800:
            kept.append(value)
    covariance = torch.cat(kept).squeeze(1).T.cov()
    torch.testing.assert_close(covariance, precision.inverse(), rtol=0.08, atol=0.03)


@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-smc", "pgd"])
def test_others_refuse_a_plate_that_draws_its_subsample(algorithm):
    with pytest.raises(ModelError, match=r"'data'.*subsample of 5 of 20.*sgld"):
        DCPC(hierarchy, num_particles=3, algorithm=algorithm).run(data(20), 5, progress=False)


@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-smc"])
def test_exact_ones_refuse_global_latents_of_a_given_subsample(algorithm):
    model = partial(hierarchy_of, size=100)
    with pytest.raises(OptionError, match=r"'z', 'x'.*\['data'\].*'mean', 'spread'.*sgld"):
        DCPC(model, num_particles=3, algorithm=algorithm).run(
            torch.arange(5), data(5), progress=False
        )


def labelled(x, index, size, enumerated):
    """A share, and labels of single data."""
    share = pyro.sample("share", dist.Beta(1.0, 1.0))
    infer = {"enumerate": "parallel"} if enumerated else {}
    with pyro.plate("data", size, subsample=index):
        z = pyro.sample("z", dist.Bernoulli(share), infer=infer)
        pyro.sample("x", dist.Normal(6.0 * z, 1.0), obs=x)


@pytest.mark.parametrize("enumerated", [False, True])
@pytest.mark.parametrize("replacement", [False, True])
def test_labels_of_all_data_are_there_however_the_loader_draws(enumerated, replacement):
    """Labels that the data leave no doubt about, of data that a pass may leave out."""
    truth = torch.arange(110) % 2
    x = 6.0 * truth + 0.1
    rows = TensorDataset(x, torch.arange(110))
    sampler = RandomSampler(rows, replacement=replacement)
    loader = DataLoader(rows, batch_size=50, sampler=sampler, drop_last=True)
    model = partial(labelled, size=110, enumerated=enumerated)
    engine = DCPC(model, num_particles=5, algorithm="sgld")
    posterior = engine.run_over(loader, index=1, num_sweeps=60, seed=0, progress=False)
    assert torch.equal(posterior.local_samples["z"].long(), truth.expand(5, -1))
    assert "z" not in posterior.samples
    with pytest.raises(OptionError, match="local_samples"):
        posterior.probabilities("z")


def test_labels_that_are_summed_out_need_no_indices():
    rows = TensorDataset(data(20), torch.arange(20))
    model = partial(labelled, size=20, enumerated=True)
    engine = DCPC(model, num_particles=3, algorithm="sgld")
    loader = DataLoader(rows, batch_size=5)
    posterior = engine.run_over(loader, num_sweeps=8, seed=0, progress=False)
    assert posterior.local_samples == {}
    assert any("index=" in message for message in posterior.warnings)
    with pytest.raises(OptionError, match="keep_every must be at least 0, got -1"):
        engine.run_over(loader, num_sweeps=8, keep_every=-1, progress=False)


def test_data_that_never_come_are_nan_and_named():
    x = data(20)
    loader = [(torch.arange(start, start + 5), x[start : start + 5]) for start in (0, 5)]
    engine = DCPC(partial(hierarchy_of, size=20), num_particles=3, algorithm="sgld")
    posterior = engine.run_over(loader, index=0, num_sweeps=8, seed=0, progress=False)
    missing = posterior.local_samples["z"].isnan().all(0)
    assert missing.tolist() == [False] * 10 + [True] * 10
    assert any("10 of 20 data" in message for message in posterior.warnings)


def test_a_global_discrete_latent_is_refused_when_it_is_summed_out_too():
    def switched(x):
        on = pyro.sample("on", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 20, subsample_size=5) as index:
            pyro.sample("x", dist.Normal(loc + on, 1.0), obs=x[index])

    with pytest.raises(OptionError, match="'on' is a discrete latent outside"):
        DCPC(switched, num_particles=3, algorithm="sgld").run(
            data(20), num_sweeps=8, progress=False
        )


def test_mistakes_are_named():
    x = data(20)
    rows = TensorDataset(torch.arange(20), x)
    engine = DCPC(partial(hierarchy_of, size=20), num_particles=3, algorithm="sgld")
    run = partial(engine.run_over, num_sweeps=8, progress=False)
    with pytest.raises(OptionError, match=r"\['z'\].*index="):
        run(DataLoader(rows, batch_size=5))
    with pytest.raises(DataError, match=r"index=2.*\[0, 1\]"):
        run(DataLoader(rows, batch_size=5), index=2)
    with pytest.raises(DataError, match="drop_last"):
        run(DataLoader(rows, batch_size=7), index=0)
    with pytest.raises(DataError, match="no minibatch"):
        run([], index=0)
    with pytest.raises(DataError, match=r"indices 100 to 104.*20 elements"):
        run([(torch.arange(100, 105), x[:5])], index=0)
    with pytest.raises(OptionError, match="sgld"):
        DCPC(partial(hierarchy_of, size=20), num_particles=3, algorithm="pgd").run_over(
            DataLoader(rows, batch_size=5), index=0, num_sweeps=8, progress=False
        )

    def switched(x):
        on = pyro.sample("on", dist.Bernoulli(0.5))
        with pyro.plate("data", 20, subsample_size=5) as index:
            pyro.sample("x", dist.Normal(on, 1.0), obs=x[index])

    with pytest.raises(OptionError, match="'on' is a discrete latent outside"):
        DCPC(switched, num_particles=3, algorithm="sgld").run(x, num_sweeps=8, progress=False)
