"""`DCPC` from end to end against exact posteriors, and its manners."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import (
    Exact,
    condition_gaussian,
    conjugate_pairs,
    gaussian_chain,
    kalman,
    linear_gaussian_dag,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import Tensor

from dcpc import DCPC
from dcpc.conquer import Langevin
from dcpc.errors import EvidenceError, OptionError
from dcpc.recombine.correction import Metropolis, Outcome, ProposedMove

pytestmark = pytest.mark.usefixtures("float64")

EXACT = ["dcpc", "dcpc-smc"]
DAGS_OF_THE_FAST_SUITE = [1, 2, 4]


def check_exact(exact: Exact, posterior) -> None:
    """Must hold 2: means, sds, correlations, evidence."""
    weights = posterior.state.log_weight.normalized()
    mean, sd, correlation = exact.errors(posterior.samples, weights)
    assert mean < 0.12
    assert sd < 0.08
    assert correlation < 0.1
    assert float(posterior.log_evidence_se) < 0.5
    error = abs(float(posterior.log_evidence) - exact.log_evidence)
    assert error < 0.1 + 4 * float(posterior.log_evidence_se)


@pytest.mark.parametrize("algorithm", EXACT)
@pytest.mark.parametrize("seed", DAGS_OF_THE_FAST_SUITE)
def test_posterior_of_a_random_linear_gaussian_dag_is_exact(seed, algorithm):
    exact = linear_gaussian_dag(seed)
    engine = DCPC(exact.model, num_particles=2000, algorithm=algorithm)
    check_exact(exact, engine.run(num_sweeps=300, seed=seed, progress=False))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", EXACT)
@pytest.mark.parametrize("seed", [s for s in range(20) if s not in DAGS_OF_THE_FAST_SUITE])
def test_posterior_of_many_random_linear_gaussian_dags_is_exact(seed, algorithm):
    exact = linear_gaussian_dag(seed)
    engine = DCPC(exact.model, num_particles=2000, algorithm=algorithm)
    check_exact(exact, engine.run(num_sweeps=300, seed=seed, progress=False))


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("algorithm", EXACT)
def test_posterior_of_the_chain_of_the_design_is_exact(algorithm, steps):
    exact = gaussian_chain()
    engine = DCPC(exact.model, num_particles=2000, algorithm=algorithm, move=Langevin(steps))
    check_exact(exact, engine.run(*exact.args, num_sweeps=200, seed=0, progress=False))


@pytest.mark.parametrize("algorithm", EXACT)
def test_posterior_of_a_state_space_chain_is_that_of_the_kalman_smoother(algorithm):
    torch.manual_seed(0)
    exact = kalman(torch.randn(8).cumsum(0))
    engine = DCPC(exact.model, num_particles=1500, algorithm=algorithm)
    check_exact(exact, engine.run(*exact.args, num_sweeps=200, seed=1, progress=False))


@pytest.mark.parametrize("backend", ["vmap", "loop"])
def test_slow_backends_give_the_same_posterior(backend):
    exact = gaussian_chain()
    num_particles = 400 if backend == "vmap" else 8
    options = {"num_sweeps": 4, "seed": 0, "progress": False, "evidence": False}
    posteriors = [
        DCPC(exact.model, num_particles=num_particles, backend=b).run(*exact.args, **options)
        for b in ("graph", backend)
    ]
    for name in exact.names:
        torch.testing.assert_close(posteriors[0].samples[name], posteriors[1].samples[name])


@pytest.mark.parametrize("pair", conjugate_pairs(), ids=lambda pair: pair.name)
@pytest.mark.parametrize("algorithm", EXACT)
def test_conjugate_pairs_have_their_posterior_and_evidence(pair, algorithm):
    count = 1000
    engine = DCPC(pair.model, num_particles=count, algorithm=algorithm)
    posterior = engine.run(num_sweeps=80, seed=0, progress=False)
    ess = float(posterior.ess)
    assert ess > 0.3 * count
    error = ((posterior.mean()["z"] - pair.mean) / pair.std).abs().max()
    assert float(error) < 4.5 / ess**0.5
    # The sd of a skewed law is known to about sqrt((kurtosis - 1) / 4 ESS), kurtosis below 9.
    assert float((posterior.std()["z"] / pair.std - 1).abs().max()) < 4.5 * math.sqrt(2 / ess)
    evidence_error = abs(float(posterior.log_evidence) - pair.log_evidence)
    assert evidence_error < 4.5 * float(posterior.log_evidence_se) + 1e-3
    assert float(posterior.log_evidence_se) < 0.1


def test_collinear_coefficients_mix_in_one_block():
    """Two coefficients of correlation -.999: alone they crawl, in a dense block they do not."""
    torch.manual_seed(0)
    x = torch.linspace(100.0, 101.0, 30)
    y = 1 + 0.5 * x + 0.3 * torch.randn(30)

    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 100.0))
        b = pyro.sample("b", dist.Normal(0.0, 10.0))
        with pyro.plate("n", 30):
            pyro.sample("y", dist.Normal(a + b * x, 0.3), obs=y)

    design = torch.stack([torch.ones(30), x], -1)
    mean, covariance, log_evidence = condition_gaussian(
        torch.zeros(2), torch.diag(torch.tensor([1e4, 1e2])), design, torch.full((30,), 0.09), y
    )
    exact = Exact(model, ["a", "b"], mean, covariance, log_evidence)
    engine = DCPC(model, num_particles=1000, blocks=[("a", "b")])
    check_exact(exact, engine.run(y, num_sweeps=100, seed=0, progress=False))


def test_plate_of_independent_problems_has_one_evidence_and_weight_per_cell():
    x = torch.tensor([2.0, -1.0, 0.5, 4.0])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    for algorithm in EXACT:
        engine = DCPC(model, num_particles=2000, algorithm=algorithm)
        posterior = engine.run(x, num_sweeps=60, seed=0, progress=False)
        assert posterior.log_weight.shape == (2000, 4)
        assert posterior.ess.shape == posterior.log_evidence.shape == (4,)
        expected = dist.Normal(0.0, 2**0.5).log_prob(x)
        error = (posterior.log_evidence - expected).abs()
        assert bool((error < 4.5 * posterior.log_evidence_se + 1e-3).all())
        tolerance = 4.5 * 0.5**0.5 / posterior.ess.sqrt()
        assert bool(((posterior.mean()["z"] - x / 2).abs() < tolerance).all())


# -- simulation-based calibration ------------------------------------------------------------


class Overconfident(Metropolis):
    """Metropolis with a tempered ratio: a sampler of the wrong target."""

    def apply(self, proposed: ProposedMove) -> Outcome:
        after = proposed.arrive()
        ratio, bad = after.log_ratio, after.bad
        gained = after.after.log_density - after.before.log_density
        accepted = torch.rand_like(ratio).log() < ratio + 0.8 * gained
        return Outcome(
            value=torch.where(accepted[..., None], proposed.proposal.value, proposed.value),
            log_weight=None,
            log_joint=proposed.group.over_population(torch.where(accepted, gained, 0.0)),
            statistic=ratio.clamp(max=0).exp().flatten(0, -2).mean(0),
            num_bad=bad.sum(),
        )


def calibration(seed: int, num_particles: int = 63, cells: int = 2000, **options) -> dict:
    """Ranks of the truth among posterior draws, for `cells` simulated data sets at once.

    Non-Gaussian and hierarchical: `scale ~ LogNormal`, `z ~ Normal(0, scale)`, `x ~ Normal`.
    """

    def model(x: Tensor | None = None):
        with pyro.plate("data", cells):
            s = pyro.sample("s", dist.LogNormal(torch.zeros(cells), 0.5))
            z = pyro.sample("z", dist.Normal(0.0, s))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    torch.manual_seed(seed)
    trace = pyro.poutine.trace(model).get_trace()
    truth = {name: trace.nodes[name]["value"] for name in ("s", "z")}
    x = trace.nodes["x"]["value"].detach()
    engine = DCPC(model, num_particles=num_particles, **options)
    posterior = engine.run(x, num_sweeps=30, seed=seed, progress=False, evidence=False)
    drawn = posterior.resample()
    return {name: (drawn[name] < truth[name]).sum(0) for name in truth}


def chi_square(ranks: Tensor, num_particles: int, bins: int = 16) -> float:
    """Pearson's statistic of the ranks `0..K` in equal bins, in standard deviations."""
    counts = torch.bincount(ranks * bins // (num_particles + 1), minlength=bins).double()
    expected = counts.sum() / bins
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - (bins - 1)) / math.sqrt(2 * (bins - 1))


@pytest.mark.parametrize("algorithm", EXACT)
def test_ranks_of_the_truth_are_uniform(algorithm):
    for name, ranks in calibration(0, algorithm=algorithm).items():
        assert chi_square(ranks, 63) < 4.5, name


def test_ranks_of_a_biased_sampler_are_not_uniform():
    ranks = calibration(0, correction=Overconfident())
    assert max(chi_square(r, 63) for r in ranks.values()) > 10


def test_ranks_of_the_papers_correction_are_not_uniform():
    ranks = calibration(0, algorithm="dcpc-paper", step_size=0.05)
    assert max(chi_square(r, 63) for r in ranks.values()) > 10


# -- guides and initial values ---------------------------------------------------------------


def amortised(x):
    """A good but imperfect encoder of the chain: right means, sds 30 % too wide, no correlation."""
    pyro.sample("z1", dist.Normal(0.478 * x, 0.95))
    pyro.sample("z2", dist.Normal(0.522 * x, 0.95))


@pytest.mark.parametrize("algorithm", EXACT)
def test_guide_gives_proper_weights_and_the_right_evidence(algorithm):
    exact = gaussian_chain()
    engine = DCPC(exact.model, amortised, num_particles=2000, algorithm=algorithm)
    check_exact(exact, engine.run(*exact.args, num_sweeps=40, seed=0, progress=False))


def test_guide_weights_are_model_over_guide():
    exact = gaussian_chain(3)

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z1", dist.Normal(0.478 * x, 0.95))
            pyro.sample("z2", dist.Normal(0.522 * x, 0.95))

    engine = DCPC(exact.model, guide, num_particles=7)
    x = torch.tensor([2.0, -1.0, 0.0])
    state = engine.init(x)
    z1, z2 = state.latents["z1"], state.latents["z2"]
    expected = dist.Normal(0.478 * x, 0.95).log_prob(z1) + dist.Normal(0.522 * x, 0.95).log_prob(z2)
    torch.testing.assert_close(state.log_joint, expected)
    assert torch.equal(state.log_weight.log_weight, torch.zeros(7, 3))


@pytest.mark.parametrize("name", ["gamma-poisson", "dirichlet-categorical", "multivariate-normal"])
def test_guide_on_a_constrained_support_has_the_right_evidence(name):
    """The guide's density is of constrained values, the particles are not."""
    pair = next(pair for pair in conjugate_pairs() if pair.name == name)
    guides = {
        "gamma-poisson": lambda: pyro.sample("z", dist.Gamma(torch.tensor(9.0), 4.0)),
        "dirichlet-categorical": lambda: pyro.sample(
            "z", dist.Dirichlet(torch.tensor([2.0, 5.0, 2.0, 4.0]))
        ),
        "multivariate-normal": lambda: pyro.sample(
            "z", dist.Normal(pair.mean, 1.5 * pair.std).to_event(1)
        ),
    }
    engine = DCPC(pair.model, guides[name], num_particles=1000)
    posterior = engine.run(num_sweeps=20, seed=0, progress=False)
    error = abs(float(posterior.log_evidence) - pair.log_evidence)
    assert error < 4.5 * float(posterior.log_evidence_se)
    assert float(posterior.log_evidence_se) < 0.1
    assert float(((posterior.mean()["z"] - pair.mean) / pair.std).abs().max()) < 4.5 / 1000**0.5


def test_a_guide_of_half_observed_labels_has_the_right_evidence():
    """Where a label is seen, the guide's draw of it is no part of either density."""
    share, centre = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([-1.0, 0.5, 2.0])

    def model(x, label, seen):
        with pyro.plate("data", len(x)):
            label = pyro.sample("label", dist.Categorical(share), obs=label, obs_mask=seen)
            z = pyro.sample("z", dist.Normal(centre[label], 0.7))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x, label, seen):
        with pyro.plate("data", len(x)):
            pyro.sample("label_unobserved", dist.Categorical(torch.tensor([0.2, 0.4, 0.4])))
            pyro.sample("z", dist.Normal(x, 0.8))
            with pyro.poutine.mask(mask=seen):
                pyro.sample("told", dist.Categorical(share), obs=label)

    x, label = torch.tensor([0.0, 1.0, 2.0, -1.0]), torch.tensor([0, 1, 2, 0])
    seen = torch.tensor([True, False, True, False])
    joint = share.log() + dist.Normal(centre, math.hypot(0.7, 0.5)).log_prob(x[:, None])
    exact = torch.where(seen, joint.gather(1, label[:, None])[:, 0], joint.logsumexp(1))
    engine = DCPC(model, guide, num_particles=2000)
    posterior = engine.run(x, label, seen, num_sweeps=20, seed=0, progress=False)
    error = (posterior.log_evidence - exact).abs() / posterior.log_evidence_se
    assert bool((error < 4).all())
    found = posterior.probabilities("label_unobserved")[~seen]
    torch.testing.assert_close(found, joint.softmax(1)[~seen], atol=0.02, rtol=0.0)


def test_a_guide_learns_from_labels_that_it_sees_and_from_no_others():
    """The loss of its class probabilities is the cross-entropy of the labels that are seen."""
    logits = torch.tensor([0.3, -0.2, 0.5], requires_grad=True)

    def model(x, label, seen):
        with pyro.plate("data", len(x)):
            label = pyro.sample(
                "label", dist.Categorical(torch.ones(3) / 3), obs=label, obs_mask=seen
            )
            pyro.sample("x", dist.Normal(label.to(x), 1.0), obs=x)

    def guide(x, label, seen):
        with pyro.plate("data", len(x)):
            pyro.sample("label_unobserved", dist.Categorical(torch.ones(3) / 3))
            with pyro.poutine.mask(mask=seen):
                pyro.sample("told", dist.Categorical(logits=logits), obs=label)

    x, label = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0, 1, 2])
    seen = torch.tensor([True, False, True])
    problem = DCPC(model, guide, num_particles=4).bind(x, label, seen)
    loss = problem.guide_loss(problem.init())
    (found,) = torch.autograd.grad(loss, logits)
    told = torch.nn.functional.cross_entropy(logits.expand(2, 3), label[seen], reduction="sum")
    (expected,) = torch.autograd.grad(told, logits)
    torch.testing.assert_close(found, expected)


def test_autoguide_warm_starts_the_particles():
    pair = next(pair for pair in conjugate_pairs() if pair.name == "gamma-precision")
    guide = AutoNormal(pair.model, init_scale=0.5)
    engine = DCPC(pair.model, guide, num_particles=1000)
    posterior = engine.run(num_sweeps=30, seed=0, progress=False)
    error = abs(float(posterior.log_evidence) - pair.log_evidence)
    assert error < 4.5 * float(posterior.log_evidence_se)
    assert float((posterior.mean()["z"] - pair.mean).abs() / pair.std) < 4.5 / 1000**0.5


def test_guide_that_lacks_a_latent_is_an_error_that_names_it():
    exact = gaussian_chain()
    engine = DCPC(exact.model, lambda x: pyro.sample("z1", dist.Normal(0.0, 1.0)), num_particles=4)
    with pytest.raises(OptionError, match=r"guide does not sample latent site\(s\) \['z2'\]"):
        engine.run(*exact.args, num_sweeps=2, progress=False)


def test_initial_values_start_inexact_algorithms_where_they_are_given():
    exact = gaussian_chain()
    engine = DCPC(exact.model, num_particles=200, algorithm="pgd")
    posterior = engine.run(
        *exact.args,
        initial_values={"z1": torch.tensor(30.0), "z2": torch.tensor(-30.0)},
        num_sweeps=0,
        progress=False,
        seed=0,
    )
    assert float(posterior.samples["z1"].mean()) == pytest.approx(30.0, abs=0.4)
    assert float(posterior.samples["z2"].mean()) == pytest.approx(-30.0, abs=0.4)


@pytest.mark.parametrize("algorithm", EXACT)
def test_initial_values_far_away_do_not_bias_the_posterior(algorithm):
    exact = gaussian_chain()
    engine = DCPC(exact.model, num_particles=1000, algorithm=algorithm)
    posterior = engine.run(
        *exact.args,
        initial_values={"z1": torch.tensor(4.0)},
        num_sweeps=100,
        progress=False,
        seed=0,
    )
    mean, sd, _ = exact.errors(posterior.samples, posterior.state.log_weight.normalized())
    assert mean < 4.5 / float(posterior.ess) ** 0.5 + 0.02
    assert sd < 0.1


def test_unknown_initial_value_lists_the_latents():
    exact = gaussian_chain()
    with pytest.raises(OptionError, match=r"initial_values names \['q'\].*'z1', 'z2'"):
        DCPC(exact.model, num_particles=4).run(
            *exact.args, initial_values={"q": torch.tensor(0.0)}, progress=False
        )


# -- manners ---------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-smc", "dcpc-paper"])
def test_same_seed_same_result_other_seed_other_result(algorithm):
    exact = gaussian_chain()

    def samples(seed: int) -> Tensor:
        engine = DCPC(exact.model, num_particles=20, algorithm=algorithm)
        return engine.run(*exact.args, num_sweeps=10, seed=seed, progress=False).samples["z1"]

    first = samples(3)
    torch.rand(7)
    assert torch.equal(samples(3), first)
    assert not torch.equal(samples(4), first)


def test_one_engine_run_twice_gives_the_same_result_for_the_same_seed():
    exact = gaussian_chain()
    engine = DCPC(exact.model, num_particles=20)
    options = {"num_sweeps": 10, "seed": 3, "progress": False}
    first, second = (engine.run(*exact.args, **options).samples["z1"] for _ in range(2))
    assert torch.equal(first, second)


def test_seeded_run_leaves_the_global_random_state_as_it_was():
    exact = gaussian_chain()
    before = torch.get_rng_state()
    DCPC(exact.model, num_particles=20).run(*exact.args, num_sweeps=5, seed=3, progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_unseeded_runs_follow_torchs_generator():
    exact = gaussian_chain()
    engine = DCPC(exact.model, num_particles=20)
    results = []
    for _ in range(2):
        torch.manual_seed(9)
        results.append(engine.run(*exact.args, num_sweeps=5, progress=False).samples["z1"])
    assert torch.equal(*results)
    again = engine.run(*exact.args, num_sweeps=5, progress=False).samples["z1"]
    assert not torch.equal(again, results[0])


def test_a_run_that_fails_puts_the_random_state_back():
    exact = gaussian_chain()
    before = torch.get_rng_state()
    with pytest.raises(OptionError):
        DCPC(exact.model, num_particles=4).run(
            *exact.args, initial_values={"q": torch.tensor(0.0)}, seed=1, progress=False
        )
    assert torch.equal(torch.get_rng_state(), before)


def test_progress_bar_shows_and_can_be_switched_off(capsys):
    exact = gaussian_chain()
    engine = DCPC(exact.model, num_particles=20)
    engine.run(*exact.args, num_sweeps=5, seed=0, progress=False)
    silent = capsys.readouterr()
    assert silent.out == ""
    assert silent.err == ""
    engine.run(*exact.args, num_sweeps=5, seed=0)
    assert "sweeps" in capsys.readouterr().err


def test_results_have_no_gradients_and_leave_parameters_without_any():
    def model(x):
        loc = pyro.param("loc", torch.tensor(0.3))
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    posterior = DCPC(model, num_particles=20).run(torch.tensor(1.0), num_sweeps=5, progress=False)
    assert not posterior.samples["z"].requires_grad
    assert not posterior.log_weight.requires_grad
    assert not posterior.log_evidence.requires_grad
    assert pyro.param("loc").grad is None


def test_zero_sweeps_are_the_annealed_particles():
    exact = gaussian_chain()
    posterior = DCPC(exact.model, num_particles=2000).run(
        *exact.args, num_sweeps=0, seed=0, progress=False
    )
    mean, sd, _ = exact.errors(posterior.samples, posterior.state.log_weight.normalized())
    assert mean < 0.15
    assert sd < 0.1


def test_observation_means_average_the_decoder_over_the_particles():
    x = torch.tensor([2.0, -1.0])

    def model(x):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    engine = DCPC(model, num_particles=2000, algorithm="dcpc-smc")
    posterior = engine.run(x, num_sweeps=30, seed=0, progress=False)
    got = engine.bind(x).observation_means(posterior.state)["x"]
    torch.testing.assert_close(got, posterior.mean()["z"])
    assert got.shape == (2,)


def test_single_precision_is_kept():
    torch.set_default_dtype(torch.float32)
    exact = gaussian_chain()
    posterior = DCPC(exact.model, num_particles=500).run(
        *exact.args, num_sweeps=60, seed=0, progress=False
    )
    assert posterior.samples["z1"].dtype == torch.float32
    mean, sd, _ = exact.errors(posterior.samples, posterior.state.log_weight.normalized())
    assert mean < 4.5 / 500**0.5
    assert sd < 4.5 / 1000**0.5


def points(x):
    """A model of two latents, conjugate: `z1 ~ N(0, 1)`, `z2 ~ N(z1, 1)`, data `N(z2, 1)`."""
    z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
    z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(z2, 1.0), obs=x)


def point_guide(x):
    pyro.sample("z1", dist.Delta(torch.tensor(0.3)))
    pyro.sample("z2", dist.Delta(torch.tensor(1.2)))


def mode_guide(x):
    """At the mode of three data that sum to 3.5, where all scores are zero."""
    pyro.sample("z1", dist.Delta(torch.tensor(0.5)))
    pyro.sample("z2", dist.Delta(torch.tensor(1.0)))


def half_point_guide(x):
    pyro.sample("z1", dist.Normal(0.5, 0.7))
    pyro.sample("z2", dist.Delta(torch.tensor(1.0)))


def mixing_guide(x):
    u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    pyro.sample("z1", dist.Normal(0.5 + 0.3 * u, 0.3))
    pyro.sample("z2", dist.Normal(1.0, 0.3))


@pytest.mark.parametrize(
    "guide", [point_guide, mode_guide, half_point_guide, mixing_guide, AutoDelta(points)]
)
def test_a_guide_without_a_density_of_the_latents_gives_no_evidence(guide):
    """Its particles would be weighed by the wrong density; the posterior is that of the sweeps."""
    x = torch.tensor([1.0, 2.0, 0.5])
    posterior = DCPC(points, guide, num_particles=400).run(
        x, num_sweeps=200, seed=0, progress=False
    )
    with pytest.raises(EvidenceError, match="its density is not one of the latents"):
        posterior.log_evidence  # noqa: B018
    precision = torch.tensor([[2.0, -1.0], [-1.0, 1.0 + len(x)]])
    mean = torch.linalg.solve(precision, torch.tensor([0.0, float(x.sum())]))
    sd = torch.linalg.inv(precision).diagonal().sqrt()
    for index, name in enumerate(("z1", "z2")):
        table = posterior.statistics()[name]
        assert abs(float(table["mean"] - mean[index])) < 5 * float(table["mcse"])
        assert float(table["std"]) == pytest.approx(float(sd[index]), rel=0.05)


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal, AutoDiagonalNormal])
def test_autoguides_over_images_of_auxiliary_numbers_have_a_density(kind):
    def model(x):
        s = pyro.sample("s", dist.Gamma(2.0, 2.0))
        w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        pyro.sample("x", dist.Poisson(s * w).to_event(1), obs=x)

    x = torch.tensor([1.0, 0.0, 2.0])
    posterior = DCPC(model, kind(model, init_scale=2.0), num_particles=800).run(
        x, num_sweeps=10, seed=0, progress=False
    )
    # sum x | s ~ Poisson(s), and the counts given their sum are multinomial with flat weights.
    total = float(x.sum())
    expected = 2 * math.log(2.0) - math.lgamma(2.0) + math.lgamma(2 + total)
    expected -= (2 + total) * math.log(3.0) + math.lgamma(total + 1)
    expected += math.lgamma(3.0) + math.lgamma(total + 1) - math.lgamma(total + 3)
    error = abs(float(posterior.log_evidence) - expected)
    assert error < 4 * float(posterior.log_evidence_se) < 1.0
