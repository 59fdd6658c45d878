"""The export to ArviZ: every group against formulas, and ArviZ's own functions on it."""

from __future__ import annotations

import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy.stats import halfcauchy, norm
from zoo import CASES, Case

from dcpc import DCPC, Posterior
from dcpc.errors import OptionError
from tests.acceptance.case import Program
from tests.acceptance.catalogue import programs

arviz = pytest.importorskip("arviz")

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)
GROUPS = {
    "posterior",
    "sample_stats",
    "log_likelihood",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "observed_data",
}


def eight_schools(effects: torch.Tensor, errors: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, errors), obs=effects)


def groups_of(data: Any) -> set[str]:
    """Names of the groups, in ArviZ before and after 1.0."""
    return set(data.children) if hasattr(data, "children") else set(data.groups())


def run(model: Any, *args: Any, num_particles: int = 200, **options: Any) -> Posterior:
    engine = {n: options.pop(n) for n in ("algorithm", "reparam", "backend") if n in options}
    settings = {"num_sweeps": 100, "evidence": False, "seed": 0, "progress": False, **options}
    return DCPC(model, num_particles=num_particles, **engine).run(*args, **settings)


@pytest.fixture(scope="module")
def schools() -> Posterior:
    return run(eight_schools, EFFECTS, ERRORS, num_particles=400, evidence=True)


@pytest.fixture(scope="module")
def exported(schools: Posterior) -> Any:
    return schools.to_arviz(coords={"schools": list("ABCDEFGH")})


# -- groups against formulas -------------------------------------------------------------------


def test_all_groups_are_there_with_the_dimensions_of_the_plates(exported: Any) -> None:
    assert groups_of(exported) == GROUPS
    chains_and_draws = exported.posterior["mu"].shape
    assert chains_and_draws[0] == 4
    assert math.prod(chains_and_draws) <= 4000
    for group, name in (
        ("posterior", "theta"),
        ("log_likelihood", "effect"),
        ("posterior_predictive", "effect"),
    ):
        values = exported[group][name]
        assert values.dims == ("chain", "draw", "schools")
        assert values.shape == (*chains_and_draws, 8)
        assert list(values.coords["schools"].values) == list("ABCDEFGH")
    assert set(exported.prior.data_vars) == {"mu", "tau", "theta"}
    assert exported.prior["theta"].shape == exported.prior_predictive["effect"].shape
    assert (exported.observed_data["effect"].values == EFFECTS.numpy()).all()


def test_likelihoods_and_log_joints_are_those_of_the_draws(exported: Any) -> None:
    mu, tau, theta = (exported.posterior[name].values for name in ("mu", "tau", "theta"))
    expected = norm(theta, ERRORS).logpdf(EFFECTS)
    np.testing.assert_allclose(exported.log_likelihood["effect"].values, expected)
    joint = norm(0, 5).logpdf(mu) + halfcauchy(scale=5).logpdf(tau) + expected.sum(-1)
    joint += norm(mu[..., None], tau[..., None]).logpdf(theta).sum(-1)
    np.testing.assert_allclose(exported.sample_stats["lp"].values, joint)


def test_predictions_are_the_draws_and_the_noise_of_the_likelihood(exported: Any) -> None:
    theta = exported.posterior["theta"].values
    noise = (exported.posterior_predictive["effect"].values - theta) / ERRORS.numpy()
    assert abs(noise.mean()) < 4.5 / noise.size**0.5
    assert noise.std() == pytest.approx(1, abs=4.5 / (2 * noise.size) ** 0.5)


def test_draws_of_the_prior_have_its_moments(schools: Posterior) -> None:
    data = schools.to_arviz(groups=["prior", "prior_predictive"], num_prior=4000)
    assert groups_of(data) == {"posterior", "prior", "prior_predictive"}
    mu, tau, theta = (data.prior[name].values[0] for name in ("mu", "tau", "theta"))
    assert mu.mean() == pytest.approx(0, abs=4.5 * 5 / 4000**0.5)
    assert np.median(tau) == pytest.approx(5, abs=4.5 * 0.5 * math.pi * 5 / 4000**0.5)
    standard = (theta - mu[:, None]) / tau[:, None]
    assert standard.std() == pytest.approx(1, abs=4.5 / (2 * 32_000) ** 0.5)
    noise = (data.prior_predictive["effect"].values[0] - theta) / ERRORS.numpy()
    assert noise.std() == pytest.approx(1, abs=4.5 / (2 * 32_000) ** 0.5)


def test_every_draw_tells_its_particle_and_sweep(schools: Posterior, exported: Any) -> None:
    particle, sweep = (exported.sample_stats[name].values for name in ("particle", "sweep"))
    history = schools.history["mu"].numpy()
    assert (history[particle, sweep] == exported.posterior["mu"].values).all()
    assert len(np.unique(particle * history.shape[1] + sweep)) == particle.size


def test_notes_hold_the_evidence_and_what_the_chains_are(schools: Posterior, exported: Any) -> None:
    for notes in (exported.attrs, exported.posterior.attrs):
        assert notes["log_evidence"] == pytest.approx([float(schools.log_evidence)])
        assert notes["arrangement"].startswith("every chain is 100 particles")
        assert notes["inference_library"] == "dcpc"


# -- ArviZ's functions -------------------------------------------------------------------------


def regression(x: torch.Tensor, y: torch.Tensor) -> None:
    """Noise of one; conjugate."""
    weights = pyro.sample("weights", dist.Normal(torch.zeros(x.shape[1]).to(x), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ weights, 1.0), obs=y)


def exact_loo(x: np.ndarray, y: np.ndarray) -> float:
    """Sum of the log predictive densities of each datum given the others."""
    total = 0.0
    for i in range(len(y)):
        rest = np.delete(np.arange(len(y)), i)
        covariance = np.linalg.inv(np.eye(x.shape[1]) + x[rest].T @ x[rest])
        mean = covariance @ x[rest].T @ y[rest]
        spread = math.sqrt(1 + x[i] @ covariance @ x[i])
        total += float(norm(x[i] @ mean, spread).logpdf(y[i]))
    return total


@pytest.fixture(scope="module")
def regressions() -> dict[str, tuple[Any, float]]:
    """By number of columns of the design, the export and the exact LOO."""
    generator = np.random.default_rng(1)
    x = np.c_[np.ones(30), generator.normal(size=(30, 1))]
    y = x @ np.array([0.5, 1.5]) + generator.normal(size=30)
    result = {}
    for columns in (1, 2):
        design = x[:, :columns]
        posterior = run(regression, torch.tensor(design), torch.tensor(y), num_particles=400)
        result[f"{columns} columns"] = (posterior.to_arviz(), exact_loo(design, y))
    return result


def test_loo_is_the_exact_one(regressions: dict[str, tuple[Any, float]]) -> None:
    for data, expected in regressions.values():
        loo = arviz.loo(data)
        # Smoothed importance weights of 4,000 draws: some hundredths.
        assert float(getattr(loo, "elpd_loo", getattr(loo, "elpd", None))) == pytest.approx(
            expected, abs=0.15
        )


@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.sort_values is deprecated")
def test_models_are_compared(regressions: dict[str, tuple[Any, float]]) -> None:
    table = arviz.compare({name: data for name, (data, _) in regressions.items()})
    assert list(table.index) == ["2 columns", "1 columns"]


@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping to normalize_kwargs")
def test_posterior_predictive_plots_are_drawn(regressions: dict[str, tuple[Any, float]]) -> None:
    data, _ = regressions["2 columns"]
    if hasattr(arviz, "plot_ppc"):
        arviz.plot_ppc(data, num_pp_samples=20)
    else:
        arviz.plot_ppc_dist(data, num_samples=20)
    assert plt.get_fignums()
    plt.close("all")


def test_files_of_arviz_keep_everything(exported: Any, tmp_path: Any) -> None:
    exported.to_netcdf(str(tmp_path / "schools.nc"))
    again = arviz.from_netcdf(str(tmp_path / "schools.nc"))
    assert groups_of(again) == GROUPS
    assert again.posterior.equals(exported.posterior)


# -- which draws -------------------------------------------------------------------------------


def test_resampled_particles_are_one_chain_of_as_many_draws_as_they_are_worth() -> None:
    posterior = run(eight_schools, EFFECTS, ERRORS, algorithm="dcpc-smc", reparam="auto")
    assert not posterior.is_chains
    data = posterior.to_arviz(groups=["sample_stats"], num_draws=None)
    fewest = min(float(about["ess_bulk"].min()) for about in posterior.statistics().values())
    assert data.posterior["mu"].shape == (1, round(fewest))
    assert round(fewest) < posterior.num_particles * posterior.num_kept
    # Draws without autocorrelation: ArviZ finds them worth their number.
    ess = arviz.ess(data.posterior["mu"].values)
    assert float(ess) == pytest.approx(round(fewest), rel=0.25)
    assert "no chains" in data.attrs["arrangement"]


def test_fewer_draws_are_evenly_spaced(schools: Posterior) -> None:
    every = schools.to_arviz(groups=["sample_stats"], num_draws=None)
    few = schools.to_arviz(groups=["sample_stats"], num_draws=100)
    assert every.posterior["mu"].shape == (4, 100 * schools.num_kept)
    assert few.posterior["mu"].shape == (4, 25)
    step = 100 * schools.num_kept // 25
    assert (few.posterior["mu"].values == every.posterior["mu"].values[:, ::step]).all()


def test_likelihoods_and_predictions_are_kept_small(
    schools: Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcpc.chains.MAX_BYTES", 2 * 8 * 8 * 40)
    assert schools.to_arviz().log_likelihood["effect"].shape == (4, 10, 8)
    assert schools.to_arviz(groups=["sample_stats"]).posterior["mu"].shape == (4, 1000)


def test_draws_that_are_evaluated_in_parts_are_the_same(
    schools: Posterior, exported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcpc.replay.NUMBERS_AT_ONCE", 26 * 150)  # of 10 latents and 16 data
    again = schools.to_arviz(groups=["log_likelihood", "sample_stats"])
    for group, name in (("log_likelihood", "effect"), ("sample_stats", "lp")):
        np.testing.assert_allclose(again[group][name].values, exported[group][name].values)


def test_a_posterior_from_a_file_has_draws_and_plates_and_the_rest_with_its_model(
    schools: Posterior, exported: Any, tmp_path: Any
) -> None:
    schools.save(tmp_path / "schools.pt")
    loaded = Posterior.load(tmp_path / "schools.pt")
    data = loaded.to_arviz()
    assert groups_of(data) == {"posterior", "sample_stats"}
    assert data.posterior["theta"].dims == ("chain", "draw", "schools")
    assert "log_likelihood: it needs the model" in data.attrs["left_out"]
    with pytest.raises(OptionError, match="no 'log_likelihood': it needs the model and its data"):
        loaded.to_arviz(groups=["log_likelihood"])
    loaded.made_by(DCPC(eight_schools, num_particles=400), ((EFFECTS, ERRORS), {}))
    again = loaded.to_arviz(coords={"schools": list("ABCDEFGH")})
    assert groups_of(again) == GROUPS
    for group in ("log_likelihood", "posterior_predictive"):
        assert again[group]["effect"].equals(exported[group]["effect"])


# -- sites of every kind -----------------------------------------------------------------------


def test_masks_take_data_out_and_scales_do_not_count_in_likelihoods() -> None:
    mask = torch.tensor([True, False, True])

    def model(x: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3), poutine.mask(mask=mask), poutine.scale(scale=2.0):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    data = run(model, torch.tensor([1.0, math.nan, 2.0])).to_arviz()
    z = data.posterior["z"].values[..., None]
    expected = norm(z, 1).logpdf(np.array([1.0, 0.0, 2.0])) * mask.numpy()
    likelihood = data.log_likelihood["x"].values
    np.testing.assert_allclose(likelihood, expected, rtol=1e-5)
    joint = norm(0, 1).logpdf(z[..., 0]) + 2 * expected.sum(-1)
    np.testing.assert_allclose(data.sample_stats["lp"].values, joint, rtol=1e-5)
    assert np.isfinite(data.posterior_predictive["x"].values).all()


def test_factors_are_in_the_log_joint_and_in_no_likelihood() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("potential", -z.square())

    data = run(model).to_arviz()
    assert groups_of(data) == {"posterior", "sample_stats", "prior"}
    z = data.posterior["z"].values
    np.testing.assert_allclose(
        data.sample_stats["lp"].values, norm(0, 1).logpdf(z) - z**2, rtol=1e-5
    )
    assert "no observed site but pyro.factor" in data.attrs["left_out"]


def test_improper_priors_leave_the_prior_out() -> None:
    def model(x: torch.Tensor) -> None:
        flat = dist.ImproperUniform(dist.constraints.real, (), ())
        z = pyro.sample("z", flat)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    posterior = run(model, torch.tensor(1.0))
    data = posterior.to_arviz()
    assert groups_of(data) == GROUPS - {"prior", "prior_predictive"}
    assert "site 'z' has an improper prior" in data.attrs["left_out"]
    with pytest.raises(OptionError, match="site 'z' has an improper prior"):
        posterior.to_arviz(groups=["prior"])


def test_discrete_summed_out_and_deterministic_sites_are_exported() -> None:
    def model(x: torch.Tensor) -> None:
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        with pyro.plate("data", 4):
            k = pyro.sample("k", dist.Bernoulli(share), infer={"enumerate": "parallel"})
            centre = pyro.deterministic("centre", 4.0 * k - 2.0)
            pyro.sample("x", dist.Normal(centre, 1.0), obs=x)

    data = run(model, torch.tensor([-2.0, -1.5, 2.0, 2.5])).to_arviz()
    k, centre = data.posterior["k"].values, data.posterior["centre"].values
    assert data.posterior["k"].dims == data.posterior["centre"].dims == ("chain", "draw", "data")
    assert (centre == 4 * k - 2).all()
    likelihood = norm(centre, 1).logpdf(np.array([-2.0, -1.5, 2.0, 2.5]))
    np.testing.assert_allclose(data.log_likelihood["x"].values, likelihood, rtol=1e-4)
    assert data.prior["k"].values.mean() == pytest.approx(0.5, abs=4.5 * 0.5 / 500**0.5)


def test_programs_that_no_vmap_can_run_are_run_one_by_one() -> None:
    def model(x: torch.Tensor, plain: bool) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        centre = z if plain else torch.tensor([float(number) for number in z])
        pyro.sample("x", dist.Normal(centre, 1.0).to_event(1), obs=x)

    x = torch.tensor([1.0, -1.0])
    posterior = run(model, x, True)
    posterior.made_by(DCPC(model, num_particles=200), ((x, False), {}))
    data = posterior.to_arviz(num_draws=40)
    z = data.posterior["z"].values
    expected = norm(z, 1).logpdf(x.numpy()).sum(-1)
    np.testing.assert_allclose(data.log_likelihood["x"].values, expected, rtol=1e-5)
    spread = (data.posterior_predictive["x"].values - z).std()
    assert spread == pytest.approx(1, abs=4.5 / 160**0.5)


def agrees_with_pyros_traces(posterior: Posterior, model: Any, args: tuple, kwargs: dict) -> None:
    """Compares two draws' likelihoods and log-joints with those of a conditioned plain run."""
    data = posterior.to_arviz(num_prior=3)
    likelihood = data.log_likelihood.data_vars if "log_likelihood" in groups_of(data) else ()
    latents = posterior.origin.engine.division(*args, **kwargs).model_sites.latents
    for chain, draw in ((0, 0), (-1, -1)):
        given = {n: torch.as_tensor(data.posterior[n].values[chain, draw]) for n in latents}
        with torch.no_grad():
            trace = poutine.trace(poutine.condition(model, data=given)).get_trace(*args, **kwargs)
            trace.compute_log_prob()
        for name in likelihood:
            values = torch.as_tensor(data.log_likelihood[name].values[chain, draw])
            site = trace.nodes[name]
            torch.testing.assert_close(
                values * site["scale"], site["log_prob"], rtol=1e-4, atol=1e-4
            )
            drawn = data.posterior_predictive[name].values[chain, draw]
            assert drawn.shape == site["value"].shape
        lp = float(data.sample_stats["lp"].values[chain, draw])
        assert lp == pytest.approx(float(trace.log_prob_sum()), rel=1e-4, abs=1e-4)


QUICK = ("deep_generative", "nested_plates", "sequential_plate", "bayesian_regression", "mixture")


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if c.name in QUICK else pytest.mark.slow) for c in CASES],
    ids=lambda case: case.name,
)
def test_likelihoods_of_models_of_every_shape_are_those_of_pyros_traces(case: Case) -> None:
    model, args, kwargs = case.build()
    posterior = run(model, *args, num_particles=4, num_sweeps=10, keep_every=1, **kwargs)
    agrees_with_pyros_traces(posterior, model, args, kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("program", programs(), ids=lambda program: program.name)
def test_likelihoods_of_pyros_programs_are_those_of_its_traces(program: Program) -> None:
    engine = DCPC(program.model, num_particles=4, **program.options)
    options = {"num_sweeps": 10, "keep_every": 1, "evidence": False, "seed": 0, "progress": False}
    posterior = engine.run(*program.args, **options, **program.kwargs)
    agrees_with_pyros_traces(posterior, engine.model, program.args, dict(program.kwargs))


def test_plates_that_are_named_like_arvizs_own_dimensions_get_other_names() -> None:
    def model(x: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("draw", 3):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    data = run(model, torch.ones(3)).to_arviz()
    assert data.log_likelihood["x"].dims == ("chain", "draw", "draw_plate")


def test_axes_that_are_no_plates_and_plates_that_a_value_does_not_vary_in_have_numbers() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", 2, dim=-2):
            shift = pyro.sample("shift", dist.Normal(torch.zeros(2, 1, 3), 1.0).to_event(1))
            with pyro.plate("columns", 4, dim=-1):
                pyro.sample("x", dist.Normal(shift, 1.0).to_event(1), obs=x)

    data = run(model, torch.zeros(2, 4, 3)).to_arviz()
    assert data.posterior["shift"].dims[2:] == ("rows", "shift_dim_1", "shift_dim_2")
    assert data.log_likelihood["x"].dims[2:] == ("rows", "columns")
    assert data.posterior_predictive["x"].dims[2:] == ("rows", "columns", "x_dim_2")


# -- what users get wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": ["likelihood"]}, "groups must be some of posterior, .*, got 'likelihood'"),
        ({"coords": {"school": ["A"]}}, r"coords names 'school', .* \['schools'\]"),
        ({"coords": {"schools": ["A"]}}, r"coords\['schools'\] must have 8 labels, .* got 1"),
        ({"dims": {"beta": ["a"]}}, r"dims names 'beta', but the sites are \['effect', 'mu'"),
        ({"dims": {"theta": ["a", "b"]}}, r"dims\['theta'\] must name 1 axes, .* \(8,\)"),
        ({"dims": {"theta": ["mu"]}}, r"dims\['theta'\] gives an axis the name 'mu'"),
        ({"dims": {"theta": ["chain"]}}, r"dims\['theta'\] gives an axis the name 'chain'"),
        ({"dims": {"theta": "school"}}, "dims must map names to lists, .* got 'school'"),
        ({"coords": ["A"]}, r"coords must map names to lists, .* got \['A'\]"),
        ({"coords": {"schools": "ABCDEFGH"}}, "coords must map names to lists, .* got 'ABCDEFGH'"),
        ({"num_draws": 0}, "num_draws must be at least 1"),
        ({"num_prior": 0}, "num_prior must be at least 1"),
    ],
)
def test_wrong_options_are_named(schools: Posterior, options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        schools.to_arviz(**options)


def test_a_site_that_is_named_like_arvizs_own_dimensions_is_refused() -> None:
    def model(x: torch.Tensor) -> None:
        pyro.sample("x", dist.Normal(pyro.sample("draw", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    with pytest.raises(OptionError, match="site 'draw' has the name of a dimension of ArviZ"):
        run(model, torch.tensor(1.0)).to_arviz()


def test_dimensions_of_the_user_take_the_place_of_plates(schools: Posterior) -> None:
    data = schools.to_arviz(
        groups=["log_likelihood"],
        dims={"theta": ["place"], "effect": ["place"]},
        coords={"place": list("ABCDEFGH")},
    )
    assert data.posterior["theta"].dims[2] == data.log_likelihood["effect"].dims[2] == "place"


def test_the_global_random_state_is_left_as_it_was(schools: Posterior) -> None:
    before = torch.get_rng_state()
    first, second = schools.to_arviz(), schools.to_arviz()
    assert torch.equal(torch.get_rng_state(), before)
    assert first.posterior_predictive.equals(second.posterior_predictive)
