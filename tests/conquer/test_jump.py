"""Jumps: draws and densities of the mixture, and a move that leaves the posterior invariant."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from dcpc import DCPC
from dcpc.conquer.jump import JUMP_DEGREES, mixture_of, state_of
from dcpc.divide.joint_reference import StudentMixture

pytestmark = pytest.mark.usefixtures("float64")

SHARES = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)


def mixture(cells: int = 2) -> StudentMixture:
    """Three components in three dimensions, others in every cell."""
    generator = torch.Generator().manual_seed(4)
    loc = 6 * torch.randn(3, cells, 3, generator=generator)
    factor = torch.randn(3, cells, 3, 3, generator=generator).tril()
    factor.diagonal(dim1=-2, dim2=-1).abs_().add_(0.5)
    share = torch.stack([SHARES.roll(cell) for cell in range(cells)], 1)
    return StudentMixture(loc, factor, JUMP_DEGREES, share.log())


def oracle(of: StudentMixture, cell: int) -> dist.Distribution:
    return dist.MixtureSameFamily(
        dist.Categorical(logits=of.log_share[:, cell]),
        dist.MultivariateStudentT(torch.tensor(of.degrees), of.loc[:, cell], of.factor[:, cell]),
    )


def test_log_density_is_that_of_the_mixture_with_its_shares():
    of = mixture()
    value = 4 * torch.randn(20, 2, 3)
    expected = torch.stack([oracle(of, cell).log_prob(value[:, cell]) for cell in range(2)], 1)
    torch.testing.assert_close(of.log_prob(value, value[..., 0]), expected)


def test_every_draw_is_one_of_the_mixture():
    """Moments by cell, over all draws and over those of the same place: no draw has a component."""
    of, count = mixture(), 40_000
    torch.manual_seed(0)
    draws = of.draw_each(torch.zeros(count, 2, 3))
    share = of.log_share.exp()
    mean = torch.einsum("sc,scd->cd", share, of.loc)
    inner = of.degrees / (of.degrees - 2) * of.factor @ of.factor.mT
    second = torch.einsum("sc,scij->cij", share, inner + of.loc[..., None] * of.loc[..., None, :])
    covariance = second - mean[..., None] * mean[:, None]
    sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    for part in (draws, draws[: count // 4]):
        error = (part.mean(0) - mean) / sd * len(part) ** 0.5
        assert float(error.abs().max()) < 4.5
    got = torch.stack([draws[:, cell].mT.cov() for cell in range(2)])
    assert float(((got - covariance) / (sd[..., None] * sd[:, None])).abs().max()) < 0.05


def test_tails_are_those_of_a_student():
    """Probability of `|u| > 5` in one dimension: 5.4e-4 with ten degrees of freedom."""
    of = StudentMixture(torch.zeros(1, 1), torch.ones(1, 1, 1), JUMP_DEGREES)
    torch.manual_seed(0)
    count = 400_000
    far = float((of.draw_each(torch.zeros(count, 1)).abs() > 5).double().mean())
    grid = torch.linspace(5, 2000, 2_000_001)
    density = torch.distributions.StudentT(JUMP_DEGREES).log_prob(grid).exp()
    exact = 2 * float(torch.trapezoid(density, grid))
    assert far == pytest.approx(exact, abs=4.5 * math.sqrt(exact / count))


def two_modes() -> None:
    """Modes at -5 and 5 of a fifth and four fifths, which no score leads to."""
    z = pyro.sample("z", dist.Normal(0.0, 100.0))
    centre, share = torch.tensor([-5.0, 5.0]), torch.tensor([0.2, 0.8])
    log_density = share.log() - 0.5 * ((z.unsqueeze(-1) - centre) / 0.5).square()
    pyro.factor("x", log_density.logsumexp(-1))


def jumping_state(start: torch.Tensor, of: StudentMixture, **options):
    """A problem and particles that jump from a mixture."""
    problem = DCPC(two_modes, num_particles=len(start), **options).bind()
    state = problem.init()
    state = state.map(lambda name, u: start.clone())
    (name,) = (group.name for group in problem.division.groups)
    problem_state, _ = problem.sweep(state)  # makes an adaptation state
    learned = problem_state.adaptation[name]
    learned = type(learned)(learned.preconditioner, learned.step_size, state_of(of))
    return problem, type(state)(
        {"z": start.clone()},
        state.log_weight,
        problem.density.log_joint({"z": start}),
        {name: learned},
        problem_state.memory,
    )


def rough_mixture() -> StudentMixture:
    """A mixture with wrong shares and widths: what is right comes of the ratio."""
    loc, factor = torch.tensor([[-4.5], [5.5]]), torch.tensor([[[1.0]], [[0.4]]])
    return StudentMixture(loc, factor, JUMP_DEGREES, torch.tensor([0.6, 0.4]).log())


@pytest.mark.parametrize("options", [{}, {"algorithm": "dcpc-smc"}, {"move": "underdamped"}])
def test_jumps_leave_the_posterior_invariant_and_lead_to_it(options):
    count = 4000
    torch.manual_seed(1)
    in_first = torch.rand(count) < 0.2
    exact = torch.where(in_first, -5.0, 5.0) + 0.5 * torch.randn(count)
    # A momentum is not at equilibrium in the beginning.
    for start, num_sweeps in ((exact, 40 if options.get("move") else 3), (0 * exact + 5.0, 40)):
        problem, state = jumping_state(start, rough_mixture(), **options)
        for _ in range(num_sweeps):
            state, _ = problem.sweep(state, adapt=False, retargets=False)
        mass = state.log_weight.normalized()
        z = state.latents["z"]
        error = (0.2 * 0.8 * float(mass.square().sum())) ** 0.5
        assert float((mass * (z < 0)).sum()) == pytest.approx(0.2, abs=4.5 * error)
        for side, centre in ((z < 0, -5.0), (z > 0, 5.0)):
            inside, weight = z[side] - centre, mass[side] / mass[side].sum()
            assert float((weight * inside).sum()) == pytest.approx(0.0, abs=0.1)
            assert float((weight * inside.square()).sum()) == pytest.approx(0.25, rel=0.2)
        torch.testing.assert_close(state.log_joint, problem.density.log_joint(state.latents))


def test_without_jumps_no_particle_leaves_its_mode():
    problem, state = jumping_state(torch.full((200,), 5.0), rough_mixture())
    learned = {n: type(a)(a.preconditioner, a.step_size) for n, a in state.adaptation.items()}
    state = type(state)(state.latents, state.log_weight, state.log_joint, learned, state.memory)
    for _ in range(40):
        state, _ = problem.sweep(state, adapt=False, retargets=False)
    assert bool((state.latents["z"] > 0).all())


def test_a_mixture_survives_as_tensors():
    of = mixture()
    again = mixture_of(state_of(of))
    assert torch.equal(again.loc, of.loc)
    assert torch.equal(again.factor, of.factor)
    assert torch.equal(again.log_share, of.log_share)
    assert again.degrees == JUMP_DEGREES
