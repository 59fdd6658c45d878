"""The presets, step by step, against short implementations on the Gaussian chain of the design.

The implementations below share nothing with the package but torch's random numbers, which they
draw in the same order, so that trajectories must agree to rounding.
"""

from __future__ import annotations

import math

import pytest
import torch
from oracles import gaussian_chain
from torch import Tensor
from torch.distributions import Normal

from dcpc import DCPC
from dcpc.divide.graph import SCHEDULES
from dcpc.presets import PRESETS, build_algorithm
from dcpc.recombine.correction import CORRECTIONS

pytestmark = pytest.mark.usefixtures("float64")

X = 2.0


def log_conditionals(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """Complete conditionals of z1 and z2, up to constants that they do not contain."""
    link = Normal(z1, 0.3).log_prob(z2)
    return Normal(0, 1).log_prob(z1) + link, link + Normal(z2, 1).log_prob(torch.tensor(X))


def log_joint(z1: Tensor, z2: Tensor) -> Tensor:
    return log_conditionals(z1, z2)[0] + Normal(z2, 1).log_prob(torch.tensor(X))


def scores(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    error = (z2 - z1) / 0.09
    return -z1 + error, -error + X - z2


def pick(weights: Tensor) -> Tensor:
    """Systematic resampling with one uniform, by search in the cumulated weights."""
    count = len(weights)
    positions = (torch.arange(count) + torch.rand(1)) / count
    return torch.searchsorted(weights.cumsum(0), positions).clamp(max=count - 1)


def engine_and_start(algorithm: str, num_particles: int = 8, **options):
    chain = gaussian_chain()
    engine = DCPC(chain.model, num_particles=num_particles, algorithm=algorithm, **options)
    torch.manual_seed(1)
    state = engine.init(*chain.args)
    return engine, state, chain.args


def follow(engine, state, args, step, num_sweeps: int = 6, adapt: bool = False) -> None:
    """Runs the package and `step(z1, z2, log_weight)` with the same random numbers."""
    z1, z2 = state.latents["z1"].clone(), state.latents["z2"].clone()
    log_weight = state.log_weight.log_weight.clone()
    for sweep in range(num_sweeps):
        torch.manual_seed(100 + sweep)
        state, _ = engine.sweep(state, *args, adapt=adapt)
        torch.manual_seed(100 + sweep)
        z1, z2, log_weight = step(z1, z2, log_weight)
        torch.testing.assert_close(state.latents["z1"], z1)
        torch.testing.assert_close(state.latents["z2"], z2)
        torch.testing.assert_close(state.log_weight.log_weight, log_weight)


def test_dcpc_paper_is_algorithm_one_step_by_step():
    eta, count = 0.05, 8
    engine, state, args = engine_and_start("dcpc-paper", step_size=eta)

    def step(z1, z2, log_weight):
        correction = torch.zeros(count)
        for unit in (1, 0):  # bottom-up
            values = [z1, z2]
            z, score = values[unit], scores(z1, z2)[unit]
            # One value per unit: the preconditioner, scaled to mean one, is one.
            mean, scale = z + eta * score, math.sqrt(2 * eta)
            proposal = mean + scale * torch.randn(count)
            values[unit] = proposal
            density = log_conditionals(*values)[unit]
            local = density - Normal(mean, scale).log_prob(proposal)
            log_zhat = local.exp().mean().log()
            ancestors = pick(torch.softmax(local, 0))
            values[unit] = proposal[ancestors]
            correction = correction + density[ancestors] - log_zhat
            z1, z2 = values
        return z1, z2, log_joint(z1, z2) - correction

    follow(engine, state, args, step)


def test_dcpc_is_metropolis_adjusted_langevin_unit_by_unit():
    eta, count = 0.04, 8
    engine, state, args = engine_and_start(
        "dcpc", step_size=eta, preconditioner="identity", resample_threshold=0.0
    )
    reference = log_joint(state.latents["z1"], state.latents["z2"])
    carried = state.log_joint.clone()
    started = []

    def step(z1, z2, log_weight):
        if not started:
            log_weight = log_weight + reference - carried
            started.append(True)
        for unit in (1, 0):
            values = [z1, z2]
            z, score = values[unit], scores(*values)[unit]
            before = log_conditionals(*values)[unit]
            scale = math.sqrt(2 * eta)
            proposal = z + eta * score + scale * torch.randn(count)
            values[unit] = proposal
            after, back = log_conditionals(*values)[unit], scores(*values)[unit]
            ratio = after - before
            ratio = ratio + Normal(proposal + eta * back, scale).log_prob(z)
            ratio = ratio - Normal(z + eta * score, scale).log_prob(proposal)
            accept = torch.rand(count).log() < ratio
            values[unit] = torch.where(accept, proposal, z)
            z1, z2 = values
        return z1, z2, log_weight

    follow(engine, state, args, step)


@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-smc"])
def test_whole_particles_are_resampled_where_the_ess_is_low(algorithm):
    """Weights to the posterior, systematic resampling below ESS = .95 K, then the moves."""
    eta, count = 0.04, 8
    engine, state, args = engine_and_start(
        algorithm, step_size=eta, preconditioner="identity", resample_threshold=0.95
    )
    first = [state.log_joint.clone()]
    resampled = []

    def step(z1, z2, log_weight):
        if first:
            log_weight = log_weight + log_joint(z1, z2) - first.pop()
        normal = torch.softmax(log_weight, 0)
        if 1 / normal.square().sum() < 0.95 * count:
            ancestors = pick(normal)
            z1, z2 = z1[ancestors], z2[ancestors]
            log_weight = log_weight.exp().mean().log().expand(count)
            resampled.append(True)
        for unit in (1, 0):
            values = [z1, z2]
            z, score = values[unit], scores(*values)[unit]
            before = log_conditionals(*values)[unit]
            scale = math.sqrt(2 * eta)
            proposal = z + eta * score + scale * torch.randn(count)
            values[unit] = proposal
            after, back = log_conditionals(*values)[unit], scores(*values)[unit]
            ratio = after - before
            ratio = ratio + Normal(proposal + eta * back, scale).log_prob(z)
            ratio = ratio - Normal(z + eta * score, scale).log_prob(proposal)
            bound = {"dcpc": 0.0, "dcpc-smc": 1.0}[algorithm]
            accept = torch.rand(count).log() < ratio + bound
            values[unit] = torch.where(accept, proposal, z)
            log_weight = log_weight + torch.where(accept, ratio.clamp(-bound, bound), 0.0)
            z1, z2 = values
        return z1, z2, log_weight

    follow(engine, state, args, step, num_sweeps=12)
    assert resampled


@pytest.mark.parametrize(("algorithm", "count"), [("pgd", 8), ("mcpc", 1)])
def test_pgd_and_mcpc_are_unadjusted_langevin_on_all_latents_at_once(algorithm, count):
    eta = 0.02
    engine, state, args = engine_and_start(algorithm, count, step_size=eta)

    def step(z1, z2, log_weight):
        noise = torch.randn(count, 2)
        s1, s2 = scores(z1, z2)
        scale = math.sqrt(2 * eta)
        return z1 + eta * s1 + scale * noise[:, 0], z2 + eta * s2 + scale * noise[:, 1], log_weight

    follow(engine, state, args, step)


@pytest.mark.parametrize("algorithm", ["pc", "ipc"])
def test_pc_is_gradient_ascent_on_all_latents_at_once(algorithm):
    eta = 0.02
    engine, state, args = engine_and_start(algorithm, 1, step_size=eta)

    def step(z1, z2, log_weight):
        s1, s2 = scores(z1, z2)
        return z1 + eta * s1, z2 + eta * s2, log_weight

    follow(engine, state, args, step)


def test_pc_converges_to_the_posterior_mode():
    chain = gaussian_chain()
    engine = DCPC(chain.model, num_particles=1, algorithm="pc", step_size=0.05)
    posterior = engine.run(*chain.args, num_sweeps=800, progress=False, seed=0)
    torch.testing.assert_close(chain.stack(posterior.samples)[0], chain.mean, atol=1e-6, rtol=0)


def test_lpc_scales_by_the_root_of_the_running_second_moment():
    eta, count, decay = 0.02, 200, 0.95
    engine, state, args = engine_and_start("lpc", count, step_size=eta)
    memory = {"moment": torch.zeros(2), "mass": 0.0}

    def learn(score):
        memory["moment"] = decay * memory["moment"] + (1 - decay) * score.square().mean(0)
        memory["mass"] = decay * memory["mass"] + (1 - decay)

    def step(z1, z2, log_weight):
        noise = torch.randn(count, 2)
        score = torch.stack(scores(z1, z2), -1)
        if memory["mass"] == 0:
            learn(score)
        p = (memory["moment"] / memory["mass"]).rsqrt()
        moved = torch.stack([z1, z2], -1) + eta * p * score + (2 * eta * p).sqrt() * noise
        learn(score)
        return moved[:, 0], moved[:, 1], log_weight

    # Scores within five standard deviations, so that none is cut as an outlier.
    follow(engine, state, args, step, adapt=True)


def moments_over_cells(algorithm: str, num_particles: int, eta: float, cells: int, sweeps=200):
    """Pooled weighted variances and covariance, and log-mean and mean of log Zhat."""
    chain = gaussian_chain(cells)
    engine = DCPC(
        chain.model,
        num_particles=num_particles,
        algorithm=algorithm,
        step_size=eta,
        **({} if algorithm == "dcpc-paper" else {"preconditioner": "identity"}),
    )
    torch.manual_seed(0)
    state = engine.init(*chain.args)
    for _ in range(sweeps):
        state, _ = engine.sweep(state, *chain.args, adapt=False)
    z1, z2 = state.latents["z1"], state.latents["z2"]
    w = state.log_weight.normalized() / cells
    m1, m2 = (w * z1).sum(), (w * z2).sum()
    log_z = state.log_weight.log_mean()
    return {
        "variances": (float((w * (z1 - m1) ** 2).sum()), float((w * (z2 - m2) ** 2).sum())),
        "covariance": float((w * (z1 - m1) * (z2 - m2)).sum()),
        "log_mean": float(log_z.exp().mean().log()),
        "mean_log": float(log_z.mean()),
    }


@pytest.mark.parametrize(
    ("num_particles", "eta", "cells", "variances", "covariance", "mean_log"),
    [
        (4, 0.01, 4000, (0.204, 0.205), 0.171, -3.93),
        (100, 0.03, 400, (0.206, 0.205), 0.164, -2.93),
    ],
)
def test_dcpc_paper_reproduces_the_narrow_posterior_of_the_design(
    num_particles, eta, cells, variances, covariance, mean_log
):
    """Exact would be .522, .478 and -2.24; the standard error over cells is about .006."""
    got = moments_over_cells("dcpc-paper", num_particles, eta, cells)
    assert got["variances"] == pytest.approx(variances, abs=0.02)
    assert got["covariance"] == pytest.approx(covariance, abs=0.02)
    assert got["mean_log"] == pytest.approx(mean_log, abs=0.06)


def test_evidence_of_the_paper_is_no_bound():
    """The mean of `Zhat` over 4000 cells, heavy-tailed, exceeds the evidence at some sweeps."""
    chain = gaussian_chain(4000)
    engine = DCPC(chain.model, num_particles=4, algorithm="dcpc-paper", step_size=0.01)
    torch.manual_seed(0)
    state = engine.init(*chain.args)
    largest = -math.inf
    for sweep in range(150):
        state, _ = engine.sweep(state, *chain.args, adapt=False)
        if sweep >= 50:
            largest = max(largest, float(state.log_weight.log_mean().exp().mean().log()))
    assert largest > chain.log_evidence + 0.5


@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-smc"])
def test_exact_algorithms_have_the_exact_posterior_on_the_same_chain(algorithm):
    got = moments_over_cells(algorithm, 100, 0.03, 300, sweeps=300)
    assert got["variances"] == pytest.approx((0.5215, 0.5215), abs=0.02)
    assert got["covariance"] == pytest.approx(0.4785, abs=0.02)
    if algorithm == "dcpc-smc":
        assert got["log_mean"] == pytest.approx(-2.2445, abs=0.03)


def test_every_preset_runs_and_gives_finite_samples():
    for name, preset in PRESETS.items():
        chain = gaussian_chain()
        engine = DCPC(
            chain.model, num_particles=1 if preset.single_particle else 16, algorithm=name
        )
        posterior = engine.run(*chain.args, num_sweeps=5, progress=False, seed=0)
        assert all(bool(z.isfinite().all()) for z in posterior.samples.values()), name


def test_parts_are_overridden_by_name_or_by_object():
    correction = CORRECTIONS["weight"](target=0.8)
    algorithm = build_algorithm(
        "dcpc", correction=correction, preconditioner="identity", schedule="sequential"
    )
    assert algorithm.parts.correction is correction
    assert type(algorithm.parts.preconditioner).__name__ == "Identity"
    assert algorithm.schedule is SCHEDULES["sequential"]
