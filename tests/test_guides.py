"""The parts that the guides write out pass what is asked of the package's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import ROOT, fences
from torch import nn

from dcpc.conquer import MOVES, Move
from dcpc.networks import (
    Backpropagation,
    InferenceLearning,
    PredictiveCodingNetwork,
    SquaredErrorNode,
    sgd,
)

sys.path.append(str(Path(__file__).parent / "conquer"))
import test_moves

GUIDES = ROOT / "docs" / "guides"


def definitions(page: str) -> dict[str, Any]:
    """Names of a guide's classes: of its programs as far as the first that shows an output."""
    names: dict[str, Any] = {"__name__": f"guides.{page}"}
    sys.modules[names["__name__"]] = type(sys)(names["__name__"])  # where dataclasses look
    for block in fences((GUIDES / f"{page}.md").read_text()):
        if block.kind == "python" and not block.output:
            exec(block.text, names)
    return names


@pytest.fixture(scope="module")
def move() -> Move:
    return definitions("moves")["TamedLangevin"]()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("make", ["diagonal", "dense"])
def test_the_move_leaves_a_gaussian_invariant(move, make):
    test_moves.test_corrected_moves_leave_a_gaussian_invariant(make, move)


@pytest.mark.usefixtures("float64")
def test_the_move_conforms(move):
    test_moves.test_densities_of_proposals_integrate_to_one(test_moves.dense, move)
    test_moves.test_ways_back_are_densities_of_proposals_from_the_other_end(move)
    test_moves.test_moves_keep_shapes_precision_and_what_they_were_given(move)
    test_moves.test_moves_take_as_many_scores_as_they_say(move)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("correction", ["metropolis", "weight"])
def test_the_engine_is_exact_with_the_move(move, correction, monkeypatch):
    monkeypatch.setitem(MOVES, "tamed", type(move))
    test_moves.test_the_engine_is_exact_with_every_move("tamed", correction)


def test_the_move_is_as_short_as_the_guide_says():
    (block,) = [
        b for b in fences((GUIDES / "moves.md").read_text()) if "class TamedLangevin" in b.text
    ]
    assert len(block.text.splitlines()) < 30


@pytest.mark.usefixtures("float64")
def test_the_rule_points_where_inference_learning_does_for_small_steps():
    """The step of the weights is small, so that all stages see the same network.

    The stages learn after 8, 9 and 10 steps of the values; relaxed for long, these are alike.
    """
    names = definitions("rules")
    torch.manual_seed(0)
    x, y = torch.randn(20, 3), torch.randn(20, 2)

    def step(rule):
        torch.manual_seed(1)
        network = PredictiveCodingNetwork(
            nn.Linear(3, 8), nn.Tanh(), SquaredErrorNode(8), nn.Linear(8, 2), SquaredErrorNode(2)
        )
        before = nn.utils.parameters_to_vector(network.weights()).detach()
        rule.learn(network, x, y, torch.optim.SGD(network.weights(), lr=1e-6))
        return nn.utils.parameters_to_vector(network.weights()).detach() - before

    rule = names["LayerByLayer"](num_steps=500)
    torch.testing.assert_close(
        step(rule), step(InferenceLearning(500, sgd(0.1))), rtol=1e-3, atol=1e-11
    )
    assert torch.cosine_similarity(step(rule), step(Backpropagation()), 0) > 0.5


@pytest.mark.usefixtures("float64")
def test_the_energy_of_the_node_is_minus_a_log_density():
    node = definitions("rules")["StudentNode"](3, degrees=4.0)
    value, prediction = torch.randn(5, 3), torch.randn(5, 3)
    student = torch.distributions.StudentT(4.0, prediction, 1.0)
    constant = student.log_prob(prediction).sum(1)  # at the mode, where the energy is zero
    expected = constant - student.log_prob(value).sum(1)
    torch.testing.assert_close(node.energy(value, prediction), expected)
