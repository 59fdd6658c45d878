from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch

from dcpc import DCPC
from dcpc.recombine import LogWeights
from dcpc.sweep import SweepState
from dcpc.training.store import ParticleStore, StoreError
from dcpc.training.visits import TiedVisit, Visit, datum_axes

N, K, B = 7, 3, 4


def state(*cells: int) -> SweepState:
    """Random particles of `B` data, which share a weight where there are no cells."""
    return SweepState(
        latents={"z": torch.randn(K, B, 5)},
        log_weight=LogWeights(torch.randn(K, *cells)),
        log_joint=torch.randn(K, *cells),
    )


@pytest.mark.parametrize(("kind", "cells"), [(Visit, (B,)), (TiedVisit, ())])
def test_a_first_visit_draws_and_the_next_recalls(
    kind: type[Visit], cells: tuple[int, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    here = kind(ParticleStore(tmp_path, N), torch.tensor([5, 0, 3, 1]), {"z": 1})
    drawn, swept = state(*cells), state(*cells)
    assert here.is_first
    assert torch.equal(here.recall(lambda: drawn).latents["z"], drawn.latents["z"])
    here.keep(swept)
    assert not here.is_first
    back = here.recall(lambda: drawn)
    assert torch.equal(back.latents["z"], swept.latents["z"])
    assert back.log_weight.log_weight.shape == back.log_joint.shape == (K, *cells)


def test_data_that_were_tied_keep_a_weight_each_and_meet_again_with_equal_ones(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    store = ParticleStore(tmp_path, N)
    here, swept = TiedVisit(store, torch.tensor([5, 0, 3, 1]), {"z": 1}), state()
    here.keep(swept)
    weights = swept.log_weight.log_weight
    _, kept = store.particles(here.index)
    torch.testing.assert_close(kept, (torch.log_softmax(weights, 0) + math.log(K)).expand(B, K))
    # Other data of the batch say nothing of these particles' weights, and neither does its sum.
    assert not bool(here.recall(state).log_weight.log_weight.any())


def test_a_model_whose_data_are_not_one_plate_is_refused() -> None:
    division = SimpleNamespace(sites={"z": SimpleNamespace(plates=())}, latents=["z"])
    with pytest.raises(StoreError, match="one plate over the 8 data"):
        datum_axes(division, 8)


def test_a_latent_outside_of_the_plate_over_the_data_is_named_with_what_to_do() -> None:
    def model(x: torch.Tensor) -> None:
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, spread), obs=x)

    division = DCPC(model, num_particles=2).division(torch.zeros(B))
    with pytest.raises(StoreError, match=r"\['spread'\] are outside of it. Make each a parameter"):
        datum_axes(division, B)
