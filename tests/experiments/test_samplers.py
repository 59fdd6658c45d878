"""The comparison of samplers: its arguments, scores and tables, and the models in NumPyro."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from experiments.benchmarks import samplers
from experiments.benchmarks.peers import SAMPLERS, Sampled, Sampler, Task
from experiments.benchmarks.peers.cell import PYRO_MODELS, task_of
from experiments.benchmarks.peers.dcpc_default import sample
from experiments.benchmarks.peers.pyro_nuts import deterministic_sites
from experiments.benchmarks.peers.sampled import Stopwatch
from experiments.benchmarks.peers.scores import by_label, ess_by_chains, score
from experiments.benchmarks.peers.table import (
    agrees,
    cells,
    counted_ess,
    ratio_table,
    seconds_to_target,
)
from tests.posteriordb import FILES, FOLDER, references


def row(sampler: str, **changes: object) -> dict:
    """A row with 1,000 effective draws in 2 s, after 6 s of set-up."""
    return {
        "sampler": sampler,
        "model": "eight_schools",
        "mean_error": 0.01,
        "sd_ratios": [0.98, 1.02],
        "r_hat": 1.001,
        "ess": 1000.0,
        "ess_by_chains": None,
        "own_ess": 900.0,
        "worst": "tau",
        "set_up": 6.0,
        "sampling": 2.0,
        "stages": {"capture": 6.0, "sampling": 2.0},
        "num_gradients": 1_000_000,
        "warning": "",
        **changes,
    }


def test_models_are_named_by_a_part_of_their_names() -> None:
    assert samplers.parse([]).names == list(PYRO_MODELS)
    assert samplers.parse(["--models", "eight_schools", "arK"]).names == [
        "eight_schools-eight_schools_noncentered",
        "arK-arK",
    ]
    with pytest.raises(SystemExit):
        samplers.parse(["--models", "seven_schools"])
    with pytest.raises(SystemExit):
        samplers.parse(["--samplers", "stan"])


def test_nothing_is_compared_without_references(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    samplers.main([f"--references={tmp_path}"])
    assert f"there is no {FILES[0]}" in capsys.readouterr().out


def test_a_sampler_that_is_not_installed_is_told_by_its_packages() -> None:
    assert Sampler("S", "m", "f", "", ("torch", "surely_not_a_package")).missing() == [
        "surely_not_a_package"
    ]
    assert SAMPLERS["dcpc"].missing() == []


def test_set_up_is_what_is_neither_sampling_nor_importing() -> None:
    seconds = {"capture": 1.0, "imports": 16.0, "warm-up": 2.0, "sampling": 4.0, "summary": 8.0}
    assert Sampled({}, seconds).cost == (3.0, 12.0)


def test_modules_that_are_imported_on_the_way_are_a_stage_of_their_own() -> None:
    watch = Stopwatch()
    with watch.running("capture"):
        import colorsys  # noqa: F401

        assert watch.stage == "capture"
    assert list(watch.seconds) == ["capture", "imports"]
    assert watch.stage == ""


def test_labels_of_elements_are_stan_s() -> None:
    draws = {"mu": np.zeros((2, 3)), "beta": np.arange(12.0).reshape(2, 3, 2)}
    labelled = by_label(draws)
    assert list(labelled) == ["mu", "beta[1]", "beta[2]"]
    assert labelled["beta[2]"][1, 0] == 7.0
    assert by_label({"beta": np.array([1.0, 2.0])}, axes=0) == {"beta[1]": 1.0, "beta[2]": 2.0}


def test_scores_are_those_of_the_worst_quantity() -> None:
    generator = np.random.default_rng(0)
    draws = {"z": generator.normal(size=(4, 1000, 2)) * [1.0, 2.0] + [0.0, 1.0]}
    reference = {"mean": {"z[1]": 0.0, "z[2]": 0.0}, "sd": {"z[1]": 1.0, "z[2]": 2.0}}
    found = score(draws, reference)
    assert abs(found.mean_error - 0.5) < 4 / math.sqrt(4000)
    assert max(abs(ratio - 1.0) for ratio in found.sd_ratios) < 4 / math.sqrt(2 * 4000)
    assert found.r_hat < 1.01
    assert abs(found.ess / 4000 - 1.0) < 0.2
    assert found.ess_by_chains is None


@pytest.mark.parametrize("correlation", [-0.3, 0.0, 0.9])
def test_the_spread_of_chains_tells_their_ess_however_short_they_are(correlation: float) -> None:
    generator = np.random.default_rng(0)
    chains, steps = 1000, 20
    draws = generator.normal(size=(chains, steps))
    for t in range(1, steps):
        noise = math.sqrt(1.0 - correlation**2) * draws[:, t]
        draws[:, t] = correlation * draws[:, t - 1] + noise
    lags = range(1, steps)
    inflation = 1.0 + 2.0 * sum((1.0 - lag / steps) * correlation**lag for lag in lags)
    expected = chains * steps / inflation
    assert abs(ess_by_chains(draws) / expected - 1.0) < 4 * math.sqrt(2 / chains)


def test_a_row_has_its_rates_and_is_bold_where_it_disagrees() -> None:
    titles = cells(row("dcpc"))
    assert titles[1] == "DCPC"
    assert titles[7:] == ("900", "6", "2", "125", "500", "14", "2")
    assert seconds_to_target(row("dcpc")) == 14.0
    for wrong in ({"mean_error": 0.2}, {"sd_ratios": [0.7, 1.0]}, {"r_hat": 1.1}):
        assert not agrees(row("dcpc", **wrong))
        assert cells(row("dcpc", **wrong))[1] == "**DCPC**"


@pytest.mark.parametrize(
    ("by_chains", "own", "expected"),
    [(None, None, 1000.0), (800.0, None, 800.0), (800.0, 900.0, 800.0), (800.0, 200.0, 200.0)],
)
def test_rates_are_of_the_ess_that_is_not_biased(by_chains, own, expected) -> None:
    many = row("dcpc", ess_by_chains=by_chains, own_ess=own)
    assert counted_ess(many) == expected
    assert seconds_to_target(many) == 6.0 + 2.0 * 4000 / expected


def test_ratios_are_of_models_where_both_agree() -> None:
    rows = [
        row("dcpc"),
        row("pyro", ess=100.0),
        row("dcpc", model="arK"),
        row("pyro", model="arK", ess=1.0, r_hat=2.0),
        samplers.failed("pyro", "surgical", "more than 600 s"),
    ]
    line = [cell.strip() for cell in ratio_table(rows).splitlines()[-1].split("|")[1:-1]]
    assert line == ["Pyro NUTS", "1", "10 (10 to 10)", "10 (10 to 10)", "6.14 (6.14 to 6.14)"]
    assert "more than 600 s" in samplers.report(rows)


@pytest.mark.usefixtures("float64")
def test_the_stages_of_a_default_run_are_measured() -> None:
    def model(data: dict) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(data["x"]))

    sampled = sample(Task("toy", model, {"x": 1.0}, ("z",), num_particles=16))
    stages = [
        "capture",
        "annealing, pilot",
        "annealing",
        "tuning",
        "warm-up",
        "sampling",
        "summary",
    ]
    assert [stage for stage in sampled.seconds if stage != "imports"] == stages
    assert sampled.draws["z"].shape[0] == 16
    assert sampled.num_gradients == 16 * 500
    assert sampled.own_ess["z"] > 16
    assert abs(sampled.draws["z"].mean() - 0.5) < 0.2


def test_deterministic_sites_keep_their_shapes() -> None:
    def model(data: dict) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * z)
        with pyro.plate("n", 3):
            pyro.deterministic("shifted", z + torch.arange(3.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))

    draws = {"z": torch.randn(2, 4)}
    found = deterministic_sites(Task("toy", model, {}, ("z", "twice", "shifted[1]")), draws)
    assert torch.equal(found["twice"], 2 * draws["z"])
    assert torch.equal(found["shifted"], draws["z"][..., None] + torch.arange(3.0))


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.skipif(
    not all((FOLDER / name).exists() for name in FILES), reason=f"needs {FILES} in {FOLDER}"
)
@pytest.mark.parametrize("name", PYRO_MODELS)
def test_models_in_numpyro_have_the_log_density_of_those_in_pyro(name: str) -> None:
    pytest.importorskip("numpyro")
    from experiments.benchmarks.peers.model_check import check_model

    check_model(task_of(name, references()[name]))
