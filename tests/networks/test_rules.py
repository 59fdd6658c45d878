"""What weights learn by each rule, against backpropagation and finite differences."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcpc.errors import DataError, OptionError
from dcpc.models import Perceptron
from dcpc.networks import (
    Backpropagation,
    ConditionalGaussian,
    CrossEntropyNode,
    EnergyNetwork,
    EquilibriumPropagation,
    IncrementalInferenceLearning,
    InferenceLearning,
    LearningRule,
    PredictiveCodingNetwork,
    RelaxationError,
    RestrictedHopfield,
    SquaredErrorNode,
    ZeroDivergenceLearning,
    relax,
    sgd,
)
from dcpc.networks.energy_based import ACTIVATIONS

SIZES = [6, 5, 4, 3]


def chain(output: type[nn.Module] = SquaredErrorNode) -> PredictiveCodingNetwork:
    torch.manual_seed(0)
    modules: list[nn.Module] = []
    for above, below in itertools.pairwise(SIZES[:-1]):
        modules += [nn.Linear(above, below), nn.Tanh(), SquaredErrorNode(below)]
    return PredictiveCodingNetwork(*modules, nn.Linear(4, 3), output(3)).double()


def data(batch: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 6, dtype=torch.double, generator=generator)
    labels = torch.randint(3, (batch,), generator=generator)
    return x, nn.functional.one_hot(labels, 3).double()


def learned(rule: LearningRule, network: EnergyNetwork, x: Tensor, y: Tensor) -> list[Tensor]:
    """Minus the change of the weights by steps of size one."""
    moved = copy.deepcopy(network)
    rule.learn(moved, x, y, torch.optim.SGD(moved.weights(), lr=1.0))
    return [
        b.detach() - a.detach() for b, a in zip(network.weights(), moved.weights(), strict=True)
    ]


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    difference = torch.cat([(f - e).flatten() for f, e in zip(found, expected, strict=True)])
    return float(difference.norm() / torch.cat([e.flatten() for e in expected]).norm())


def gradients_seen(
    rule: LearningRule, network: EnergyNetwork, x: Tensor, y: Tensor
) -> list[Tensor]:
    """The gradients that an optimiser is given, without the rounding of a step."""
    moved = copy.deepcopy(network)
    optimizer, seen = torch.optim.SGD(moved.weights(), lr=1.0), {}

    def record(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        weights = optimizer.param_groups[0]["params"]
        seen.update({p: p.grad.clone() for p in weights if p.grad is not None})

    optimizer.register_step_pre_hook(record)
    rule.learn(moved, x, y, optimizer)
    return [seen[weight] for weight in moved.weights()]


@pytest.mark.parametrize("output", [SquaredErrorNode, CrossEntropyNode])
@pytest.mark.parametrize("rule", [ZeroDivergenceLearning(), Backpropagation()])
def test_zero_divergence_learning_is_backpropagation(
    rule: LearningRule, output: type[nn.Module]
) -> None:
    network, (x, y) = chain(output), data()
    loss = network.nodes[-1].energy(y, network(x)).mean()
    expected = torch.autograd.grad(loss, network.weights())
    for found, truth in zip(gradients_seen(rule, network, x, y), expected, strict=True):
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-16)
    for found, truth in zip(learned(rule, network, x, y), expected, strict=True):
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-15)


def test_inference_learning_descends_the_energy_that_inference_has_minimised() -> None:
    # By the envelope theorem, the derivative of min_z F(z, w) in w is that of F at the minimum.
    network, (x, y) = chain(), data()
    rule = InferenceLearning(num_steps=600, value_optimizer=sgd(0.4))
    found = learned(rule, network, x, y)

    def minimum() -> float:
        network.init(x)
        network.nodes[-1].clamp(y)
        relax(network, 600, sgd(0.4))
        return float(network.energy().mean().detach())

    torch.manual_seed(0)
    directions = [torch.randn_like(parameter) for parameter in network.weights()]
    slope, size = 0.0, 1e-5
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for parameter, direction in zip(network.weights(), directions, strict=True):
                parameter.add_(sign * size * direction)
        slope += sign * minimum() / (2 * size)
        with torch.no_grad():
            for parameter, direction in zip(network.weights(), directions, strict=True):
                parameter.sub_(sign * size * direction)
    expected = sum(float((f * d).sum()) for f, d in zip(found, directions, strict=True))
    assert slope == pytest.approx(expected, rel=1e-7)


def test_inference_learning_without_inference_teaches_the_last_stage_only() -> None:
    network, (x, y) = chain(), data()
    found = learned(InferenceLearning(num_steps=0), network, x, y)
    truth = learned(Backpropagation(), network, x, y)
    assert [bool(f.any()) for f in found] == [False, False, False, False, True, True]
    torch.testing.assert_close(found[-2:], truth[-2:])


class Counter(torch.optim.SGD):
    """Counts its steps, and takes none."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, lr=1.0)
        self.count = 0

    def step(self, closure: object = None) -> None:
        self.count += 1


@pytest.mark.parametrize(
    ("num_steps", "first", "every", "expected"),
    [(8, 0, 1, 8), (8, 0, 3, 3), (8, 2, 3, 2), (8, 7, 1, 1), (8, 5, 2, 2)],
)
def test_incremental_schedules(num_steps: int, first: int, every: int, expected: int) -> None:
    network, (x, y) = chain(), data()
    counter = Counter(network.weights())
    rule = IncrementalInferenceLearning(num_steps, first, every)
    info = rule.learn(network, x, y, counter)
    assert counter.count == expected
    assert len(info.energy) == num_steps + expected


def test_incremental_learning_with_weights_at_the_end_is_inference_learning() -> None:
    network, (x, y) = chain(), data()
    late = learned(IncrementalInferenceLearning(num_steps=6, first=5), network, x, y)
    assert relative_error(late, learned(InferenceLearning(num_steps=6), network, x, y)) == 0.0
    early = learned(IncrementalInferenceLearning(num_steps=6), network, x, y)
    assert relative_error(early, late) > 0.01


def test_incremental_learning_is_the_written_loop() -> None:
    network, (x, y) = chain(), data()
    weights = [parameter.detach().clone().requires_grad_() for parameter in network.weights()]
    network.init(x)
    values = [node.value.detach().clone().requires_grad_() for node in network.nodes[1:-1]]
    network.reset()

    def energy() -> Tensor:
        first, second = values
        predictions = (
            nn.functional.linear(x, *weights[:2]).tanh(),
            nn.functional.linear(first, *weights[2:4]).tanh(),
            nn.functional.linear(second, *weights[4:]),
        )
        pairs = zip((first, second, y), predictions, strict=True)
        return sum(0.5 * (value - prediction).square().sum() for value, prediction in pairs)

    def descend(moved: list[Tensor], rate: float) -> None:
        gradients = torch.autograd.grad(energy(), moved)
        for tensor, gradient in zip(moved, gradients, strict=True):
            tensor.data -= rate * gradient

    for step in range(6):
        descend(values, 0.1)
        if step in (1, 3, 5):
            descend(weights, 0.3 / len(x))
    rule = IncrementalInferenceLearning(num_steps=6, first=1, every=2)
    rule.learn(network, x, y, torch.optim.SGD(network.weights(), lr=0.3))
    for found, expected in zip(network.weights(), weights, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("rule", "network"),
    [
        (Backpropagation(), chain(CrossEntropyNode)),
        (InferenceLearning(num_steps=8), chain(CrossEntropyNode)),
        (IncrementalInferenceLearning(num_steps=8), chain(CrossEntropyNode)),
        (ZeroDivergenceLearning(), chain(CrossEntropyNode)),
        (EquilibriumPropagation(free_steps=0, beta=0.5), ConditionalGaussian(SIZES).double()),
        (
            EquilibriumPropagation(
                "squared_error", free_steps=10, nudged_steps=5, value_optimizer=sgd(0.5)
            ),
            RestrictedHopfield([6, 16, 3]).double(),
        ),
    ],
    ids=lambda case: type(case).__name__,
)
def test_every_rule_learns_any_batch_size_and_leaves_nothing_behind(
    rule: LearningRule, network: EnergyNetwork
) -> None:
    x, _ = data(40)
    y = nn.functional.one_hot(x[:, :3].argmax(1), 3).double()
    optimizer = torch.optim.Adam(network.weights(), lr=0.05)
    for _ in range(40):
        for rows in (slice(0, 25), slice(25, 40)):
            rule.learn(network, x[rows], y[rows], optimizer)
            assert not any(node.has_value or node.is_clamped for node in network.nodes)
            assert all(parameter.grad is None for parameter in network.parameters())
    right = rule.predict(network, x).argmax(1) == y.argmax(1)
    assert float(right.double().mean()) > 0.8


def backpropagated(network: ConditionalGaussian, x: Tensor, y: Tensor, cost: str) -> list[Tensor]:
    output = network(x)
    if cost == "cross_entropy":
        loss = nn.functional.cross_entropy(output, y)
    else:
        loss = 0.5 * (output - y).square().sum(1).mean()
    return list(torch.autograd.grad(loss, network.weights()))


def contrasted(
    network: EnergyNetwork, x: Tensor, y: Tensor, rule: EquilibriumPropagation
) -> list[Tensor]:
    rule.gradients(network, x, y)
    return [parameter.grad.clone() for parameter in network.weights()]


def gaussian() -> ConditionalGaussian:
    torch.manual_seed(0)
    return ConditionalGaussian(SIZES).double()


def test_equilibrium_propagation_tends_to_backpropagation_with_the_nudge() -> None:
    network, (x, y) = gaussian(), data()
    truth = backpropagated(network, x, y, "cross_entropy")

    def error(beta: float, symmetric: bool = False) -> float:
        rule = EquilibriumPropagation(
            beta=beta, symmetric=symmetric, free_steps=0, nudged_steps=2000, tolerance=1e-16
        )
        return relative_error(contrasted(network, x, y, rule), truth)

    errors = [error(beta) for beta in (1.0, 0.1, 0.01, 0.001)]
    # First order in beta; the second order of the symmetric nudge.
    ratios = [large / small for large, small in itertools.pairwise(errors)]
    assert errors[0] < 0.2
    assert ratios[1:] == pytest.approx([10.0, 10.0], rel=0.05)
    small = [error(beta, symmetric=True) for beta in (0.1, 0.01)]
    assert small[0] / small[1] == pytest.approx(100.0, rel=0.05)
    assert small[1] < 1e-5


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_one_layer_with_squared_error_has_a_known_factor(beta: float) -> None:
    torch.manual_seed(0)
    network, (x, y) = ConditionalGaussian([6, 3]).double(), data()
    rule = EquilibriumPropagation(
        "squared_error", beta=beta, free_steps=0, nudged_steps=2000, tolerance=1e-16
    )
    found = contrasted(network, x, y, rule)
    truth = backpropagated(network, x, y, "squared_error")
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one, other * 2 / (2 + beta))


@pytest.mark.parametrize("num_steps", [1, 3])
def test_both_nudges_of_few_steps_start_at_the_free_equilibrium(num_steps: int) -> None:
    # A nudge of beta contracts to (beta y + 2 mu) / (2 + beta), by 1 - dt (2 + beta) at a step.
    torch.manual_seed(0)
    network, (x, y) = ConditionalGaussian([6, 3]).double(), data()
    rule = EquilibriumPropagation(
        "squared_error", 0.5, True, free_steps=0, nudged_steps=num_steps, value_optimizer=sgd(0.1)
    )
    found = contrasted(network, x, y, rule)
    truth = backpropagated(network, x, y, "squared_error")
    factor = sum((1 - (1 - 0.1 * rate) ** num_steps) / rate for rate in (2.5, 1.5))
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one, other * factor)


@pytest.mark.parametrize("step_size", [0.05, 0.1, 0.6])
def test_a_nudged_output_contracts_at_the_known_rate(step_size: float) -> None:
    torch.manual_seed(0)
    network, (x, y), beta = ConditionalGaussian([6, 3]).double(), data(), 1.0
    distances = []
    network.init(x)
    rest = (2 * network(x) + beta * y) / (2 + beta)
    network.nudge(lambda u, t: 0.5 * (u - t).square().sum(1), y, beta)
    for _ in range(4):
        distances.append((network.nodes[-1].value - rest).detach())
        relax(network, 1, sgd(step_size))
    for before, after in itertools.pairwise(distances):
        torch.testing.assert_close(after, before * (1 - step_size * (2 + beta)))


def test_too_large_a_step_diverges_with_an_error() -> None:
    network, (x, y) = ConditionalGaussian([6, 3]).double(), data()
    rule = EquilibriumPropagation(
        "squared_error", free_steps=0, nudged_steps=5000, value_optimizer=sgd(1.0)
    )
    with pytest.raises(RelaxationError, match="lower the step size"):
        rule.gradients(network, x, y)
    assert not any(node.has_value for node in network.nodes)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_a_forward_pass_is_the_free_equilibrium_of_the_gaussian(activation: str) -> None:
    torch.manual_seed(0)
    network, (x, _) = ConditionalGaussian(SIZES, activation).double(), data()
    network.init(x)
    assert network.energy().tolist() == [0.0] * 7
    slopes = torch.autograd.grad(network.energy().mean(), network.weights())
    assert all(not bool(slope.any()) for slope in slopes)
    relaxed = relax(network, 20, sgd(0.1), tolerance=1e-12)
    assert (relaxed.num_steps, relaxed.change) == (1, 0.0)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_both_energies_are_what_is_written(activation: str) -> None:
    torch.manual_seed(0)
    functions = {
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "relu": torch.relu,
        "leaky_relu": nn.functional.leaky_relu,
        "hard_sigmoid": nn.functional.hardsigmoid,
    }
    phi = functions[activation]
    states = [torch.randn(4, size, dtype=torch.double) for size in SIZES]
    active = [states[0], *map(phi, states[1:])]
    hopfield = RestrictedHopfield(SIZES, activation).double()
    conditional = ConditionalGaussian(SIZES, activation).double()
    for network in (hopfield, conditional):
        network.init(states[0])
        for node, state in zip(network.nodes[1:], states[1:], strict=True):
            node.init(state)
    energy = sum(0.5 * state.square().sum(1) for state in states)
    for i, layer in enumerate(hopfield.connections):
        energy = energy - torch.einsum("bo,oi,bi->b", active[i + 1], layer.weight, active[i])
        energy = energy - active[i + 1] @ layer.bias
    torch.testing.assert_close(hopfield.energy(), energy)
    layers = [layer for layer in conditional.layers if isinstance(layer, nn.Linear)]
    energy = sum(
        (active[i] @ layer.weight.T + layer.bias - states[i + 1]).square().sum(1)
        for i, layer in enumerate(layers)
    )
    torch.testing.assert_close(conditional.energy(), energy)


def test_the_hopfield_network_learns_the_derivative_through_its_fixed_point() -> None:
    torch.manual_seed(0)
    network, (x, y) = RestrictedHopfield(SIZES).double(), data()
    options = {"value_optimizer": sgd(0.3), "free_steps": 20_000, "nudged_steps": 20_000}
    rule = EquilibriumPropagation("squared_error", beta=1e-4, tolerance=1e-15, **options)
    found = contrasted(network, x, y, rule)

    def cost() -> float:
        output = rule.predict(network, x)
        return float(0.5 * (output - y).square().sum(1).mean())

    size, propagated, differences = 1e-5, [], []
    for parameter, gradient in zip(network.weights(), found, strict=True):
        index = int(gradient.abs().argmax())
        entry, slope = parameter.data.view(-1), 0.0
        for sign in (1.0, -1.0):
            entry[index] += sign * size
            slope += sign * cost() / (2 * size)
            entry[index] -= sign * size
        propagated.append(gradient.view(-1)[index])
        differences.append(torch.tensor(slope).double())
    assert relative_error(propagated, differences) < 1e-4


def test_predictions_of_the_hopfield_network_are_at_rest() -> None:
    torch.manual_seed(0)
    network, (x, _) = RestrictedHopfield(SIZES).double(), data()
    rule = EquilibriumPropagation("squared_error", free_steps=500)
    output = rule.predict(network, x)
    network.init(x)
    relax(network, 500, sgd(0.1))
    (slope,) = torch.autograd.grad(network.energy().sum(), network.nodes[-1].value)
    assert float(slope.abs().max()) < 1e-12
    assert torch.equal(network.nodes[-1].value, output)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InferenceLearning(num_steps=-1), "num_steps must be at least 0, got -1"),
        (lambda: IncrementalInferenceLearning(0), "num_steps must be at least 1, got 0"),
        (lambda: IncrementalInferenceLearning(4, 4), "first must be below num_steps, .*first=4"),
        (lambda: IncrementalInferenceLearning(4, 0, 0), "every must be at least 1, got 0"),
        (lambda: EquilibriumPropagation("nothing"), r"cost must be one of .*, got 'nothing'"),
        (lambda: EquilibriumPropagation(beta=0.0), "beta must be finite and not 0"),
        (lambda: EquilibriumPropagation(beta=float("nan")), "beta must be finite .* got nan"),
        (lambda: Perceptron([3]), r"at least two positive integers, got \[3\]"),
        (lambda: EquilibriumPropagation(nudged_steps=0), "nudged_steps must be at least 1"),
        (lambda: EquilibriumPropagation(tolerance=-1.0), "tolerance must be at least 0, got -1"),
        (lambda: ConditionalGaussian([3]), r"at least two positive integers, got \[3\]"),
        (lambda: RestrictedHopfield([3, 0]), r"at least two positive integers, got \[3, 0\]"),
        (lambda: RestrictedHopfield([3, 2], "gelu"), "activation must be one of .*, got 'gelu'"),
    ],
)
def test_impossible_rules_and_networks_are_refused(make: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


RULES = [
    Backpropagation(),
    InferenceLearning(),
    IncrementalInferenceLearning(),
    ZeroDivergenceLearning(),
    EquilibriumPropagation("squared_error"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.zeros(1, 3), "1 targets, but 7 data"),
        (torch.zeros(7, 1), r"shape \(batch, 3\), got \(7, 1\)"),
        (torch.zeros(7, dtype=torch.long), r"got torch\.int64; of class labels, make F\.one_hot"),
    ],
)
def test_targets_that_do_not_fit_are_refused(rule: LearningRule, y: Tensor, message: str) -> None:
    network, (x, _) = chain(), data()
    optimizer = torch.optim.SGD(network.weights(), lr=1.0)
    with pytest.raises(DataError, match=message):
        rule.learn(network, x, y.double() if y.is_floating_point() else y, optimizer)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_targets_never_broadcast(rule: LearningRule) -> None:
    torch.manual_seed(0)
    network, (x, y) = PredictiveCodingNetwork(nn.Linear(6, 3), SquaredErrorNode()).double(), data()
    before, optimizer = copy.deepcopy(network), torch.optim.SGD(network.weights(), lr=1.0)
    with pytest.raises(DataError, match=r"shape \(7, 1\), but the network's output has \(7, 3\)"):
        rule.learn(network, x, y[:, :1], optimizer)
    assert not any(node.has_value for node in network.nodes)
    for old, new in zip(before.weights(), network.weights(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize(
    ("rule", "network"),
    [*((rule, chain()) for rule in RULES), (RULES[-1], RestrictedHopfield(SIZES).double())],
)
def test_the_precision_is_that_of_the_weights(rule: LearningRule, network: EnergyNetwork) -> None:
    x, y = data()
    network.init(x.float())
    assert {node.value.dtype for node in network.nodes} == {torch.double}
    network.reset()
    x, y = x.float(), y.float()
    found, expected = (learned(rule, network, *pair) for pair in ((x, y), (x.double(), y.double())))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert rule.predict(network, x).dtype == torch.double


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_weights_learn_where_gradients_are_not_allowed(rule: LearningRule) -> None:
    network, (x, y) = chain(), data()
    expected = learned(rule, network, x, y)
    with torch.no_grad():
        found = learned(rule, network, x, y)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert not rule.predict(network, x).requires_grad


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: InferenceLearning(value_optimizer=optimizer),
        lambda optimizer: IncrementalInferenceLearning(value_optimizer=optimizer),
        lambda optimizer: EquilibriumPropagation(value_optimizer=optimizer),
    ],
)
@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (torch.optim.LBFGS, "must make an optimiser that steps on gradients alone: .*closure"),
        (partial(torch.optim.SGD, lr=-0.1), "steps on gradients alone: Invalid learning rate"),
        (torch.optim.Adafactor, "depend on the gradients of other samples"),
        (torch.optim.Muon, "depend on the gradients of other samples"),
    ],
)
def test_optimisers_that_cannot_step_values_are_refused(
    make: Callable[[object], LearningRule], optimizer: object, message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        make(optimizer)


def test_an_energy_that_overflows_in_the_last_step_moves_no_weight() -> None:
    network, (x, y) = ConditionalGaussian(SIZES), data()
    before, optimizer = copy.deepcopy(network), torch.optim.SGD(network.weights(), lr=1.0)
    rule = EquilibriumPropagation(free_steps=0, nudged_steps=1, value_optimizer=sgd(1e25))
    with pytest.raises(RelaxationError, match=r"energy of \['layers\.\d'.* at the end of the"):
        rule.learn(network, x, y, optimizer)
    for old, new in zip(before.weights(), network.weights(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_gradients_and_momentum_of_before_are_forgotten(rule: LearningRule) -> None:
    if isinstance(rule, (InferenceLearning, IncrementalInferenceLearning)):
        rule = dataclasses.replace(rule, value_optimizer=partial(torch.optim.Adam, lr=0.1))
    network, (x, y) = chain(), data()
    fresh = learned(rule, network, x, y)
    still = torch.optim.SGD(network.weights(), lr=0.0)
    rule.learn(network, x.flip(0)[:4], y[:4], still)
    for weight in network.weights():
        weight.grad = torch.ones_like(weight)
    rule.learn(network, x[:3], y[:3], still)
    optimizer, before = torch.optim.SGD(network.weights(), lr=1.0), copy.deepcopy(network)
    for weight in network.weights():
        weight.grad = torch.ones_like(weight)
    rule.learn(network, x, y, optimizer)
    for old, new, change in zip(before.weights(), network.weights(), fresh, strict=True):
        torch.testing.assert_close(old - new, change)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_only_energy_networks_are_trained(rule: LearningRule) -> None:
    model, (x, y) = nn.Sequential(nn.Linear(6, 3)).double(), data()
    with pytest.raises(OptionError, match="trains an EnergyNetwork, got Sequential; put nodes"):
        rule.learn(model, x, y, torch.optim.SGD(model.parameters(), lr=1.0))


def test_backpropagation_stops_at_a_loss_that_is_no_number() -> None:
    network, (x, y) = chain(), data()
    x[0, 0] = torch.nan
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(RelaxationError, match="the loss is nan"):
        Backpropagation().learn(network, x, y, torch.optim.SGD(network.weights(), lr=1.0))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_an_output_without_an_equilibrium_is_refused() -> None:
    network, (x, y), rule = chain(CrossEntropyNode), data(), EquilibriumPropagation()
    optimizer = torch.optim.SGD(network.weights(), lr=1.0)
    for call in (
        lambda: rule.learn(network, x, y, optimizer),
        lambda: rule.gradients(network, x, y),
        lambda: rule.predict(network, x),
    ):
        with pytest.raises(OptionError, match="CrossEntropyNode is linear in its value"):
            call()


def test_a_diverging_nudge_leaves_nothing_behind() -> None:
    network, (x, y) = gaussian(), data()
    rule = EquilibriumPropagation(free_steps=0, nudged_steps=5000, value_optimizer=sgd(5.0))
    with pytest.raises(RelaxationError, match="NaN or infinite at step"):
        rule.gradients(network, x, y)
    assert not any(node.has_value or node.is_clamped for node in network.nodes)
    network.init(x)
    assert set(network.all_energies()) == set(network.energies()), "the nudge is gone"


def test_predictions_need_no_gradients_to_be_allowed() -> None:
    network, (x, _) = RestrictedHopfield(SIZES).double(), data()
    rule = EquilibriumPropagation("squared_error", free_steps=20)
    with torch.no_grad():
        found = rule.predict(network, x)
    assert torch.equal(found, rule.predict(network, x))


def test_a_relaxation_of_no_steps_is_of_the_networks_type() -> None:
    network, (x, y) = gaussian(), data()
    free, _ = EquilibriumPropagation(free_steps=0).gradients(network, x, y)
    assert free.energy.shape == (0,)
    assert free.energy.dtype == torch.double


@pytest.mark.gpu
def test_a_gpu_learns_the_same_weights() -> None:
    for build in (gaussian, lambda: RestrictedHopfield(SIZES).double()):
        network, (x, y) = build(), data()
        rule = EquilibriumPropagation("squared_error", free_steps=5, nudged_steps=5)
        for steps in (0, 5):
            rule = dataclasses.replace(rule, free_steps=steps)
            expected = contrasted(network, x, y, rule)
            found = contrasted(copy.deepcopy(network).cuda(), x.cuda(), y.cuda(), rule)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one.cpu(), other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", [Backpropagation(), InferenceLearning(), ZeroDivergenceLearning()])
def test_a_network_without_a_forward_pass_is_refused(rule: LearningRule) -> None:
    network, (x, y) = RestrictedHopfield(SIZES).double(), data()
    optimizer = torch.optim.SGD(network.weights(), lr=1.0)
    message = f"{type(rule).__name__} trains a feed-forward network, .*got RestrictedHopfield"
    with pytest.raises(OptionError, match=message):
        rule.learn(network, x, y, optimizer)
    with pytest.raises(OptionError, match=message):
        rule.predict(network, x)
