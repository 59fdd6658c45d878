"""Forecasts of a Gaussian random walk, in one site or in one per frame: its conditionals."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from dcpc.errors import DataError, OptionError
from dcpc.evaluation import decode, evaluate, forecast, held_out_inference, matching_site

NOISE, NUM_FRAMES = 0.5, 4


class Walk(nn.Module):
    """z_t ~ N(z_{t-1}, 1), z_{-1} = 0; frames of two pixels z_t + noise, in one site or in many."""

    def __init__(self, in_one_site: bool, num_frames: int = NUM_FRAMES) -> None:
        super().__init__()
        self.in_one_site, self.num_frames = in_one_site, num_frames

    def forward(self, frames: Tensor) -> None:
        z, states = torch.zeros(len(frames)), []
        with pyro.plate("sequences", len(frames)):
            for t in range(self.num_frames):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                states.append(z)
                if not self.in_one_site:
                    mean = z[..., None, None, None].expand(*z.shape, 1, 1, 2)
                    frame = dist.Normal(mean, NOISE).to_event(3)
                    pyro.sample(f"x_{t}", frame, obs=frames[:, t])
            if self.in_one_site:
                mean = torch.stack(states, -1)[..., None, None, None]
                every = dist.Normal(mean.expand(*mean.shape[:-1], 2), NOISE)
                pyro.sample("frames", every.to_event(4), obs=frames)


def conditional(frames: Tensor, num_seen: int) -> tuple[Tensor, Tensor]:
    """Means and variances of the states given the first frames, by their joint Gaussian."""
    time = torch.arange(1.0, NUM_FRAMES + 1)
    covariance = torch.minimum(time.unsqueeze(0), time.unsqueeze(1))
    seen = frames.flatten(2).mean(-1)[:, :num_seen]  # sufficient, with half the variance
    within = covariance[:num_seen, :num_seen] + NOISE**2 / 2 * torch.eye(num_seen)
    gain = covariance[:, :num_seen] @ torch.linalg.inv(within)
    return seen @ gain.T, (covariance - gain @ covariance[:num_seen]).diagonal()


@pytest.mark.parametrize("in_one_site", [True, False])
def test_forecasts_are_the_gaussian_conditional_given_the_first_frames(in_one_site):
    frames = torch.randn(60, NUM_FRAMES, 1, 1, 2)
    told = forecast(Walk(in_one_site), frames, 1, num_particles=64, num_temperatures=6)
    mean, variance = conditional(frames, NUM_FRAMES - 1)
    assert torch.equal(told.frames[:, :-1], frames[:, :-1])
    error = told.frames[:, -1].flatten(1) - mean[:, -1:]
    # Of the 64 particles' mean; weights and moves that are correlated leave fewer to count.
    assert float(error.square().mean()) < 3 * float(variance[-1]) / 64
    squares = (frames[:, -1] - told.frames[:, -1]).square().flatten(1).mean(1)
    torch.testing.assert_close(told.mse, squares)
    repeated = (frames[:, -1] - frames[:, -2]).square().flatten(1).mean(1)
    torch.testing.assert_close(told.repeated_frame_mse, repeated)
    assert told.num_predicted == 1


def test_nothing_of_the_last_frames_leaks():
    frames = torch.randn(5, NUM_FRAMES, 1, 1, 2)
    other = torch.cat([frames[:, :2], 9 + torch.randn(5, 2, 1, 1, 2)], 1)
    options = {"num_particles": 4, "num_temperatures": 3, "intensity_range": (-1.0, 1.0)}
    first, second = (
        forecast(Walk(in_one_site=False), x, 2, **options).frames[:, 2:] for x in (frames, other)
    )
    assert torch.equal(first, second)


def test_repeated_frames_are_compared_in_intensities_from_0_to_1():
    frames = torch.zeros(3, NUM_FRAMES, 1, 1, 2)
    frames[:, -2:] = torch.tensor([1.0, 0.5]).reshape(2, 1, 1, 1)
    options = {"num_particles": 2, "num_temperatures": 1, "intensity_range": (-1.0, 1.0)}
    told = forecast(Walk(in_one_site=True), frames, 2, **options)
    # 0 is repeated, 1 and .5 come: half as far apart from 0 to 1.
    expected = torch.full((3,), (0.5**2 + 0.25**2) / 2)
    torch.testing.assert_close(told.repeated_frame_mse, expected)


@pytest.mark.parametrize(
    ("shape", "count"), [((3, 4, 1, 1, 2), 4), ((3, 4, 1, 1, 2), 0), ((3, 4), 1)]
)
def test_too_many_frames_to_predict_are_refused(shape, count):
    with pytest.raises(OptionError, match=rf"got {count} for data of shape \(3, 4"):
        forecast(Walk(in_one_site=True), torch.zeros(shape), count)


def test_frames_of_several_sites_are_reconstructed_as_those_of_one():
    frames = torch.randn(40, NUM_FRAMES, 1, 1, 2)
    mean, variance = conditional(frames, NUM_FRAMES)
    nll = []
    for in_one_site in (True, False):
        engine = held_out_inference(Walk(in_one_site), 64)
        told = evaluate(engine, frames, num_temperatures=8, seed=0)
        assert told.reconstructions.shape == frames.shape
        error = told.reconstructions.flatten(2) - mean.unsqueeze(-1)
        assert bool((error.square().mean((0, 2)) < 3 * variance / 64).all())
        nll.append(told.evidence_nll.mean())
    torch.testing.assert_close(nll[0], nll[1], atol=0.1, rtol=0)


def test_drawn_frames_are_in_the_order_of_the_program():
    z = {f"z_{t}": torch.full((3,), float(t)) for t in range(NUM_FRAMES)}
    drawn = decode(Walk(in_one_site=False), z, torch.zeros(3, NUM_FRAMES, 1, 1, 2), seed=0)
    expected = torch.arange(float(NUM_FRAMES)).reshape(1, -1, 1, 1, 1).expand(3, -1, 1, 1, 2)
    assert torch.equal(drawn.means, expected)


@pytest.mark.parametrize("num_frames", [3, 5])
def test_sites_of_another_number_than_the_frames_are_one_error(num_frames):
    values = {f"x_{t}": torch.zeros(6, 1, 1, 2) for t in range(num_frames)}
    expected = r"\(6, 4, 1, 1, 2\), .* one site for each of their 4 frames; got 0 of the sites"
    with pytest.raises(DataError, match=expected):
        matching_site(values, torch.zeros(6, 4, 1, 1, 2))
