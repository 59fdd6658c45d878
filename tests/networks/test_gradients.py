"""Predictive-coding gradients against autograd, and the cases that break naive versions."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor, nn

from dcpc.errors import DataError, OptionError
from dcpc.networks import (
    InferenceLearning,
    PredictiveCodingNetwork,
    RelaxationError,
    SquaredErrorNode,
    pc_gradients,
    sgd,
)

LOSS = nn.MSELoss()


def mlp(depth: int = 4, width: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]
    return nn.Sequential(*layers).double()


def data(width: int = 5, batch: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, batch, width, dtype=torch.double, generator=generator)
    return x, y


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def backpropagated(model: nn.Module, x: Tensor, y: Tensor, loss: nn.Module = LOSS) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss(model(x), y), parameters))


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    flat = [torch.cat([g.flatten() for g in one]) for one in (found, expected)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 4)
    ).double()


def test_exact_gradients_are_backpropagations() -> None:
    model, (x, y) = mlp(), data()
    truth = backpropagated(model, x, y)
    found = pc_gradients(model, LOSS, x, y)
    assert relative_error(gradients(model), truth) == 0.0
    hidden = [x]
    for layer in model:
        hidden.append(layer(hidden[-1]))
    slopes = torch.autograd.grad(LOSS(hidden[-1], y), hidden[1:])
    for error, slope in zip(found.errors, slopes, strict=True):
        torch.testing.assert_close(error, slope)
    for activation, belief, error in zip(
        found.activations[1:], found.beliefs[1:], found.errors, strict=True
    ):
        torch.testing.assert_close(activation - belief, error)
    torch.testing.assert_close(found.activations[-1], model(x))
    torch.testing.assert_close(found.loss, LOSS(model(x), y))
    assert torch.equal(found.output_gradient, found.errors[-1])
    output = found.activations[-1].clone().requires_grad_()
    (slope,) = torch.autograd.grad(LOSS(output, y), output)
    torch.testing.assert_close(found.output_gradient, slope)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5])
def test_fixed_prediction_with_unit_steps_is_exact_in_the_last_layers(num_steps: int) -> None:
    model, (x, y) = mlp(depth=4), data()
    pc_gradients(model, LOSS, x, y, "fixed_prediction", step_size=1.0, num_steps=num_steps)
    exact = []
    for layer, truth in zip(
        model, zip(*[iter(backpropagated(model, x, y))] * 2, strict=True), strict=True
    ):
        found = [p.grad for p in layer.parameters()]
        exact.append(relative_error(found, list(truth)) < 1e-14)
    assert exact == [layer >= 4 - num_steps for layer in range(4)]


def test_fixed_prediction_of_a_convolutional_network() -> None:
    model = convolutional()
    x, y = torch.randn(3, 1, 8, 8, dtype=torch.double), torch.tensor([0, 3, 1])
    loss = nn.CrossEntropyLoss()
    truth = backpropagated(model, x, y, loss)
    pc_gradients(model, loss, x, y, "fixed_prediction", step_size=1.0, num_steps=5)
    assert relative_error(gradients(model), truth) < 1e-15


def test_layers_in_front_of_all_weights_have_errors_too() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(2, 2, 2, dtype=torch.double), torch.randn(2, 3, dtype=torch.double)
    first = model[0](x).requires_grad_()
    (slope,) = torch.autograd.grad(LOSS(model[1:](first), y), first)
    torch.testing.assert_close(pc_gradients(model, LOSS, x, y).errors[0], slope)
    assert not x.requires_grad
    model.requires_grad_(False)
    torch.testing.assert_close(pc_gradients(model, LOSS, x, y).errors[0], slope)


def test_a_step_of_fixed_prediction_is_the_written_one() -> None:
    model, (x, y) = mlp(), data()
    one, other = (
        pc_gradients(model, LOSS, x, y, "fixed_prediction", step_size=0.2, num_steps=n)
        for n in (3, 4)
    )
    for depth in range(1, 4):
        torch.testing.assert_close(
            one.errors[depth - 1], one.activations[depth] - one.beliefs[depth]
        )
        before = one.activations[depth].clone().requires_grad_()
        (pull,) = torch.autograd.grad(model[depth](before), before, one.errors[depth])
        moved = one.beliefs[depth] + 0.2 * (one.errors[depth - 1] - pull)
        torch.testing.assert_close(other.beliefs[depth], moved)


@pytest.mark.parametrize("num_steps", [2, 5, 20])
@pytest.mark.parametrize("step_size", [0.1, 0.5])
def test_fixed_prediction_falls_short_by_a_known_factor(num_steps: int, step_size: float) -> None:
    # Errors obey e_l <- (1 - eta) e_l + eta J' e_{l+1} from zero, so that k layers below the output
    # they are P(Binomial(n - 1, eta) >= k) times those of backpropagation.
    model, (x, y) = mlp(), data()
    truth = backpropagated(model, x, y)
    pc_gradients(model, LOSS, x, y, "fixed_prediction", step_size=step_size, num_steps=num_steps)
    factors = binom.sf(np.arange(3, -1, -1) - 1, num_steps - 1, step_size).repeat(2)
    for found, exact, factor in zip(gradients(model), truth, factors, strict=True):
        torch.testing.assert_close(found, exact * factor)


def test_fixed_prediction_converges_with_small_steps() -> None:
    model, (x, y) = mlp(), data()
    truth = backpropagated(model, x, y)
    for num_steps, bound in ((200, 1e-7), (400, 1e-13)):
        pc_gradients(model, LOSS, x, y, "fixed_prediction", num_steps=num_steps)
        assert relative_error(gradients(model), truth) < bound


def energy(model: nn.Sequential, beliefs: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """`L + sum |f_l(v_{l-1}) - v_l|^2 / 2`, written down anew."""
    values = [x, *beliefs]
    total = LOSS(model[-1](values[-1]), y)
    for layer, before, after in zip(model[:-1], values[:-1], values[1:], strict=True):
        total = total + 0.5 * (layer(before) - after).square().sum()
    return total


def test_strict_beliefs_converge_to_the_minimum_of_the_energy() -> None:
    model, (x, y) = mlp(), data()
    found = pc_gradients(model, LOSS, x, y, "strict", num_steps=5000)
    beliefs = [v.clone().requires_grad_() for v in found.beliefs[1:-1]]
    slopes = torch.autograd.grad(energy(model, beliefs, x, y), [*beliefs, *model.parameters()])
    assert max(float(s.abs().max()) for s in slopes[: len(beliefs)]) < 1e-14
    assert relative_error(gradients(model), list(slopes[len(beliefs) :])) < 1e-14
    assert relative_error(gradients(model), backpropagated(model, x, y)) > 1e-6


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_strict_errors_and_gradients_belong_to_the_beliefs_that_are_returned(
    num_steps: int,
) -> None:
    model, (x, y) = mlp(), data()
    init = [torch.randn_like(y) for _ in range(3)]
    found = pc_gradients(model, LOSS, x, y, "strict", num_steps=num_steps, init=init)
    beliefs = list(found.beliefs)
    for layer, before, after, error in zip(
        model[:-1], beliefs[:-2], beliefs[1:-1], found.errors[:-1], strict=True
    ):
        torch.testing.assert_close(error, layer(before) - after)
    slopes = torch.autograd.grad(energy(model, beliefs[1:-1], x, y), list(model.parameters()))
    assert relative_error(gradients(model), list(slopes)) < 1e-14


def test_strict_steps_descend_the_energy() -> None:
    model, (x, y) = mlp(), data()
    init = [torch.randn_like(y) for _ in range(3)]
    first = [v.clone().requires_grad_() for v in init]
    slopes = torch.autograd.grad(energy(model, first, x, y), first)
    found = pc_gradients(model, LOSS, x, y, "strict", step_size=0.01, num_steps=2, init=init)
    for belief, start, slope in zip(found.beliefs[1:-1], init, slopes, strict=True):
        torch.testing.assert_close(belief, start - 0.01 * slope)


def test_after_one_evaluation_only_the_last_layer_has_an_error() -> None:
    model, (x, y) = mlp(), data()
    for mode in ("strict", "fixed_prediction"):
        found = pc_gradients(model, LOSS, x, y, mode, num_steps=1)
        assert [bool(error.any()) for error in found.errors] == [False, False, False, True]


def test_first_beliefs_matter_and_are_not_overwritten() -> None:
    model, (x, y) = mlp(), data()
    init = [torch.ones_like(y) for _ in range(3)]
    pc_gradients(model, LOSS, x, y, "strict", num_steps=5)
    plain = gradients(model)
    pc_gradients(model, LOSS, x, y, "strict", num_steps=5, init=init)
    assert relative_error(gradients(model), plain) > 0.01
    assert all(torch.equal(v, torch.ones_like(y)) for v in init)


MODES = [
    ("exact", {}),
    ("fixed_prediction", {"step_size": 1.0, "num_steps": 8}),
    ("strict", {"step_size": 0.1, "num_steps": 30}),
]


@pytest.mark.parametrize(("mode", "options"), MODES)
def test_gradients_are_set_and_not_added(mode: str, options: dict) -> None:
    model, (x, y) = mlp(), data()
    pc_gradients(model, LOSS, x, y, mode, **options)
    once = gradients(model)
    pc_gradients(model, LOSS, x, y, mode, **options)
    assert relative_error(gradients(model), once) == 0.0


@pytest.mark.parametrize(("mode", "options"), MODES[:2])
def test_dropout_is_drawn_once_per_call(mode: str, options: dict) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 9),
        nn.Dropout(0.5),
        nn.Tanh(),
        nn.Linear(9, 9),
        nn.Dropout(0.5),
        nn.Linear(9, 5),
    ).double()
    x, y = data()
    torch.manual_seed(7)
    truth = backpropagated(model, x, y)
    torch.manual_seed(7)
    found = pc_gradients(model, LOSS, x, y, mode, **options)
    assert relative_error(gradients(model), truth) < 1e-14
    again = pc_gradients(model, LOSS, x, y, mode, **options)
    assert not torch.equal(found.activations[2], again.activations[2]), "another call, another mask"


def test_strict_sees_one_mask_of_dropout_at_all_steps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.Dropout(0.5), nn.Linear(9, 5)).double()
    x, y = data()
    found = pc_gradients(model, LOSS, x, y, "strict", num_steps=300)
    dropped = found.activations[2] == 0
    assert bool(dropped.any())
    # Where the mask is zero, the prediction is as well, and so is the belief but for its child.
    mask = torch.where(dropped, 0.0, 2.0).double()
    torch.testing.assert_close(found.errors[1], mask * found.beliefs[1] - found.beliefs[2])


@pytest.mark.parametrize(("mode", "options"), MODES)
def test_batch_statistics_count_once(mode: str, options: dict) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 5)).double()
    x, y = data()
    once = copy.deepcopy(model)
    once(x)
    pc_gradients(model, LOSS, x, y, mode, **options)
    for (name, buffer), (_, expected) in zip(
        model.named_buffers(), once.named_buffers(), strict=True
    ):
        torch.testing.assert_close(buffer, expected, msg=name)


class Overwriting(nn.Module):
    """A layer that overwrites its input, and does not say so as `nn.ReLU(inplace=True)` does."""

    overwrites = True

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(x, inplace=self.overwrites)


@pytest.mark.parametrize(("mode", "options"), MODES[:2])
@pytest.mark.parametrize("what", ["shared", "frozen", "inplace", "overwriting", "batchnorm"])
def test_awkward_layers_have_the_right_gradients(mode: str, options: dict, what: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(5, 5)
    if what == "shared":
        layers = [linear, nn.Tanh(), linear, nn.Tanh(), linear]
    elif what == "frozen":
        layers = [nn.Linear(5, 5), nn.Tanh(), linear, nn.Tanh(), nn.Linear(5, 5)]
        linear.requires_grad_(False)
    elif what == "inplace":
        layers = [nn.ReLU(inplace=True), linear, nn.ReLU(inplace=True), nn.Linear(5, 5)]
    elif what == "overwriting":
        layers = [Overwriting(), linear, Overwriting(), nn.Linear(5, 5)]
    else:
        layers = [linear, nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 5)]
    model, (x, y) = nn.Sequential(*layers).double(), data()
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, (nn.ReLU, Overwriting)):
            module.inplace = module.overwrites = False
    truth, before = backpropagated(plain, x, y), x.clone()
    pc_gradients(model, LOSS, x, y, mode, **options)
    assert relative_error(gradients(model), truth) < 1e-14
    assert torch.equal(x, before)
    if what == "frozen":
        assert linear.weight.grad is None


@pytest.mark.parametrize("what", ["shared", "frozen", "inplace"])
def test_strict_gradients_of_awkward_layers_are_those_of_the_energy(what: str) -> None:
    torch.manual_seed(0)
    linear, phi = nn.Linear(5, 5), nn.ReLU(inplace=what == "inplace")
    between = linear if what == "shared" else nn.Linear(5, 5)
    linear.requires_grad_(what != "frozen")
    model, (x, y) = nn.Sequential(linear, phi, between, phi, nn.Linear(5, 5)).double(), data()
    found = pc_gradients(model, LOSS, x, y, "strict", num_steps=7)
    phi.inplace = False
    parameters = [p for p in model.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(energy(model, list(found.beliefs[1:-1]), x, y), parameters)
    assert relative_error(gradients(model), list(slopes)) < 1e-14


def test_beliefs_that_diverge_name_the_layer_and_the_step() -> None:
    model, (x, y) = mlp(), data()
    with pytest.raises(
        RelaxationError, match=r"error of model\[\d\] is NaN or infinite at step \d+"
    ):
        pc_gradients(model, LOSS, x, y, "strict", step_size=1e3, num_steps=300)


@pytest.mark.parametrize("mode", ["fixed_prediction", "strict"])
def test_data_that_are_no_numbers_are_noticed_at_the_first_step(mode: str) -> None:
    model, (x, y) = mlp(), data()
    x[0, 0] = torch.nan
    with pytest.raises(RelaxationError, match=r"error of model\[3\] is NaN .* at step 0;"):
        pc_gradients(model, LOSS, x, y, mode, num_steps=1)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_strict_gradients_are_those_of_inference_learning(num_steps: int) -> None:
    model, (x, y) = mlp(), data()
    pc_gradients(model, lambda u, z: 0.5 * (u - z).square().sum(), x, y, "strict", 0.1, num_steps)
    strict, of_rule = gradients(model), []

    class Recorder(torch.optim.SGD):
        def step(self) -> None:
            of_rule.extend(w.grad.clone() for w in network.weights())

    network = PredictiveCodingNetwork(
        *(part for layer in model for part in (layer, SquaredErrorNode(5)))
    ).double()
    rule = InferenceLearning(num_steps - 1, sgd(0.1))
    rule.learn(network, x, y, Recorder(network.weights(), lr=0.0))
    for one, other in zip(strict, of_rule, strict=True):
        torch.testing.assert_close(one, len(x) * other, rtol=1e-12, atol=1e-15)


def test_a_wholly_frozen_front_is_no_obstacle() -> None:
    model, (x, y) = mlp(), data()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    for mode, options in MODES:
        pc_gradients(model, LOSS, x, y, mode, **options)
        assert model[0][0].weight.grad is None
        assert bool(model[1][0].weight.grad.any())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": nn.Linear(5, 5)}, OptionError, "must be an nn.Sequential, .* got Linear"),
        ({"model": nn.Sequential()}, OptionError, "nn.Sequential without layers"),
        ({"mode": "backprop"}, OptionError, "mode must be one of .*, got 'backprop'"),
        ({"loss_fn": nn.MSELoss(reduction="none")}, DataError, r"one number, got \(6, 5\)"),
        ({"y": torch.zeros(6, 4)}, DataError, r"targets have shape \(6, 4\), .* \(6, 5\)"),
        ({"y": torch.zeros(5, dtype=torch.long)}, DataError, "5 targets, but 6 outputs"),
        ({"mode": "strict", "step_size": -0.1}, OptionError, r"step_size .* got -0\.1"),
        ({"mode": "strict", "num_steps": 0}, OptionError, "num_steps must be at least 1 .* got 0"),
        ({"mode": "strict", "init": [torch.zeros(6, 5)]}, DataError, r"init must hold .* got \["),
        (
            {"mode": "strict", "init": [torch.zeros(6, 4)] * 3},
            DataError,
            r"of shapes \[\(6, 5\).*, got \[\(6, 4\)",
        ),
        ({"y": None}, DataError, "targets must be a tensor, got NoneType"),
        ({"init": [torch.zeros(6, 5)] * 3}, OptionError, "init is for mode='strict' only"),
    ],
)
def test_bad_input_is_refused(change: dict, error: type[Exception], message: str) -> None:
    x, y = data()
    arguments = {"model": mlp(), "loss_fn": LOSS, "x": x, "y": y, **change}
    with pytest.raises(error, match=message):
        pc_gradients(**arguments)
