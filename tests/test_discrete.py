"""Discrete latents against enumeration, forward-backward and closed forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from discrete_models import Discrete, models
from oracles import Enumerated, enumerate_posterior

from dcpc import DCPC

pytestmark = pytest.mark.usefixtures("float64")

NAMES = [case.name for case in models()]
NUM_PARTICLES = 4000


@pytest.fixture
def case(request, float64) -> Discrete:
    return next(case for case in models() if case.name == request.param)


def exact_draws(case: Discrete, exact: Enumerated, count: int) -> dict[str, torch.Tensor]:
    """Independent draws of the posterior, from its table."""
    index = torch.multinomial(exact.weights, count, replacement=True)
    return {name: value[index].double() for name, value in exact.assignments.items()}


def largest_z(
    drawn: torch.Tensor, values: list[torch.Tensor], shares: torch.Tensor, keep: torch.Tensor
) -> float:
    """Largest deviation of frequencies from probabilities, in standard errors.

    Probabilities under 1e-3 are left out, where a count is not normal.
    """
    found = torch.stack(
        [(drawn == value).double().mean(0) for value in torch.unique(torch.stack(values))], -1
    )
    error = (shares * (1 - shares) / len(drawn)).sqrt()
    z = ((found - shares).abs() / error).masked_fill(shares <= 1e-3, 0.0)
    return float(z[keep].max())


@pytest.mark.parametrize("case", NAMES, indirect=True)
@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-smc"])
def test_draws_of_the_posterior_stay_draws_of_the_posterior(case, algorithm):
    """One sweep on exact draws, all frequencies of which must stay what they are."""
    exact = enumerate_posterior(case.model, case.args, case.values)
    engine = DCPC(case.model, num_particles=NUM_PARTICLES, algorithm=algorithm, **case.options)
    problem = engine.bind(*case.args)
    latents = exact_draws(case, exact, NUM_PARTICLES)
    log_joint = problem.density.log_joint(latents)
    state = replace(problem.init(), latents=latents, log_joint=log_joint)
    moved, _ = problem.sweep(state)
    torch.testing.assert_close(moved.log_joint, problem.density.log_joint(moved.latents))
    torch.testing.assert_close(moved.log_weight.log_weight, state.log_weight.log_weight)
    for name, values in case.values.items():
        z, shares = moved.latents[name], exact.probabilities[name]
        unseen = ~masked(case, name)
        assert largest_z(z, values, shares, unseen) < 4.5
        assert not torch.equal(moved.latents[name], state.latents[name])


@pytest.mark.parametrize("case", NAMES, indirect=True)
@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-smc"])
def test_posterior_and_evidence_are_those_of_enumeration(case, algorithm):
    exact = enumerate_posterior(case.model, case.args, case.values)
    engine = DCPC(case.model, num_particles=200, algorithm=algorithm, **case.options)
    posterior = engine.run(*case.args, num_sweeps=400, seed=1, progress=False)
    error = float(posterior.log_evidence_se.square().sum().sqrt())
    assert error < 0.3
    assert abs(float(posterior.log_evidence.sum()) - exact.log_evidence) < 4 * error + 1e-6
    for name, shares in exact.probabilities.items():
        found = posterior.probabilities(name)
        if case.name == "one_hot":  # probabilities of the entries, not of zero and one in each
            shares = shares[..., 1]
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]))
        seen = min(found.shape[-1], shares.shape[-1])
        off = (found[..., :seen] - shares[..., :seen]).abs()
        assert float(off[~masked(case, name)].max()) < 0.02
        assert float(shares[..., seen:].sum()) < 1e-2


def masked(case: Discrete, name: str) -> torch.Tensor:
    """Elements that are data, and no part of the posterior."""
    return case.args[1] if name.endswith("_unobserved") else torch.tensor(False)
