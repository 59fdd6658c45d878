"""A memory of sequences: its density in closed form, and its evidence against a Kalman filter."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from torch import Tensor

from dcpc import DCPC
from dcpc.errors import DCPCError
from dcpc.evaluation import evaluate, forecast, held_out_inference
from dcpc.models import SequenceMemory

pytestmark = pytest.mark.usefixtures("float64")

SIZES = {"state_size": 3, "frames_shape": [4, 1, 1, 2], "cue_size": 2}


def linear() -> SequenceMemory:
    torch.manual_seed(1)
    options = {"nonlinearity": "identity", "state_scale": 0.4, "frame_scale": 0.5}
    return SequenceMemory(**SIZES, **options).double()


def kalman(model: SequenceMemory, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Log evidence of a sequence `(T, 2)`; mean of its last frame given those before."""
    (transition, b), (emission, c) = (
        (layer.weight.detach(), layer.bias.detach()) for layer in (model.transition, model.emission)
    )
    noise = model.frame_scale**2 * torch.eye(2)
    mean, initial = torch.zeros(3), model.initial.weight.detach()
    covariance = initial @ initial.T
    total = torch.zeros(())
    for t, frame in enumerate(frames):
        if t:
            mean = transition @ mean + b
            covariance = transition @ covariance @ transition.T
            covariance = covariance + model.state_scale**2 * torch.eye(3)
        expected = emission @ mean + c
        within = emission @ covariance @ emission.T + noise
        total += torch.distributions.MultivariateNormal(expected, within).log_prob(frame)
        gain = covariance @ emission.T @ torch.linalg.inv(within)
        mean = mean + gain @ (frame - expected)
        covariance = covariance - gain @ emission @ covariance
    return total, expected


def test_the_linear_models_evidence_and_forecast_are_those_of_a_kalman_filter():
    model, frames = linear(), torch.randn(4, 4, 1, 1, 2)
    exact = [kalman(model, sequence.flatten(1)) for sequence in frames]
    # `Zhat` is unbiased: ten estimates' mean is the evidence, up to their own standard error.
    engine = held_out_inference(model, 64)
    runs = [evaluate(engine, frames, num_temperatures=15, seed=s).evidence_nll for s in range(10)]
    ratio = (-torch.stack(runs) - torch.stack([value for value, _ in exact])).exp()
    error = ratio.mean(0) - 1
    assert bool((error.abs() < 4 * ratio.std(0) / math.sqrt(10)).all())
    assert float(ratio.std()) < 1.0
    # Self-normalised weights have a bias of the order of their variance, below the error of ten.
    foreseen = torch.stack(
        [
            forecast(model, frames, 1, num_particles=64, num_temperatures=20, seed=s).frames[:, -1]
            for s in range(10)
        ]
    ).flatten(2)
    error = foreseen.mean(0) - torch.stack([mean for _, mean in exact])
    assert bool((error.abs() < 4 * foreseen.std(0) / math.sqrt(10)).all())
    assert float(foreseen.std(0).max()) < float(model.frame_scale)


def test_the_density_is_that_of_every_state_and_frame_given_the_state_before():
    torch.manual_seed(0)
    model = SequenceMemory(**SIZES, state_scale=0.3, frame_scale=0.2).double()
    frames = torch.rand(5, 4, 1, 1, 2)
    problem = DCPC(model, num_particles=6).bind(frames)
    state = problem.init()
    z = [state.latents[f"z_{t}"] for t in range(4)]
    normal = torch.distributions.Normal
    expected = normal(0.0, 1.0).log_prob(z[0]).sum(-1)
    hidden = z[0] @ model.initial.weight.T
    for t in range(4):
        mean = torch.tanh(hidden) @ model.emission.weight.T + model.emission.bias
        expected = expected + normal(mean, 0.2).log_prob(frames[:, t].flatten(1)).sum(-1)
        if t < 3:
            mean = torch.tanh(hidden) @ model.transition.weight.T + model.transition.bias
            expected = expected + normal(mean, 0.3).log_prob(z[t + 1]).sum(-1)
            hidden = z[t + 1]
    torch.testing.assert_close(problem.log_joint(state), expected.detach())


def test_it_draws_sequences():
    model = SequenceMemory(**SIZES)
    nodes = pyro.poutine.trace(model).get_trace(num_sequences=7).nodes
    assert nodes["_RETURN"]["value"].shape == (7, 4, 2)
    assert nodes["z_0"]["value"].shape == (7, 2)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"state_size": 0}, "state_size"),
        ({"cue_size": 0}, "cue_size"),
        ({"frames_shape": [4, 2]}, "frames_shape"),
        ({"frames_shape": [0, 1, 1, 2]}, "frames_shape"),
        ({"nonlinearity": "relu"}, "nonlinearity"),
        ({"state_scale": 0.0}, "state_scale"),
        ({"frame_scale": math.nan}, "frame_scale"),
    ],
)
def test_impossible_sizes_are_refused(options, name):
    with pytest.raises(DCPCError, match=name):
        SequenceMemory(**{**SIZES, **options})
