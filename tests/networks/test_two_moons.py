"""The two-moons problem: a network of value nodes, by inference learning."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from sklearn.datasets import make_moons
from torch.nn import functional as F

from dcpc.models import Perceptron
from dcpc.networks import InferenceLearning

NUM_EPOCHS = 8
BATCH_SIZE = 32


def accuracy(seed: int) -> float:
    """Of held-out points, in percent, after training from a seed."""
    train, test = (
        (torch.tensor(x, dtype=torch.float32), torch.tensor(y))
        for x, y in (
            make_moons(1024, noise=0.2, random_state=42),
            make_moons(512, noise=0.2, random_state=0),
        )
    )
    torch.manual_seed(seed)
    network = Perceptron([2, 32, 32, 2], "leaky_relu")
    rule = InferenceLearning(num_steps=8, value_optimizer=partial(torch.optim.SGD, lr=0.01))
    optimizer = torch.optim.AdamW(network.weights(), lr=0.01)
    for _ in range(NUM_EPOCHS):
        for rows in torch.randperm(len(train[0])).split(BATCH_SIZE):
            rule.learn(network, train[0][rows], F.one_hot(train[1][rows], 2).float(), optimizer)
    with torch.no_grad():
        right = rule.predict(network, test[0]).argmax(1) == test[1]
    return 100 * float(right.double().mean())


@pytest.mark.parametrize("num_seeds", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_every_seed_learns_the_two_moons(num_seeds: int) -> None:
    accuracies = [accuracy(seed) for seed in range(num_seeds)]
    assert sum(accuracies) / num_seeds >= 95.5
    assert min(accuracies) >= 94.0
