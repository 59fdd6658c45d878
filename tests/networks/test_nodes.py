"""Energies of nodes against densities, and what happens to their values."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, MultivariateNormal

from dcpc.errors import DataError, OptionError
from dcpc.networks import (
    Bias,
    CrossEntropyNode,
    FactorizedGaussianNode,
    FixedNode,
    FloatingNode,
    FunctionNode,
    MultivariateGaussianNode,
    Node,
    ScaledGaussianNode,
    SquaredErrorNode,
)


def randomised(node: Node) -> Node:
    torch.manual_seed(0)
    for name, parameter in node.named_parameters():
        if name != "value":
            nn.init.normal_(parameter, std=0.5)
    return node.double()


def covariance(node: Node, shape: tuple[int, ...]) -> Tensor:
    """Of one flattened sample, written down from the definition of each node."""
    size = torch.Size(shape).numel()
    if isinstance(node, MultivariateGaussianNode):
        factor = node.raw_scale.tril(-1) + node.raw_scale.diagonal().exp().diag()
        return factor @ factor.T
    if isinstance(node, SquaredErrorNode):
        return torch.eye(size, dtype=torch.double)
    return node.logvar.exp().expand(shape).reshape(-1).diag()


GAUSSIAN = [
    (lambda: SquaredErrorNode(3), (3,)),
    (lambda: ScaledGaussianNode(3), (3,)),
    (lambda: ScaledGaussianNode(None, 2), (4, 2)),
    (lambda: FactorizedGaussianNode(3), (3,)),
    (lambda: FactorizedGaussianNode(2, 3), (2, 3)),
    (lambda: FactorizedGaussianNode(2, None), (2, 3)),
    (lambda: MultivariateGaussianNode(3), (3,)),
]


@pytest.mark.parametrize(("make", "shape"), GAUSSIAN)
def test_a_gaussian_energy_is_the_log_density_without_its_constant(
    make: Callable[[], Node], shape: tuple[int, ...]
) -> None:
    node = randomised(make())
    z, u = torch.randn(2, 5, *shape, dtype=torch.double)
    normal = MultivariateNormal(u.flatten(1), covariance(node, shape))
    constant = 0.5 * z[0].numel() * torch.log(torch.tensor(2 * torch.pi, dtype=torch.double))
    torch.testing.assert_close(node.energy(z, u), -normal.log_prob(z.flatten(1)) - constant)


@pytest.mark.parametrize(("make", "shape"), GAUSSIAN)
def test_the_error_is_the_precision_times_the_difference(
    make: Callable[[], Node], shape: tuple[int, ...]
) -> None:
    node = randomised(make())
    z, u = torch.randn(2, 5, *shape, dtype=torch.double)
    precision = torch.linalg.inv(covariance(node, shape))
    expected = ((z - u).flatten(1) @ precision).reshape(z.shape)
    torch.testing.assert_close(node.error(z, u), expected)
    z.requires_grad_()
    (slope,) = torch.autograd.grad(node.energy(z, u).sum(), z)
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize(("make", "shape"), GAUSSIAN)
def test_samples_have_the_prediction_as_mean_and_the_nodes_covariance(
    make: Callable[[], Node], shape: tuple[int, ...]
) -> None:
    node = randomised(make())
    count = 40_000
    with torch.no_grad():
        draws = node.sample(torch.full((count, *shape), 5.0, dtype=torch.double)).flatten(1)
        truth = covariance(node, shape)
    error = 5 * (truth.diagonal() / count).sqrt()
    assert bool(((draws.mean(0) - 5.0).abs() < error).all())
    spread = torch.outer(truth.diagonal(), truth.diagonal()) + truth.square()
    assert bool(((draws.T.cov() - truth).abs() < 5 * (spread / count).sqrt()).all())


def test_cross_entropy_is_the_log_probability_of_a_label() -> None:
    logits, labels = torch.randn(6, 4, dtype=torch.double), torch.tensor([0, 1, 2, 3, 3, 0])
    one_hot = nn.functional.one_hot(labels, 4).double()
    node = CrossEntropyNode(4)
    expected = -Categorical(logits=logits).log_prob(labels)
    torch.testing.assert_close(node.energy(one_hot, logits), expected)
    torch.testing.assert_close(-node.distribution(logits).log_prob(one_hot), expected)
    half = 0.5 * (one_hot + one_hot.roll(1, 0))
    torch.testing.assert_close(
        node.energy(half, logits),
        0.5 * (node.energy(one_hot, logits) + node.energy(one_hot.roll(1, 0), logits)),
    )


def test_nodes_without_energy_and_with_the_users_own() -> None:
    z, u = torch.randn(2, 5, 3)
    for node in (FloatingNode(3), FixedNode(3)):
        assert node.energy(z, u).tolist() == [0.0] * 5
    own = FunctionNode(lambda z, u: (z - u).abs().sum(1), 3)
    torch.testing.assert_close(own.energy(z, u), (z - u).abs().sum(1))
    with pytest.raises(DataError, match=r"one number per sample, of shape \(5,\), got \(5, 3\)"):
        FunctionNode(lambda z, u: (z - u).abs(), 3).energy(z, u)


def test_a_bias_stands_in_for_an_input_of_any_batch() -> None:
    bias = Bias(3)
    with torch.no_grad():
        bias.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert bias(torch.zeros(2, 7)).tolist() == [[1.0, 2.0, 3.0]] * 2


def test_a_value_may_change_its_batch_size_and_stays_the_same_parameter() -> None:
    node = SquaredErrorNode(3)
    value = node.value
    for batch in (4, 2, 5):
        given = torch.randn(batch, 3)
        node.init(given)
        assert node.value is value
        assert torch.equal(node.value, given)
        node.value.data.add_(1.0)
        assert not torch.equal(node.value, given), "the node has a copy"
    node.reset()
    assert not node.has_value
    assert node.value is value


def test_clamped_values_resist_initialisation_until_they_are_released() -> None:
    node = SquaredErrorNode(2)
    first, second = torch.zeros(3, 2), torch.ones(3, 2)
    assert not node.is_free
    node.clamp(first)
    node.init(second)
    assert torch.equal(node.value, first)
    assert not node.is_free
    node.clamp(second)
    assert torch.equal(node.value, second)
    node.release()
    assert node.is_free
    node.clamp(first)
    node.reset()
    node.init(second)
    assert node.is_free
    node.is_frozen = True
    assert not node.is_free


@pytest.mark.parametrize("value", [torch.zeros(3, 4), torch.zeros(0, 2), torch.zeros(3, 2).int()])
def test_a_refused_value_leaves_the_node_as_it_was(value: Tensor) -> None:
    node, first = SquaredErrorNode(2), torch.rand(3, 2)
    node.clamp(first)
    for refused in (node.clamp, node.init):
        with pytest.raises(DataError):
            refused(value)
    assert node.is_clamped
    assert torch.equal(node.value, first)


def test_a_fixed_node_is_a_buffer_and_never_free() -> None:
    node = FixedNode(2)
    node.init(torch.ones(3, 2))
    assert not list(node.parameters())
    assert not node.is_free
    node.release()
    assert not node.is_free
    assert node.to(torch.double).value.dtype == torch.double
    assert not node.state_dict()


def test_values_are_no_part_of_the_state() -> None:
    node = FactorizedGaussianNode(2)
    node.init(torch.ones(3, 2))
    assert list(node.state_dict()) == ["logvar"]
    fresh = FactorizedGaussianNode(2, variance=3.0)
    node.load_state_dict(fresh.state_dict())
    torch.testing.assert_close(node.logvar.exp(), torch.full((2,), 3.0))
    assert torch.equal(copy.deepcopy(node).value, node.value)


@pytest.mark.parametrize("value", [torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, 2, 1)])
def test_a_value_of_another_shape_is_refused(value: Tensor) -> None:
    node = SquaredErrorNode(2)
    got = str(tuple(value.shape)).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(DataError, match=rf"SquaredErrorNode expected .* \(batch, 2\), got {got}"):
        node.init(value)
    assert not node.has_value


def test_impossible_nodes_are_refused() -> None:
    with pytest.raises(OptionError, match=r"positive integers or None, got \(0,\)"):
        SquaredErrorNode(0)
    with pytest.raises(OptionError, match=r"variance must be positive and finite, got 0\.0"):
        FactorizedGaussianNode(2, variance=0.0)
    with pytest.raises(OptionError, match="needs the shape of a sample's value"):
        FactorizedGaussianNode()
