"""Simulation-based calibration (Talts, Betancourt, Simpson, Vehtari & Gelman 2018).

Latents are drawn from the prior and data given them; then the rank of a latent among independent
draws of its posterior is uniform. That holds for any model, whether its posterior is known or not.
Nothing but a right sampler gives uniform ranks for the latents and for the joint density
(Modrák et al. 2023), which sees what marginal ranks do not.

Most models stand in an outer plate of replicates, which the engine infers as a population: two
hundred data sets in one run. The others are run once for every data set.

`poutine.scale` changes the joint density, so that data drawn by the program itself do not belong to
it. Those models draw theirs from the densities that the scaled ones are proportional to. Counts as
scales have none, and are left out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from scipy.stats import chisquare
from torch import Tensor

from dcpc import DCPC
from dcpc.conquer import Diagonal, Jump, Preconditioner, WayBack
from dcpc.recombine.correction import Metropolis, Outcome

pytestmark = pytest.mark.usefixtures("float64")

REPLICATES = 200
NUM_DRAWS = 15
"""Draws that a truth is ranked among; more particles than these make the draws less dependent."""

NUM_BINS = 8
SIGNIFICANCE = 1e-3
MAX_ENTRIES = 2
"""Entries of a site that are ranked; entries of one replicate are dependent, so each is a test."""

Data = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model to calibrate.

    Attributes:
        model: A Pyro program of a dictionary of data, which draws its data where that is empty.
        simulate: Draws latents and data where the program itself does not draw from its joint.
        hide: What becomes of simulated data before they are shown, such as missing entries.
        loop: Whether the model has no plate of replicates, and is run once for each of 100.
        num_sweeps: Of a run.
    """

    name: str
    model: Callable[[Data], None]
    simulate: Callable[[], Data] | None = None
    hide: Callable[[Data], Data] = dict
    loop: bool = False
    num_sweeps: int = 200


# -- models ----------------------------------------------------------------------------------------


def replicates():
    return pyro.plate("replicates", REPLICATES)


def nested_plates(data):
    """Three plates as Pyro allocates them: the outermost has dim -1."""
    with replicates():
        top = pyro.sample("top", dist.Normal(0.0, 1.0))
        with pyro.plate("outer", 2):
            mean = pyro.sample("mean", dist.Normal(top, 0.7))
            with pyro.plate("inner", 2):
                z = pyro.sample("z", dist.Normal(mean, 0.5))
                pyro.sample("x", dist.Normal(z, 1.0), obs=data.get("x"))


def schools(data):
    with replicates():
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))
        with pyro.plate("schools", 4):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * theta, 1.0), obs=data.get("y"))


def funnel(data):
    with replicates():
        depth = pyro.sample("depth", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Normal(0.0, (depth / 2).exp()))
            pyro.sample("x", dist.Normal(z, 0.5), obs=data.get("x"))


def gamma_poisson(data):
    with replicates():
        shape = pyro.sample("shape", dist.Gamma(3.0, 1.0))
        with pyro.plate("rows", 3):
            rate = pyro.sample("rate", dist.Gamma(shape, 1.0))
            with pyro.plate("columns", 2):
                pyro.sample("x", dist.Poisson(rate), obs=data.get("x"))


def simplex(data):
    with replicates():
        p = pyro.sample("p", dist.Dirichlet(torch.tensor([0.7, 1.0, 2.0])))
        q = pyro.sample("q", dist.Beta(0.5, 0.8))
        with pyro.plate("n", 6):
            pyro.sample("x", dist.Categorical(p), obs=data.get("x"))
            pyro.sample("y", dist.Bernoulli(q), obs=data.get("y"))


def correlations(data):
    with replicates():
        factor = pyro.sample("factor", dist.LKJCholesky(2, torch.tensor(1.5)))
        scales = pyro.sample("scales", dist.LogNormal(torch.zeros(2), 0.5).to_event(1))
        tril = scales[..., None] * factor
        with pyro.plate("n", 6):
            noise = dist.MultivariateNormal(torch.zeros(2), scale_tril=tril)
            pyro.sample("x", noise, obs=data.get("x"))


def ordered_mixture(data):
    """The gap between the components is positive, which tells them apart."""
    with replicates():
        low = pyro.sample("low", dist.Normal(-1.0, 1.0))
        gap = pyro.sample("gap", dist.Gamma(4.0, 1.0))
        weight = pyro.sample("weight", dist.Beta(3.0, 3.0))
        locs = torch.stack([low, low + gap], -1)
        choice = dist.Categorical(torch.stack([weight, 1 - weight], -1))
        with pyro.plate("n", 8):
            mixture = dist.MixtureSameFamily(choice, dist.Normal(locs, 0.7))
            pyro.sample("x", mixture, obs=data.get("x"))


def masked_rows(data):
    with replicates():
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        sd = pyro.sample("sd", dist.LogNormal(0.0, 0.5))
        with pyro.plate("n", 5), poutine.mask(mask=data.get("seen", torch.tensor(True))):
            pyro.sample("x", dist.Normal(mean, sd), obs=data.get("x"))


def hide_rows(data):
    seen = torch.rand(5, REPLICATES) < 0.6
    return {"x": data["x"].where(seen, torch.tensor(math.nan)), "seen": seen}


def imputed(data):
    """Missing entries are latents, and covariates of what follows."""
    with replicates():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3):
            x = pyro.sample(
                "x", dist.Normal(mean, 1.0), obs=data.get("x"), obs_mask=data.get("seen")
            )
            pyro.sample("y", dist.Normal(slope * x, 0.5), obs=data.get("y"))


def hide_covariates(data):
    """The first row is missing everywhere, the others at random."""
    seen = torch.rand(3, REPLICATES) < 0.7
    seen[0] = False
    return {"x": data["x"].where(seen, torch.tensor(math.nan)), "y": data["y"], "seen": seen}


def grouped(data):
    group = torch.tensor([0, 0, 1, 2, 2, 2])
    with replicates():
        top = pyro.sample("top", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", 3):
            m = pyro.sample("m", dist.Normal(top, 0.8))
        with pyro.plate("n", 6):
            pyro.sample("x", dist.Normal(m[group], 1.0), obs=data.get("x"))


def sequential(data):
    with replicates():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        for i in pyro.plate("rows", 3):
            rate = pyro.sample(f"rate{i}", dist.LogNormal(mean, 0.5))
            pyro.sample(f"x{i}", dist.Exponential(rate), obs=data.get(f"x{i}"))


def bounded(data):
    with replicates():
        angle = pyro.sample("angle", dist.VonMises(0.5, 1.5))
        width = pyro.sample("width", dist.Uniform(0.2, 2.0))
        with pyro.plate("n", 4):
            pyro.sample("x", dist.Normal(angle.sin(), width), obs=data.get("x"))
            pyro.sample("y", dist.Normal(angle.cos(), width), obs=data.get("y"))


def cells(data):
    """A population of two plates in random order, as in a table of cells."""
    with pyro.plate("columns", 20, dim=-2), pyro.plate("lines", 10, dim=-1):
        scale = pyro.sample("scale", dist.InverseGamma(4.0, 3.0))
        z = pyro.sample("z", dist.Normal(torch.zeros(2), scale[..., None]).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=data.get("x"))
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=data.get("y"))


SCALE = 3.0


def scaled(data):
    """Scales on a constrained prior, on a prior in a plate, and on data."""
    with replicates():
        with poutine.scale(scale=SCALE):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("n", 3):
            with poutine.scale(scale=1 / SCALE):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.scale(scale=SCALE):
                pyro.sample("x", dist.Normal(z + rate, 1.0), obs=data.get("x"))


def simulate_scaled():
    """Powers of the densities, normalised: a gamma's and a normal's are of the same family."""
    shape = SCALE * (2.0 - 1.0) + 1.0
    rate = dist.Gamma(shape, SCALE).sample((REPLICATES,))
    z = dist.Normal(0.0, SCALE**0.5).sample((3, REPLICATES))
    return {"rate": rate, "z": z, "x": dist.Normal(z + rate, SCALE**-0.5).sample()}


def autoregression(data):
    with replicates():
        decay = pyro.sample("decay", dist.Uniform(-1.0, 1.0))
        z = torch.zeros(())
        for t in pyro.markov(range(4)):
            z = pyro.sample(f"z{t}", dist.Normal(decay * z, 0.7))
            pyro.sample(f"x{t}", dist.StudentT(4.0, z, 0.5), obs=data.get(f"x{t}"))


def crossed(data):
    """No population: global latents, and latents of two crossed plates."""
    rows, columns = pyro.plate("rows", 3), pyro.plate("columns", 2, dim=-2)
    sd = pyro.sample("sd", dist.HalfNormal(1.0))
    with rows:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with columns:
        b = pyro.sample("b", dist.Normal(0.0, sd))
    with columns, rows:
        pyro.sample("x", dist.Normal(a + b, 0.7), obs=data.get("x"))


def regression(data):
    design = torch.linspace(-1, 1, 12).reshape(6, 2).sin()
    with replicates():
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        sigma = pyro.sample("sigma", dist.Exponential(1.0))
        with pyro.plate("n", 6):
            mean = (design[:, None] * beta).sum(-1)
            pyro.sample("y", dist.Normal(mean, sigma + 0.1), obs=data.get("y"))


def drawn_mixture(data):
    """Assignments that are drawn, of components that a positive gap tells apart."""
    with replicates():
        low = pyro.sample("low", dist.Normal(-1.0, 1.0))
        gap = pyro.sample("gap", dist.Gamma(4.0, 1.0))
        weight = pyro.sample("weight", dist.Beta(3.0, 3.0))
        with pyro.plate("n", 6):
            z = pyro.sample("z", dist.Bernoulli(weight))
            pyro.sample("x", dist.Normal(low + gap * z, 0.7), obs=data.get("x"))


def summed_mixture(data):
    """The same, summed out; values are drawn afterwards."""
    with replicates():
        low = pyro.sample("low", dist.Normal(-1.0, 1.0))
        gap = pyro.sample("gap", dist.Gamma(4.0, 1.0))
        weight = pyro.sample("weight", dist.Beta(3.0, 3.0))
        with pyro.plate("n", 6):
            z = pyro.sample("z", dist.Bernoulli(weight), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(low + gap * z, 0.7), obs=data.get("x"))


def hidden_markov(data):
    """A chain of states that are drawn at once, with a latent transition matrix."""
    with replicates():
        move = pyro.sample(
            "move", dist.Dirichlet(torch.tensor([[3.0, 1.0], [1.0, 2.0]])).to_event(1)
        )
        level = pyro.sample("level", dist.Normal(torch.tensor([-1.0, 1.0]), 0.5).to_event(1))
        rows, z = torch.arange(REPLICATES), torch.zeros(REPLICATES, dtype=torch.long)
        for t in pyro.markov(range(4)):
            z = pyro.sample(f"z{t}", dist.Categorical(move[rows, z]))
            pyro.sample(f"x{t}", dist.Normal(level[rows, z], 0.7), obs=data.get(f"x{t}"))


def separate_states(data):
    """A tree of binary causes in a plate, and a cause of all of them."""
    with replicates():
        top = pyro.sample("top", dist.Bernoulli(0.4))
        with pyro.plate("middle", 3):
            h = pyro.sample("h", dist.Bernoulli(0.2 + 0.5 * top))
        pyro.sample("x", dist.Normal(h.sum(0), 0.6), obs=data.get("x"))


def counts(data):
    """Counts without end and with one, that the data see noisily."""
    with replicates():
        rate = pyro.sample("rate", dist.Gamma(3.0, 0.5))
        found = pyro.sample("found", dist.Beta(4.0, 2.0))
        n = pyro.sample("n", dist.Poisson(rate))
        k = pyro.sample("k", dist.Binomial(8, found))
        with pyro.plate("visits", 2):
            pyro.sample("x", dist.Normal(n, 1.0), obs=data.get("x"))
            pyro.sample("y", dist.Normal(k, 1.0), obs=data.get("y"))


def allocations(data):
    """Counts with a common sum, and a category, of the same probabilities."""
    with replicates():
        p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 2.0])))
        m = pyro.sample("m", dist.Multinomial(4, p))
        c = pyro.sample("c", dist.OneHotCategorical(p))
        pyro.sample("x", dist.Normal(m, 1.0).to_event(1), obs=data.get("x"))
        pyro.sample("y", dist.Normal(c, 0.5).to_event(1), obs=data.get("y"))


def spike_and_slab(data):
    design = torch.linspace(-1, 1, 12).reshape(6, 2).sin()
    with replicates():
        with pyro.plate("coefficients", 2):
            used = pyro.sample("used", dist.Bernoulli(0.5))
            beta = pyro.sample("beta", dist.Normal(0.0, 0.1 + used))
        with pyro.plate("n", 6):
            pyro.sample("y", dist.Normal(design @ beta, 0.3), obs=data.get("y"))


QUICK = [Case("nested_plates", nested_plates), Case("imputed", imputed, hide=hide_covariates)]
SLOW = [
    Case("schools", schools),
    Case("funnel", funnel, num_sweeps=400),
    Case("gamma_poisson", gamma_poisson, num_sweeps=400),
    Case("simplex", simplex),
    Case("correlations", correlations),
    Case("ordered_mixture", ordered_mixture, num_sweeps=400),
    Case("masked_rows", masked_rows, hide=hide_rows),
    Case("grouped", grouped),
    Case("sequential", sequential),
    Case("bounded", bounded),
    Case("cells", cells, num_sweeps=400),
    Case("scaled", scaled, simulate=simulate_scaled),
    Case("autoregression", autoregression),
    Case("regression", regression),
    Case("crossed", crossed, loop=True),
    Case("drawn_mixture", drawn_mixture),
    Case("summed_mixture", summed_mixture),
    Case("hidden_markov", hidden_markov),
    Case("separate_states", separate_states),
    Case("counts", counts),
    Case("allocations", allocations),
    Case("spike_and_slab", spike_and_slab),
]
NUM_TESTS = 200
"""An upper bound of the number of ranks tested, for Bonferroni's correction."""


# -- ranks -----------------------------------------------------------------------------------------


def simulate(case: Case) -> tuple[Data, Data]:
    """Latents and what is shown of the data, from the joint."""
    if case.simulate is not None:
        everything = case.simulate()
        latents = {name: v for name, v in everything.items() if name not in "xy"}
    else:
        with torch.no_grad():
            trace = poutine.trace(case.model).get_trace({})
        sites = [
            name for name in trace.stochastic_nodes if not site_is_subsample(trace.nodes[name])
        ]
        everything = {name: trace.nodes[name]["value"] for name in sites}
        latents = everything
    observed = {name: value for name, value in everything.items() if name[0] in "xy"}
    latents = {name: value for name, value in latents.items() if name not in observed}
    shown = case.hide(observed)
    if case.name == "imputed":
        latents["x_unobserved"] = observed["x"]
    return latents, shown


def by_replicate(case: Case, value: Tensor) -> Tensor:
    """A value with the population's axes anywhere, as `(replicates, entries)`."""
    if case.loop:
        return value.reshape(1, -1)
    if case.name == "cells":
        return value.reshape(REPLICATES, -1)
    return value.movedim(value.shape.index(REPLICATES), 0).reshape(REPLICATES, -1)


def log_joint(case: Case, data: Data, latents: Data) -> Tensor:
    """Log-density of latents in their own coordinates and of data, by replicate."""
    conditioned = poutine.condition(case.model, data=latents)
    with torch.no_grad(), pyro.validation_enabled(False):
        trace = poutine.trace(conditioned).get_trace(data)
        trace.compute_log_prob(lambda _, node: not site_is_subsample(node))
    terms = [node["log_prob"] for node in trace.nodes.values() if "log_prob" in node]
    return torch.stack(
        [by_replicate(case, term).sum(-1) for term in terms if case.loop or term.dim()]
    ).sum(0)


def ranks(case: Case, latents: Data, data: Data, samples: Data) -> dict[str, Tensor]:
    """Rank of every truth among the draws, `(replicates,)` by quantity."""
    rows = torch.randperm(len(next(iter(samples.values()))))[:NUM_DRAWS]
    draws = {name: samples[name][rows] for name in latents}
    result = {}
    for name, truth in latents.items():
        below = by_replicate(case, rank_among(draws[name], truth))
        moving = by_replicate(case, (draws[name] != truth).any(0)).any(0)  # not a Cholesky's zeros
        entries = 1 if name.endswith("_unobserved") else MAX_ENTRIES
        for entry in moving.nonzero().flatten().tolist()[:entries]:
            result[f"{name}[{entry}]"] = below[:, entry]
    truth = log_joint(case, data, latents)
    drawn = [log_joint(case, data, {n: u[k] for n, u in draws.items()}) for k in range(NUM_DRAWS)]
    result["log joint"] = rank_among(torch.stack(drawn), truth)
    return result


def rank_among(draws: Tensor, truth: Tensor) -> Tensor:
    """Rank of the truth; among draws that are equal to it, a random one."""
    ties = (draws == truth).sum(0)
    return (draws < truth).sum(0) + (torch.rand(ties.shape) * (ties + 1)).long()


def calibrate(case: Case, num_particles: int, **options: object) -> dict[str, float]:
    """p-values of the hypothesis that ranks are uniform, by quantity."""
    pyro.set_rng_seed(11)
    engine = DCPC(case.model, num_particles=num_particles, **options)
    found: dict[str, list[Tensor]] = {}
    for seed in range(100 if case.loop else 1):
        latents, data = simulate(case)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of convergence, which is what is tested here
            posterior = engine.run(
                data, num_sweeps=case.num_sweeps, evidence=False, seed=seed, progress=False
            )
        for name, rank in ranks(case, latents, data, posterior.resample()).items():
            found.setdefault(name, []).append(rank)
    return {name: uniformity(torch.cat(values)) for name, values in found.items()}


def uniformity(rank: Tensor) -> float:
    """Chi-square p-value of ranks among `NUM_DRAWS` draws."""
    bins = rank * NUM_BINS // (NUM_DRAWS + 1)
    return float(chisquare(torch.bincount(bins, minlength=NUM_BINS).numpy()).pvalue)


def failures(p_values: dict[str, float]) -> dict[str, float]:
    return {name: p for name, p in p_values.items() if p * NUM_TESTS < SIGNIFICANCE}


PARTICLES = {"dcpc": 64, "dcpc-smc": 256}
"""Whole particles that were resampled are related; more of them make relatives rare among draws."""


@dataclass(frozen=True)
class OneSided(Metropolis):
    """Metropolis without the way back: the proposal's asymmetry is left out of the acceptance."""

    def apply(self, proposed):
        after = proposed.unit.evaluate(proposed.proposal.value)
        gained = after.log_density - proposed.before.log_density
        accepted = torch.rand_like(gained).log() < gained
        return Outcome(
            value=torch.where(accepted.unsqueeze(-1), proposed.proposal.value, proposed.value),
            log_weight=None,
            log_joint=proposed.group.over_population(torch.where(accepted, gained, 0.0)),
            statistic=proposed.mean_acceptance(gained),
            num_bad=torch.zeros(()),
        )


class Peeking(Preconditioner):
    """A scale that every particle takes from its own score: it adapts on what it moves."""

    def metric(self, state, score):
        return Diagonal((1.0 + score.square()).rsqrt())


BIASED = {
    "peeking": {"preconditioner": Peeking(), "step_size": 1.5},
    "the paper's": {"algorithm": "dcpc-paper"},
    "uncorrected": {"correction": "none", "step_size": 1.5},
    "one-sided": {"correction": OneSided(), "step_size": 0.5},
}


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_ranks_of_the_default_are_uniform(case):
    assert not failures(calibrate(case, PARTICLES["dcpc"]))


@pytest.mark.parametrize(
    "biased",
    [
        "the paper's",
        "one-sided",
        "peeking",
        pytest.param("uncorrected", marks=pytest.mark.slow),
    ],
)
def test_a_biased_sampler_fails(biased):
    assert failures(calibrate(QUICK[0], PARTICLES["dcpc"], **BIASED[biased]))


def test_jumps_without_their_ratio_fail(monkeypatch):
    """Draws of the mixture that are accepted by the density alone favour its tails."""

    def propose(self, start):
        proposal = original(self, start)
        return replace(proposal, way_back=lambda score: WayBack(torch.zeros(())))

    original = Jump.propose
    monkeypatch.setattr(Jump, "propose", propose)
    assert failures(calibrate(QUICK[0], PARTICLES["dcpc"]))


@pytest.mark.slow
@pytest.mark.parametrize("case", [SLOW[0], SLOW[13]], ids=lambda case: case.name)
def test_ranks_of_compiled_sweeps_are_uniform(case):
    assert not failures(calibrate(case, PARTICLES["dcpc"], compile=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=lambda case: case.name)
def test_ranks_of_the_default_are_uniform_for_many_models(case):
    assert not failures(calibrate(case, PARTICLES["dcpc"]))


@pytest.mark.slow
@pytest.mark.parametrize("case", [*QUICK, *SLOW], ids=lambda case: case.name)
def test_ranks_of_smc_are_uniform(case):
    assert not failures(calibrate(case, PARTICLES["dcpc-smc"], algorithm="dcpc-smc"))
