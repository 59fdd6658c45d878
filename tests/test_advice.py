"""What to do about particles that have not mixed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcpc import Posterior
from dcpc.advice import advise, correlated_blocks
from dcpc.recombine import LogWeights
from dcpc.sweep import SweepState


def posterior(latents: dict[str, Tensor], **options) -> Posterior:
    count = len(next(iter(latents.values())))
    about = {
        "samples": latents,
        "state": SweepState(latents, LogWeights.uniform(count), torch.zeros(count)),
        "population_axes": dict.fromkeys(latents, ()),
        "acceptance": {},
        "step_size": {},
        "unit_of": {name: name for name in latents},
    }
    return Posterior(**{**about, **options})


@pytest.fixture
def latents() -> dict[str, Tensor]:
    """`a`, `b` and an element of `v` are nearly one; `c` and `e` are opposites; `d` is alone."""
    a, c = torch.randn(500), torch.randn(500)

    def near(z: Tensor) -> Tensor:
        return z + 0.1 * torch.randn(500)

    v = torch.stack([torch.randn(500), near(a)], -1)
    return {"a": a, "b": near(a), "c": c, "v": v, "d": torch.randn(500), "e": -near(c)}


def test_latents_that_correlate_are_joined_in_blocks(latents):
    blocks, strongest = correlated_blocks(posterior(latents))
    assert blocks == [("a", "b", "v"), ("c", "e")]
    # 1 / sqrt(1 + .01), of either sign
    assert abs(strongest) == pytest.approx(1.01**-0.5, abs=0.002)


def test_what_moves_together_already_is_no_new_block(latents):
    joined = {name: "a+b+v" if name in "abv" else name for name in latents}
    blocks, strongest = correlated_blocks(posterior(latents, unit_of=joined))
    assert blocks == [("c", "e")]
    assert strongest < -0.9


def test_whole_units_are_joined(latents):
    joined = {name: "a+d" if name in "ad" else name for name in latents}
    blocks, _ = correlated_blocks(posterior(latents, unit_of=joined))
    assert blocks == [("a", "b", "v", "d"), ("c", "e")]


def test_particles_without_weight_do_not_count(latents):
    """Two outliers make a correlation, and weigh nothing."""
    x, y = torch.randn(500), torch.randn(500)
    x[:2], y[:2] = 1e3, 1e3
    log_weight = torch.zeros(500)
    values = {"x": x, "y": y}
    assert correlated_blocks(posterior(values))[0] == [("x", "y")]
    log_weight[:2] = -torch.inf
    state = SweepState(values, LogWeights(log_weight), torch.zeros(500))
    assert correlated_blocks(posterior(values, state=state))[0] == []


def test_latents_of_many_values_are_not_proposed_as_blocks(latents):
    wide = latents["a"][:, None] + 0.1 * torch.randn(500, 17)
    assert correlated_blocks(posterior({"a": latents["a"], "wide": wide}))[0] == []


def test_advice_depends_on_what_was_run(latents):
    short = advise(posterior(latents), num_sweeps=10, few_families=False)
    assert 'blocks=[("a", "b", "v"), ("c", "e")]' in short
    assert "num_sweeps=1000" in short
    assert "initial_values" not in short
    discarded = advise(posterior({"d": latents["d"]}), num_sweeps=800, few_families=True)
    assert "blocks" not in discarded
    assert "keep_every" in discarded
    assert "initial_values" in discarded
    history = {"d": torch.randn(500, 20)}
    kept = posterior({"d": latents["d"]}, history=history)
    assert "num_sweeps=3200" in advise(kept, num_sweeps=800, few_families=False)


def test_particles_that_are_too_few_for_one_unit_are_counted():
    latents = {"a": torch.randn(100, 20), "b": torch.randn(100, 10)}
    text = advise(posterior(latents), num_sweeps=10, few_families=False)
    assert "take 120 particles" in text  # four per value
    many = {"a": torch.randn(100, 200), "b": torch.randn(100, 10)}
    assert "particles, from which" not in advise(posterior(many), 10, few_families=False)
    enough = {"a": torch.randn(100, 20), "b": torch.randn(100, 2)}
    assert "particles, from which" not in advise(posterior(enough), 10, few_families=False)
