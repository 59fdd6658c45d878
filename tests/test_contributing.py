"""The recipe for a new part in CONTRIBUTING.md works as it is written."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from dcpc.conquer import MOVES, Diagonal, Move, Start

sys.path.append(str(Path(__file__).parent / "conquer"))
import test_moves

RECIPE = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(), re.DOTALL
)


@pytest.fixture
def move(monkeypatch: pytest.MonkeyPatch) -> Move:
    registry: dict[str, type[Move]] = {}
    namespace = {"MOVES": registry, "__name__": "dcpc.conquer.random_walk"}
    module = type(sys)("dcpc.conquer.random_walk")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in RECIPE:
        exec(block, namespace)
    (kind,) = registry.values()
    monkeypatch.setitem(MOVES, next(iter(registry)), kind)
    return kind()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("make", ["diagonal", "dense"])
def test_the_new_move_leaves_a_gaussian_invariant(move, make):
    test_moves.test_corrected_moves_leave_a_gaussian_invariant(make, move)


@pytest.mark.usefixtures("float64")
def test_the_new_move_conforms(move):
    test_moves.test_densities_of_proposals_integrate_to_one(test_moves.dense, move)
    test_moves.test_ways_back_are_densities_of_proposals_from_the_other_end(move)
    test_moves.test_moves_keep_shapes_precision_and_what_they_were_given(move)
    test_moves.test_moves_take_as_many_scores_as_they_say(move)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("correction", ["metropolis", "weight"])
def test_the_engine_takes_the_new_move_by_name(move, correction):
    test_moves.test_the_engine_is_exact_with_every_move("random_walk", correction)


def test_the_recipe_is_one_small_file_and_one_line():
    file, line = RECIPE
    assert len(file.splitlines()) < 100
    assert len([row for row in line.splitlines() if not row.startswith("#")]) == 1
    for kind in {type(move) for move in test_moves.EXACT}:
        source = Path(sys.modules[kind.__module__].__file__).read_text()
        assert len(source.splitlines()) < 100, kind.__name__


def test_a_start_has_nothing_kept_unless_the_move_keeps_something():
    start = Start(torch.ones(1), torch.ones(1), torch.ones(1), Diagonal(torch.ones(1)), torch.neg)
    assert start.memory == {}
