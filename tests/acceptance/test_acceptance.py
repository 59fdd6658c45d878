"""Pyro's own static programs: each divides, and its posterior is that of an independent oracle."""

from __future__ import annotations

import pytest
import torch

from dcpc import DCPC
from dcpc.errors import ModelError
from tests.acceptance.case import Program
from tests.acceptance.catalogue import Refused, programs, refused
from tests.acceptance.comparison import LARGEST_DIFFERENCE, LARGEST_Z, SD_RATIOS, compare

PROGRAMS = programs()
REFUSED = refused()


@pytest.fixture(params=PROGRAMS, ids=lambda program: program.name)
def program(request: pytest.FixtureRequest) -> Program:
    return request.param


def test_a_program_divides_and_takes_two_sweeps(program):
    engine = DCPC(program.model, num_particles=4, **program.options)
    problem = engine.bind(*program.args, **program.kwargs)
    assert engine.division(*program.args, **program.kwargs).program.name == "graph"
    state = problem.init()
    for _ in range(2):
        state, info = problem.sweep(state)
        assert state.log_joint.isfinite().all()
        assert all(bool((count == 0).all()) for count in info.num_bad_scores.values())
    assert all(value.isfinite().all() for value in state.latents.values())


@pytest.mark.slow
def test_its_posterior_is_that_of_the_oracle(program):
    row = compare(program)
    assert row.z <= LARGEST_Z
    assert row.sd_ratios[0] >= SD_RATIOS[0]
    assert row.sd_ratios[1] <= SD_RATIOS[1]
    assert row.probability <= LARGEST_DIFFERENCE


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_is_not_static_is_refused_in_words(case: Refused):
    with pytest.raises(ModelError, match=case.message):
        DCPC(case.model, num_particles=4).division(*case.args)


def test_references_name_what_is_compared():
    """A cheap one of each family, so that the smoke suite runs the oracles' machinery as well."""
    chosen = [p for p in PROGRAMS if p.name in ("minipyro", "named mixture", "hmm 6", "cvae")]
    for program in chosen:
        reference = program.reference()
        assert reference.mean.keys() == reference.std.keys()
        for shares in reference.probabilities.values():
            torch.testing.assert_close(shares.sum(-1), torch.ones_like(shares[..., 0]))
