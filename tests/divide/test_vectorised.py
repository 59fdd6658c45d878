"""Models that `vmap` refuses as they are written: same values and gradients under `vectorised`."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import hmm
from scipy import stats
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from dcpc import DCPC
from dcpc.divide.vectorised import drawing, vectorised

NUM_PARTICLES = 5

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(autouse=True)
def unvalidated():
    """As in a run of the engine: validation branches on values, which `vmap` cannot."""
    with pyro.validation_enabled(False):
        yield


def scaled_eye(z: Tensor) -> Tensor:
    return torch.eye(2) * z.exp()


def normal(loc: Tensor, scale: Tensor | float = 1.0) -> dist.Distribution:
    return dist.Normal(loc, scale).to_event(1)


def gaussian_hmm(z: Tensor) -> dist.Distribution:
    return dist.GaussianHMM(
        dist.MultivariateNormal(torch.zeros(2) + z[0], torch.eye(2)),
        torch.eye(2) * z[1].tanh(),
        dist.MultivariateNormal(torch.zeros(2), scaled_eye(z[2])),
        torch.eye(2),
        dist.MultivariateNormal(torch.zeros(2), torch.eye(2)).expand([4]),
    )


def gaussian_mrf(z: Tensor) -> dist.Distribution:
    return dist.GaussianMRF(
        dist.MultivariateNormal(torch.zeros(2) + z[0], torch.eye(2)),
        dist.MultivariateNormal(torch.zeros(4), torch.eye(4) * z[1].exp()).expand([4]),
        dist.MultivariateNormal(torch.zeros(4), torch.eye(4)).expand([4]),
    )


def discrete_hmm(z: Tensor) -> dist.Distribution:
    return dist.DiscreteHMM(
        torch.stack([z[0], z[1]]),
        torch.stack([z[:2], z[1:]]),
        dist.Normal(torch.stack([z[0], z[2]]), z[1].exp()),
    )


def impossible_hmm(z: Tensor) -> dist.Distribution:
    """A left-to-right chain, some of whose transitions have probability zero."""
    jump = torch.tensor([[0.0, 0.0], [-torch.inf, 0.0]])
    start = torch.tensor([0.0, -torch.inf])
    return dist.DiscreteHMM(start, jump + z[0], dist.Normal(z[1:], 1.0))


def counts(*values: float) -> Tensor:
    return torch.tensor(values)


TIMES = torch.tensor([-0.3, -0.2])
LIKELIHOODS = {
    "multinomial": (lambda z: dist.Multinomial(6, logits=z), counts(2.0, 0.0, 4.0)),
    "multinomials": (
        lambda z: dist.Multinomial(3, torch.stack([z, -z]).softmax(-1)).to_event(1),
        torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]]),
    ),
    "ordered_logistic": (
        lambda z: dist.OrderedLogistic(z[0], torch.cat([z[1:2], z[1:2] + z[2:].exp()])),
        torch.tensor(1),
    ),
    "ordered_logistics": (
        lambda z: dist.OrderedLogistic(z, torch.tensor([-1.0, 0.0, 2.0])).to_event(1),
        torch.tensor([0, 3, 2]),
    ),
    "discrete_hmm": (discrete_hmm, torch.randn(5)),
    "impossible_hmm": (impossible_hmm, torch.randn(6)),
    "gaussian_hmm": (gaussian_hmm, torch.randn(4, 2)),
    "gaussian_mrf": (gaussian_mrf, torch.randn(4, 2)),
    "sparse_dirichlet_multinomial": (
        lambda z: dist.DirichletMultinomial(z.exp(), 6, is_sparse=True),
        counts(2.0, 0.0, 4.0),
    ),
    "sparse_poisson": (
        lambda z: dist.Poisson(z.exp(), is_sparse=True).to_event(1),
        counts(2.0, 0.0, 4.0),
    ),
    "skewed_angles": (
        lambda z: dist.SineSkewed(dist.VonMises(z[:2], z[2].exp()).to_event(1), 0.4 * z[1:].tanh()),
        torch.tensor([0.3, -2.0]),
    ),
    "coalescent": (
        lambda z: dist.CoalescentTimesWithRate(counts(0.0, 0.1, 0.2), z[0].exp() * torch.ones(5)),
        TIMES,
    ),
}


def compare(function: Callable[[Tensor], Tensor], *, tolerance: float = 1e-9) -> None:
    """Compares `vmap` and a capture, within `vectorised`, with plain runs, particle by particle."""
    z = torch.randn(NUM_PARTICLES, 3)
    plain = z.clone().requires_grad_()
    expected = torch.stack([function(row) for row in plain])
    (expected_gradient,) = torch.autograd.grad(expected.sum(), plain)
    assert expected.isfinite().all()
    assert expected_gradient.isfinite().all()

    def inside(row: Tensor) -> Tensor:
        with vectorised():
            return function(row)

    # No operation falls back to a loop over particles.
    torch._C._functorch._set_vmap_fallback_enabled(False)
    try:
        captured = make_fx(torch.vmap(inside, randomness="different"))(z.clone())
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(True)
    for run in (torch.vmap(inside, randomness="different"), captured):
        leaf = z.clone().requires_grad_()
        result = run(leaf)
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
        (gradient,) = torch.autograd.grad(result.sum(), leaf)
        torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihoods_and_their_gradients_are_those_of_pyro(name):
    make, value = LIKELIHOODS[name]
    value = value.double() if value.is_floating_point() else value
    compare(lambda z: make(z).log_prob(value))


def test_a_count_of_zero_with_probability_zero_contributes_nothing():
    def log_prob(z: Tensor) -> Tensor:
        probabilities = torch.cat([z[:2].softmax(-1), torch.zeros(1)])
        logits = torch.cat([z[:2].log_softmax(-1), torch.full((1,), -torch.inf)])
        value = torch.tensor([2.0, 1.0, 0.0])
        by_probs = dist.Multinomial(3, probabilities).log_prob(value)
        return by_probs + dist.Multinomial(3, logits=logits).log_prob(value)

    compare(log_prob)


def test_a_number_is_written_under_a_mask():
    def function(z: Tensor) -> Tensor:
        x = (z * 2.0).unsqueeze(-1) * torch.ones(3, 2)
        x[z < 0] = 0.5
        x[x > 1] = torch.tensor(1.0)
        return (x.sum(-1) * z).sum()

    compare(function)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True},
        {"bias": False, "batch_first": True},
        {"num_layers": 2, "dropout": 0.5},
    ],
)
def test_recurrent_networks_of_latents_run(kind, options):
    network = kind(2, 3, **options).eval()
    inputs = torch.randn(3, 2, 2)
    pick = torch.randn(3, 2, 6 if options.get("bidirectional") else 3)

    def function(z: Tensor) -> Tensor:
        output, state = network(inputs * z[:2])
        states = state if isinstance(state, tuple) else (state,)
        return (output * pick).sum() + sum(part.square().sum() for part in states)

    compare(function)


def test_other_activations_projections_and_unbatched_inputs_of_recurrent_networks_run():
    relu = nn.RNN(2, 3, nonlinearity="relu")
    projected = nn.LSTM(2, 5, proj_size=3)
    inputs = torch.randn(4, 2)
    start = torch.randn(1, 3)

    def function(z: Tensor) -> Tensor:
        first = relu(inputs * z[:2], start * z[2])[0].sum()
        return first + projected(inputs * z[:2])[0].square().sum()

    compare(function)


def test_weights_of_a_recurrent_network_learn_through_a_capture():
    network = nn.GRU(2, 3)
    inputs = torch.randn(4, 1, 2)

    def function(z: Tensor) -> Tensor:
        return network(inputs * z[:2])[0].square().sum()

    def inside(z: Tensor) -> Tensor:
        with vectorised():
            return function(z)

    z = torch.randn(NUM_PARTICLES, 3)
    captured = make_fx(torch.vmap(inside, randomness="different"))(z)
    parameters = list(network.parameters())
    expected = torch.autograd.grad(sum(function(row) for row in z), parameters)
    # A capture holds the parameters by reference.
    for ours, theirs in zip(
        torch.autograd.grad(captured(z).sum(), parameters), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_networks_of_data_alone_run():
    network, data = nn.GRU(2, 3), torch.randn(4, 1, 2)
    compare(lambda z: z.sum() * network(data)[0].sum())


MODULES = {
    "attention": (nn.MultiheadAttention(4, 2), lambda m, x: m(x, x, x)[0]),
    "transformer": (
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
        lambda m, x: m(x.unsqueeze(0)),
    ),
    "batch_norm": (nn.BatchNorm1d(4), lambda m, x: m(x)),
    "layer_norm": (nn.LayerNorm(4), lambda m, x: m(x)),
    "embedding": (nn.Embedding(7, 4), lambda m, x: m(torch.tensor([1, 5, 2])) * x),
    "gru_cell": (nn.GRUCell(4, 3), lambda m, x: m(x)),
    "lstm_cell": (nn.LSTMCell(4, 3), lambda m, x: torch.cat(m(x))),
    "rnn_cell": (nn.RNNCell(4, 3, bias=False), lambda m, x: m(x)),
    "convolution": (nn.Conv1d(1, 2, 2), lambda m, x: m(x.unsqueeze(1))),
}


@pytest.mark.parametrize("name", MODULES)
def test_other_modules_of_latents_run(name):
    module, apply = MODULES[name]
    module = module.double().eval()
    compare(lambda z: apply(module, torch.cat([z, z[:1]]) * torch.ones(3, 4)).sin().sum())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.tensor([[True, False, True]] * 3)},
        {"attn_mask": torch.tensor([[0.0, 1.0, -1.0]] * 3, dtype=torch.float64)},
        {"enable_gqa": True},
    ],
)
def test_fused_attention_of_latents_runs(options):
    query, key, value = torch.randn(4, 3, 3), torch.randn(4, 3, 3), torch.randn(4, 3, 3)
    heads = 2 if "enable_gqa" in options else 4

    def function(z: Tensor) -> Tensor:
        arguments = (query * z, key[:heads] + z, value[:heads] * z)
        return functional.scaled_dot_product_attention(*arguments, **options).sin().sum()

    compare(function)


EYE = torch.eye(2, dtype=torch.float64)
SAMPLERS = {
    "multivariate_normal": lambda: dist.MultivariateNormal(torch.zeros(2), EYE),
    "low_rank_normal": lambda: dist.LowRankMultivariateNormal(
        torch.zeros(2), torch.ones(2, 1), torch.ones(2)
    ),
    "student": lambda: dist.StudentT(torch.tensor(3.0), 0.0, 1.0),
    "multivariate_student": lambda: dist.MultivariateStudentT(
        torch.tensor(3.0), torch.zeros(2), EYE
    ),
    "cauchy": lambda: dist.Cauchy(torch.tensor(0.0), 1.0),
    "exponential": lambda: dist.Exponential(torch.tensor(2.0)).expand([2]).to_event(1),
    "laplace": lambda: dist.Laplace(torch.tensor(0.0), 1.0),
    "asymmetric_laplace": lambda: dist.AsymmetricLaplace(torch.tensor(0.0), 1.0, 2.0),
    "folded": lambda: dist.FoldedDistribution(dist.Laplace(torch.tensor(0.0), 1.0)),
    "masked": lambda: dist.Cauchy(torch.zeros(2), 1.0).mask(torch.tensor([True, False])),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_that_fill_in_place_draw_other_values_for_each_particle(name):
    fn = SAMPLERS[name]()

    def draw(_: Tensor) -> Tensor:
        with vectorised(), drawing():
            return fn.sample()

    drawn = torch.vmap(draw, randomness="different")(torch.zeros(2000))
    assert drawn.shape == (2000, *fn.batch_shape, *fn.event_shape)
    assert len(drawn.flatten().unique()) == drawn.numel()
    plain = fn.sample((2000,))
    ours, theirs = (x.reshape(2000, -1)[:, 0].numpy() for x in (drawn, plain))
    assert stats.ks_2samp(ours, theirs).pvalue > 1e-3


def test_what_was_replaced_is_put_back_also_after_an_error():
    before = (dist.OrderedLogistic.__init__, hmm._logmatmulexp, hmm.safe_cholesky)
    with pytest.raises(ZeroDivisionError), vectorised(), vectorised():
        raise ZeroDivisionError
    assert before == (dist.OrderedLogistic.__init__, hmm._logmatmulexp, hmm.safe_cholesky)


def test_a_rate_of_zero_at_a_count_of_zero_has_a_score():
    """`d/dr (0 log r - r)` is -1; torch's own is NaN."""

    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        on = torch.tensor([0.0, 1.0])
        with pyro.plate("data", 2):
            pyro.sample("x", dist.Poisson(on * a.exp()), obs=x)

    x = torch.tensor([0.0, 3.0])
    problem = DCPC(model, num_particles=4).bind(x)
    state = problem.init()
    (group,) = problem.division.groups
    a = state.latents["a"]
    evaluation = group.evaluate(group.pack(state.latents), state.latents, (x,))
    torch.testing.assert_close(evaluation.score.flatten(), -a + 3.0 - a.exp())
