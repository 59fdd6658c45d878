"""Joint reference distributions against densities written out, and against their own draws."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch

from dcpc.divide.joint_reference import HalfPrior, StudentMixture

pytestmark = pytest.mark.usefixtures("float64")


def mixture(*plates: int) -> StudentMixture:
    """Three components in two dimensions."""
    loc = 3 * torch.randn(3, *plates, 2)
    factor = torch.randn(3, *plates, 2, 2).tril()
    factor.diagonal(dim1=-2, dim2=-1).abs_().add_(0.3)
    return StudentMixture(loc, factor, 5.0)


@pytest.mark.parametrize("plates", [(), (4,), (2, 3)])
def test_density_is_that_of_a_mixture_of_multivariate_students(plates):
    torch.manual_seed(0)
    reference, value = mixture(*plates), 4 * torch.randn(7, *plates, 2)
    terms = [
        dist.MultivariateStudentT(5.0, loc, factor).log_prob(value)
        for loc, factor in zip(reference.loc, reference.factor, strict=True)
    ]
    expected = torch.stack(terms).logsumexp(0) - math.log(3)
    nothing = torch.zeros(7, *plates)
    torch.testing.assert_close(reference.log_prob(value, nothing), expected)
    torch.testing.assert_close(
        HalfPrior(reference).log_prob(value, torch.full_like(nothing, -3.0)),
        torch.stack([expected, torch.full_like(nothing, -3.0)]).logsumexp(0) - math.log(2),
    )


@pytest.mark.parametrize("plates", [(), (2,)])
def test_draws_have_the_density(plates):
    """`E[f(u) / p(u)]` of draws is the integral of `f`, of a Gaussian here."""
    torch.manual_seed(1)
    count = 200_001  # odd, and no multiple of three
    prior = 2 * torch.randn(count, *plates, 2)
    log_prior = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    target = dist.Normal(torch.tensor([1.0, -1.0]), 1.0).to_event(1)
    for reference in (mixture(*plates), HalfPrior(mixture(*plates))):
        drawn = reference.draw(prior)
        assert drawn.shape == prior.shape
        weight = (
            target.log_prob(drawn) - reference.log_prob(drawn, log_prior.log_prob(drawn))
        ).exp()
        error = weight.std(0) / count**0.5
        assert bool(((weight.mean(0) - 1).abs() < 4 * error).all())
        assert float(error.max()) < 0.1


def test_components_are_drawn_in_turns():
    """As often as each other, whatever the noise: a stratified sample."""
    loc = torch.tensor([-1e6, 0.0, 1e6]).reshape(3, 1)
    reference = StudentMixture(loc, torch.ones(3, 1, 1))
    for _ in range(5):
        nearest = (reference.draw(torch.zeros(300, 1)) - loc[:, 0]).abs().argmin(1)
        assert torch.bincount(nearest).tolist() == [100, 100, 100]


def test_half_of_the_draws_are_those_of_the_prior():
    reference = HalfPrior(StudentMixture(torch.full((1, 1), 1e9), torch.ones(1, 1, 1)))
    prior = torch.randn(5, 1)
    shares = [int((reference.draw(prior) == prior).sum()) for _ in range(400)]
    assert set(shares) == {2, 3}
    assert sum(shares) / 400 == pytest.approx(2.5, abs=4 * 0.5 / 20)
