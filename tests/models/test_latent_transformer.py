"""A causal transformer with latents between its blocks, against quadrature, autograd and torch."""

from __future__ import annotations

import itertools
import math

import pyro
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from dcpc import DCPC
from dcpc.errors import DCPCError
from dcpc.evaluation import ImportanceSampler, prior_samples
from dcpc.models import CausalBlock, LatentTransformer

pytestmark = pytest.mark.usefixtures("float64")

NUM_SYMBOLS, LENGTH, WIDTH = 5, 6, 8


def transformer(**options) -> LatentTransformer:
    torch.manual_seed(0)
    settings = {"width": WIDTH, "num_blocks": 3, "num_heads": 2, **options}
    return LatentTransformer(NUM_SYMBOLS, LENGTH, **settings).double()


def symbols(count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, NUM_SYMBOLS, (count, 2, LENGTH // 2), generator=generator)


class Tiny(LatentTransformer):
    """Three symbols of two kinds, a number per position, one latent: its evidence is known."""

    def __init__(self) -> None:
        sizes = {"width": 1, "num_blocks": 2, "num_heads": 1, "embedding_scale": 1.0}
        super().__init__(2, 3, latent_after=[2], scale=1.5, **sizes)
        self.norm = nn.Identity()  # that of a single number is zero
        for block in self.blocks:
            block.first_norm = block.second_norm = nn.Identity()
        self.double()

    def evidence(self, x: Tensor) -> Tensor:
        """`p(x) = prod_t int N(h; m_t, scale^2) softmax(head(h))[x_t] dh` by quadrature, `(N,)`."""
        stream = self.embed(x)
        for block in self.blocks:
            stream = block(stream)
        nodes = torch.linspace(-9, 9, 4001)
        h = stream + 1.5 * nodes  # (N, T, nodes)
        told = self.head(h.unsqueeze(-1)).softmax(-1)
        chosen = told.gather(-1, x[..., None, None].expand(*told.shape[:-1], 1)).squeeze(-1)
        density = Normal(0.0, 1.0).log_prob(nodes).exp() * 18 / 4000
        return (chosen * density).sum(-1).prod(-1)


@pytest.fixture
def tiny() -> Tiny:
    torch.manual_seed(4)
    return Tiny().requires_grad_(False)


ALL = torch.tensor(list(itertools.product([0, 1], repeat=3)))


def test_the_evidence_is_that_of_quadrature_and_a_distribution_over_sequences(tiny):
    exact = tiny.evidence(ALL)
    assert float(exact.sum()) == pytest.approx(1.0, abs=1e-6)
    weights = ImportanceSampler(tiny).log_weights(ALL, 4000, seed=0).exp()
    error = weights.std(0) / 4000**0.5
    assert float(((weights.mean(0) - exact) / error).abs().max()) < 4.5
    annealed = DCPC(tiny, num_particles=3000).anneal(ALL, num_temperatures=8, seed=0)
    torch.testing.assert_close(annealed.log_evidence, exact.log(), rtol=0, atol=0.08)


def test_sequences_are_drawn_with_the_probabilities_of_the_joint_program(tiny):
    torch.manual_seed(0)
    drawn, means = tiny.generate(20_000)
    counts = torch.bincount((drawn * torch.tensor([4, 2, 1])).sum(1), minlength=8)
    expected = 20_000 * tiny.evidence(ALL)
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < 24.3  # of 7 degrees of freedom, with probability .999
    assert drawn.shape == means.shape == (20_000, 3)
    residual = (drawn - means).mean(0) / (means * (1 - means)).mean(0).sqrt() * 20_000**0.5
    assert float(residual.abs().max()) < 4.5  # the mean of a symbol of two kinds is its probability


def test_the_program_without_symbols_draws_latents_that_explain_its_symbols():
    model = transformer(scale=0.5).requires_grad_(False).train(False)
    nodes = pyro.poutine.trace(model).get_trace(num_sequences=300).nodes
    x = nodes["x"]["value"]
    assert x.shape == (300, LENGTH)
    assert not nodes["x"]["is_observed"]
    stream = model.embed(x)
    for number, block in enumerate(model.blocks, start=1):
        z = nodes[f"z{number}"]["value"]
        noise = z - block(stream) / model.scales[number]
        count = noise.numel()
        assert float(noise.mean().abs()) < 4.5 / count**0.5
        assert float((noise.var() - 1).abs()) < 4.5 * (2 / count) ** 0.5
        stream = model.scales[number] * z
        torch.testing.assert_close(nodes[f"stream{number}"]["value"], stream)
    told = model.logits(stream).softmax(-1)
    excess = (F.one_hot(x, NUM_SYMBOLS) - told).sum((0, 1))
    spread = (told * (1 - told)).sum((0, 1)).sqrt()
    assert float((excess / spread).abs().max()) < 4.5


def test_what_is_at_a_position_depends_on_no_later_one():
    block = CausalBlock(WIDTH, 2, LENGTH)
    stream = torch.randn(3, LENGTH, WIDTH)
    changed = stream.clone()
    changed[:, 4] = torch.randn(3, WIDTH)
    before, after = block(stream), block(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert bool((before[:, 4:] != after[:, 4:]).all())
    model, x = transformer(), symbols()
    other = x.flatten(1).clone()
    other[:, 3] = (other[:, 3] + 1) % NUM_SYMBOLS
    first, second = model.network(x), model.network(other)
    assert torch.equal(first[:, :4], second[:, :4])  # the logits of symbol 3 are at place 3
    assert bool((first[:, 4:] != second[:, 4:]).any(-1).all())


def test_without_latents_it_is_an_ordinary_transformer():
    model, x = transformer(latent_after=[]), symbols()
    trace = pyro.poutine.trace(model).get_trace(x)
    expected = -F.cross_entropy(model.network(x).flatten(0, 1), x.flatten(), reduction="sum")
    torch.testing.assert_close(trace.log_prob_sum(), expected)


def test_attention_is_torchs():
    block = CausalBlock(WIDTH, 2, LENGTH)
    stream = torch.randn(3, LENGTH, WIDTH)
    mask = torch.full((LENGTH, LENGTH), -math.inf).triu(1)
    normed = block.first_norm(stream)
    attended, _ = F.multi_head_attention_forward(
        *(normed.transpose(0, 1),) * 3,
        WIDTH,
        2,
        block.queries_keys_values.weight,
        block.queries_keys_values.bias,
        None,
        None,
        False,
        0.0,
        block.merge.weight,
        block.merge.bias,
        attn_mask=mask,
    )
    middle = stream + attended.transpose(0, 1)
    torch.testing.assert_close(block(stream), middle + block.hidden(block.second_norm(middle)))


def test_every_block_learns_from_its_own_factor_alone():
    model, x = transformer(scale=0.5, scale_ratio=0.5), symbols()
    problem = DCPC(model, num_particles=3).bind(x)
    state, _ = problem.sweep(problem.init())
    problem.loss(state).backward()
    weights = state.log_weight.normalized()  # (K, N)
    above, latents = model.embed(x.flatten(1)).expand(3, -1, -1, -1), state.latents
    for number, block in enumerate(model.blocks, start=1):
        z, scale = latents[f"z{number}"], model.scales[number]
        loc = torch.stack([block(particle) for particle in above.unbind()]) / scale
        own = -(weights * Normal(loc, 1.0).log_prob(z).sum((-1, -2))).sum()
        parameters = dict(block.named_parameters())
        gradients = torch.autograd.grad(own, list(parameters.values()), retain_graph=True)
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, msg=f"{number}: {name}")
        above = (scale * z).detach()
    told = model.logits(above).log_softmax(-1)
    chosen = told.gather(-1, x.flatten(1)[..., None].expand(3, -1, -1, 1)).sum((-1, -2))
    (gradient,) = torch.autograd.grad(-(weights * chosen).sum(), [model.head.weight])
    torch.testing.assert_close(model.head.weight.grad, gradient)


def relative_error(scale_ratio: float) -> float:
    """Of the blocks' local gradient after one sweep from a forward pass, to backpropagation's."""
    x = symbols()
    plain = transformer(embedding_scale=1.0)
    model = transformer(embedding_scale=1.0, scale=1e-3, scale_ratio=scale_ratio)
    F.cross_entropy(plain.network(x).flatten(0, 1), x.flatten(), reduction="sum").backward()
    dcpc = DCPC(model, num_particles=1, algorithm="pc", schedule="sequential", step_size=1.0)
    problem = dcpc.bind(x)
    state, _ = problem.sweep(problem.init_at_means())
    problem.loss(state).backward()
    pairs = [
        (local.grad, whole.grad)
        for local, whole in zip(model.parameters(), plain.parameters(), strict=True)
    ]
    difference = torch.cat([(local - whole).flatten() for local, whole in pairs])
    return float(difference.norm() / torch.cat([whole.flatten() for _, whole in pairs]).norm())


def test_one_sweep_gives_the_gradient_of_backpropagation_to_second_order_in_the_ratio():
    coarse, fine = relative_error(0.2), relative_error(0.1)
    assert fine < 0.05
    assert 3.0 < coarse / fine < 5.0  # the square of two
    assert relative_error(1.0) > 0.3  # equal scales take the errors of residual blocks away


def test_samples_of_the_prior_are_generated_and_have_the_shape_of_the_data():
    model, x = transformer(), symbols()
    drawn = prior_samples(model, x, seed=3)
    assert drawn.samples.shape == drawn.means.shape == x.shape
    assert drawn.samples.dtype == torch.long
    # They do not hang on the values of the data.
    again = prior_samples(model, torch.zeros_like(x), seed=3)
    assert torch.equal(again.samples, drawn.samples)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_symbols", 1),
        ("length", 0),
        ("width", 0),
        ("num_blocks", 0),
        ("num_heads", 3),
        ("latent_after", [4]),
        ("latent_after", [1, 1]),
        ("scale", 0.0),
        ("scale_ratio", math.inf),
        ("embedding_scale", -1.0),
    ],
)
def test_impossible_settings_are_refused(name, value):
    settings = {"num_symbols": 2, "length": 3, "width": 4, "num_blocks": 3, "num_heads": 2}
    with pytest.raises(DCPCError, match=name):
        LatentTransformer(**{**settings, name: value})


@pytest.mark.parametrize("x", [torch.zeros(2, LENGTH), torch.zeros(2, 4, dtype=torch.long)])
def test_data_that_are_no_symbols_are_refused(x):
    with pytest.raises(DCPCError, match="takes integers, 6 in a sequence"):
        transformer()(x)
