"""Random states that are set, kept, and continued."""

from __future__ import annotations

import torch

from dcpc.seeding import continued, random_state, seeded


def test_a_block_goes_on_from_a_state_and_sets_the_global_one_back() -> None:
    with seeded(3):
        torch.rand(5)
        state = random_state()
        expected = torch.rand(4)
    before = torch.get_rng_state()
    with continued(state):
        assert torch.equal(torch.rand(4), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_states_of_devices_that_are_not_here_are_left_out() -> None:
    state = random_state()
    with continued({**state, "cuda:99": torch.zeros(16, dtype=torch.uint8)}):
        assert torch.equal(torch.get_rng_state(), state["cpu"])
