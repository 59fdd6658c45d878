"""Mixtures that are fitted to particles: the right number of modes, and the right ones."""

from __future__ import annotations

import pytest
import torch

from dcpc.approach.mixture import INFLATION, fit_mixture
from dcpc.conquer.jump import JUMP_DEGREES

pytestmark = pytest.mark.usefixtures("float64")


def covariance_of(mixture, component: int, cell: int | None = None) -> torch.Tensor:
    """Covariance of a component of Student-t distributions."""
    factor = mixture.factor[component]
    factor = factor if cell is None else factor[cell]
    return JUMP_DEGREES / (JUMP_DEGREES - 2) * factor @ factor.mT


def test_one_gaussian_is_one_component():
    torch.manual_seed(0)
    root = torch.randn(6, 6)
    value = 3 + torch.randn(2000, 6) @ root.mT
    mixture = fit_mixture(value)
    assert len(mixture.loc) == 1
    torch.testing.assert_close(mixture.loc[0], value.mean(0))
    torch.testing.assert_close(
        covariance_of(mixture, 0), INFLATION * value.mT.cov(correction=0), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("size", [2, 10])
def test_modes_are_found_with_their_shares_centres_and_shapes(size):
    torch.manual_seed(size)
    share = torch.tensor([0.1, 0.2, 0.3, 0.4])
    centre = (
        6 * torch.eye(4, size)
        if size >= 4
        else 6 * torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1.0]])
    )
    root = torch.randn(4, size, size).tril() * 0.4 + 0.5 * torch.eye(size)
    which = torch.multinomial(share, 4000, replacement=True)
    value = centre[which] + (root[which] @ torch.randn(4000, size, 1)).squeeze(-1)
    mixture = fit_mixture(value)
    assert len(mixture.loc) == 4
    nearest = torch.cdist(centre, mixture.loc).argmin(1)
    assert sorted(nearest.tolist()) == [0, 1, 2, 3]
    counts = torch.bincount(which, minlength=4) / 4000
    torch.testing.assert_close(mixture.log_share[nearest].exp(), counts, rtol=0.02, atol=0.005)
    for index, component in enumerate(nearest.tolist()):
        own = value[which == index]
        torch.testing.assert_close(mixture.loc[component], own.mean(0), rtol=0.0, atol=0.1)
        torch.testing.assert_close(
            covariance_of(mixture, component), INFLATION * own.mT.cov(), rtol=0.25, atol=0.05
        )


def test_every_cell_has_its_own_number_of_modes():
    torch.manual_seed(0)
    one = torch.randn(1000, 2)
    two = torch.randn(1000, 2) + torch.where(torch.rand(1000, 1) < 0.3, 12.0, 0.0)
    value = torch.stack([one, two], 1)
    mixture = fit_mixture(value)
    share = mixture.log_share.exp()
    assert share.shape == (2, 2)
    torch.testing.assert_close(share.sum(0), torch.ones(2))
    assert sorted(share[:, 0].tolist()) == pytest.approx([0.0, 1.0])
    assert float(share[:, 1].min()) == pytest.approx(0.3, abs=0.05)


def test_few_particles_have_one_component():
    value = torch.cat([torch.randn(8, 5), 30 + torch.randn(8, 5)])
    mixture = fit_mixture(value)
    assert len(mixture.loc) == 1
    assert bool(mixture.factor.isfinite().all())


def test_particles_in_one_place_have_a_finite_mixture():
    value = torch.zeros(100, 2)
    mixture = fit_mixture(value)
    assert bool(mixture.log_prob(value, value[..., 0]).isfinite().all())
