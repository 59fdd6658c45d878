"""Models and data as users bring them: what runs is right, and what does not is named."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from torch import nn
from torch.nn import functional

from dcpc import DCPC
from dcpc.errors import CertificationError, DataError, ModelError, OptionError

X = torch.tensor([1.0, 2.0, 4.0])


def gaussian(x, scale=1.0, size=3):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("n", size):
        pyro.sample("x", dist.Normal(m, scale), obs=x)


def loss_of(state, x, scale=1.0):
    """`- mean_k log N(m_k | 0, 1) prod_i N(x_i | m_k, scale)`, written out in double precision."""
    m, x = state.latents["m"].double(), torch.as_tensor(np.asarray(x)).double()
    square = (x[None] - m[:, None]).square().sum(1) / scale**2
    constant = len(x) * math.log(scale) + (len(x) + 1) * 0.5 * math.log(2 * math.pi)
    return float((0.5 * m.square() + 0.5 * square).mean()) + constant


@pytest.mark.parametrize(
    "x",
    [
        X.numpy(),
        X.double(),
        X.double().numpy(),
        pd.Series(X.numpy()),
        X.tolist(),
        np.array([1, 2, 4]),
        torch.tensor([1, 2, 4]),
    ],
    ids=["array", "double", "double array", "series", "list", "integer array", "integers"],
)
def test_data_may_be_of_any_kind_that_a_tensor_is_made_from(x):
    dcpc = DCPC(gaussian, num_particles=6)
    state = dcpc.init(x)
    assert state.latents["m"].dtype == torch.get_default_dtype()
    assert dcpc.loss(state, x).item() == pytest.approx(loss_of(state, x), rel=1e-5)


def number_from_a_maximum(x, group):
    with pyro.plate("groups", int(group.max()) + 1):
        pyro.sample("unused", dist.Normal(0.0, 1.0))
    gaussian(x)


def branch_on_a_mean(x, group):
    gaussian(x if x.mean() > 0 else -x)


def one_hot_of_data(x, group):
    gaussian((functional.one_hot(group).float() @ torch.ones(2)) * x)


def unique_values(x, group):
    gaussian(x, scale=float(len(torch.unique(group))) / 2)


def selection_by_mask(x, group):
    gaussian(torch.cat([x[x < 2], x[x >= 2]]))


def loop_over_data(x, group):
    gaussian(torch.stack([value for value in x]))


def formatted_number(x, group):
    assert f"{x.sum().item():.1f}" != "nan"
    gaussian(x, size=x.shape[0])


READERS = [
    number_from_a_maximum,
    branch_on_a_mean,
    one_hot_of_data,
    unique_values,
    selection_by_mask,
    loop_over_data,
    formatted_number,
]


@pytest.mark.parametrize("model", READERS, ids=lambda model: model.__name__)
def test_python_on_data_is_captured(model):
    group = torch.tensor([0, 0, 1])
    dcpc = DCPC(model, num_particles=6)
    division = dcpc.division(X, group)
    assert division.program.name == "graph"
    state = dcpc.init(X, group)
    expected = loss_of(state, X)
    if "unused" in state.latents:
        unused = state.latents["unused"].double()
        expected += float((0.5 * unused.square()).sum(1).mean()) + math.log(2 * math.pi)
    assert dcpc.loss(state, X, group).item() == pytest.approx(expected, rel=1e-5)


def indices_of_a_plate(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 3) as index:
        pyro.sample("x", dist.Normal(m, 1.0), obs=x[index])


def scattered_into_zeros(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    row = x.new_zeros(3).scatter_(0, torch.tensor([0, 2]), m.expand(2))
    with pyro.plate("n", 3):
        pyro.sample("x", dist.Normal(row.scatter_(0, torch.tensor([1]), m.reshape(1)), 1.0), obs=x)


def numbers_without_an_axis(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 3):
        pyro.sample("x", dist.Normal(m.squeeze(-1).flip(-1).squeeze(), 1.0), obs=x)


@pytest.mark.parametrize(
    "model",
    [indices_of_a_plate, numbers_without_an_axis, scattered_into_zeros],
    ids=lambda model: model.__name__,
)
def test_idioms_without_a_batching_rule_are_captured(model):
    calls = []

    def counted(x):
        calls.append(None)
        model(x)

    dcpc = DCPC(counted, num_particles=500)
    assert dcpc.division(X).program.name == "graph"
    state = dcpc.init(X)
    assert len(calls) < 100  # the prior is not drawn from particle by particle
    assert dcpc.loss(state, X).item() == pytest.approx(loss_of(state, X), rel=1e-5)


def test_a_matrix_without_a_cholesky_factor_has_density_zero():
    """`[[1, r], [r, 1]]` has a factor where |r| < 1, which `Uniform(-1.05, 1.05)` exceeds."""
    y = torch.tensor([1.0, 0.8])

    def model(y):
        r = pyro.sample("r", dist.Uniform(-1.05, 1.05))
        covariance = torch.eye(2) + r * (1 - torch.eye(2))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), covariance), obs=y)

    r = (torch.arange(4000, dtype=torch.float64) + 0.5) / 2000 - 1
    quadratic = (1.0**2 + 0.8**2 - 2 * r * 0.8) / (1 - r**2)
    weight = (-0.5 * quadratic - 0.5 * torch.log1p(-(r**2))).softmax(0)
    posterior = DCPC(model, num_particles=1000).run(y, num_sweeps=60, seed=0, progress=False)
    assert posterior.mean()["r"].item() == pytest.approx(float(weight @ r), abs=0.02)
    assert float(posterior.samples["r"].abs().max()) < 1


def test_a_mask_counts_as_it_is_at_the_end_as_in_a_trace_of_pyro():
    """`z | x ~ N(sum(x) / 4, 1 / 4)`: the mask that hides x_0 is lifted after the statement."""
    seen = torch.tensor([False, True, True])

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        mask = seen.clone()
        with pyro.plate("n", 3), poutine.mask(mask=mask):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        mask |= True

    dcpc = DCPC(model, num_particles=2000)
    assert dcpc.division(X).program.name == "graph"
    posterior = dcpc.run(X, num_sweeps=40, seed=0, progress=False)
    assert posterior.mean()["z"] == pytest.approx(7 / 4, abs=0.03)
    assert posterior.std()["z"] == pytest.approx(0.5, rel=0.03)


def branch(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(m if m > 0 else -m, 1.0), obs=x[0])


def number(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(float(m), 1.0), obs=x[0])


def array(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(torch.as_tensor(m.numpy()), 1.0), obs=x[0])


@pytest.mark.parametrize("model", [branch, number, array], ids=lambda model: model.__name__)
def test_the_same_on_a_latent_is_refused_with_its_line(model):
    with pytest.raises(ModelError, match=r"test_what_users_bring.*latent sites are \['m'\]"):
        DCPC(model, num_particles=4).init(X)


def test_mixed_precision_moves_every_latent_in_its_own():
    def model(x):
        m = pyro.sample("m", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
        s = pyro.sample("s", dist.HalfNormal(1.0))
        with pyro.plate("n", 3):
            pyro.sample("x", dist.Normal(m.sum(), s), obs=x)

    for algorithm in ("dcpc", "dcpc-smc", "dcpc-paper"):
        posterior = DCPC(model, num_particles=8, algorithm=algorithm).run(
            X.double(), num_sweeps=6, seed=0, progress=False
        )
        assert posterior.samples["m"].dtype == torch.float64
        assert posterior.samples["s"].dtype == torch.float32


def test_a_plate_without_a_size_takes_that_of_its_axis():
    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    division = DCPC(model, num_particles=4).division(X)
    assert [(plate.name, plate.size) for plate in division.population] == [("data", 3)]


def test_delta_and_deterministic_sites_are_values_of_the_posterior():
    def model(x):
        with pyro.plate("n", 3):
            m = pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            d = pyro.sample("delta", dist.Delta(2 * m, event_dim=1))
            total = pyro.deterministic("total", d.sum(-1))
            pyro.deterministic("pair", d.exp(), event_dim=1)
            pyro.sample("x", dist.Normal(total, 1.0), obs=x)
        pyro.deterministic("everything", d.sum())

    posterior = DCPC(model, num_particles=20).run(X, num_sweeps=8, seed=0, progress=False)
    z = posterior.samples
    torch.testing.assert_close(z["delta"], 2 * z["m"])
    torch.testing.assert_close(z["total"], 2 * z["m"].sum(-1))
    torch.testing.assert_close(z["pair"], (2 * z["m"]).exp())
    # Particles have weights by cell, which a sum over cells has not.
    assert "everything" not in z
    assert posterior.mean()["total"].shape == (3,)


def test_a_reparametrised_site_keeps_its_name_in_the_posterior():
    @poutine.reparam(config={"x": LocScaleReparam(0.0)})
    def model(y):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        x = pyro.sample("x", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    samples = DCPC(model, num_particles=9).run(X[0], num_sweeps=4, progress=False).samples
    torch.testing.assert_close(samples["x"], samples["scale"] * samples["x_decentered"])


def test_a_delta_with_a_density_of_its_own_is_refused():
    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        d = pyro.sample("d", dist.Delta(m, log_density=m))
        pyro.sample("x", dist.Normal(d, 1.0), obs=x)

    with pytest.raises(ModelError, match=r"site 'd' is a latent Delta with a log_density.*factor"):
        DCPC(model, num_particles=4).init(X[0])


def test_an_angle_stays_on_the_circle_and_its_posterior_is_right():
    """VonMises(mu, k) prior and n observations of concentration 4: the resultant is the posterior.

    The prior's mean is near the cut at pi, so that half of the mass lies beyond it.
    """
    prior, data = torch.tensor(3.1), torch.tensor([-3.0, 3.0, -2.9, 3.1])

    def model(x):
        a = pyro.sample("a", dist.VonMises(prior, 2.0))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.VonMises(a, 4.0), obs=x)

    angle = DCPC(model, num_particles=4000).run(data, num_sweeps=60, seed=0, progress=False)
    a = angle.samples["a"]
    assert a.abs().max() <= math.pi + 1e-6
    s = 2 * prior.sin() + 4 * data.sin().sum()
    c = 2 * prior.cos() + 4 * data.cos().sum()
    off = torch.atan2((a - torch.atan2(s, c)).sin().mean(), (a - torch.atan2(s, c)).cos().mean())
    concentration = torch.hypot(s, c).double()
    length = torch.special.i1e(concentration) / torch.special.i0e(concentration)
    assert abs(off) < 0.02
    assert torch.hypot(a.sin().mean(), a.cos().mean()) == pytest.approx(length.item(), abs=0.01)


def subsampled(x, with_global=True):
    m = pyro.sample("m", dist.Normal(0.0, 1.0)) if with_global else 0.0
    with pyro.plate("n", 100, subsample=torch.arange(3)):
        z = pyro.sample("z", dist.LogNormal(m, 1.0))
        pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)


def test_local_latents_of_a_subsample_next_to_global_ones_are_refused_by_exact_algorithms():
    for algorithm in ("dcpc", "dcpc-smc"):
        dcpc = DCPC(subsampled, num_particles=4, algorithm=algorithm)
        with pytest.raises(OptionError, match=r"\['z', 'x'\] are in a plate .*\['m'\]"):
            dcpc.init(X)
    DCPC(subsampled, num_particles=4, algorithm="pgd").init(X)


def test_local_latents_of_a_subsample_alone_have_their_own_posterior():
    """log z | x ~ N(x / 2, 1 / 2) for every datum, whatever it is scaled by for learning."""
    dcpc = DCPC(lambda x: subsampled(x, with_global=False), num_particles=2000)
    posterior = dcpc.run(X, num_sweeps=60, seed=0, progress=False)
    logs = posterior.samples["z"].log()
    torch.testing.assert_close(logs.mean(0), X / 2, atol=0.07, rtol=0)
    torch.testing.assert_close(logs.std(0), torch.full((3,), 0.5**0.5), atol=0, rtol=0.06)
    exact = dist.Normal(0.0, 2**0.5).log_prob(X)
    assert ((posterior.log_evidence - exact).abs() < 4 * posterior.log_evidence_se).all()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor(math.nan), r"initial_values\['s'\] has NaN"),
        (torch.tensor(-1.0), r"initial_values\['s'\] lies outside the support"),
        (torch.tensor(0.0), r"initial_values\['s'\] lies on the edge"),
        (torch.ones(2), r"initial_values\['s'\] has shape \(2,\).*shape \(\)"),
        (None, r"initial_values\['s'\] must be a tensor or a number, got None"),
    ],
    ids=["nan", "outside", "edge", "shape", "none"],
)
def test_bad_initial_values_name_themselves(value, message):
    def model(x):
        s = pyro.sample("s", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, s), obs=x)

    with pytest.raises(OptionError, match=message):
        DCPC(model, num_particles=4).run(
            X[0], num_sweeps=2, initial_values={"s": value}, progress=False
        )


def test_arguments_of_other_samplers_get_a_hint():
    with pytest.raises(OptionError, match=r"DCPC has no argument 'num_chains': .*num_particles="):
        DCPC(gaussian, num_particles=4, num_chains=4)
    with pytest.raises(OptionError, match=r"DCPC.run has no argument 'warmup_steps'.*num_warmup="):
        DCPC(gaussian, num_particles=4).run(X, warmup_steps=10)
    with pytest.raises(OptionError, match=r"DCPC has no argument 'colour'$"):
        DCPC(gaussian, num_particles=4, colour="red")


def test_an_argument_of_the_model_may_have_the_name_of_a_samplers():
    dcpc = DCPC(lambda x, draws: gaussian(x, scale=draws), num_particles=4)
    posterior = dcpc.run(X, draws=2.0, num_sweeps=2, seed=0, progress=False)
    assert set(posterior.samples) == {"m"}


def test_a_nan_covariate_behind_a_mask_is_an_error_that_names_the_site():
    """Selecting hides the value, and not its gradient: the score would be zero times NaN."""
    covariate = torch.tensor([1.0, math.nan, 2.0])
    missing = covariate.isnan()

    def model(x):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        loc = torch.where(missing, 0.0, slope * covariate)
        with pyro.plate("n", 3), poutine.mask(mask=~missing):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    with pytest.raises(CertificationError, match=r"unit 'slope': its score .* covariate"):
        DCPC(model, num_particles=4).init(X)


def test_scores_that_turn_bad_on_the_way_are_counted_by_site():
    """sqrt(relu(z)) has an infinite derivative at zero, where the density is finite."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.where(z > 0, z.sqrt(), z * 0) + w, 1.0), obs=x)

    dcpc = DCPC(model, num_particles=50, certify=False)
    state = dcpc.init(X[0])
    negative = int((state.latents["z"] < 0).sum())
    _, info = dcpc.sweep(state, X[0])
    counts = {
        name: int(count)
        for group, per_unit in info.num_bad_scores.items()
        for name, count in zip(group.split(","), per_unit, strict=True)
    }
    assert counts == {"z": negative, "w": 0}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(1, 3)
        self.out = nn.Linear(3, 1)

    def forward(self, x):
        with pyro.plate("steps", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        hidden, _ = self.cell(z.reshape(-1, 1, 1))
        pyro.sample("x", dist.Normal(self.out(hidden).reshape(-1), 1.0).to_event(1), obs=x)


def ordered_logistic(x):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 3):
        cutpoints = torch.tensor([-1.0, 1.0])
        pyro.sample("x", dist.OrderedLogistic(slope * X, cutpoints), obs=torch.tensor([0, 1, 2]))


def multinomial(x):
    logits = pyro.sample("logits", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    counts = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0]])
    with pyro.plate("n", 2):
        pyro.sample("x", dist.Multinomial(3, logits=logits), obs=counts)


def discrete_hmm(x):
    locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    hidden = torch.zeros(2)
    transition = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()
    observation = dist.Normal(locs, 1.0)
    pyro.sample("x", dist.DiscreteHMM(hidden, transition, observation, duration=3), obs=x)


@pytest.mark.parametrize(
    "make",
    [lambda: ordered_logistic, lambda: multinomial, lambda: discrete_hmm, Recurrent],
    ids=["ordered logistic", "multinomial", "hidden Markov model", "recurrent network"],
)
def test_likelihoods_that_torch_cannot_vectorise_run_on_a_fast_backend(make):
    division = DCPC(make(), num_particles=4).division(X)  # also certifies
    assert division.program.name == "graph"


def test_a_support_with_a_latent_in_it_is_no_fault_of_the_data():
    """theta | x is Pareto: density 3.5 / 4 (theta / 4)^-4.5 from the largest observation on."""

    def model(x):
        theta = pyro.sample("theta", dist.Pareto(0.1, 0.5))
        with pyro.plate("n", 3):
            pyro.sample("x", dist.Uniform(0.0, theta), obs=x)

    dcpc = DCPC(model, num_particles=2000)
    for seed in range(6):  # the prior's draws of theta lie on both sides of the data
        theta = dcpc.run(X, num_sweeps=20, seed=seed, progress=False).samples["theta"]
        assert theta.min() >= 4.0
    assert theta.median() == pytest.approx(4 * 2 ** (1 / 3.5), rel=0.03)


def test_a_fixed_support_that_data_lie_outside_of_still_is_one():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Uniform(0.0, torch.tensor(3.0)), obs=x + 0 * z)

    with pytest.raises(DataError, match=r"site 'x' lies outside the support"):
        DCPC(model, num_particles=4).init(X[2])
