"""What a mask takes out has no influence on values, scores or parameter gradients."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.mcmc.util import initialize_model

from dcpc import DCPC
from dcpc.errors import DataError, EvidenceError

NAN = math.nan


def by_handler(fn, mask, x):
    with poutine.mask(mask=mask):
        pyro.sample("x", fn, obs=x)


def by_distribution(fn, mask, x):
    pyro.sample("x", fn.mask(mask), obs=x)


def by_obs_mask(fn, mask, x):
    pyro.sample("x", fn, obs=x, obs_mask=mask)


LIKELIHOODS = {
    "normal": (lambda p: dist.Normal(p, 1.0), torch.tensor([0.3, NAN, -1.0, math.inf])),
    "gamma": (lambda p: dist.Gamma(p.exp(), 1.0), torch.tensor([0.3, NAN, 1.0, -1.0])),
    "bernoulli": (lambda p: dist.Bernoulli(logits=p), torch.tensor([0.0, NAN, 1.0, 7.0])),
    "poisson": (lambda p: dist.Poisson(p.exp()), torch.tensor([3.0, NAN, 1.0, -2.0])),
    "binomial": (lambda p: dist.Binomial(5, logits=p), torch.tensor([3.0, NAN, 1.0, 9.0])),
    "categorical": (
        lambda p: dist.Categorical(logits=torch.stack([p, -p, 0 * p], -1)),
        torch.tensor([0, -1, 2, 17]),
    ),
    "beta": (lambda p: dist.Beta(p.exp(), 2.0), torch.tensor([0.3, NAN, 0.9, 1.5])),
    "uniform": (lambda p: dist.Uniform(p - 3.0, p + 3.0), torch.tensor([0.3, NAN, 0.1, 99.0])),
    "vector": (
        lambda p: dist.Normal(p[..., None].expand(4, 2), 1.0).to_event(1),
        torch.tensor([[0.3, 1.0], [NAN, 1.0], [-1.0, 0.0], [NAN, NAN]]),
    ),
    "multivariate": (
        lambda p: dist.MultivariateNormal(p[..., None].expand(4, 2), torch.eye(2)),
        torch.tensor([[0.3, 1.0], [NAN, 1.0], [-1.0, 0.0], [NAN, NAN]]),
    ),
    "dirichlet": (
        lambda p: dist.Dirichlet(torch.stack([p.exp(), 1 + 0 * p], -1)),
        torch.tensor([[0.3, 0.7], [NAN, 1.0], [0.5, 0.5], [2.0, -1.0]]),
    ),
}  # fmt: skip
SEEN = torch.tensor([True, False, True, False])


def model_of(likelihood, how):
    def model(x, seen):
        w = pyro.param("w", torch.tensor(0.7))
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(x)):
            how(likelihood((w * m).expand(len(x))), seen, x)

    return model


@pytest.mark.parametrize("how", [by_handler, by_distribution], ids=lambda how: how.__name__)
@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("backend", ["graph", "vmap"])
def test_masked_entries_have_no_influence(name, how, backend):
    likelihood, x = LIKELIHOODS[name]
    model = model_of(likelihood, how)
    results = []
    for data, seen in ((x, SEEN), (x[SEEN].repeat_interleave(2, 0), SEEN)):
        pyro.clear_param_store()
        dcpc = DCPC(model, num_particles=6, backend=backend)
        state = dcpc.init(data, seen)
        state.latents["m"].copy_(torch.linspace(-1, 1, 6))
        division = dcpc.division(data, seen)
        (group,) = division.groups
        evaluation = group.evaluate(group.pack(state.latents), state.latents, (data, seen))
        loss = dcpc.loss(state, data, seen)
        loss.backward()
        gradient = pyro.get_param_store()._params["w"].grad
        results.append((evaluation.log_density, evaluation.score, loss.detach(), gradient))
    for with_bad, with_good in zip(*results, strict=True):
        assert with_bad.isfinite().all()
        torch.testing.assert_close(with_bad, with_good)


@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-smc", "dcpc-paper", "pgd"])
@pytest.mark.parametrize("how", [by_handler, by_obs_mask], ids=lambda how: how.__name__)
def test_every_algorithm_runs_on_data_with_gaps(algorithm, how):
    likelihood, x = LIKELIHOODS["normal"]
    dcpc = DCPC(model_of(likelihood, how), num_particles=20, algorithm=algorithm)
    posterior = dcpc.run(x, SEEN, num_sweeps=20, seed=0, progress=False)
    assert all(z.isfinite().all() for z in posterior.samples.values())
    assert posterior.num_bad == 0


def test_bad_entries_that_are_not_masked_out_are_still_refused():
    likelihood, x = LIKELIHOODS["normal"]
    dcpc = DCPC(model_of(likelihood, by_handler), num_particles=4)
    with pytest.raises(DataError, match="site 'x' has 1 NaN among 4"):
        dcpc.init(x, torch.tensor([True, True, False, False]))


def with_gaps(y, seen):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=seen)


@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-smc", "pgd"])
def test_entries_without_a_gap_stay_where_they_were_drawn(algorithm):
    y = torch.tensor([2.0, 2.5, NAN, NAN])
    dcpc = DCPC(with_gaps, num_particles=8, algorithm=algorithm, resample_threshold=0.0)
    for seen in (
        torch.tensor([True, True, False, False]),
        torch.tensor([True, False, False, False]),
    ):
        data = torch.where(seen, y, NAN)
        state = dcpc.init(data, seen)
        drawn = state.latents["y_unobserved"].clone()
        for _ in range(5):
            state, _ = dcpc.sweep(state, data, seen)
        moved = state.latents["y_unobserved"] != drawn
        assert not moved[:, seen].any()
        assert moved[:, ~seen].any(0).all()


@pytest.mark.parametrize("backend", ["graph", "vmap"])
def test_a_mask_of_the_model_that_changes_in_place_is_followed(backend):
    y, seen = torch.tensor([2.0, 2.5, 1.0, 0.0]), torch.tensor([True, True, False, False])

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 4):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=seen)

    dcpc = DCPC(model, num_particles=8, backend=backend, resample_threshold=0.0)
    state = dcpc.init()
    for _ in range(2):
        drawn = state.latents["y_unobserved"].clone()
        for _ in range(5):
            state, _ = dcpc.sweep(state)
        moved = state.latents["y_unobserved"] != drawn
        assert not moved[:, seen].any()
        assert moved[:, ~seen].any(0).all()
        seen.copy_(~seen)


@pytest.mark.parametrize("is_population", [True, False])
def test_entries_without_a_gap_are_not_adapted_to(is_population):
    """The conditional of a gap is N(0, 1): its score's second moment is one, not one half."""
    seen = torch.tensor([True, False]).repeat(500)

    def model(y, seen):
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y, obs_mask=seen)
        if not is_population:
            pyro.sample("z", dist.Normal(0.0, 1.0))

    y = torch.where(seen, 1.0, NAN)
    dcpc = DCPC(model, num_particles=4)
    assert bool(dcpc.division(y, seen).population) == is_population
    state = dcpc.init(y, seen)
    for _ in range(50):
        state, info = dcpc.sweep(state, y, seen)
    learned = state.adaptation["y_unobserved"].preconditioner
    moment = (learned["moment"] / learned["mass"]).flatten()
    if is_population:  # shared by the cells
        assert moment.item() == pytest.approx(1.0, abs=0.1)
    else:
        assert moment[~seen].mean() == pytest.approx(1.0, abs=0.1)
        assert (moment[seen] == 0).all()
    accepted = float(info.statistic["y_unobserved"])
    assert 0.3 < accepted < 0.85  # the target is .574; half of it would be entries that stay


def test_a_scaled_site_with_gaps_keeps_its_step_size():
    """It starts from a reference, whose score at what is masked out is none of the target's."""
    y, seen = torch.tensor([0.3, -1.0, 2.0, 0.7]), torch.tensor([True, True, True, False])

    def model():
        with pyro.plate("n", 4), poutine.scale(scale=2.0):
            value = pyro.sample("y", dist.Normal(0.0, 1.0), obs=y, obs_mask=seen)
        pyro.sample("x", dist.Normal(value.sum(), 1.0), obs=torch.tensor(3.0))

    posterior = DCPC(model, num_particles=400).run(num_sweeps=0, seed=0, progress=False)
    learned = posterior.state.adaptation["y_unobserved"].step_size
    assert learned["log_average"].exp().item() > 0.05


def test_gaps_that_a_later_site_looks_at_are_moved():
    """An autoregression: the gap is a latent of the joint, and its posterior is Gaussian."""

    def model(y, seen):
        with pyro.plate("n", 3):
            value = pyro.sample("y", dist.Normal(0.0, 1.0), obs=y, obs_mask=seen)
        pyro.sample("last", dist.Normal(value[1], 0.5), obs=torch.tensor(2.0))

    y, seen = torch.tensor([0.3, NAN, 0.1]), torch.tensor([True, False, True])
    posterior = DCPC(model, num_particles=2000).run(y, seen, num_sweeps=100, seed=0, progress=False)
    gap = posterior.samples["y_unobserved"][:, 1]
    assert gap.mean() == pytest.approx(1.6, abs=0.05)
    assert gap.std() == pytest.approx(0.2**0.5, rel=0.06)
    exact = (
        dist.Normal(0.0, 1.25**0.5).log_prob(torch.tensor(2.0))
        + dist.Normal(0.0, 1.0).log_prob(torch.tensor([0.3, 0.1])).sum()
    )
    assert abs(posterior.log_evidence - exact) < 4 * posterior.log_evidence_se


def test_a_masked_prior_of_a_latent_in_use_is_flat_and_has_no_evidence():
    """Where the prior alone is masked out z | x ~ N(x, 1); where both are, z is nowhere at all."""
    keep = torch.tensor([True, False, True, False, False])
    seen = torch.tensor([True, True, True, True, False])

    def model(x, keep, seen):
        with pyro.plate("n", 5):
            with poutine.mask(mask=keep):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([1.0, 2.0, -1.0, -2.0, 50.0])
    dcpc = DCPC(model, num_particles=2000)
    posterior = dcpc.run(x, keep, seen, num_sweeps=100, seed=0, progress=False)
    z = posterior.samples["z"][:, seen]
    kept, data = keep[seen], x[seen]
    torch.testing.assert_close(z.mean(0), torch.where(kept, data / 2, data), atol=0.08, rtol=0)
    torch.testing.assert_close(z.std(0), torch.where(kept, 0.5**0.5, 1.0), atol=0, rtol=0.06)
    assert posterior.samples["z"][:, ~seen].abs().max() < 10
    activity = dcpc.division(x, keep, seen).activity((x, keep, seen))
    assert activity.latents["z"].tolist() == seen.tolist()
    with pytest.raises(EvidenceError, match="masks or scales it"):
        _ = posterior.log_evidence


@pytest.mark.parametrize("scale", [3.0, torch.tensor([0.5, 2.0, 1.0])])
def test_scaled_latents_have_no_evidence_and_scaled_data_have(scale):
    def scaled_prior(x):
        with pyro.plate("n", 3), poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(z), obs=x)

    def scaled_data(x):
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            with poutine.scale(scale=scale):
                pyro.sample("x", dist.Poisson(z), obs=x)

    x = torch.tensor([1.0, 2.0, 0.0])
    with pytest.raises(EvidenceError, match=r"\['z'\]"):
        DCPC(scaled_prior, num_particles=10).anneal(x)
    assert DCPC(scaled_data, num_particles=10).anneal(x).log_evidence.isfinite().all()


def pyro_potential(model, args, unconstrained):
    _, potential, transforms, _ = initialize_model(model, model_args=args)
    return float(potential({name: unconstrained[name] for name in transforms}))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scale", [1.0, 0.2])
@pytest.mark.parametrize("mask", [True, False, torch.tensor([True, False, True])])
def test_the_joint_is_minus_the_potential_of_pyro_under_scales_and_masks(scale, mask):
    def model(x):
        with poutine.scale(scale=scale):
            top = pyro.sample("top", dist.HalfCauchy(2.0))
            with pyro.plate("n", 3), poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Gamma(top + 1, 1.0))
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.tensor([1.0, 2.0, 0.5])
    dcpc = DCPC(model, num_particles=4)
    u = {"top": torch.randn(4), "z": torch.randn(4, 3)}
    joint = dcpc.bind(x).density.log_joint(u)
    for k in range(4):
        expected = -pyro_potential(model, (x,), {name: value[k] for name, value in u.items()})
        assert joint[k].sum().item() == pytest.approx(expected, rel=1e-10)


def test_the_table_says_which_values_are_masked_out():
    def model(y):
        with pyro.plate("d", 4), poutine.mask(mask=torch.tensor([True, False, True, False])):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    posterior = DCPC(model, num_particles=100).run(
        torch.arange(4.0), num_sweeps=10, seed=0, progress=False
    )
    assert posterior.num_masked == {"z": 2}
    assert "2 of the values of z are masked out" in posterior.format_summary()
