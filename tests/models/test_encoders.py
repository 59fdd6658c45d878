from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from dcpc import DCPC
from dcpc.models import (
    ConvolutionalEncoder,
    ConvolutionalGenerator,
    DeepLatentGaussian,
    MLPEncoder,
    PGDGenerator,
    TopDownEncoder,
)
from dcpc.models.encoders import MIN_SCALE, GaussianHead
from dcpc.sweep import retarget

NOISE = 0.5


class LinearGaussian(nn.Module):
    """z1 ~ N(0, I), x ~ N(W z1, NOISE^2 I), with orthogonal columns of W: z1 | x is diagonal."""

    def __init__(self) -> None:
        super().__init__()
        columns, _ = torch.linalg.qr(torch.randn(4, 2))
        self.weight = nn.Parameter(columns * torch.tensor([2.0, 0.7]))

    def forward(self, x: Tensor) -> None:
        rows = x.flatten(1)
        with pyro.plate("images", len(rows)):
            z = pyro.sample("z1", dist.Normal(rows.new_zeros(len(rows), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T, NOISE).to_event(1), obs=rows)

    def log_evidence(self, x: Tensor) -> Tensor:
        covariance = self.weight @ self.weight.T + NOISE**2 * torch.eye(4)
        return MultivariateNormal(torch.zeros(4), covariance).log_prob(x.flatten(1)).detach()


def exact_encoder(model: LinearGaussian) -> MLPEncoder:
    """The encoder of the exact posterior: `x = relu(x) - relu(-x)`, then regression."""
    encoder = MLPEncoder([2], [1, 2, 2], hidden_size=8)
    precision = 1 + (model.weight.square().sum(0) / NOISE**2)
    regression = (model.weight / NOISE**2 / precision).T
    (layer,), (head,) = encoder.layers, encoder.heads
    with torch.no_grad():
        layer.weight.copy_(torch.cat([torch.eye(4), -torch.eye(4)]))
        layer.bias.zero_()
        head.loc.weight.copy_(torch.cat([regression, -regression], 1))
        head.loc.bias.zero_()
        head.raw_scale.weight.zero_()
        head.raw_scale.bias.copy_((precision.rsqrt() - MIN_SCALE).expm1().log())
    return encoder


@pytest.mark.usefixtures("float64")
def test_the_elbo_is_the_log_evidence_at_the_exact_posterior_and_a_bound_elsewhere() -> None:
    model, x = LinearGaussian(), torch.randn(5, 1, 2, 2)
    evidence = model.log_evidence(x).sum().item()
    encoder = exact_encoder(model)
    # No variance: log p(x, z) - log q(z | x) is the same at every z.
    assert -Trace_ELBO().loss(model, encoder, x) == pytest.approx(evidence, abs=1e-9)
    for other in (MLPEncoder([2], [1, 2, 2], 8), MLPEncoder([2], [1, 2, 2], 16)):
        pyro.clear_param_store()
        elbo = -Trace_ELBO(num_particles=400, vectorize_particles=False).loss(model, other, x)
        assert elbo < evidence - 0.1


@pytest.mark.usefixtures("float64")
def test_particles_of_the_exact_encoder_have_the_log_evidence_as_weight() -> None:
    model, x = LinearGaussian(), torch.randn(5, 1, 2, 2)
    inference = DCPC(model, exact_encoder(model), num_particles=6)
    state = inference.init(x)
    weights = retarget(inference.bind(x).density, state).log_weight.log_weight
    assert torch.allclose(weights, model.log_evidence(x).expand(6, 5))


def test_svi_trains_model_and_encoder_together() -> None:
    model = DeepLatentGaussian([2, 3], [1, 4, 4])
    encoder, x = MLPEncoder([2, 3], [1, 4, 4], hidden_size=8), torch.rand(16, 1, 4, 4) ** 4
    svi = SVI(model, encoder, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    before = [p.clone() for p in (*model.parameters(), *encoder.parameters())]
    losses = [svi.step(x) / 16 for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10]) - 10  # one nat per image
    after = (*model.parameters(), *encoder.parameters())
    assert all(not torch.equal(b, a) for b, a in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("model", "encoder"),
    [
        (DeepLatentGaussian([2, 3, 5], [1, 4, 4]), MLPEncoder([2, 3, 5], [1, 4, 4], 7)),
        (ConvolutionalGenerator(3, [1, 16, 16]), ConvolutionalEncoder(3, [1, 16, 16], 2, 8)),
        (PGDGenerator(3, [3, 8, 8], num_channels=8), ConvolutionalEncoder(3, [3, 8, 8], 2, 8)),
    ],
)
def test_encoders_draw_all_latents_and_start_particles(model, encoder) -> None:
    x = torch.rand(6, *model.image_shape)
    inference = DCPC(model, encoder, num_particles=4)
    latents = {unit.name for unit in inference.units(x)}
    trace = pyro.poutine.trace(encoder).get_trace(x)
    assert set(trace.stochastic_nodes) - {"images"} == latents
    for name, value in encoder(x).items():
        assert trace.nodes[name]["fn"].has_rsample
        assert value.requires_grad
    state = inference.init(x)
    assert {name: u.shape for name, u in state.latents.items()} == {
        name: (4, *trace.nodes[name]["value"].shape) for name in latents
    }
    assert all(u.std(0).min() > 0 for u in state.latents.values())
    state, info = inference.sweep(state, x)
    assert bool(info.ess.isfinite().all())


def test_every_image_is_encoded_by_itself() -> None:
    for encoder, shape in (
        (MLPEncoder([2, 3], [1, 8, 8], 7), (1, 8, 8)),
        (ConvolutionalEncoder(3, [2, 8, 8], 2, 8), (2, 8, 8)),
    ):
        x = torch.rand(4, *shape)

        def moments(x: Tensor, encoder: nn.Module = encoder) -> list[Tensor]:
            nodes = pyro.poutine.trace(encoder).get_trace(x).nodes.values()
            normals = [node["fn"].base_dist for node in nodes if "z" in node["name"]]
            return [torch.stack([normal.loc, normal.scale]) for normal in normals]

        with torch.no_grad():
            for name, parameter in encoder.named_parameters():
                if "raw_scale.weight" in name:
                    nn.init.normal_(parameter)
        before = moments(x)
        x[1] += 0.5
        for old, new in zip(before, moments(x), strict=True):
            assert torch.allclose(old[:, [0, 2, 3]], new[:, [0, 2, 3]], rtol=1e-5)
            assert bool((old[:, 1] != new[:, 1]).any(-1).all())


@pytest.mark.parametrize("image_shape", [[1, 28, 28], [3, 32, 32], [3, 64, 48], [1, 2, 2]])
def test_images_of_any_size_are_halved_down_to_four_pixels(image_shape: list[int]) -> None:
    encoder = ConvolutionalEncoder(3, image_shape, 2, 8)
    assert encoder(torch.rand(2, *image_shape))["z"].shape == (2, 3)
    linear = next(layer for layer in encoder.network if isinstance(layer, nn.Linear))
    depth = sum(isinstance(layer, nn.Conv2d) for layer in encoder.network)
    assert linear.in_features <= 16 * max(image_shape[0], 2 ** max(depth, 0))


def test_scales_start_at_one_half_and_stay_positive() -> None:
    head = GaussianHead(3, 2)
    features = torch.randn(4, 3)
    assert torch.allclose(head(features).base_dist.scale, torch.tensor(0.5), atol=2 * MIN_SCALE)
    nn.init.constant_(head.raw_scale.bias, -1e4)
    assert torch.allclose(head(features).base_dist.scale, torch.tensor(MIN_SCALE))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLPEncoder([], [1, 2, 2]), "latent_sizes must hold at least one positive size"),
        (lambda: MLPEncoder([2], [1, 0]), "image_shape must hold"),
        (lambda: MLPEncoder([2], [4], 0), "hidden_size must"),
        (lambda: ConvolutionalEncoder(0, [1, 4, 4]), "latent_size must"),
        (lambda: ConvolutionalEncoder(2, [4, 4]), r"must be \[channels, height, width\]"),
        (lambda: ConvolutionalEncoder(2, [1, 4, 4], 0), "num_channels must"),
    ],
)
def test_bad_arguments_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_top_down_encoder_draws_each_latent_by_its_error_given_the_one_above() -> None:
    """Densities written out, of errors that depend on the image and on the latent above."""
    model = DeepLatentGaussian([2, 3, 4], [1, 2, 2])
    encoder, x = model.encoder(top_down=True), torch.rand(6, 1, 2, 2)
    trace = pyro.poutine.trace(encoder).get_trace(x)
    trace.compute_log_prob()
    z = [trace.nodes[f"z{i}"]["value"] for i in (1, 2, 3)]
    features = encoder.features(x)[::-1]
    for number in range(3):
        above = torch.zeros(6, 0) if number == 0 else z[number - 1]
        joint = encoder.joints[number](torch.cat([features[number], above], -1))
        error = encoder.heads[number](torch.nn.functional.silu(joint))
        e, log_det = z[number], 0.0
        if number:
            scale = model.scales[number - 1]()
            loc = model.layers[number - 1](torch.relu(above))
            e = torch.linalg.solve_triangular(scale, (e - loc).mT, upper=False).mT
            log_det = scale.diagonal().log().sum()
        expected = error.log_prob(e) - log_det
        assert torch.allclose(trace.nodes[f"z{number + 1}"]["log_prob"], expected, atol=1e-4)
    assert all("scales" not in name for name, _ in encoder.named_parameters())


class Pair(nn.Module):
    """`z1 ~ N(0, 1)`, `z2 ~ N(z1, .3^2)`, `x ~ N(z2, 1)`."""

    latent_sizes, image_shape = (1, 1), (1, 1, 1)

    def forward(self, x: Tensor) -> None:
        rows = x.flatten(1)
        with pyro.plate("images", len(rows)):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros(len(rows), 1), 1.0).to_event(1))
            z2 = pyro.sample("z2", self.prior(1, z1))
            pyro.sample("x", dist.Normal(z2, 1.0).to_event(1), obs=rows)

    def prior(self, number: int, above: Tensor) -> dist.Distribution:
        return dist.Normal(above, 0.3).to_event(1)


def test_a_top_down_encoder_learns_a_posterior_whose_latents_depend_on_each_other() -> None:
    """The bound closes as it learns; without dependence a gap of 1.1 nats is left."""
    x = torch.randn(256, 1, 1, 1) * math.sqrt(2.09)
    exact = -float(dist.Normal(0.0, math.sqrt(2.09)).log_prob(x).mean())
    gaps = {}
    for make in (lambda: TopDownEncoder(Pair(), 16), lambda: MLPEncoder([1, 1], [1, 1, 1], 16)):
        pyro.clear_param_store()
        torch.manual_seed(0)
        encoder = make()
        svi = SVI(Pair(), encoder, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        for _ in range(700):
            svi.step(x)
        gaps[type(encoder)] = sum(svi.evaluate_loss(x) for _ in range(50)) / 50 / 256 - exact
    assert gaps[TopDownEncoder] < 0.1
    assert gaps[MLPEncoder] > 0.9
