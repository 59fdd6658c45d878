"""Values that relax on the energy of a network."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dcpc.errors import DataError, OptionError
from dcpc.networks import (
    Bias,
    FactorizedGaussianNode,
    FixedNode,
    FunctionNode,
    InferenceLearning,
    PredictiveCodingNetwork,
    RelaxationError,
    SquaredErrorNode,
    relax,
    sgd,
)

OPTIMIZERS = [
    sgd(0.1),
    partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    partial(torch.optim.Adam, lr=0.1),
]


def deep(depth: int = 4, width: int = 3) -> PredictiveCodingNetwork:
    torch.manual_seed(0)
    modules: list[nn.Module] = []
    for _ in range(depth):
        modules += [nn.Linear(width, width), nn.Tanh(), SquaredErrorNode(width)]
    return PredictiveCodingNetwork(*modules).double()


def data(batch: int = 5, width: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, batch, width, dtype=torch.double, generator=generator)
    return x, y


def values(network: PredictiveCodingNetwork) -> list[Tensor]:
    return [node.value.detach().clone() for node in network.nodes]


def test_a_forward_initialised_network_rests_until_it_is_told_a_label() -> None:
    network, (x, y) = deep(), data()
    network.init(x)
    assert network.energy().tolist() == [0.0] * 5
    before = values(network)
    relaxed = relax(network, 10, sgd(0.1))
    assert relaxed.change == 0.0
    assert all(torch.equal(b, a) for b, a in zip(before, values(network), strict=True))
    torch.testing.assert_close(network.nodes[-1].value, network(x))

    network.nodes[-1].clamp(y)
    start = network.energy().sum()
    relaxed = relax(network, 4, sgd(0.1))
    assert bool((network.energy().sum() < start).all())
    assert bool((relaxed.energy[1:] < relaxed.energy[:-1]).all())
    torch.testing.assert_close(relaxed.energy[0], start / 5)
    after = values(network)
    moved = [not torch.equal(b, a) for b, a in zip(before, after, strict=True)]
    assert moved == [False, True, True, True, True]
    assert torch.equal(after[-1], y)


def test_an_input_that_is_released_moves_with_the_rest() -> None:
    network, (x, y) = deep(depth=2), data()
    network.init(x)
    network.nodes[0].release()
    network.nodes[-1].clamp(y)
    first, second = (layer for layer in network.modules() if isinstance(layer, nn.Linear))
    above, below = values(network)[:2]
    for _ in range(3):
        above, below = (value.detach().requires_grad_() for value in (above, below))
        energy = 0.5 * (below - first(above).tanh()).square().sum()
        energy = energy + 0.5 * (y - second(below).tanh()).square().sum()
        pulls = torch.autograd.grad(energy, (above, below))
        above, below = (v - 0.1 * pull for v, pull in zip((above, below), pulls, strict=True))
    relax(network, 3, sgd(0.1))
    assert not torch.allclose(network.nodes[0].value, x)
    torch.testing.assert_close(network.nodes[0].value.detach(), above.detach())
    torch.testing.assert_close(network.nodes[1].value.detach(), below.detach())


@pytest.mark.parametrize(("num_steps", "expected"), [(1, [3]), (2, [2, 3]), (3, [1, 2, 3])])
def test_news_of_the_label_travel_one_node_per_step(num_steps: int, expected: list[int]) -> None:
    network, (x, y) = deep(), data()
    network.init(x)
    before = values(network)
    network.nodes[-1].clamp(y)
    relax(network, num_steps, sgd(0.1))
    pairs = zip(before[:-1], values(network)[:-1], strict=True)
    assert [i for i, (b, a) in enumerate(pairs) if not torch.equal(b, a)] == expected


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_of_a_batch_is_left_for_the_next(optimizer: object) -> None:
    network = PredictiveCodingNetwork(Bias(2), SquaredErrorNode(2)).double()
    with torch.no_grad():
        network.layers[0].bias.fill_(1.0)
    found = []
    for batch in (3, 3, 7):
        network.init(torch.zeros(batch, 1, dtype=torch.double))
        network.nodes[-1].init(torch.zeros(batch, 2, dtype=torch.double))
        relax(network, 1, optimizer)
        found.append(network.nodes[-1].value.detach().clone())
        network.reset()
    # From z = 0 towards 1: 0.1 times the gradient, and Adam's first step is its step size.
    for value in found:
        torch.testing.assert_close(value, torch.full_like(value, 0.1))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_samples_never_mix(optimizer: object) -> None:
    network, (x, y) = deep(), data()

    def relaxed(rows: slice) -> list[Tensor]:
        network.init(x[rows])
        network.nodes[-1].clamp(y[rows])
        relax(network, 7, optimizer)
        return values(network)

    together = relaxed(slice(None))
    for row in range(5):
        alone = relaxed(slice(row, row + 1))
        for one, all_ in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_[row])


def test_a_frozen_value_is_the_same_bits_afterwards() -> None:
    network, (x, y) = deep(), data()
    network.init(x)
    network.nodes[-1].clamp(y)
    network.nodes[2].is_frozen = True
    before = values(network)
    relax(network, 9, sgd(0.1))
    after = values(network)
    assert torch.equal(before[2], after[2])
    assert not torch.equal(before[3], after[3])


def test_a_linear_network_relaxes_to_the_energy_in_closed_form() -> None:
    # With r = y - W2 W1 x: F = r' (I + W2 W2')^-1 r / 2.
    torch.manual_seed(0)
    first, second = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)
    network = PredictiveCodingNetwork(first, SquaredErrorNode(4), second, SquaredErrorNode(2))
    network, x, y = network.double(), *(v.double() for v in (torch.randn(5, 3), torch.randn(5, 2)))
    network.init(x)
    network.nodes[-1].clamp(y)
    relaxed = relax(network, 2000, sgd(0.3), tolerance=1e-15)
    assert relaxed.num_steps < 2000
    residual = y - x @ first.weight.T @ second.weight.T
    precision = torch.linalg.inv(torch.eye(2).double() + second.weight @ second.weight.T)
    expected = 0.5 * torch.einsum("bi,ij,bj->b", residual, precision, residual)
    torch.testing.assert_close(network.energy(), expected, rtol=1e-12, atol=0)


def test_the_change_and_the_number_of_steps_are_true() -> None:
    # z <- z - 0.5 z halves the value: steps change it by 4, 2, 1, 0.5.
    network = PredictiveCodingNetwork(Bias(1), SquaredErrorNode(1)).double()

    def relaxed(num_steps: int, tolerance: float = 0.0) -> tuple[int, float]:
        network.init(torch.zeros(1, 1, dtype=torch.double))
        network.nodes[-1].init(torch.full((1, 1), 8.0, dtype=torch.double))
        result = relax(network, num_steps, sgd(0.5), tolerance)
        return result.num_steps, result.change

    assert relaxed(3) == (3, 1.0)
    assert relaxed(100, tolerance=0.5) == (4, 0.5)
    assert relaxed(100, tolerance=4.0) == (1, 4.0)
    assert relaxed(0) == (0, 0.0)


def test_an_input_that_is_released_relaxes_as_well() -> None:
    # x, and u = x: the label pulls the input to itself.
    network = PredictiveCodingNetwork(nn.Identity(), SquaredErrorNode(3))
    network.init(torch.zeros(2, 3))
    network.nodes[-1].clamp(torch.ones(2, 3))
    network.input.release()
    relax(network, 200, sgd(0.1))
    torch.testing.assert_close(network.input.value, torch.ones(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_precision_follows_the_weights(dtype: torch.dtype) -> None:
    network, (x, y) = deep().to(dtype), data()
    network.init(x.to(dtype))
    network.nodes[-1].clamp(y.to(dtype))
    relax(network, 2, sgd(0.1))
    assert {node.value.dtype for node in network.nodes} == {dtype}


@pytest.mark.gpu
def test_a_gpu_relaxes_to_the_same_values() -> None:
    found = []
    for device in ("cpu", "cuda"):
        network, (x, y) = deep().to(device), data()
        network.init(x.to(device))
        network.nodes[-1].clamp(y.to(device))
        relax(network, 8, sgd(0.1))
        assert {node.value.device.type for node in network.nodes} == {device}
        found.append([value.cpu() for value in values(network)])
    for on_cpu, on_gpu in zip(*found, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-10, atol=1e-12)


def test_divergence_names_the_layer_and_the_step() -> None:
    network, (x, y) = deep(), data()
    network.init(x)
    network.nodes[-1].clamp(y)
    with pytest.raises(RelaxationError, match=r"energy of \['layers.\d+'.*at step \d+ of"):
        relax(network, 1000, sgd(1e6))
    with torch.no_grad():
        network.layers[3].weight[0, 0] = torch.nan
    network.init(x)
    rule, optimizer = InferenceLearning(), torch.optim.SGD(network.weights(), lr=0.1)
    with pytest.raises(RelaxationError, match=r"energy of \['layers.5'"):
        rule.learn(network, x, y, optimizer)


def test_parts_whose_sum_is_too_large_are_told_by_the_largest() -> None:
    def huge(size: float) -> FunctionNode:
        return FunctionNode(lambda value, _: torch.full((len(value),), size), 3)

    network = PredictiveCodingNetwork(
        nn.Linear(3, 3), huge(1.0e38), nn.Linear(3, 3), huge(3.0e38), nn.Linear(3, 3), huge(0.5e38)
    )
    network.init(torch.zeros(1, 3))
    with pytest.raises(RelaxationError, match=r"energy of \['layers\.3'\] is NaN or infinite"):
        relax(network, 1, sgd(0.1))


def test_a_mean_energy_that_is_too_large_names_its_part() -> None:
    # Errors double at every step, energies grow fourfold: the sum of a hundred of them overflows
    # while every single one is finite.
    network, y = PredictiveCodingNetwork(nn.Linear(3, 3), SquaredErrorNode(3)), torch.ones(100, 3)
    network.init(torch.zeros(100, 3))
    network.nodes[-1].init(y)
    with pytest.raises(RelaxationError, match=r"energy of \['layers\.1'\] .* at step \d+ of"):
        relax(network, 1000, sgd(3.0))
    assert bool(network.energy().isfinite().all())


@pytest.mark.parametrize("tolerance", [0.0, 1e-6])
def test_a_value_that_is_no_number_has_not_converged(tolerance: float) -> None:
    # Zero energy at the first values, with a slope of 0 / 0 there.
    distance = FunctionNode(lambda value, prediction: (value - prediction).norm(dim=1).sqrt(), 3)
    network, (x, _) = PredictiveCodingNetwork(nn.Linear(3, 3), distance).double(), data()
    network.init(x)
    with pytest.raises(RelaxationError, match=r"energy of \['layers\.1'\] .* after step 0 of"):
        relax(network, 1, sgd(0.1), tolerance)


def test_only_a_network_with_values_relaxes() -> None:
    with pytest.raises(OptionError, match=r"no values to relax; give it first ones: init\(x\)"):
        relax(deep(), 1, sgd(0.1))


def test_a_failing_step_leaves_no_values_behind() -> None:
    def fails(value: Tensor, prediction: Tensor) -> Tensor:
        raise RuntimeError("on purpose")

    network, (x, y) = PredictiveCodingNetwork(nn.Linear(3, 3), FunctionNode(fails, 3)), data()
    network = network.double()
    optimizer = torch.optim.SGD(network.weights(), lr=0.1)
    with pytest.raises(RuntimeError, match="on purpose"):
        InferenceLearning().learn(network, x, y, optimizer)
    assert not any(node.has_value or node.is_clamped for node in network.nodes)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([], "must end with a node, .* got no modules"),
        ([SquaredErrorNode(2), nn.Linear(2, 2)], "must end with a node, .* got Linear last"),
    ],
)
def test_a_network_without_an_output_is_refused(modules: list, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PredictiveCodingNetwork(*modules)


def test_layers_may_occur_twice() -> None:
    torch.manual_seed(0)
    linear, phi, (x, _) = nn.Linear(3, 3).double(), nn.Tanh(), data()
    network = PredictiveCodingNetwork(
        linear, phi, SquaredErrorNode(3), linear, phi, SquaredErrorNode(3)
    ).double()
    expected = linear(linear(x).tanh()).tanh()
    torch.testing.assert_close(network(x), expected)
    network.init(x)
    torch.testing.assert_close(network.nodes[-1].value, expected)
    assert [id(p) for p in network.weights()] == [id(linear.weight), id(linear.bias)]


def test_impossible_nodes_of_a_network_are_refused() -> None:
    node = SquaredErrorNode(3)
    with pytest.raises(OptionError, match="a node occurs twice"):
        PredictiveCodingNetwork(nn.Linear(3, 3), node, nn.Linear(3, 3), node)
    with pytest.raises(OptionError, match=r"input_node must be .*, got SquaredErrorNode"):
        PredictiveCodingNetwork(nn.Linear(3, 3), node, input_node=SquaredErrorNode(3))


def test_integers_are_inputs_of_a_fixed_node_only() -> None:
    words = torch.tensor([0, 2, 1])
    modules = nn.Embedding(3, 4), SquaredErrorNode(4)
    network = PredictiveCodingNetwork(*modules, input_node=FixedNode())
    network.init(words)
    assert torch.equal(network.nodes[-1].value, modules[0].weight[words])
    with pytest.raises(DataError, match=r"floating-point, got torch\.int64.*FixedNode"):
        PredictiveCodingNetwork(*modules).init(words)


def test_impossible_relaxations_and_targets_are_refused() -> None:
    network, (x, y) = deep(), data()
    network.init(x)
    with pytest.raises(OptionError, match="num_steps and tolerance must be at least 0, got -1"):
        relax(network, -1, sgd(0.1))
    with pytest.raises(OptionError, match=r"step_size must be positive, got -0\.1"):
        sgd(-0.1)
    with pytest.raises(DataError, match=r"shape \(batch, 3\), got \(5, 2\)"):
        network.nodes[-1].clamp(y[:, :2])


def test_weights_of_stages_include_those_of_their_node() -> None:
    node = FactorizedGaussianNode(2)
    first, second = nn.Linear(3, 2), nn.Linear(2, 2)
    network = PredictiveCodingNetwork(first, node, nn.ReLU(), second, SquaredErrorNode(2))
    assert [id(p) for p in network.weights([1])] == [
        id(p) for p in (first.weight, first.bias, node.logvar)
    ]
    assert [id(p) for p in network.weights([2])] == [id(p) for p in (second.weight, second.bias)]
    second.bias.requires_grad_(False)
    assert len(network.weights()) == 4
