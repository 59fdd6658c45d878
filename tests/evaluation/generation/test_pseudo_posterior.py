from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dcpc.errors import DataError, OptionError
from dcpc.evaluation import PseudoPosterior, decode

COUNT = 20_000
COVARIANCE = torch.tensor([[4.0, 1.8], [1.8, 1.0]])
"""Far from a multiple of the identity, and from its own Cholesky factor."""


def correlated(count: int, mean: tuple[float, float], seed: int) -> Tensor:
    """Draws whose sample moments are *exactly* the mean and COVARIANCE, in random order."""
    torch.manual_seed(seed)
    noise = torch.randn(count, 2, dtype=torch.float64)
    noise = noise - noise.mean(0)
    white = noise @ torch.linalg.inv(torch.linalg.cholesky(noise.T @ noise / count)).T
    factor = torch.linalg.cholesky(COVARIANCE.double())
    return (white @ factor.T + torch.tensor(mean)).float()


def test_one_component_has_the_moments_of_the_particles() -> None:
    particles = correlated(400, (1.0, -2.0), seed=0).reshape(4, 100, 2)
    fitted = PseudoPosterior.fit("z", particles, num_components=1)
    covariance = fitted.scale_trils[0] @ fitted.scale_trils[0].T
    assert torch.allclose(fitted.means[0], torch.tensor([1.0, -2.0]), atol=1e-5)
    assert torch.allclose(covariance, COVARIANCE, atol=1e-4)
    assert float(fitted.scale_trils[0, 0, 1]) == 0.0


def test_samples_have_the_covariance_and_not_its_square() -> None:
    fitted = PseudoPosterior.fit("z", correlated(400, (0, 0), 1).unsqueeze(0), num_components=1)
    samples = fitted.sample(COUNT, seed=2)["z"]
    # Var of a sample covariance: (c_ii c_jj + c_ij^2) / n.
    variances = COVARIANCE.diagonal()
    error = ((torch.outer(variances, variances) + COVARIANCE.square()) / COUNT).sqrt()
    assert bool(((samples.T.cov() - COVARIANCE).abs() < 4 * error).all())
    assert bool((samples.mean(0).abs() < 4 * (variances / COUNT).sqrt()).all())


def test_every_label_gets_its_own_mixture_and_its_share_of_the_whole() -> None:
    far, near = correlated(300, (100.0, 0.0), 3), correlated(100, (-100.0, 0.0), 4)
    particles = torch.cat([far, near]).unsqueeze(0)
    labels = torch.cat([torch.full((300,), 7), torch.full((100,), 2)])
    fitted = PseudoPosterior.fit("z", particles, num_components=2, labels=labels)
    assert float(fitted.weights.sum()) == pytest.approx(1.0)
    for label, side in ((7, 1.0), (2, -1.0)):
        samples = fitted.sample(4000, seed=5, label=label)["z"]
        assert bool((samples[:, 0] * side > 50).all())
        assert float(samples[:, 0].mean()) == pytest.approx(100 * side, abs=4 * math.sqrt(4 / 4000))
    both = fitted.sample(4000, seed=6)["z"][:, 0]
    assert float((both > 0).float().mean()) == pytest.approx(0.75, abs=4 * math.sqrt(0.1875 / 4000))


def test_samples_keep_the_shape_of_the_latent_and_feed_the_decoder(shifted_gaussian: type) -> None:
    fitted = PseudoPosterior.fit("z", torch.randn(3, 50, 2, 2), num_components=3)
    latents = fitted.sample(6, seed=0)
    assert latents["z"].shape == (6, 2, 2)
    z = latents["z"].flatten(1)
    means = decode(shifted_gaussian(4), {"z": z}, torch.zeros(6, 4), seed=0).means
    assert torch.equal(means, z)
    scalars = PseudoPosterior.fit("z", torch.randn(3, 50), num_components=2)
    assert scalars.sample(6, seed=0)["z"].shape == (6,)


def test_the_same_seed_gives_the_same_fit_and_samples() -> None:
    particles, before = torch.randn(2, 60, 2), torch.get_rng_state()
    one, two = (PseudoPosterior.fit("z", particles, num_components=4, seed=1) for _ in range(2))
    assert torch.equal(one.sample(5, seed=3)["z"], two.sample(5, seed=3)["z"])
    assert not torch.equal(one.sample(5, seed=3)["z"], one.sample(5, seed=4)["z"])
    assert torch.equal(before, torch.get_rng_state())


def test_what_cannot_be_fitted_is_refused() -> None:
    particles = torch.randn(2, 10, 2)
    with pytest.raises(DataError, match="num_components must lie between 1 and"):
        PseudoPosterior.fit("z", particles, num_components=21)
    with pytest.raises(DataError, match=r"labels must have shape \(10,\)"):
        PseudoPosterior.fit("z", particles, labels=torch.zeros(3))
    with pytest.raises(DataError, match="NaN or infinite; training has diverged"):
        PseudoPosterior.fit("z", particles / 0)
    with pytest.raises(DataError, match="must have shape"):
        PseudoPosterior.fit("z", torch.randn(4))
    fitted = PseudoPosterior.fit("z", particles, num_components=1, labels=torch.arange(10) % 2)
    with pytest.raises(OptionError, match=r"no component was fitted to the label 5.*\[0, 1\]"):
        fitted.sample(1, seed=0, label=5)
