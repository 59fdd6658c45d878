"""Moves of the right length: they forget, jump only where that helps, and stay exact."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import linear_gaussian_dag

from dcpc import DCPC
from dcpc.approach.joint import joint_problem, send_pilots
from dcpc.approach.tuning import LENGTHS, MAX_CORRELATION, NUM_MEASURED, Moves, tuned
from dcpc.conquer import Langevin
from dcpc.progress import ProgressBar
from dcpc.sweep import resample

pytestmark = pytest.mark.usefixtures("float64")


def moves_of(model, *args, num_particles=400, **options) -> Moves:
    torch.manual_seed(0)
    problem = joint_problem(DCPC(model, num_particles=num_particles, **options).bind(*args))
    assert problem is not None
    pilot = send_pilots(problem, 0.9, ProgressBar(False))
    state, _ = resample(problem.density, pilot.annealed.state, problem.parts, always=True)
    return tuned(problem, state, jumps=True)


def gaussian(size: int):
    """Latents with correlations of .5."""
    covariance = 0.5 * torch.eye(size) + 0.5

    def model():
        zeros = torch.zeros(size)
        z = pyro.sample("z", dist.MultivariateNormal(zeros, 4 * covariance))
        pyro.sample("x", dist.MultivariateNormal(z, covariance), obs=torch.ones(size))

    return model


def test_one_step_and_jumps_are_enough_for_a_gaussian():
    moves = moves_of(gaussian(5))
    assert moves.problem.tuned_steps == 1
    assert moves.problem.parts.move == Langevin(1, 0.9)
    assert all(len(learned.reference["loc"]) == 1 for learned in moves.adaptation.values())
    assert moves.left < MAX_CORRELATION + 2.5 / 400**0.5
    assert moves.num_sweeps(300, 1000) < 600


def test_longer_moves_where_one_step_does_not_forget():
    """In 60 dimensions 300 particles know a mixture too roughly for jumps, and steps are short."""
    moves = moves_of(gaussian(60), num_particles=300)
    assert moves.problem.tuned_steps in LENGTHS[1:]
    assert moves.left < 0.5
    assert moves.num_sweeps(300, 1000) > 300


def test_a_move_that_the_user_chose_stays():
    moves = moves_of(gaussian(3), move=Langevin(2))
    assert moves.problem.parts.move == Langevin(2)
    assert not moves.problem.tuned_steps
    assert not any(learned.reference for learned in moves.adaptation.values())
    assert moves.num_sweeps(300, 1000) == 1000


def test_number_of_sweeps_is_a_hundred_autocorrelation_times():
    """With .5 from sweep to sweep, three sweeps are worth one draw."""
    problem = DCPC(gaussian(2), num_particles=64).bind()
    assert Moves(problem, {}, 0.5**NUM_MEASURED).num_sweeps(1, 1000) == 300
    assert Moves(problem, {}, 0.5**NUM_MEASURED).num_sweeps(1, 200) == 200
    assert Moves(problem, {}, 1e-6).num_sweeps(250, 1000) == 250


@pytest.mark.parametrize(
    ("seed", "compile"),
    [
        (0, False),
        (1, False),
        (1, True),
        (1, "auto"),
        pytest.param(0, True, marks=pytest.mark.slow),
        pytest.param(0, "auto", marks=pytest.mark.slow),
    ],
)
def test_linear_gaussian_posteriors_are_exact_with_jumps_and_tuned_moves(seed, compile):
    exact = linear_gaussian_dag(seed)
    engine = DCPC(exact.model, num_particles=500, compile=compile)
    posterior = engine.run(*exact.args, seed=seed, progress=False)
    table = posterior.statistics()
    mean, error, sd = (
        torch.cat([torch.as_tensor(table[name][column]).flatten() for name in exact.names])
        for column in ("mean", "mcse", "std")
    )
    assert bool(((mean - exact.mean).abs() < 4.5 * error).all())
    torch.testing.assert_close(sd, exact.covariance.diagonal().sqrt(), rtol=0.04, atol=0.0)
    error = abs(float(posterior.log_evidence) - float(exact.log_evidence))
    assert error < 4 * float(posterior.log_evidence_se)


def modes(size: int, shares: list[float]):
    """Gaussian modes of equal width, ten sds from the origin, and the shares of draws near them."""
    centre = 7 * torch.eye(size)[: len(shares)]
    if size < len(shares):
        angle = torch.arange(len(shares)) * (2 * math.pi / len(shares))
        centre = 7 * torch.stack([angle.cos(), angle.sin()], 1)
        centre = torch.nn.functional.pad(centre, (0, size - 2))

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(size), 10.0).to_event(1))
        distance = (z.unsqueeze(-2) - centre).square().sum(-1)
        pyro.factor("x", (torch.tensor(shares).log() - distance / (2 * 0.7**2)).logsumexp(-1))

    def found(posterior) -> list[float]:
        draws = posterior.history["z"].flatten(0, 1)
        nearest = torch.cdist(draws, centre).argmin(1)
        return (torch.bincount(nearest, minlength=len(shares)) / len(draws)).tolist()

    volume = size / 2 * math.log(2 * math.pi * 0.7**2)
    height = dist.Normal(0.0, (100 + 0.49) ** 0.5).log_prob(centre[0]).sum()
    return model, found, volume + float(height)


@pytest.mark.parametrize(
    ("size", "shares"),
    [
        (2, [0.3, 0.7]),
        pytest.param(2, [0.1, 0.2, 0.3, 0.4], marks=pytest.mark.slow),
        pytest.param(5, [0.3, 0.7], marks=pytest.mark.slow),
        pytest.param(10, [0.1, 0.2, 0.3, 0.4], marks=pytest.mark.slow),
        pytest.param(20, [0.3, 0.7], marks=pytest.mark.slow),
        pytest.param(20, [0.1, 0.2, 0.3, 0.4], marks=pytest.mark.slow),
    ],
)
def test_a_default_run_finds_the_weights_of_modes_within_a_tenth(size, shares):
    model, found, log_evidence = modes(size, shares)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = DCPC(model, num_particles=1000).run(seed=0, progress=False)
    assert found(posterior) == pytest.approx(shares, rel=0.1)
    error = abs(float(posterior.log_evidence) - log_evidence)
    assert error < 4 * float(posterior.log_evidence_se) < 0.4
