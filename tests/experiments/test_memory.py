"""Temporal predictive coding against autograd and interpolation; the table of recall errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dcpc.training.data import DigitsData, StoredSequences
from experiments import memory
from experiments.memory import SingleLayer, TemporalPredictiveCoding

pytestmark = pytest.mark.usefixtures("float64")


def energy(network: TemporalPredictiveCoding, state, predicted, frame):
    errors = (state - predicted, frame - network.emission(state.tanh()))
    return sum(e.square().sum() for e in errors) / 2


def test_states_settle_where_their_energy_has_no_slope():
    network = TemporalPredictiveCoding(5, 3, num_iterations=3000, step_size=0.05)
    predicted, frame = torch.randn(4, 3), torch.randn(4, 5)
    state = network.infer(predicted, frame).requires_grad_()
    (slope,) = torch.autograd.grad(energy(network, state, predicted, frame), state)
    assert float(slope.abs().max()) < 1e-8


def test_weights_descend_the_energy_of_one_frame_after_the_other():
    """One pass of two frames, the same steps by autograd and Adam."""
    frames = torch.randn(4, 2, 5)
    network = TemporalPredictiveCoding(5, 3, num_passes=1, learning_rate=0.1)
    other = TemporalPredictiveCoding(5, 3)
    for name in ("transition", "emission"):
        getattr(other, name).load_state_dict(getattr(network, name).state_dict())
    network.learn(frames)
    weights = [*other.transition.parameters(), *other.emission.parameters()]
    optimizer = torch.optim.Adam(weights, 0.1)
    before = None
    for frame in frames.unbind(1):
        predicted = torch.zeros(4, 3) if before is None else other.transition(before)
        state = other.infer(predicted.detach(), frame)
        optimizer.zero_grad()
        (energy(other, state, predicted, frame) / 4).backward()
        optimizer.step()
        before = state.tanh()
    for name in ("transition", "emission"):
        for own, theirs in zip(
            getattr(network, name).parameters(), getattr(other, name).parameters(), strict=True
        ):
            torch.testing.assert_close(own, theirs)


def test_one_layer_recalls_what_a_linear_map_can_interpolate():
    frames = torch.rand(2, 4, 20)  # six transitions between frames that are linearly independent
    network = SingleLayer(20, num_passes=3000)
    network.learn(frames)
    recalled = network.recall(frames)
    assert torch.equal(recalled[:, 0], frames[:, 0])
    assert memory.error(recalled, frames) < 1e-4
    assert float(frames[:, 1:].var()) > 0.05


def test_recall_of_two_layers_follows_the_transition():
    network = TemporalPredictiveCoding(5, 3)
    frames = torch.randn(4, 3, 5)
    with torch.no_grad():
        state = network.infer(torch.zeros(4, 3), frames[:, 0])
        expected = []
        for _ in range(3):
            expected.append(network.emission(state.tanh()))
            state = network.transition(state.tanh())
    torch.testing.assert_close(network.recall(frames), torch.stack(expected, 1))


def test_the_table_has_the_errors_of_what_knows_no_sequence(tmp_path: Path, capsys):
    options = ["--counts", "2", "3", "--seeds", "2", "--only", "mean", "repeat"]
    memory.main([*options, "--output", str(tmp_path / "memory")])
    told = json.loads((tmp_path / "memory.json").read_text())
    for count in (2, 3):
        for seed in (0, 1):
            data = StoredSequences(DigitsData(), count, seed=seed)
            data.setup("fit")
            frames = data.training_set.first(count)[0].flatten(2).double()
            later = frames[:, 1:]
            expected = {
                "mean": (later - frames.mean((0, 1))).square().mean(),
                "repeat": (later - frames[:, :1]).square().mean(),
            }
            for name, value in expected.items():
                assert told[name][str(count)][seed] == pytest.approx(float(value), rel=1e-5)
    printed = capsys.readouterr().out
    assert "| mean " in printed
    assert (tmp_path / "memory.png").stat().st_size > 0


def test_the_config_is_trained_and_recalled(capsys):
    options = ["--trainer.max_epochs=1", "--model.model.state_size=4", "--model.model.cue_size=2"]
    options += ["--model.held_out.num_particles=2", "--model.held_out.test_temperatures=1"]
    options += ["--model.held_out.num_temperatures=1", "--num_threads=1"]
    errors = memory.main(["--counts", "2", "--seeds", "1", "--only", "dcpc", "--", *options])
    assert 0.0 < errors["dcpc"][2][0] < 10.0
