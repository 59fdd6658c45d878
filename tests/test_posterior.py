"""The weighted posterior: moments, quantiles, resampling, diagnostics, tables, ArviZ."""

from __future__ import annotations

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import gaussian_chain, linear_gaussian_dag, weighted_moments
from pyro.infer import Predictive

from dcpc import DCPC
from dcpc.posterior import Posterior
from dcpc.recombine import LogWeights
from dcpc.sweep import SweepState

pytestmark = pytest.mark.usefixtures("float64")


def weighted(population: bool = False) -> Posterior:
    torch.manual_seed(0)
    cells = (3,) if population else ()
    log_weight = torch.randn(50, *cells)
    z, v = torch.randn(50, *cells), torch.randn(50, *cells, 2)
    axes = (1,) if population else ()
    return Posterior(
        samples={"z": z, "v": v},
        state=SweepState({"z": z, "v": v}, LogWeights(log_weight), torch.zeros(50, *cells)),
        population_axes={"z": axes, "v": axes},
        acceptance={"z": 0.5},
        step_size={"z": 0.1},
        unit_of={"z": "z", "v": "v"},
    )


@pytest.mark.parametrize("population", [False, True])
def test_moments_are_weighted(population):
    posterior = weighted(population)
    mean, std = posterior.mean(), posterior.std()
    weights = posterior.log_weight.softmax(0)
    if not population:
        for name, z in posterior.samples.items():
            expected = weighted_moments(z, weights)
            torch.testing.assert_close((mean[name], std[name]), expected)
        return
    for cell in range(3):
        for name, z in posterior.samples.items():
            expected = weighted_moments(z[:, cell], weights[:, cell])
            torch.testing.assert_close((mean[name][cell], std[name][cell]), expected)


def test_quantiles_are_where_the_weight_is():
    posterior = weighted()
    z, weights = posterior.samples["z"], posterior.log_weight.softmax(0)
    for p in (0.05, 0.5, 0.95):
        value = posterior.quantile([p])["z"][0]
        below = float(weights[z < value].sum())
        assert below < p <= below + float(weights[z == value].sum()) + 1e-12


def test_ess_is_kongs():
    posterior = weighted(True)
    w = posterior.log_weight.softmax(0)
    torch.testing.assert_close(posterior.ess, 1 / w.square().sum(0))


@pytest.mark.parametrize("population", [False, True])
def test_resampling_draws_whole_particles_by_weight(population):
    posterior = weighted(population)
    counts = torch.zeros_like(posterior.log_weight)
    for _ in range(300):
        drawn = posterior.resample()
        for cell in range(3 if population else 1):
            z = posterior.samples["z"][:, cell] if population else posterior.samples["z"]
            v = posterior.samples["v"][:, cell] if population else posterior.samples["v"]
            got = drawn["z"][:, cell] if population else drawn["z"]
            pair = drawn["v"][:, cell] if population else drawn["v"]
            index = (got[:, None] == z).int().argmax(1)
            assert torch.equal(pair, v[index])
            target = counts[:, cell] if population else counts
            target += torch.bincount(index, minlength=50)
    expected = posterior.log_weight.softmax(0)
    # Systematic counts differ from their mean by less than one.
    assert float((counts / (300 * 50) - expected).abs().max()) < 1.5 / 50 / 300**0.5 * 3


def test_samples_feed_pyros_predictive():
    def model(x=None):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3):
            return pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    engine = DCPC(model, num_particles=400)
    posterior = engine.run(torch.full((3,), 1.0), num_sweeps=30, seed=0, progress=False)
    drawn = Predictive(model, posterior_samples=posterior.resample())()["x"]
    assert drawn.shape == (400, 3)
    # z given three observations of 1 with sd .1 is N(300 / 301, 1 / 301).
    assert float(drawn.mean()) == pytest.approx(300 / 301, abs=4.5 * 0.12 / 400**0.5)
    assert float(drawn.std()) == pytest.approx((1 / 301 + 0.01) ** 0.5, rel=0.15)
    assert set(engine.get_samples()) == {"z"}
    assert engine.get_samples()["z"].shape == (400,)


def run(num_particles: int = 4, **options) -> Posterior:
    chain = gaussian_chain()
    engine = DCPC(chain.model, num_particles=num_particles)
    return engine.run(*chain.args, **{"num_sweeps": 400, "seed": 0, "progress": False, **options})


def test_history_of_particles_as_chains_has_arvizs_statistics():
    arviz = pytest.importorskip("arviz")
    chain = gaussian_chain()
    engine = DCPC(chain.model, num_particles=4, blocks=[("z1", "z2")])  # which mixes fast
    posterior = engine.run(*chain.args, num_sweeps=1000, keep_every=1, seed=0, progress=False)
    assert posterior.is_chains
    assert posterior.history["z1"].shape == (4, 500)
    table = posterior.statistics()
    data = posterior.to_arviz()
    for name in ("z1", "z2"):
        draws = posterior.history[name].numpy()
        assert (data.posterior[name].values == draws).all()
        expected = {
            "mean": draws.mean(),
            "std": draws.std(ddof=1),
            "ess_bulk": arviz.ess(draws, method="bulk"),
            "ess_tail": arviz.ess(draws, method="tail", prob=(0.05, 0.95)),
            "mcse": arviz.mcse(draws, method="mean"),
        }
        for statistic, number in expected.items():
            assert float(table[name][statistic]) == pytest.approx(float(number), rel=0.08)


def test_statistics_moments_and_diagnostics_describe_the_same_draws():
    posterior = run(keep_every=2, num_particles=20)
    table, about = posterior.statistics(prob=0.5), posterior.diagnostics()
    mean, std = posterior.mean(), posterior.std()
    tails = posterior.quantile([0.25, 0.75, 0.5])
    for name, z in posterior.history.items():
        assert list(table[name]) == [
            "mean", "std", "median", "25.0%", "75.0%", "mcse", "ess_bulk", "ess_tail", "r_hat",
        ]  # fmt: skip
        torch.testing.assert_close(table[name]["mean"], z.mean())
        torch.testing.assert_close(mean[name], z.mean())
        torch.testing.assert_close(std[name], table[name]["std"])
        pooled = z.flatten().quantile(torch.tensor([0.25, 0.75, 0.5]))
        torch.testing.assert_close(tails[name], pooled)
        for column, quantile in zip(("25.0%", "75.0%", "median"), pooled, strict=True):
            torch.testing.assert_close(table[name][column], quantile)
        for number in ("mcse", "ess_bulk", "ess_tail", "r_hat"):
            torch.testing.assert_close(about[name][number], posterior.statistics()[name][number])
        assert about[name]["ess"] is about[name]["ess_bulk"]


def test_statistics_have_the_shape_of_the_site():
    exact = linear_gaussian_dag(7)
    engine = DCPC(exact.model, num_particles=20)
    for options in ({"num_sweeps": 0}, {"num_sweeps": 60}):
        posterior = engine.run(seed=0, progress=False, **options)
        for name, numbers in engine.statistics().items():
            assert {v.shape for v in numbers.values()} == {posterior.samples[name].shape[1:]}


@pytest.mark.parametrize(("keep_every", "kept"), [(1, 200), (10, 20), (7, 28), (0, 0)])
def test_every_nth_sweep_after_the_warmup_is_kept(keep_every, kept):
    posterior = run(keep_every=keep_every)
    if kept == 0:
        assert posterior.history == {}
    else:
        assert posterior.history["z2"].shape == (4, kept)
        if 200 % keep_every == 0:
            assert torch.equal(posterior.history["z2"][:, -1], posterior.samples["z2"])


@pytest.mark.parametrize(
    ("num_particles", "num_sweeps", "kept"),
    # 100 draws of each particle, or the next lower number; 4,000 in all of few particles.
    [(100, 400, 100), (1000, 250, 62), (100, 10, 5), (10, 900, 225), (4, 400, 200)],
)
def test_a_thin_history_is_kept_by_default(num_particles, num_sweeps, kept):
    posterior = run(num_particles=num_particles, num_sweeps=num_sweeps, evidence=False)
    assert posterior.history["z1"].shape == (num_particles, kept)


def test_the_history_that_is_kept_by_default_is_bounded(monkeypatch):
    monkeypatch.setattr("dcpc.recorder.MAX_HISTORY_BYTES", 2 * 8 * 50 * 30)
    posterior = run(num_particles=50)
    assert 16 <= posterior.num_kept <= 30
    monkeypatch.setattr("dcpc.recorder.MAX_HISTORY_BYTES", 100)
    assert run(num_particles=50).history == {}
    assert run(num_particles=50, keep_every=20).num_kept == 10


def test_histories_are_constrained_in_parts(monkeypatch):
    whole = run(num_particles=10, keep_every=20)
    monkeypatch.setattr("dcpc.recorder.CONSTRAIN_AT_ONCE", 30)
    torch.testing.assert_close(run(num_particles=10, keep_every=20).history, whole.history)


def test_deterministic_sites_are_described_like_latents():
    pytest.importorskip("arviz")

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        double = pyro.deterministic("double", 2 * z)
        pyro.deterministic("fixed", torch.ones(2))
        pyro.sample("x", dist.Normal(double, 1.0), obs=x)

    engine = DCPC(model, num_particles=50)
    posterior = engine.run(torch.tensor(1.0), num_sweeps=200, seed=0, progress=False)
    table, about = posterior.statistics(), posterior.diagnostics()
    for number in ("mean", "std", "median", "mcse"):
        torch.testing.assert_close(table["double"][number], 2 * table["z"][number])
    torch.testing.assert_close(table["double"]["ess_bulk"], table["z"]["ess_bulk"])
    assert bool(table["fixed"]["r_hat"].isnan().all())
    assert torch.equal(table["fixed"]["mcse"], torch.zeros(2))
    assert math.isnan(about["double"]["acceptance"])
    assert set(posterior.to_arviz().posterior) == {"z", "double", "fixed"}
    assert posterior.warnings == ()


def test_without_a_history_the_statistics_are_those_of_the_weighted_particles():
    for population in (False, True):
        posterior = weighted(population)
        table, mean, std = posterior.statistics(), posterior.mean(), posterior.std()
        for name, z in posterior.samples.items():
            trailing = (1,) * (z.dim() - 1 - population)
            ess = posterior.ess.reshape(posterior.ess.shape + trailing).expand(z.shape[1:])
            torch.testing.assert_close(table[name]["mean"], mean[name])
            torch.testing.assert_close(table[name]["ess_bulk"], ess)
            torch.testing.assert_close(table[name]["mcse"], std[name] / ess.sqrt())
            assert bool(table[name]["r_hat"].isnan().all())


def test_particles_of_one_family_count_as_fewer_without_a_history():
    posterior = weighted()
    z = posterior.samples["z"]
    copies = {"z": z[:10].repeat_interleave(5)}
    families = (torch.arange(50) // 5) * 5
    equal = replace(
        posterior,
        samples=copies,
        state=SweepState(copies, LogWeights.uniform(50), torch.zeros(50)),
        families=families,
    )
    # Ten values in five copies each; ten families tell the variance to a half.
    assert float(equal.statistics()["z"]["ess_bulk"]) == pytest.approx(10, rel=0.5)
    assert float(replace(equal, families=None).statistics()["z"]["ess_bulk"]) == pytest.approx(50)


def test_diagnostics_without_a_history_are_those_of_the_final_particles():
    posterior = run(keep_every=0)
    about = posterior.diagnostics()["z1"]
    assert bool(about["r_hat"].isnan())
    assert 0.3 < about["acceptance"] < 0.9
    assert about["step_size"] > 0


def test_weighted_history_is_resampled_and_is_no_chain():
    chain = gaussian_chain()
    engine = DCPC(chain.model, num_particles=50, algorithm="dcpc-smc")
    posterior = engine.run(*chain.args, num_sweeps=100, seed=0, progress=False, keep_every=2)
    assert not posterior.is_chains
    assert posterior.history["z1"].shape == (50, 25)


def test_to_arviz_without_a_history_is_one_chain_of_draws():
    pytest.importorskip("arviz")
    data = run(keep_every=0).to_arviz()
    assert data.posterior["z1"].shape == (1, 4)


def test_many_particles_are_few_chains_in_arviz():
    """ArviZ's R-hat of 200 short chains would be above 1.01 however right they are."""
    arviz = pytest.importorskip("arviz")
    posterior = run(num_particles=202)
    data = posterior.to_arviz(num_draws=None)
    history = posterior.history["z1"]
    assert data.posterior["z1"].shape == (4, 50 * history.shape[1])
    values = torch.tensor(data.posterior["z1"].values)
    torch.testing.assert_close(values[1, : history.shape[1]], history[50])
    ess, table = arviz.ess(data), posterior.statistics()
    assert float(arviz.rhat(data)["z1"]) < 1.01
    assert float(ess["z1"]) == pytest.approx(float(table["z1"]["ess_bulk"]), rel=0.3)


def test_summary_has_a_row_per_value_and_the_evidence(capsys):
    exact = linear_gaussian_dag(14)
    engine = DCPC(exact.model, num_particles=100)
    posterior = engine.run(num_sweeps=10, seed=0, progress=False)
    engine.summary()
    text = capsys.readouterr().out
    assert text.strip() == posterior.format_summary().strip()
    lines = text.splitlines()
    columns = ["mean", "std", "median", "5.0%", "95.0%", "mcse", "ess_bulk", "ess_tail", "r_hat"]
    assert lines[0].split() == columns
    assert lines[1].startswith("z0[0]")
    row = lines[1].split()
    assert float(row[1]) == pytest.approx(float(posterior.mean()["z0"][0]), rel=1e-3)
    assert float(row[2]) == pytest.approx(float(posterior.std()["z0"][0]), rel=1e-3)
    assert f"log evidence {float(posterior.log_evidence):.3f}" in text
    assert set(engine.diagnostics()) == set(exact.names)


def test_state_can_be_swept_on_from():
    chain = gaussian_chain()
    engine = DCPC(chain.model, num_particles=8)
    posterior = engine.run(*chain.args, num_sweeps=10, seed=0, progress=False)
    state, _ = engine.sweep(posterior.state, *chain.args)
    assert state.num_particles == 8


@pytest.mark.parametrize("num_sweeps", [0, 100])
def test_sites_of_booleans_and_of_integers_have_the_statistics_of_their_numbers(num_sweeps):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        pyro.deterministic("positive", mu > 0)
        pyro.deterministic("rounded", mu.round().long())
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    run = DCPC(model, num_particles=256).run(
        torch.tensor(0.3), num_sweeps=num_sweeps, progress=False, seed=0
    )
    assert run.samples["positive"].dtype == torch.bool
    assert run.samples["rounded"].dtype == torch.int64
    drawn = run.history or run.samples
    weights = torch.ones(()) if run.history else run.log_weight.softmax(0)
    for name in ("positive", "rounded"):
        numbers = drawn[name].double()
        expected = numbers.mean() if run.history else (weights * numbers).sum()
        assert float(run.mean()[name]) == pytest.approx(float(expected), abs=1e-5)
        assert float(run.statistics()[name]["mean"]) == pytest.approx(float(expected), abs=1e-5)
    run.summary()
    assert "positive" in repr(run)
