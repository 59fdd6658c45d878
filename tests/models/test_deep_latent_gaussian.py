from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro.infer import Predictive
from torch.distributions import ContinuousBernoulli, MultivariateNormal, Normal
from torch.nn import functional

from dcpc import DCPC
from dcpc.models import DeepLatentGaussian


@pytest.fixture
def model() -> DeepLatentGaussian:
    model = DeepLatentGaussian([3, 4, 5], [1, 2, 3])
    with torch.no_grad():
        for scale in model.scales:
            scale.raw.copy_(0.3 * torch.randn_like(scale.raw))
    return model


@pytest.mark.parametrize("likelihood", ["continuous_bernoulli", "bernoulli"])
def test_the_joint_density_is_that_of_the_formula(
    model: DeepLatentGaussian, likelihood: str
) -> None:
    model.likelihood = likelihood
    x = torch.rand(7, 1, 2, 3)
    trace = pyro.poutine.trace(model).get_trace(x)
    z1, z2, z3 = (trace.nodes[f"z{layer}"]["value"] for layer in (1, 2, 3))
    expected = Normal(0.0, 1.0).log_prob(z1).sum(-1)
    for above, below, layer, scale in ((z1, z2, 0, 0), (z2, z3, 1, 1)):
        raw = model.scales[scale].raw
        lower = torch.tril(raw, -1) + torch.diag(torch.exp(torch.diag(raw)))
        loc = functional.linear(above.clamp(min=0), *model.layers[layer].parameters())
        density = MultivariateNormal(loc, covariance_matrix=lower @ lower.T)
        expected = expected + density.log_prob(below)
    logits = functional.linear(z3.clamp(min=0), *model.layers[2].parameters())
    pixels = x.flatten(1)
    if likelihood == "bernoulli":
        cross_entropy = functional.binary_cross_entropy_with_logits
        expected = expected - cross_entropy(logits, pixels, reduction="none").sum(-1)
    else:
        expected = expected + ContinuousBernoulli(logits=logits).log_prob(pixels).sum(-1)
    trace.compute_log_prob()
    ours = sum(trace.nodes[name]["log_prob"] for name in ("z1", "z2", "z3", "x"))
    assert torch.allclose(ours, expected, atol=1e-3)


def test_hidden_layers_are_networks_on_the_latents_themselves() -> None:
    model = DeepLatentGaussian([3, 4], [1, 2, 3], "bernoulli", hidden_sizes=[[], [7, 6]])
    x = torch.rand(5, 1, 2, 3)
    trace = pyro.poutine.trace(model).get_trace(x)
    z1, z2 = (trace.nodes[name]["value"] for name in ("z1", "z2"))
    loc = functional.linear(z1.clamp(min=0), *model.layers[0].parameters())
    assert torch.allclose(trace.nodes["z2"]["fn"].mean, loc, atol=1e-6)
    first, _, second, _, last = model.layers[1]
    hidden = functional.silu(functional.linear(z2, first.weight, first.bias))
    hidden = functional.silu(functional.linear(hidden, second.weight, second.bias))
    logits = functional.linear(hidden, last.weight, last.bias)
    pixels = x.flatten(1)
    expected = -functional.binary_cross_entropy_with_logits(logits, pixels, reduction="none")
    trace.compute_log_prob()
    assert torch.allclose(trace.nodes["x"]["log_prob"], expected.sum(-1), atol=1e-5)
    DCPC(model, num_particles=2).sweep(DCPC(model, num_particles=2).init(x), x)
    for wrong in ([[3]], [[], [0]], [[], [], []]):
        with pytest.raises(ValueError, match="hidden_sizes must be null or a list of positive"):
            DeepLatentGaussian([3, 4], [1, 2, 3], hidden_sizes=wrong)


def test_the_prior_can_be_sampled_with_pyros_predictive(model: DeepLatentGaussian) -> None:
    drawn = Predictive(model, num_samples=2000)(None, 3)
    assert drawn["x"].shape == (2000, 3, 6)
    assert bool(((drawn["x"] >= 0) & (drawn["x"] <= 1)).all())
    z1 = drawn["z1"].reshape(-1, 3)
    assert torch.allclose(z1.var(0), torch.ones(3), rtol=4 * math.sqrt(2 / 6000))


def test_units_are_the_layers_and_one_training_step_reaches_every_parameter(
    model: DeepLatentGaussian,
) -> None:
    x = torch.rand(20, 1, 2, 3)
    inference = DCPC(model, num_particles=4)
    assert {u.name: u.blanket for u in inference.units(x)} == {
        "z1": {"z2"},
        "z2": {"z1", "z3"},
        "z3": {"z2", "x"},
    }
    state, _ = inference.sweep(inference.init(x), x)
    inference.loss(state, x).backward()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        assert bool(gradient.isfinite().all()), name
        if name.endswith("raw"):  # only the lower triangle is used
            assert bool((gradient.triu(1) == 0).all())
            gradient = gradient[torch.ones_like(gradient).tril().bool()]
        assert bool((gradient != 0).any()), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [1, 2, 2]), "latent_sizes must hold at least one positive size"),
        (([2, 0], [1, 2, 2]), "latent_sizes must hold"),
        (([2], []), "image_shape must hold positive sizes"),
        (([2], [4], "poisson"), "likelihood must be .* got 'poisson'"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepLatentGaussian(*arguments)


def test_scales_start_at_the_identity_and_keep_their_floor() -> None:
    model = DeepLatentGaussian([2, 3], [1, 2, 2], min_scale=0.25)
    scale = model.scales[0]
    assert torch.allclose(scale(), torch.eye(3))
    with torch.no_grad():
        scale.raw.fill_(-50.0)
    expected = 0.25 * torch.eye(3) - 50.0 * torch.ones(3, 3).tril(-1)
    assert torch.allclose(scale(), expected)


@pytest.mark.parametrize("min_scale", [-0.1, 1.0])
def test_a_floor_outside_its_range_is_an_error(min_scale: float) -> None:
    with pytest.raises(ValueError, match=f"min_scale must be at least 0 .* got {min_scale}"):
        DeepLatentGaussian([2, 3], [1, 2, 2], min_scale=min_scale)
