from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro.infer import Predictive
from torch import Tensor, nn
from torch.distributions import Normal
from torch.func import functional_call

from dcpc import DCPC
from dcpc.errors import DataError
from dcpc.models import ConvolutionalGenerator, PGDGenerator
from dcpc.models.convolutional_generator import MIN_SCALE, PGD_SCALE

Generator = ConvolutionalGenerator | PGDGenerator


def levels(*shape: int) -> Tensor:
    """Random images on the 256 levels of [-1, 1]."""
    return torch.randint(0, 256, shape) / 127.5 - 1


def small(norm: str = "group", **options: object) -> ConvolutionalGenerator:
    return ConvolutionalGenerator(3, [1, 16, 16], norm=norm, **options)


def small_pgd(norm: str = "group") -> PGDGenerator:
    return PGDGenerator(3, [1, 8, 8], norm=norm, num_channels=8)


def log_factors(model: Generator, x: Tensor, z: Tensor) -> dict[str, Tensor]:
    conditioned = pyro.condition(model, data={"z": z})
    trace = pyro.poutine.trace(conditioned).get_trace(x)
    trace.compute_log_prob()
    return {name: trace.nodes[name]["log_prob"] for name in ("z", "x")}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("norm", ["group", "batch", "none"])
def test_the_layers_are_those_of_the_paper(channels: int, side: int, norm: str) -> None:
    model = ConvolutionalGenerator(image_shape=[channels, side, side], norm=norm)
    shapes: list[tuple[int, ...]] = []
    for layer in model.network:
        if isinstance(layer, nn.Linear | nn.ConvTranspose2d):
            layer.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
    images = model.decode(torch.randn(2, 40))
    first = side // 16
    widths = [(64, 1), (64, 2), (32, 4), (32, 8), (channels, 16)]
    assert shapes == [(256,), *((c, first * times, first * times) for c, times in widths)]
    assert images.shape == (2, channels, side, side)
    assert bool((images.abs() <= 1).all())
    kinds = {"group": nn.GroupNorm, "batch": (nn.BatchNorm1d, nn.BatchNorm2d), "none": ()}
    assert sum(isinstance(layer, kinds[norm]) for layer in model.network) == 5 * (norm != "none")
    assert sum(isinstance(layer, nn.SiLU) for layer in model.network) == 5


def test_the_pgd_generator_is_that_of_the_papers_code() -> None:
    model = PGDGenerator(norm="batch")
    # Linear and its norm, projection and its norm, two blocks of 5x5 and 3x3 with norms, output.
    block = 64 * 64 * 25 + 64 + 64 * 64 * 9 + 64 + 2 * 128
    expected = (64 + 1 + 2) * 1024 + 4 * 64 * 25 + 128 + 2 * block + 64 * 3 * 16 + 3
    assert sum(p.numel() for p in model.parameters()) == expected
    images = model.decode(torch.randn(2, 64))
    assert images.shape == (2, 3, 32, 32)
    assert bool((images.abs() <= 1).all())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize("likelihood", ["normal", "discretized_normal"])
def test_the_joint_density_is_that_of_the_formula(likelihood: str, norm: str) -> None:
    model = small(norm, likelihood=likelihood)
    x, z = levels(5, 1, 16, 16), torch.randn(5, 3)
    got = log_factors(model, x, z)
    loc, scale = model.decode(z), model.scale()
    pixels = Normal(loc, scale)
    if likelihood == "normal":
        expected = -0.5 * ((x - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)
    else:
        below = torch.where(x < -0.999, 0.0, pixels.cdf(x - 1 / 255))
        expected = (torch.where(x > 0.999, 1.0, pixels.cdf(x + 1 / 255)) - below).log()
    assert torch.allclose(got["z"], Normal(0.0, 1.0).log_prob(z).sum(-1))
    assert torch.allclose(got["x"], expected.sum((1, 2, 3)), rtol=1e-7)


def test_the_pgd_generator_has_a_fixed_noise() -> None:
    model = small_pgd()
    x, z = levels(4, 1, 8, 8), torch.randn(4, 3)
    squares = ((x - model.decode(z)) / PGD_SCALE).square().sum((1, 2, 3))
    expected = -0.5 * squares - 64 * math.log(0.01 * math.sqrt(2 * math.pi))
    assert torch.allclose(log_factors(model, x, z)["x"], expected, rtol=1e-5)


def test_the_scale_is_positive_whatever_the_parameter() -> None:
    model = small()
    assert model.scale().item() == pytest.approx(0.3)
    for raw in (-1e3, -20.0, 0.0):
        scale = functional_call(model.scale, {"raw": torch.tensor(raw)}, ())
        assert scale.item() == pytest.approx(MIN_SCALE + math.exp(raw))


@pytest.mark.parametrize("make", [small, small_pgd])
@pytest.mark.parametrize("norm", ["group", "none", "batch"])
def test_only_batch_normalisation_ties_the_images_of_a_batch(make, norm: str) -> None:
    model = make(norm)
    x, z = levels(4, *model.image_shape), torch.randn(4, 3)
    before = log_factors(model, x, z)["x"]
    z[2] += 1.0
    after = log_factors(model, x, z)["x"]
    unchanged = torch.isclose(before, after, rtol=1e-6, atol=0)
    assert not unchanged[2]
    assert bool(unchanged[[0, 1, 3]].all()) == (norm != "batch")
    inference = DCPC(model, num_particles=2, algorithm="pgd")
    (unit,) = inference.units(x)
    assert [plate.size for plate in unit.plates] == ([] if norm == "batch" else [4])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_score_is_the_derivative_by_finite_differences(norm: str) -> None:
    model = small(norm, likelihood="discretized_normal")
    x = levels(2, 1, 16, 16)
    z = torch.randn(2, 3, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: log_factors(model, x, z)["x"].sum(), (z,))


@pytest.mark.parametrize("likelihood", ["normal", "discretized_normal"])
@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-paper", "pgd"])
def test_sweeps_and_losses_run_on_the_captured_program(algorithm: str, likelihood: str) -> None:
    model, x = small(likelihood=likelihood), levels(6, 1, 16, 16)
    inference = DCPC(model, num_particles=3, algorithm=algorithm, backend="graph")
    state, _ = inference.sweep(inference.init(x), x)
    assert state.log_weight.log_weight.shape == (3, 6)
    inference.loss(state, x).backward()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        assert bool(gradient.isfinite().all()), name
    assert bool(model.scale.raw.grad != 0)
    means = inference.bind(x).observation_means(state)["x"]
    assert means.shape == x.shape
    assert bool((means.abs() <= 1).all())


def test_particles_fold_into_the_batch_of_every_convolution() -> None:
    inference = DCPC(small(), num_particles=3, backend="graph")
    program = inference.division(levels(6, 1, 16, 16)).program
    nodes = program._module.graph.nodes
    convolutions = [node for node in nodes if "convolution" in str(node.target)]
    assert len(convolutions) == 5
    assert {node.args[0].meta["tensor_meta"].shape[0] for node in convolutions} == {18}


@pytest.mark.parametrize("algorithm", ["pgd", "dcpc-paper"])
def test_with_batch_normalisation_the_papers_algorithms_learn(algorithm: str) -> None:
    model, x = small("batch"), levels(8, 1, 1, 1).expand(8, 1, 16, 16)
    inference = DCPC(model, num_particles=2, algorithm=algorithm)
    state = inference.init(x)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        state, _ = inference.sweep(state, x)
        loss = inference.loss(state, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 8 * 20  # twenty nats per image


def test_batch_statistics_are_those_of_one_particle_in_training_and_evaluation() -> None:
    model, x = small("batch"), levels(4, 1, 16, 16)
    inference = DCPC(model, num_particles=3, algorithm="pgd", backend="graph")
    state = inference.init(x)

    def log_joint(z: Tensor) -> float:
        return sum(factor.sum().item() for factor in log_factors(model, x, z).values())

    training = [log_joint(z) for z in state.latents["z"]]
    assert -inference.loss(state, x).item() == pytest.approx(sum(training) / 3, rel=1e-5)
    model.eval()
    assert [log_joint(z) for z in state.latents["z"]] == pytest.approx(training, rel=1e-5)


def test_images_off_the_grid_are_refused_by_the_discretised_likelihood() -> None:
    model = small(likelihood="discretized_normal")
    in_unit_interval = torch.randint(0, 256, (4, 1, 16, 16)) / 255
    with pytest.raises(DataError, match="site 'x' lies outside the support"):
        DCPC(model, num_particles=2).init(in_unit_interval)


@pytest.mark.parametrize("make", [small, small_pgd])
def test_images_can_be_drawn_with_pyros_predictive(make) -> None:
    model = make()
    drawn = Predictive(model, num_samples=5)(None, 3)
    assert drawn["x"].shape == (5, 3, *model.image_shape)
    assert bool(drawn["x"].isfinite().all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latent_size": 0}, "latent_size must be positive, got 0"),
        ({"image_shape": [3, 28, 28]}, r"multiples of 16, got \[3, 28, 28\]"),
        ({"image_shape": [32, 32]}, r"image_shape must be \[channels, height, width\]"),
        ({"image_shape": [0, 32, 32]}, "image_shape must be"),
        ({"likelihood": "bernoulli"}, "likelihood must be one of 'normal', .* got 'bernoulli'"),
        ({"norm": "layer"}, "norm must be one of 'group', 'batch', 'none', got 'layer'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvolutionalGenerator(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_shape": [3, 31, 32]}, "multiples of 2"),
        ({"norm": "layer"}, "norm must be one of"),
        ({"num_channels": 0}, "num_channels must be positive"),
    ],
)
def test_bad_arguments_of_the_pgd_generator_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PGDGenerator(**arguments)
