from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal
from torch.nn import functional

from dcpc import DCPC
from dcpc.conquer import Langevin
from dcpc.errors import DataError, OptionError
from dcpc.evaluation import (
    evaluate,
    format_table,
    held_out_inference,
    prior_samples,
    summarise,
)
from dcpc.evaluation.intensities import cross_entropy, to_unit
from dcpc.training.callbacks import image_grid


@pytest.fixture
def measured(shifted_gaussian: type):
    torch.manual_seed(0)
    model = shifted_gaussian(4)
    x = torch.rand(60, 1, 2, 2)
    inference = held_out_inference(model, 32)
    return x, evaluate(inference, x, num_temperatures=20, seed=1)


def test_held_out_data_are_moved_by_leapfrog_steps_unless_told_otherwise(
    shifted_gaussian: type,
) -> None:
    model = shifted_gaussian(4)
    assert held_out_inference(model, 2).parts.move == Langevin(leapfrog_steps=4)
    assert held_out_inference(model, 2, move="langevin").parts.move == Langevin()
    assert held_out_inference(model, 2).num_particles == 2


def test_data_that_a_model_ties_share_their_evidence_evenly() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            loc = (z.mean() + 0.0 * z).unsqueeze(1)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    x = torch.tensor([[0.3], [-0.2], [1.1]])
    result = evaluate(held_out_inference(model, 500), x, num_temperatures=20, seed=0)
    # z enters by its mean alone, so that x ~ N(0, I + 1/3 of ones).
    exact = MultivariateNormal(torch.zeros(3), torch.eye(3) + 1 / 3).log_prob(x[:, 0])
    assert result.evidence_nll.shape == result.ess_percent.shape == (3,)
    assert torch.allclose(result.evidence_nll, -exact / 3, atol=0.03)


def test_the_evidence_of_a_gaussian_is_its_marginal_density(measured) -> None:
    x, result = measured
    exact = -Normal(0.0, math.sqrt(2.0)).log_prob(x).flatten(1).sum(1)
    error = result.evidence_nll - exact
    # Jensen's bias of the log is half its variance.
    spread = float(error.std())
    assert abs(float(error.mean())) < spread**2 + 4 * spread / math.sqrt(60)
    assert spread < 0.5


def test_the_reconstruction_is_the_posterior_mean_of_the_decoder(measured) -> None:
    x, result = measured
    # z | x ~ N(x / 2, 1/2), of which the mean of 32 particles is taken.
    error = result.reconstructions - x / 2
    assert result.reconstructions.shape == x.shape
    assert float(error.square().mean()) < 3 * 0.5 / 32


def test_cross_entropy_and_mse_are_those_of_the_reconstruction(measured) -> None:
    x, result = measured
    mean = result.reconstructions.clamp(1e-6, 1 - 1e-6)
    cross_entropy = functional.binary_cross_entropy(mean, x, reduction="none").sum((1, 2, 3))
    inside = ((result.reconstructions - mean).abs() < 1e-9).flatten(1).all(1)
    assert torch.allclose(result.reconstruction_cross_entropy[inside], cross_entropy[inside])
    mse = functional.mse_loss(result.reconstructions, x, reduction="none").mean((1, 2, 3))
    assert torch.allclose(result.reconstruction_mse, mse)
    assert bool(((result.ess_percent > 0) & (result.ess_percent <= 100.01)).all())


def test_evaluation_leaves_the_random_state_and_the_inference_mode_alone(
    shifted_gaussian: type,
) -> None:
    inference = DCPC(shifted_gaussian(4), num_particles=2)
    x = torch.rand(3, 4)
    before = torch.get_rng_state()
    with torch.inference_mode():
        first = evaluate(inference, x, num_temperatures=2, seed=1)
        again = evaluate(inference, x, num_temperatures=2, seed=1)
        other = evaluate(inference, x, num_temperatures=2, seed=2)
        prior_samples(inference.model, x, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.evidence_nll, again.evidence_nll)
    assert not torch.equal(first.evidence_nll, other.evidence_nll)


def test_prior_samples_have_the_models_marginal_moments(shifted_gaussian: type) -> None:
    model = shifted_gaussian(4)
    with torch.no_grad():
        model.shift.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    samples, means = prior_samples(model, torch.zeros(4000, 1, 2, 2), seed=0)
    for values, variance in ((samples, 2.0), (means, 1.0)):
        columns = values.flatten(1)
        error = 4 * math.sqrt(variance / 4000)
        assert torch.allclose(columns.mean(0), model.shift.detach(), atol=error)
        assert torch.allclose(
            columns.var(0), torch.full((4,), variance), rtol=4 * (2 / 4000) ** 0.5
        )


def test_the_summary_averages_over_data_and_not_over_batches(shifted_gaussian: type) -> None:
    inference = DCPC(shifted_gaussian(4), num_particles=2)
    parts = [evaluate(inference, torch.rand(n, 4), num_temperatures=2, seed=n) for n in (5, 1)]
    nll = torch.cat([part.evidence_nll for part in parts])
    summary = summarise(parts)
    assert summary["evidence_nll"] == pytest.approx(float(nll.mean()))
    assert summary["evidence_nll_se"] == pytest.approx(float(nll.std()) / math.sqrt(6))
    assert summary["num_data"] == 6
    table = format_table(summary, num_particles=2, num_temperatures=2)
    for name in ("evidence NLL", "reconstruction cross-entropy", "reconstruction MSE", "ESS %"):
        assert name in table


def test_a_model_that_does_not_observe_the_data_as_they_are_is_refused(
    shifted_gaussian: type,
) -> None:
    model = shifted_gaussian(4)
    inference = DCPC(lambda x: model(x[:, :4]), num_particles=2)
    with pytest.raises(DataError, match="as many elements as the data"):
        evaluate(inference, torch.rand(3, 6), num_temperatures=1, seed=0)


def test_a_grid_shows_every_image_in_reading_order() -> None:
    images = torch.rand(5, 1, 2, 3)
    grid = image_grid(images, columns=3)
    assert grid.shape == (1, 2 * 3 + 1, 3 * 4 + 1)
    for position, picture in enumerate(images):
        top, left = 1 + position // 3 * 3, 1 + position % 3 * 4
        assert torch.equal(grid[:, top : top + 2, left : left + 3], picture)
    assert bool((grid[:, 0] == 0.5).all())


def test_a_grid_of_images_of_many_channels_shows_their_mean() -> None:
    images = torch.rand(2, 5, 2, 3)
    grid = image_grid(images, columns=2)
    torch.testing.assert_close(grid[0, 1:3, 1:4], images[0].mean(0))


def test_intensities_of_any_range_are_compared_on_the_scale_from_zero_to_one(
    shifted_gaussian: type,
) -> None:
    inference = DCPC(shifted_gaussian(4), num_particles=4)
    x = 2 * torch.rand(5, 4) - 1
    plain, scaled = (
        evaluate(inference, x, 3, seed=1, intensity_range=r) for r in ((0.0, 1.0), (-1.0, 1.0))
    )
    mean = (plain.reconstructions + 1) / 2
    assert torch.equal(plain.evidence_nll, scaled.evidence_nll)
    assert torch.equal(plain.reconstructions, scaled.reconstructions)
    assert torch.allclose(scaled.reconstruction_mse, plain.reconstruction_mse / 4)
    eps = torch.finfo(torch.float32).eps
    expected = functional.binary_cross_entropy(
        mean.clamp(eps, 1 - eps), (x + 1) / 2, reduction="none"
    )
    assert torch.allclose(scaled.reconstruction_cross_entropy, expected.sum(1), rtol=1e-4)


def test_the_cross_entropy_is_finite_for_every_mean() -> None:
    x = torch.tensor([0.0, 1.0, 0.5, 1.0])
    mean = torch.tensor([1.0, 0.0, -3.0, 1.0])
    result = cross_entropy(x, mean)
    assert bool(result.isfinite().all())
    eps = torch.finfo(torch.float32).eps
    assert torch.allclose(result, -torch.tensor([1, 1, 0.5, 0]) * math.log(eps), atol=1e-6)


@pytest.mark.parametrize("bad", [(1.0, 0.0), (0.0, 0.0), (0.0, math.inf)])
def test_an_impossible_range_of_intensities_is_refused(bad: tuple[float, float]) -> None:
    with pytest.raises(OptionError, match="black < white"):
        to_unit(torch.zeros(2), bad)
