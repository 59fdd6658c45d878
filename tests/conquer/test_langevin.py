"""Moves against torch's Normal densities, and MALA on a Gaussian."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from dcpc.conquer import MOVES, Dense, Diagonal, Gradient, Langevin

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

    proposal = Langevin().propose(value, score, eta, metric)
    torch.testing.assert_close(proposal.log_forward, density(value, score, proposal.value))
    backward = Langevin().log_backward(proposal, other, eta, metric)
    torch.testing.assert_close(backward, density(proposal.value, other, value))


def test_langevin_with_a_diagonal_metric_is_a_product_of_normals():
    value, score, _, eta = setting()
    metric = diagonal()
    proposal = Langevin().propose(value, score, eta, metric)
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
        .propose(value.expand(count, PLATE, N, D), score.expand(count, PLATE, N, D), eta, metric)
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
    proposal = Gradient().propose(value, score, eta, metric)
    expected = value + eta[:, None] * (covariance(metric) @ score[..., None])[..., 0]
    torch.testing.assert_close(proposal.value, expected)
    assert torch.equal(proposal.log_forward, torch.zeros(K, PLATE, N))
    assert torch.equal(
        Gradient().log_backward(proposal, other, eta, metric), torch.zeros(K, PLATE, N)
    )


def test_moves_declare_whether_they_are_random():
    assert {name: move.is_random for name, move in MOVES.items()} == {
        "langevin": True,
        "gradient": False,
    }


@pytest.mark.parametrize("make", ["diagonal", "dense"])
def test_metropolis_adjusted_moves_leave_a_gaussian_invariant(make):
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
    for _ in range(10):
        score = -z @ precision
        proposal = Langevin().propose(z, score, eta, metric)
        backward = Langevin().log_backward(proposal, -proposal.value @ precision, eta, metric)
        ratio = target.log_prob(proposal.value) - target.log_prob(z)
        accept = torch.rand(count, 1).log() < ratio + backward - proposal.log_forward
        rates.append(float(accept.double().mean()))
        z = torch.where(accept[..., None], proposal.value, z)
    assert 0.2 < min(rates) < 0.98
    white = z[:, 0] @ torch.linalg.cholesky(precision)
    assert float(white.mean(0).abs().max()) < 4.5 / count**0.5
    assert float((white.T @ white / count - torch.eye(2)).abs().max()) < 4.5 * (2 / count) ** 0.5
    assert float((white**4).mean(0).sub(3).abs().max()) < 4.5 * (96 / count) ** 0.5
