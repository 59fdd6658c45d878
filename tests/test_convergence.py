"""The warning of a posterior that may be off: what is flagged, and what is not."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import test_posteriordb as posteriordb
import torch
from oracles import conjugate_pairs, gaussian_chain, linear_gaussian_dag
from torch import Tensor

from dcpc import DCPC, ConvergenceWarning, Posterior
from dcpc.convergence import SweepRecord, find_problems, format_problems
from dcpc.problem import Problem
from dcpc.recombine import LogWeights
from dcpc.sweep import SweepState

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
REFERENCES = Path(__file__).parents[2] / "shared" / "refs" / "posteriordb.json"


def eight_schools(effects, errors):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("effect", dist.Normal(mu + tau * theta, errors), obs=effects)


def run(model: Callable, *args, num_particles: int = 100, **options) -> Posterior:
    """A run, its warning recorded and compared with `posterior.warnings`."""
    engine_options = {
        key: options.pop(key) for key in ("algorithm", "step_size", "blocks") if key in options
    }
    engine = DCPC(model, num_particles=num_particles, **engine_options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        posterior = engine.run(*args, **{"seed": 0, "progress": False, **options})
    said = [w for w in caught if w.category is ConvergenceWarning]
    assert len(said) == bool(posterior.warnings)
    for warning in said:
        assert str(warning.message) == format_problems(posterior.warnings)
        assert warning.filename == __file__  # where `run` was called
    return posterior


# -- what is right ------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-smc"])
def test_eight_schools_is_right_and_silent(algorithm):
    posterior = run(eight_schools, EFFECTS, ERRORS, algorithm=algorithm, num_sweeps=400)
    assert posterior.warnings == ()


def test_a_default_run_of_many_sites_is_silent():
    assert run(linear_gaussian_dag(1).model, num_sweeps=200).warnings == ()


def test_values_that_are_masked_out_are_not_judged():
    """They stay where they were drawn, which for others would be a fault."""

    def model(y, seen):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 4):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=seen)

    posterior = run(model, torch.tensor([2.0, 2.5, 1.5, 2.2]), torch.arange(4) < 2, num_sweeps=200)
    history = posterior.history["y_unobserved"]
    assert bool((history[..., :2] == history[:, :1, :2]).all())
    assert posterior.warnings == ()


def test_hard_edges_inside_a_model_are_no_fault():
    def model(x):
        top = pyro.sample("top", dist.Gamma(2.0, 1.0))
        with pyro.plate("n", 5):
            pyro.sample("x", dist.Uniform(0.0, top, validate_args=False), obs=x)

    posterior = run(model, torch.tensor([0.5, 1.0, 2.0, 0.3, 1.5]), num_sweeps=200)
    assert posterior.num_bad > 1000
    assert posterior.warnings == ()


def test_points_without_a_distribution_are_not_judged_as_draws():
    posterior = run(eight_schools, EFFECTS, ERRORS, algorithm="pc", num_particles=1, num_sweeps=50)
    assert posterior.warnings == ()


# -- what is wrong ------------------------------------------------------------------------------


def ridge(y):
    a, b = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "ab")
    c = pyro.sample("c", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(10 * a + 10 * b + c, 0.3), obs=y)


def test_a_ridge_names_the_block_that_mends_it():
    posterior = run(ridge, torch.tensor(0.5), num_particles=400, num_sweeps=200, blocks=())
    slow = next(m for m in posterior.warnings if m.startswith("bulk ESS"))
    assert "'a'" in slow
    assert "'c'" not in slow
    (advice,) = (m for m in posterior.warnings if m.startswith("what to do"))
    assert 'blocks=[("a", "b")]' in advice
    assert "num_sweeps=1000" in advice
    mended = run(ridge, torch.tensor(0.5), num_particles=400, num_sweeps=200, blocks=[("a", "b")])
    assert mended.warnings == ()


def test_two_modes_that_nothing_connects_are_flagged():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 5.0))
        pyro.sample("y", dist.Normal(z.abs(), 0.05), obs=torch.tensor(4.0))

    text = "\n".join(run(model, num_particles=20, num_sweeps=400).warnings)
    assert "R-hat" in text
    assert "bulk ESS" in text


def test_resampled_particles_that_hardly_move_are_flagged():
    """On a ridge of sd 7 steps are of sd .07: the cloud's own series tells nothing of that."""

    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 10.0))
        b = pyro.sample("b", dist.Normal(0.0, 10.0))
        with pyro.plate("n", 6):
            pyro.sample("y", dist.Normal(a + b, 0.1), obs=y)

    y = torch.tensor([1.0, 2.0, 0.5, -0.3, 1.7, 0.9])
    options = {"algorithm": "dcpc-smc", "blocks": ()}
    posterior = run(model, y, num_particles=400, num_sweeps=100, **options)
    assert any("a lineage has taken no more than" in message for message in posterior.warnings)


def mirrored(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    pyro.sample("y", dist.Normal(mu.abs(), 0.5), obs=y)


def narrow_guide(y):
    pyro.sample("mu", dist.Normal(4.0, 0.5))


def wide_guide(y):
    pyro.sample("mu", dist.Normal(0.0, 4.0))


@pytest.mark.parametrize(
    ("guide", "options", "misses"),
    [
        (narrow_guide, {}, True),
        (None, {"initial_values": {"mu": 4.0}}, True),
        (wide_guide, {}, False),
        (None, {}, False),
    ],
    ids=["narrow guide", "initial values", "wide guide", "prior"],
)
def test_a_start_that_covers_one_mode_of_two_is_flagged(guide, options, misses):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = DCPC(mirrored, guide, num_particles=200).run(
            torch.tensor(4.0), num_sweeps=40, seed=0, progress=False, **options
        )
    found = any("draws of the prior show more evidence" in m for m in posterior.warnings)
    assert found == misses


def test_few_families_that_are_not_forgotten_are_flagged():
    """A guide whose weights leave a handful of particles, which then hardly move."""
    chain = gaussian_chain()

    def guide(x):
        pyro.sample("z1", dist.Normal(-4.0, 1.0))
        pyro.sample("z2", dist.Normal(-4.0, 1.0))

    engine = DCPC(chain.model, guide, num_particles=500, step_size=1e-4)
    with pytest.warns(ConvergenceWarning, match=r"500 particles descend from [1-9]\.\d"):
        posterior = engine.run(*chain.args, num_sweeps=40, seed=0, progress=False)
    assert any("initial_values" in m for m in posterior.warnings)


def test_short_runs_are_judged_by_their_final_particles():
    for options in ({"num_sweeps": 0}, {"num_sweeps": 8}):
        few = run(eight_schools, EFFECTS, ERRORS, num_particles=100, **options)
        assert "the effective number of final particles" in few.warnings[0]
        many = run(eight_schools, EFFECTS, ERRORS, num_particles=2000, **options)
        assert many.warnings == ()


def test_steps_that_are_too_long_or_too_short_are_flagged():
    for step_size, rate in ((20.0, "0.0"), (1e-4, "1 at")):
        posterior = run(
            eight_schools, EFFECTS, ERRORS, step_size=step_size, num_sweeps=60, evidence=False
        )
        (message,) = (m for m in posterior.warnings if m.startswith("acceptance"))
        assert rate in message
        assert "leave step_size out" in message


def test_a_density_that_is_nan_names_the_site():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal((z - 0.2).sqrt(), 1.0), obs=x)

    posterior = run(model, torch.tensor(1.0), num_sweeps=100)
    (message,) = posterior.warnings
    assert "NaN at 'x'" in message


def test_an_evidence_without_an_error_is_flagged(monkeypatch):
    chain = gaussian_chain()
    anneal = Problem.anneal_once

    def few_families(self, *args, **options):
        annealed = anneal(self, *args, **options)
        return replace(annealed, log_evidence_se=torch.tensor(float("inf")))

    monkeypatch.setattr(Problem, "anneal_once", few_families)
    posterior = run(chain.model, *chain.args, num_particles=1000, num_sweeps=100)
    (message,) = posterior.warnings
    assert "evidence estimate is not reliable" in message


def test_the_warning_can_be_made_an_error():
    chain = gaussian_chain()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        with pytest.raises(ConvergenceWarning, match="the posterior may be off"):
            DCPC(chain.model, num_particles=10).run(*chain.args, num_sweeps=4, progress=False)


# -- what is found in a posterior that is given -------------------------------------------------


def cloud(history: Tensor, **options) -> Posterior:
    """A posterior of one latent with the given history `(K, T, n)`."""
    z = history[:, -1]
    count = len(z)
    return Posterior(
        samples={"z": z},
        state=SweepState({"z": z}, LogWeights.uniform(count), torch.zeros(count)),
        population_axes={"z": ()},
        acceptance={"z": 0.57},
        step_size={"z": 1.0},
        unit_of={"z": "z"},
        history={"z": history},
        is_chains=True,
        **options,
    )


def found(posterior: Posterior, **options) -> str:
    return "\n".join(find_problems(posterior, SweepRecord(100, target=0.574, **options)))


def test_independent_draws_have_no_problem():
    assert found(cloud(torch.randn(100, 50, 3))) == ""


@pytest.mark.parametrize("num_kept", [16, 18, 19, 50])
def test_particles_that_never_moved_are_flagged_however_many(num_kept):
    still = torch.randn(2000, 1, 3).expand(2000, num_kept, 3)
    assert "at 'z' (less than 2200)" in found(cloud(still))


def test_a_light_mode_that_particles_never_enter_or_leave_is_told_by_the_tails():
    """Its mass is known from as many draws as there are particles: 200, or 2,000."""
    for num_particles, is_told in ((200, True), (2000, False)):
        draws = torch.randn(num_particles, 50)
        draws[::25] += 20.0  # 4 % of the particles, in all parts of the cloud
        problems = found(cloud(draws))
        assert ("tail ESS is" in problems) == is_told
        assert "bulk ESS" not in problems
        assert "R-hat" not in problems


def test_a_drift_of_the_whole_cloud_is_flagged():
    drift = torch.linspace(0.0, 1.0, 50)[:, None]
    assert "R-hat" in found(cloud(torch.randn(100, 50, 3) + drift))


def test_one_value_among_many_is_found(monkeypatch):
    monkeypatch.setattr("dcpc.convergence.MAX_JUDGED", 20 * 5000)
    history = torch.randn(100, 50, 300)
    history[:, :, 217] = torch.randn(100, 1)
    assert "bulk ESS is 10" in found(cloud(history))
    history[:, :, 217] = torch.randn(100, 50)
    assert found(cloud(history)) == ""


def test_identical_particles_are_flagged():
    history = torch.randn(100, 50, 2)
    history[:60, -1, 1] = 0.25
    assert "only 41% at 'z' differ" in found(cloud(history))
    assert found(cloud(history), active={"z": torch.tensor([True, False])}) == ""


def test_bad_scores_and_collapsed_steps_are_flagged():
    posterior = cloud(torch.randn(100, 50, 2))
    assert "3 times at 'z'" in found(posterior, bad_scores={"z": 3.0})
    object.__setattr__(posterior, "step_size", {"z": 1e-5})
    assert "the step size has collapsed to 1e-05 at 'z'" in found(posterior)
    assert found(posterior, is_preconditioned=False) == ""


def test_constant_values_have_no_problem():
    history = torch.randn(100, 50, 2)
    history[..., 1] = 1.0
    history[:, -1, 1] = 1.0
    text = found(cloud(history), active={"z": torch.tensor([True, False])})
    assert text == ""


def test_messages_list_few_sites():
    history = torch.randn(100, 1, 1).expand(100, 50, 1)
    posterior = cloud(history)
    names = [f"z{i}" for i in range(9)]
    many = Posterior(
        samples=dict.fromkeys(names, posterior.samples["z"]),
        state=posterior.state,
        population_axes=dict.fromkeys(names, ()),
        acceptance={},
        step_size={},
        unit_of={name: name for name in names},
        history=dict.fromkeys(names, history),
        is_chains=True,
    )
    text = found(many)
    assert "'z3' and similar at 5 more" in text
    assert "'z4'" not in text


# -- slow: how often there is a warning, and how right the printed error is ------------------------


def well_behaved() -> list[tuple[str, Callable, tuple, int, tuple]]:
    """Fifty runs: name, model, arguments, particles, blocks."""
    runs = [
        (f"dag {seed}", linear_gaussian_dag(seed).model, (), 1000 if seed % 2 else 200, ())
        for seed in range(26)
    ]
    runs += [(pair.name, pair.model, (), 500, ()) for pair in conjugate_pairs()]
    schools = (EFFECTS.double(), ERRORS.double())
    runs += [
        (f"eight schools {count}", eight_schools, schools, count, ())
        for count in (100, 150, 200, 300, 500, 700, 1000)
    ]
    data = json.loads(REFERENCES.read_text())
    runs += [
        (case.name, case.model, (data[case.name]["data"],), 1000, case.blocks)
        for case in posteriordb.CASES
    ]
    return runs


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.skipif(not REFERENCES.exists(), reason=f"needs {REFERENCES}")
def test_of_fifty_well_behaved_runs_at_most_one_warns():
    warned = {}
    runs = well_behaved()
    assert len(runs) == 50
    for seed, (name, model, args, num_particles, blocks) in enumerate(runs):
        pyro.clear_param_store()
        posterior = run(model, *args, num_particles=num_particles, blocks=blocks, seed=seed)
        if posterior.warnings:
            warned[name] = posterior.warnings
    assert len(warned) <= 1, warned


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"keep_every": 4}, {"algorithm": "dcpc-smc"}], ids=str)
def test_the_printed_error_is_the_spread_over_seeds(options):
    """Must hold 4; the spread of 24 is known to 15 %."""
    tables = [
        run(eight_schools, EFFECTS, ERRORS, num_sweeps=400, seed=seed, **options).statistics()
        for seed in range(24)
    ]
    for name in ("mu", "tau"):
        spread = torch.stack([table[name]["mean"] for table in tables]).std()
        printed = torch.stack([table[name]["mcse"] for table in tables]).mean()
        assert 0.7 < float(spread / printed) < 1.3, name
