"""Observations that arrive one by one: exact filters, genealogies, refusals, and a flat cost."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import kalman
from torch import Tensor

from dcpc import DCPC, ConvergenceWarning
from dcpc.errors import DataError, ModelError, OptionError
from dcpc.filtering import window
from dcpc.filtering.evidence import RunningError
from dcpc.filtering.genealogy import Generation, PathSamples
from dcpc.filtering.steps import Template, _template
from dcpc.posterior import Posterior
from dcpc.recombine import LogWeights

DECAY, PROCESS, NOISE = 0.9, 0.5, 0.7


def chain(y: Tensor) -> None:
    """The model of `oracles.kalman`."""
    x = None
    for t in pyro.markov(range(len(y))):
        prior = dist.Normal(0.0, 1.0) if x is None else dist.Normal(DECAY * x, PROCESS)
        x = pyro.sample(f"x_{t}", prior)
        pyro.sample(f"y_{t}", dist.Normal(x, NOISE), obs=y[t])


def data(num_steps: int, *shape: int, seed: int = 0) -> Tensor:
    """A random walk with noise, as good as any other data."""
    generator = torch.Generator().manual_seed(seed)
    steps, noise = torch.randn(2, 50, *shape, generator=generator)  # more rows follow, no others
    return (0.5 * steps.cumsum(0) + 0.7 * noise)[:num_steps]


def one_by_one(
    model: Callable, first: int, *series: Tensor, num_particles: int = 1000, **options: int
) -> Posterior:
    """The posterior of a run over the first rows that was extended by the others, one by one."""
    engine = DCPC(model, num_particles=num_particles)
    rows = [y[:first] for y in series]
    posterior = engine.run(*rows, num_sweeps=150, seed=0, progress=False)
    for stop in range(first + 1, len(series[0]) + 1):
        rows = [y[:stop] for y in series]
        posterior = posterior.extend(*rows, seed=stop, progress=False, **options)
    return posterior


def gaussian_posterior(
    prior_mean: Tensor, prior: Tensor, design: Tensor, noise: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, float]:
    """Mean, covariance and log evidence of `y ~ N(design z, diag(noise^2))`, z Gaussian."""
    total = design @ prior @ design.T + torch.diag(noise.square())
    gain = prior @ design.T @ torch.linalg.inv(total)
    log_evidence = dist.MultivariateNormal(design @ prior_mean, total).log_prob(y)
    mean = prior_mean + gain @ (y - design @ prior_mean)
    return mean, prior - gain @ design @ prior, float(log_evidence)


def ar_covariance(matrix: Tensor, scales: Tensor) -> Tensor:
    """Covariance of `z = matrix z + scales * noise`, the matrix strictly lower triangular."""
    inverse = torch.linalg.inv(torch.eye(len(matrix), dtype=torch.float64) - matrix)
    return inverse @ torch.diag(scales.square()) @ inverse.T


def check(posterior: Posterior, names: list[str], mean: Tensor, std: Tensor, within: float) -> None:
    """Means of sites are exact ones, within so many standard deviations."""
    about = posterior.statistics()
    got = torch.stack([about[name]["mean"].double() for name in names])
    spread = torch.stack([about[name]["std"].double() for name in names])
    assert ((got - mean).abs() / std).max() < within
    assert ((spread / std).log().abs()).max() < 2 * within


def check_evidence(posterior: Posterior, log_evidence: float) -> None:
    assert 0.0 < float(posterior.log_evidence_se) < 1.0
    error = float(posterior.log_evidence) - log_evidence
    assert abs(error) < 4 * float(posterior.log_evidence_se)


def test_every_filtering_mean_is_kalmans() -> None:
    y = data(25)
    engine = DCPC(chain, num_particles=1000)
    posterior = engine.run(y[:1], num_sweeps=150, seed=0, progress=False)
    for t in range(1, 25):
        posterior = posterior.extend(y[: t + 1], seed=t, progress=False)
        exact = kalman(y[: t + 1])
        about = posterior.filtered()[f"x_{t}"]
        std = exact.covariance[-1, -1].sqrt()
        assert abs(float(about["mean"]) - exact.mean[-1]) < 0.1 * std
        assert abs(float(about["std"]) / std - 1) < 0.1
        assert 0.005 * std < float(about["mcse"]) < 0.1 * std
        check_evidence(posterior, exact.log_evidence)
    assert posterior.newest == tuple(f"x_{t}" for t in range(21, 25))
    assert list(posterior.samples) == [f"x_{t}" for t in range(25)]


def test_paths_are_smoothed_ones() -> None:
    """Values of old steps are those of the Rauch-Tung-Striebel smoother, paths taken whole."""
    y = data(20)
    exact = kalman(y)
    posterior = one_by_one(chain, 3, y, num_particles=4000)
    names = [f"x_{t}" for t in range(10, 20)]
    check(posterior, names, exact.mean[10:], exact.covariance.diagonal()[10:].sqrt(), 0.15)
    weights = posterior.state.log_weight.normalized().double()
    one, other = (posterior.samples[name].double() for name in ("x_15", "x_16"))
    covariance = (weights * (one - weights @ one) * (other - weights @ other)).sum()
    assert abs(covariance / exact.covariance[15, 16] - 1) < 0.2


def test_several_at_once_are_one_after_the_other() -> None:
    y = data(12)
    engine = DCPC(chain, num_particles=100)
    start = engine.run(y[:3], num_sweeps=30, seed=0, progress=False)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        at_once = engine.extend(start, y, progress=False)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        posterior = start
        for stop in range(4, 13):
            posterior = engine.extend(posterior, y[:stop], progress=False)
    assert float(at_once.log_evidence) == float(posterior.log_evidence)
    assert all(torch.equal(z, posterior.samples[name]) for name, z in at_once.samples.items())


def test_a_seed_gives_the_same_and_leaves_what_was() -> None:
    y = data(10)
    engine = DCPC(chain, num_particles=100)
    start = engine.run(y[:4], num_sweeps=30, seed=0, progress=False)
    before = {name: z.clone() for name, z in start.samples.items()}
    state = torch.get_rng_state()
    one, other = (start.extend(y, seed=7, progress=False) for _ in range(2))
    third = start.extend(y, seed=8, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(z, other.samples[name]) for name, z in one.samples.items())
    assert not torch.equal(one.samples["x_9"], third.samples["x_9"])
    assert all(torch.equal(z, start.samples[name]) for name, z in before.items())


def test_an_initial_state_and_two_latents_per_step() -> None:
    """A local linear trend, and a state before the first step; the exact posterior is Gaussian."""

    def trend(y: Tensor) -> None:
        level = pyro.sample("level_init", dist.Normal(1.0, 1.0))
        slope = torch.zeros(())
        for t in pyro.markov(range(len(y))):
            new = pyro.sample(f"level_{t}", dist.Normal(level + slope, 0.4))
            slope = pyro.sample(f"slope_{t}", dist.Normal(0.8 * slope, 0.2))
            level = new
            pyro.sample(f"y_{t}", dist.Normal(level, 0.5), obs=y[t])

    count, y = 14, data(14)
    names = ["level_init", *(f"{kind}_{t}" for t in range(count) for kind in ("level", "slope"))]
    matrix = torch.zeros(len(names), len(names), dtype=torch.float64)
    scales = torch.tensor([1.0, *[0.4, 0.2] * count], dtype=torch.float64)
    design = torch.zeros(count, len(names), dtype=torch.float64)
    for t in range(count):
        level = 1 + 2 * t
        matrix[level, level - 2 if t else 0] = 1.0
        if t:
            matrix[level, level - 1] = 1.0
            matrix[level + 1, level - 1] = 0.8
        design[t, level] = 1.0
    start = torch.zeros(len(names), dtype=torch.float64)
    start[0] = 1.0
    prior_mean = torch.linalg.solve(torch.eye(len(names), dtype=torch.float64) - matrix, start)
    mean, covariance, log_evidence = gaussian_posterior(
        prior_mean,
        ar_covariance(matrix, scales),
        design,
        torch.full((count,), 0.5, dtype=torch.float64),
        y.double(),
    )
    posterior = one_by_one(trend, 2, y, num_particles=2000)
    check(posterior, names[-6:], mean[-6:], covariance.diagonal()[-6:].sqrt(), 0.15)
    check_evidence(posterior, log_evidence)
    assert not any("level_init" in text for text in posterior.warnings)
    check(posterior, names[:1], mean[:1], covariance.diagonal()[:1].sqrt(), 0.3)
    assert posterior.samples["level_init"].shape == (2000,)


def test_a_chain_of_order_two_with_missing_steps_and_a_season() -> None:
    """AR(2) about a season that is data; masked steps bring no evidence."""

    def seasonal(y: Tensor, season: Tensor, seen: Tensor) -> None:
        past = [torch.zeros(()), torch.zeros(())]
        for t in pyro.markov(range(len(y)), history=2):
            loc = 0.6 * past[-1] + 0.3 * past[-2]
            past.append(pyro.sample(f"x{t:03d}", dist.Normal(loc, 0.5)))
            with pyro.poutine.mask(mask=seen[t]):
                pyro.sample(f"y{t:03d}", dist.Normal(past[-1] + season[t], 0.6), obs=y[t])

    count = 15
    y, season = data(count), torch.sin(torch.arange(15.0))
    seen = torch.tensor([t not in (4, 9, 10) for t in range(count)])
    y[~seen] = math.nan
    eye = torch.eye(count, dtype=torch.float64)
    matrix = 0.6 * eye.roll(1, 0).tril(-1) + 0.3 * eye.roll(2, 0).tril(-1)
    mean, covariance, log_evidence = gaussian_posterior(
        torch.zeros(count, dtype=torch.float64),
        ar_covariance(matrix, torch.full((count,), 0.5, dtype=torch.float64)),
        eye[seen],
        torch.full((int(seen.sum()),), 0.6, dtype=torch.float64),
        (y - season)[seen].double(),
    )
    posterior = one_by_one(seasonal, 3, y, season, seen, num_particles=2000)
    names = [f"x{t:03d}" for t in range(9, count)]
    check(posterior, names, mean[9:], covariance.diagonal()[9:].sqrt(), 0.15)
    check_evidence(posterior, log_evidence)
    assert posterior.filter.order == 2


def test_data_further_back_than_latents_take_a_longer_window() -> None:
    """The observation looks two observations back, the latents one step: exact all the same."""

    def feedback(y: Tensor) -> None:
        x = torch.zeros(())
        for t in pyro.markov(range(len(y))):
            x = pyro.sample(f"x_{t}", dist.Normal(0.8 * x, 0.5))
            back = y[t - 2] if t >= 2 else 0.0
            pyro.sample(f"y_{t}", dist.Normal(x + 0.5 * back, 0.6), obs=y[t])

    count, y = 14, data(14)
    eye = torch.eye(count, dtype=torch.float64)
    back = torch.cat([torch.zeros(2), y[:-2]])
    mean, covariance, log_evidence = gaussian_posterior(
        torch.zeros(count, dtype=torch.float64),
        ar_covariance(0.8 * eye.roll(1, 0).tril(-1), 0.5 * torch.ones(count, dtype=torch.float64)),
        eye,
        0.6 * torch.ones(count, dtype=torch.float64),
        (y - 0.5 * back).double(),
    )
    posterior = one_by_one(feedback, 2, y, num_particles=2000)
    names = [f"x_{t}" for t in range(9, count)]
    check(posterior, names, mean[9:], covariance.diagonal()[9:].sqrt(), 0.15)
    check_evidence(posterior, log_evidence)
    assert posterior.filter.order == 2


def test_many_sequences_weigh_apart() -> None:
    """A plate over sequences is a population: each has its own weights, paths and evidence."""

    def panel(y: Tensor) -> None:
        x = None
        with pyro.plate("sequences", y.shape[1]):
            for t in pyro.markov(range(len(y))):
                loc, scale = (torch.zeros(()), 1.0) if x is None else (DECAY * x, PROCESS)
                x = pyro.sample(f"x_{t}", dist.Normal(loc, scale).expand([y.shape[1]]))
                pyro.sample(f"y_{t}", dist.Normal(x, NOISE), obs=y[t])

    y = data(12, 5)
    posterior = one_by_one(panel, 2, y)
    assert posterior.log_weight.shape == (1000, 5)
    for cell in range(5):
        exact = kalman(y[:, cell])
        std = exact.covariance.diagonal().sqrt()
        for t in (5, 8, 11):
            error = float(posterior.statistics()[f"x_{t}"]["mean"][cell] - exact.mean[t]) / std[t]
            assert abs(error) < 0.2
        z = float(posterior.log_evidence[cell] - exact.log_evidence)
        assert abs(z) < 4 * float(posterior.log_evidence_se[cell])


def test_vectors_on_a_simplex_and_deterministic_values() -> None:
    """Constrained values of old steps and new ones are those that the unconstrained ones map to."""

    def mixture(y: Tensor) -> None:
        share = torch.ones(3) / 3
        for t in pyro.markov(range(len(y))):
            share = pyro.sample(f"share_{t}", dist.Dirichlet(1.0 + 20.0 * share))
            pyro.deterministic(f"largest_{t}", share.max(-1).values)
            pyro.sample(f"y_{t}", dist.Multinomial(10, share), obs=y[t])

    y = torch.tensor([[6.0, 3.0, 1.0]] * 10)
    posterior = one_by_one(mixture, 2, y, num_particles=200)
    for t in range(10):
        share, largest = posterior.samples[f"share_{t}"], posterior.samples[f"largest_{t}"]
        assert share.shape == (200, 3)
        torch.testing.assert_close(share.sum(-1), torch.ones(200))
        torch.testing.assert_close(share.max(-1).values, largest)
    mean = posterior.filtered()["share_9"]["mean"]
    assert mean[0] > 0.5 > mean[1] > mean[2]


def test_latents_for_all_times_are_reweighted() -> None:
    """A level that all steps share: its posterior is exact while enough values are left."""

    def levelled(y: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        for t in pyro.markov(range(len(y))):
            x = pyro.sample(f"x_{t}", dist.Normal(level, 0.5))
            pyro.sample(f"y_{t}", dist.Normal(x, 0.7), obs=y[t])

    y = 0.5 + data(12)
    posterior = one_by_one(levelled, 8, y, num_particles=4000)
    total = 0.5**2 + 0.7**2
    variance = 1 / (1 + len(y) / total)
    mean = variance * float(y.sum()) / total
    about = posterior.statistics()["level"]
    assert abs(float(about["mean"]) - mean) < 0.15 * math.sqrt(variance)
    assert abs(float(about["std"]) / math.sqrt(variance) - 1) < 0.15
    covariance = torch.eye(12) * total + 1.0
    exact = dist.MultivariateNormal(torch.zeros(12), covariance).log_prob(y)
    check_evidence(posterior, float(exact))


def test_few_values_left_of_a_latent_for_all_times_are_told() -> None:
    def levelled(y: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 10.0))
        for t in pyro.markov(range(len(y))):
            x = pyro.sample(f"x_{t}", dist.Normal(level, 0.1))
            pyro.sample(f"y_{t}", dist.Normal(x, 0.1), obs=y[t])

    engine = DCPC(levelled, num_particles=200)
    y = 3.0 + 0.1 * data(25)
    posterior = engine.run(y[:2], num_sweeps=50, seed=0, progress=False)
    with pytest.warns(ConvergenceWarning, match="few distinct values are left of .'level'."):
        posterior = posterior.extend(y, seed=0, progress=False)
    assert "level" in posterior.warnings[0]


def test_a_surprise_is_taken_in_little_by_little() -> None:
    """An observation at 13 standard deviations, where one weighing would leave one particle."""
    y = data(12)
    y[9] += 12.0
    exact = kalman(y)
    posterior = one_by_one(chain, 3, y)
    names = [f"x_{t}" for t in range(8, 12)]
    check(posterior, names, exact.mean[8:], exact.covariance.diagonal()[8:].sqrt(), 0.2)
    check_evidence(posterior, exact.log_evidence)
    assert posterior.warnings == ()


def test_few_survivors_are_told() -> None:
    """Where observations have a hard edge, no power of their density keeps more particles."""

    def edged(y: Tensor) -> None:
        x = torch.zeros(())
        for t in pyro.markov(range(len(y))):
            x = pyro.sample(f"x_{t}", dist.Normal(x, 0.5))
            pyro.sample(f"y_{t}", dist.Uniform(x - 1.0, x + 1.0), obs=y[t])

    y = torch.tensor([0.0, 0.2, -0.1, 0.3, 2.4])
    engine = DCPC(edged, num_particles=400)
    posterior = engine.run(y[:3], num_sweeps=50, seed=0, progress=False)
    with pytest.warns(ConvergenceWarning, match=r"step\(s\) 4 were far from"):
        posterior = posterior.extend(y, seed=0, progress=False)
    posterior = posterior.extend(torch.cat([y, y[-1:]]), seed=0, progress=False)
    assert len(posterior.warnings) == 1


def test_a_regime_that_switches() -> None:
    """A hidden Markov model: the forward algorithm's filter and evidence."""

    def switching(y: Tensor) -> None:
        z = None
        table = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(
                f"z_{t}", dist.Categorical(torch.ones(2) / 2 if z is None else table[z])
            )
            pyro.sample(f"y_{t}", dist.Normal(torch.tensor([-1.0, 1.0])[z], 0.8), obs=y[t])

    y = data(12)
    mass, log_evidence = torch.ones(2, dtype=torch.float64) / 2, 0.0
    for t, value in enumerate(y.double()):
        if t:
            mass = mass @ torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
        loc = torch.tensor([-1.0, 1.0], dtype=torch.float64)
        mass = mass * dist.Normal(loc, 0.8).log_prob(value).exp()
        log_evidence += math.log(float(mass.sum()))
        mass = mass / mass.sum()
    posterior = one_by_one(switching, 2, y, num_particles=2000)
    assert abs(float(posterior.filtered()["z_11"]["mean"]) - float(mass[1])) < 0.05
    check_evidence(posterior, log_evidence)


@pytest.mark.parametrize(
    ("threshold", "surprise"), [(0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (0.5, 4.0)]
)
def test_zhat_is_unbiased_over_independent_populations(threshold: float, surprise: float) -> None:
    """The mean of `Zhat / Z` over 400 sequences of the same data is one, and errors are honest."""
    cells, y = 400, data(10)
    y[7] += surprise

    def panel(y: Tensor) -> None:
        x = None
        with pyro.plate("sequences", cells):
            for t in pyro.markov(range(len(y))):
                loc, scale = (torch.zeros(()), 1.0) if x is None else (DECAY * x, PROCESS)
                x = pyro.sample(f"x_{t}", dist.Normal(loc, scale).expand([cells]))
                pyro.sample(f"y_{t}", dist.Normal(x, NOISE), obs=y[t])

    many = y[:, None].expand(-1, cells).contiguous()
    engine = DCPC(panel, num_particles=100, resample_threshold=threshold)
    posterior = engine.run(many[:2], num_sweeps=4, seed=0, progress=False)
    posterior = posterior.extend(many, num_sweeps=2, seed=1, progress=False)
    error = posterior.log_evidence.double() - kalman(y).log_evidence
    ratio = error.exp()
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / cells**0.5 < 0.15
    if threshold > 0.0:
        reported = posterior.log_evidence_se
        assert reported.isfinite().double().mean() > 0.9
        spread = float(reported[reported.isfinite()].square().mean().sqrt())
        assert 1 / 1.5 < float(error.std()) / spread < 1.5


def test_variances_of_blocks_add_up() -> None:
    """Equal weights over K families are no error; a block that ends hands its families on."""

    def shared(count: int) -> LogWeights:
        return LogWeights(torch.where(torch.arange(1000) < count, 0.0, -math.inf))

    def relative(count: int) -> float:
        return 1000 / 999 * (1 / count - 1 / 1000)

    even = LogWeights(torch.zeros(1000))
    index = torch.arange(1000)
    first = RunningError.start(torch.tensor(0.3), even)
    assert float(first.standard_error(even)) == pytest.approx(0.3)
    assert float(first.standard_error(shared(50)) ** 2) == pytest.approx(0.09 + relative(50))
    going = first.resampled(shared(500), index % 500)
    assert torch.equal(going.younger, index % 500)
    assert float(going.standard_error(even) ** 2) == pytest.approx(0.09 + relative(500))
    ended = going.resampled(shared(50), index % 50)
    assert torch.equal(ended.younger, index)
    assert torch.equal(ended.families, index % 50)
    assert float(ended.standard_error(even) ** 2) == pytest.approx(0.09 + relative(50))
    again = ended.resampled(shared(500), index % 500)  # families of 50, younger ones of 500
    third = again.resampled(shared(60), index % 60)  # ten families of 50 count twice
    grown = 1000 / 999 * ((10 * 2**2 + 40) / 60**2 - 1 / 60)
    last = 1000 / 999 * ((40 * 17**2 + 20 * 16**2) / 1000**2 - 1 / 1000)
    assert float(third.standard_error(even) ** 2) == pytest.approx(0.09 + grown + last)


def test_draws_of_a_particle_that_hardly_moves_are_one() -> None:
    y = data(6)
    engine = DCPC(chain, num_particles=400, step_size=1e-8)
    posterior = engine.run(y[:2], num_sweeps=5, seed=0, progress=False)
    posterior = posterior.extend(y, num_sweeps=8, seed=0, progress=False)
    about = posterior.filtered()["x_5"]
    assert float(about["mcse"]) > 0.9 * float(about["std"]) / float(posterior.ess) ** 0.5


def test_a_path_goes_through_the_ancestors_of_its_ancestors() -> None:
    """Particle k now was `first[second[k]]` before two resamplings, in each population cell."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(6, (2, 6, 3), generator=generator)
    oldest, older, now = torch.randn(3, 6, 3, generator=generator)
    last = Generation({"a": oldest}, first, None)
    last = Generation({}, None, last)
    last = Generation({"b": older}, second, last)
    samples = PathSamples(lambda: {"c": now}, ["c"], last, lambda _: (1,))
    assert list(samples) == ["a", "b", "c"]
    assert len(samples) == 3
    for k in range(6):
        for cell in range(3):
            before = second[k, cell]
            assert samples["c"][k, cell] == now[k, cell]
            assert samples["b"][k, cell] == older[before, cell]
            assert samples["a"][k, cell] == oldest[first[before, cell], cell]
    with pytest.raises(KeyError):
        samples["d"]


def test_names_are_told_apart_by_the_number_that_counts() -> None:
    before = {"a1_x4", "b_09", "c_4_lag1"}
    assert _template("a1_x5", before, 5) == Template("a1_x", "", 1, 0)
    assert _template("b_10", before, 9).name(0) == "b_01"
    assert _template("c_5_lag1", before, 5).name(12) == "c_12_lag1"
    assert Template("x", "", 1, 1).step("x0") is None
    assert Template("x", "", 2, 0).step("x7") is None


def test_files_and_pickles_hold_the_paths_and_say_that_they_do_not_extend(tmp_path) -> None:
    y = data(10)
    posterior = one_by_one(chain, 4, y, num_particles=50)
    posterior.save(tmp_path / "posterior.pt")
    loaded = Posterior.load(tmp_path / "posterior.pt")
    pickled, copied = pickle.loads(pickle.dumps(posterior)), copy.deepcopy(posterior)
    for other in (loaded, pickled, copied):
        assert list(other.samples) == list(posterior.samples)
        for name, z in posterior.samples.items():
            assert torch.equal(other.samples[name], z)
        assert torch.equal(other.log_evidence, posterior.log_evidence)
        with pytest.raises(OptionError, match="files and pickles leave out"):
            other.extend(y)
    assert set(posterior.resample()) == set(posterior.samples)
    assert "x_9" in posterior.format_summary()


def test_the_same_model_object_can_be_given_by_keyword() -> None:
    y = data(9)
    engine = DCPC(chain, num_particles=50)
    posterior = engine.run(y=y[:4], num_sweeps=20, seed=0, progress=False)
    assert "x_8" in posterior.extend(y=y, seed=0, progress=False).samples


def test_numbers_of_steps_and_longer_data_are_cut_alike() -> None:
    """A count of steps, and inputs with a row more than there are observations."""

    def driven(count: int, u: Tensor, y: Tensor) -> None:
        x = pyro.sample("x_init", dist.Normal(u[0], 1.0))
        for t in pyro.markov(range(count)):
            x = pyro.sample(f"x_{t}", dist.Normal(0.8 * x + u[t + 1], 0.5))
            pyro.sample(f"y_{t}", dist.Normal(x, 0.6), obs=y[t])

    count = 12
    u, y = torch.sin(torch.arange(count + 1.0)), data(count)
    eye = torch.eye(count + 1, dtype=torch.float64)
    matrix = 0.8 * eye.roll(1, 0).tril(-1)
    scales = torch.tensor([1.0, *[0.5] * count], dtype=torch.float64)
    mean, covariance, log_evidence = gaussian_posterior(
        torch.linalg.solve(eye - matrix, u.double()),
        ar_covariance(matrix, scales),
        eye[1:],
        0.6 * torch.ones(count, dtype=torch.float64),
        y.double(),
    )
    engine = DCPC(driven, num_particles=2000)
    posterior = engine.run(3, u[:4], y[:3], num_sweeps=150, seed=0, progress=False)
    posterior = posterior.extend(7, u[:8], y[:7], seed=1, progress=False)
    posterior = posterior.extend(count, u, y, seed=2, progress=False)
    names = [f"x_{t}" for t in range(8, count)]
    check(posterior, names, mean[9:], covariance.diagonal()[9:].sqrt(), 0.15)
    check_evidence(posterior, log_evidence)


def ready(model: Callable = chain, rows: int = 4, **options: object) -> tuple[DCPC, Posterior]:
    engine = DCPC(model, num_particles=20, **options)
    return engine, engine.run(data(rows), num_sweeps=4, seed=0, progress=False)


def test_bad_arguments_are_named() -> None:
    engine, posterior = ready()
    y = data(6)
    changed = y.clone()
    changed[2] += 1
    cases = [
        ((changed,), r"argument 'y' is .* at \[2\], where it was .*: the past cannot change"),
        ((y[:4],), r"expected a tensor among the arguments that grew .*float32 tensor \(4,\)"),
        ((y[:3],), r"argument 'y' had shape \(4,\) and has \(3,\)"),
        ((y[:, None],), r"argument 'y' was a float32 tensor \(4,\) and is a float32"),
        ((y.double(),), "argument 'y' was a float32 tensor"),
        (([y],), "expected the arguments of before"),
        ((y, 3), "expected the arguments of before"),
    ]
    for args, message in cases:
        with pytest.raises(DataError, match=message) as caught:
            engine.extend(posterior, *args, progress=False)
        assert "\n" not in str(caught.value)
    y[5] = math.nan
    with pytest.raises(DataError, match="'y_5'"):
        engine.extend(posterior, y, progress=False)
    with pytest.raises(OptionError, match="num_sweeps must be at least 0, got -1"):
        engine.extend(posterior, data(6), num_sweeps=-1)


def test_uneven_growth_is_named() -> None:
    def driven(y: Tensor, u: Tensor, scale: float) -> None:
        x = torch.zeros(())
        for t in pyro.markov(range(len(y))):
            x = pyro.sample(f"x_{t}", dist.Normal(x + u[t], 1.0))
            pyro.sample(f"y_{t}", dist.Normal(x, scale), obs=y[t])

    engine = DCPC(driven, num_particles=20)
    y = data(6)
    posterior = engine.run(y[:3], y[:3], 1.0, num_sweeps=4, seed=0, progress=False)
    with pytest.raises(DataError, match="'y' by 1, 'u' by 2"):
        posterior.extend(y[:4], y[:5], 1.0)
    with pytest.raises(DataError, match=r"argument 'scale' was 1.0 and is 2.0"):
        posterior.extend(y[:4], y[:4], 2.0)


def test_posteriors_of_others_are_refused(tmp_path) -> None:
    engine, posterior = ready()
    with pytest.raises(OptionError, match="was made by another engine"):
        ready()[0].extend(posterior, data(5))
    with pytest.raises(OptionError, match="got 3"):
        engine.extend(3, data(5))
    engine, posterior = ready(algorithm="pgd")
    with pytest.raises(OptionError, match="'pgd', which is not exact"):
        engine.extend(posterior, data(5))


def test_steps_that_are_not_alike_are_refused() -> None:
    def trend(y: Tensor) -> None:
        x = torch.zeros(())
        for t in pyro.markov(range(len(y))):
            x = pyro.sample(f"x_{t}", dist.Normal(x + 0.1 * t, 1.0))
            pyro.sample(f"y_{t}", dist.Normal(x, 1.0), obs=y[t])

    engine, posterior = ready(trend, rows=12)
    with pytest.raises(ModelError, match=r"site 'x_\d+' has the log-density .* as data with a row"):
        engine.extend(posterior, data(13), progress=False)


def test_a_model_that_changes_later_is_refused_when_it_is_twice_as_long() -> None:
    def late(y: Tensor) -> None:
        x = torch.zeros(())
        for t in pyro.markov(range(len(y))):
            x = pyro.sample(f"x_{t}", dist.Normal(x, 1.0 if t < 15 else 3.0))
            pyro.sample(f"y_{t}", dist.Normal(x, 1.0), obs=y[t])

    engine, posterior = ready(late, rows=8)
    posterior = engine.extend(posterior, data(9), progress=False)
    assert posterior.filter.certified == 9
    with pytest.raises(ModelError, match=r"site 'x_1[5-7]'"):
        engine.extend(posterior, data(20), progress=False)


def test_time_on_an_axis_is_refused() -> None:
    def vectorised(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    engine, posterior = ready(vectorised)
    with pytest.raises(ModelError, match=r"site 'x' grows from shape \(4,\) to \(5,\)"):
        engine.extend(posterior, data(5))


def test_models_without_a_chain_are_refused() -> None:
    def constant(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        for t in range(len(y)):
            pyro.sample(f"y_{t}", dist.Normal(x, 1.0), obs=y[t])

    def backwards(y: Tensor) -> None:
        x = torch.zeros(())
        for t in range(len(y)):
            x = pyro.sample(f"x_{len(y) - 1 - t}", dist.Normal(x, 1.0))
            pyro.sample(f"y_{len(y) - 1 - t}", dist.Normal(x, 1.0), obs=y[len(y) - 1 - t])

    def unnumbered(y: Tensor) -> None:
        x = torch.zeros(())
        for t in range(len(y)):
            x = pyro.sample("x" * (t + 1), dist.Normal(x, 1.0))
            pyro.sample("y" * (t + 1), dist.Normal(x, 1.0), obs=y[t])

    for model, message in [
        (constant, "none of them a latent"),
        (backwards, "goes forward in time"),
        (unnumbered, "site 'xxxxx' of the new step has no counterpart"),
    ]:
        engine, posterior = ready(model)
        with pytest.raises(ModelError, match=message):
            engine.extend(posterior, data(5))


def test_a_window_costs_no_whole_run(monkeypatch) -> None:
    """After the windows were compared with the whole, no run sees more rows than a window."""
    lengths: list[int] = []

    def counted(y: Tensor) -> None:
        lengths.append(len(y))
        chain(y)

    _, posterior = ready(counted, rows=8)
    posterior = posterior.extend(data(20), progress=False)
    lengths.clear()
    posterior = posterior.extend(data(21), progress=False)
    assert set(lengths) == {window.NUM_FREE + 1}


def test_a_season_by_the_number_of_the_step_is_refused_at_once() -> None:
    """A window that begins an even number of steps later would not show it."""

    def season(y: Tensor) -> None:
        z = torch.tensor(0.0)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z + float(t % 2 == 0), 0.5))
            pyro.sample(f"y_{t}", dist.Normal(z, 0.7), obs=y[t])

    _, posterior = ready(season, rows=8)
    with pytest.raises(ModelError, match=r"'z_\d+'.*steps that are alike"):
        posterior.extend(data(11), progress=False)


@pytest.mark.slow
def test_five_hundred_steps_one_by_one() -> None:
    """The acceptance: means within .1 sd, evidence within 4 errors, and a flat cost."""
    from experiments import filtering

    y = filtering.simulated(filtering.linear_gaussian, 500, seed=1)
    got = filtering.extended(filtering.linear_gaussian, y, 1000, seed=1)
    exact = filtering.kalman_filter(y)
    assert filtering.worst_error(got, exact) < 0.1
    assert abs(got.log_evidence - exact.log_evidence) < 4 * got.standard_error < 8
    assert np.median(got.seconds[-50:]) < 1.2 * np.median(got.seconds[10:60])
    y = filtering.simulated(filtering.stochastic_volatility, 150, seed=1)
    got = filtering.extended(filtering.stochastic_volatility, y, 1000, seed=1)
    exact, smc = filtering.grid_filter(y), filtering.smc_filter(y, 100_000, seed=1)
    assert filtering.worst_error(smc, exact) < 0.05
    assert filtering.worst_error(got, exact) < 0.2
    assert abs(got.log_evidence - exact.log_evidence) < 4 * got.standard_error
