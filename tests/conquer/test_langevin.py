"""Moves against torch's Normal densities, and MALA on a Gaussian."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from dcpc import DCPC
from dcpc.conquer import MOVES, Dense, Diagonal, Gradient, Langevin
from dcpc.errors import OptionError
from dcpc.sweep import SweepState

pytestmark = pytest.mark.usefixtures("float64")

K, PLATE, N, D = 6, 4, 2, 3


def setting():
    torch.manual_seed(1)
    value, score, other = torch.randn(3, K, PLATE, N, D).unbind(0)
    return value, score, other, torch.tensor([0.3, 0.05])


def diagonal():
    return Diagonal(torch.rand(PLATE, N, D) + 0.5)


def dense():
    return Dense(torch.randn(PLATE, N, D, D) + 2 * torch.eye(D))


def unused(value):
    raise AssertionError("a single step needs no score but the first")


def covariance(metric) -> torch.Tensor:
    """P as a full matrix, `(*plates, n, d, d)`."""
    if isinstance(metric, Diagonal):
        return metric.scale.square().diag_embed()
    return metric.factor @ metric.factor.mT


@pytest.mark.parametrize("make", [diagonal, dense])
def test_metric_is_a_factor_of_its_preconditioner(make):
    torch.manual_seed(0)
    metric, score = make(), torch.randn(K, PLATE, N, D)
    p = covariance(metric)
    torch.testing.assert_close(
        metric.colour(metric.whiten_score(score)), (p @ score[..., None])[..., 0]
    )
    torch.testing.assert_close(metric.half_log_det(), 0.5 * torch.logdet(p))


@pytest.mark.parametrize("make", [diagonal, dense])
def test_langevin_densities_are_multivariate_normal_both_ways(make):
    value, score, other, eta = setting()
    metric = make()
    p = covariance(metric)
    step = eta[:, None]

    def density(start, start_score, end):
        mean = start + step * (p @ start_score[..., None])[..., 0]
        return MultivariateNormal(mean, 2 * eta[:, None, None] * p).log_prob(end)

    proposal = Langevin().propose(value, score, eta, metric, unused)
    torch.testing.assert_close(proposal.log_forward, density(value, score, proposal.value))
    backward = Langevin().log_backward(proposal, other, eta, metric)
    torch.testing.assert_close(backward, density(proposal.value, other, value))


def test_langevin_with_a_diagonal_metric_is_a_product_of_normals():
    value, score, _, eta = setting()
    metric = diagonal()
    proposal = Langevin().propose(value, score, eta, metric, unused)
    mean = value + eta[:, None] * metric.scale**2 * score
    scale = (2 * eta[:, None]).sqrt() * metric.scale
    expected = Normal(mean, scale).log_prob(proposal.value).sum(-1)
    torch.testing.assert_close(proposal.log_forward, expected)


@pytest.mark.parametrize("make", [diagonal, dense])
def test_langevin_proposals_have_the_mean_and_covariance_of_the_formula(make):
    torch.manual_seed(2)
    metric = make()
    count = 40_000
    value = torch.randn(PLATE, N, D)
    score = torch.randn(PLATE, N, D)
    eta = torch.tensor([0.3, 0.05])
    draws = (
        Langevin()
        .propose(
            value.expand(count, PLATE, N, D),
            score.expand(count, PLATE, N, D),
            eta,
            metric,
            unused,
        )
        .value
    )
    p = covariance(metric)
    mean = value + eta[:, None] * (p @ score[..., None])[..., 0]
    expected = 2 * eta[:, None, None] * p
    sd = expected.diagonal(dim1=-2, dim2=-1).sqrt()
    assert float(((draws.mean(0) - mean) / sd).abs().max()) < 5 / count**0.5
    centred = (draws - mean) / sd
    correlation = torch.einsum("k...i,k...j->...ij", centred, centred) / count
    target = expected / sd[..., None] / sd[..., None, :]
    assert float((correlation - target).abs().max()) < 5 * (2 / count) ** 0.5


@pytest.mark.parametrize("make", [diagonal, dense])
def test_gradient_step_is_the_langevin_mean_without_noise_or_density(make):
    value, score, other, eta = setting()
    metric = make()
    proposal = Gradient().propose(value, score, eta, metric, unused)
    expected = value + eta[:, None] * (covariance(metric) @ score[..., None])[..., 0]
    torch.testing.assert_close(proposal.value, expected)
    assert torch.equal(proposal.log_forward, torch.zeros(K, PLATE, N))
    assert torch.equal(
        Gradient().log_backward(proposal, other, eta, metric), torch.zeros(K, PLATE, N)
    )


@pytest.mark.parametrize("make", [diagonal, dense])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_leapfrog_steps_follow_hamiltons_equations(make, steps):
    """Textbook leapfrog in position and momentum, with mass matrix P^-1 and eps^2 = 2 eta."""
    value, _, _, eta = setting()
    metric = make()

    def score_at(u):
        return 1 - 2 * u.tanh()

    def log_density(u):
        return (u - 2 * u.cosh().log()).sum(-1)

    torch.manual_seed(5)
    move = Langevin(leapfrog_steps=steps)
    proposal = move.propose(value, score_at(value), eta, metric, score_at)
    torch.manual_seed(5)
    p, eps = covariance(metric), (2 * eta)[:, None].sqrt()
    whitened = torch.randn_like(value)
    factor = metric.factor if hasattr(metric, "factor") else metric.scale.diag_embed()
    momentum = torch.linalg.solve(factor.mT, whitened[..., None])[..., 0]

    def kinetic(m):
        return 0.5 * (m * (p @ m[..., None])[..., 0]).sum(-1)

    u, start = value, kinetic(momentum)
    for _ in range(steps):
        momentum = momentum + eps / 2 * score_at(u)
        u = u + eps * (p @ momentum[..., None])[..., 0]
        momentum = momentum + eps / 2 * score_at(u)
    torch.testing.assert_close(proposal.value, u)
    backward = move.log_backward(proposal, score_at(u), eta, metric)
    torch.testing.assert_close(backward - proposal.log_forward, start - kinetic(momentum))
    assert float((log_density(u) - log_density(value)).abs().max()) > 0.1  # it went somewhere


@pytest.mark.parametrize("steps", [0, 2.5, True])
def test_no_number_of_leapfrog_steps_is_an_error(steps):
    message = f"leapfrog_steps must be an integer of at least 1, got {steps}"
    with pytest.raises(OptionError, match=message):
        Langevin(leapfrog_steps=steps)


def test_the_length_of_several_steps_varies_by_a_fifth_and_that_of_one_is_kept():
    torch.manual_seed(0)
    eta = torch.full((10_000,), 0.3)
    assert torch.equal(Langevin().jitter(eta), eta)
    ratio = (Langevin(4).jitter(eta) / eta).sqrt()
    assert 0.8 <= float(ratio.min()) < 0.801
    assert 1.199 < float(ratio.max()) <= 1.2
    assert float(ratio.mean()) == pytest.approx(1.0, abs=4 * 0.4 / math.sqrt(12 * 10_000))


def test_four_steps_of_a_quarter_period_do_not_return_to_where_they_started():
    # On a standard normal, a leapfrog step of length sqrt(2) is a quarter turn of phase space.
    torch.manual_seed(0)

    def model():
        with pyro.plate("copies", 4000):
            z = pyro.sample("z", dist.Normal(torch.zeros(4000), math.sqrt(2.0)))
            pyro.sample("x", dist.Normal(z, math.sqrt(2.0)), obs=torch.zeros(4000))

    engine = DCPC(
        model, num_particles=1, move=Langevin(4), step_size=1.0, preconditioner="identity"
    )
    state = engine.init()
    start = SweepState({"z": torch.full((1, 4000), 2.0)}, state.log_weight, state.log_joint)
    state, _ = engine.sweep(start, adapt=False)
    for _ in range(20):
        state, _ = engine.sweep(state, adapt=False)
    z = state.latents["z"]
    assert abs(float(z.mean())) < 4 / math.sqrt(4000)
    assert float(z.var()) == pytest.approx(1.0, abs=4 * math.sqrt(2 / 4000))


def test_only_single_steps_have_a_density():
    assert Langevin().has_density
    assert not Langevin(leapfrog_steps=2).has_density
    assert not Gradient().has_density


def test_moves_declare_whether_they_are_reversible():
    assert {name: move.is_reversible for name, move in MOVES.items()} == {
        "langevin": True,
        "gradient": False,
    }


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("make", ["diagonal", "dense"])
def test_metropolis_adjusted_moves_leave_a_gaussian_invariant(make, steps):
    """Exact draws in, exact draws out: mean, covariance and fourth moments after ten steps."""
    torch.manual_seed(3)
    count = 40_000
    precision = torch.tensor([[2.0, 0.8], [0.8, 1.0]])
    target = MultivariateNormal(torch.zeros(2), precision_matrix=precision)
    metric = (
        Diagonal(torch.tensor([[0.5, 1.0]]))
        if make == "diagonal"
        else Dense(torch.linalg.cholesky(torch.linalg.inv(precision))[None])
    )
    eta = torch.tensor([0.6])
    z = target.sample((count, 1))
    rates = []
    move = Langevin(leapfrog_steps=steps)
    for _ in range(10):
        proposal = move.propose(z, -z @ precision, eta, metric, lambda u: -u @ precision)
        backward = move.log_backward(proposal, -proposal.value @ precision, eta, metric)
        ratio = target.log_prob(proposal.value) - target.log_prob(z)
        accept = torch.rand(count, 1).log() < ratio + backward - proposal.log_forward
        rates.append(float(accept.double().mean()))
        z = torch.where(accept[..., None], proposal.value, z)
    assert 0.2 < min(rates) < 0.98
    white = z[:, 0] @ torch.linalg.cholesky(precision)
    assert float(white.mean(0).abs().max()) < 4.5 / count**0.5
    assert float((white.T @ white / count - torch.eye(2)).abs().max()) < 4.5 * (2 / count) ** 0.5
    assert float((white**4).mean(0).sub(3).abs().max()) < 4.5 * (96 / count) ** 0.5
