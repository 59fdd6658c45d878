"""The weighted posterior: moments, quantiles, resampling, diagnostics, tables, ArviZ."""

from __future__ import annotations

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


def run(**options) -> Posterior:
    chain = gaussian_chain()
    engine = DCPC(chain.model, num_particles=4)
    return engine.run(*chain.args, num_sweeps=400, seed=0, progress=False, **options)


def test_history_of_particles_as_chains_has_arviz_diagnostics():
    arviz = pytest.importorskip("arviz")
    posterior = run(keep_every=1)
    assert posterior.is_chains
    assert posterior.history["z1"].shape == (4, 200)
    about = posterior.diagnostics()
    data = posterior.to_arviz()
    for name in ("z1", "z2"):
        draws = posterior.history[name].numpy()
        assert (data.posterior[name].values == draws).all()
        r_hat = float(arviz.rhat(draws, method="split"))
        assert float(about[name]["r_hat"]) == pytest.approx(r_hat, abs=0.01)
        ess = float(arviz.ess(draws, method="mean"))
        assert float(about[name]["ess"]) == pytest.approx(ess, rel=0.35)
        mcse = posterior.history[name].std() / about[name]["ess"].sqrt()
        assert float(about[name]["mcse"]) == pytest.approx(float(mcse))


@pytest.mark.parametrize(("keep_every", "kept"), [(1, 200), (10, 20), (7, 28), (0, 0)])
def test_every_nth_sweep_after_the_warmup_is_kept(keep_every, kept):
    posterior = run(keep_every=keep_every)
    if kept == 0:
        assert posterior.history == {}
    else:
        assert posterior.history["z2"].shape == (4, kept)
        if 200 % keep_every == 0:
            assert torch.equal(posterior.history["z2"][:, -1], posterior.samples["z2"])


def test_without_a_history_the_diagnostics_are_those_of_the_weights():
    posterior = run()
    about = posterior.diagnostics()["z1"]
    assert float(about["ess"]) == pytest.approx(float(posterior.ess))
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
    data = run().to_arviz()
    assert data.posterior["z1"].shape == (1, 4)


def test_summary_has_a_row_per_value_and_the_evidence(capsys):
    exact = linear_gaussian_dag(0)
    engine = DCPC(exact.model, num_particles=100)
    posterior = engine.run(num_sweeps=10, seed=0, progress=False)
    engine.summary()
    text = capsys.readouterr().out
    assert text.strip() == posterior.format_summary().strip()
    lines = text.splitlines()
    assert lines[0].split() == ["mean", "std", "median", "5.0%", "95.0%", "mcse", "ess", "r_hat"]
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
