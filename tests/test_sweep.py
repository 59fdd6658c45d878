"""One sweep: what it keeps, what it changes, what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import gaussian_chain, linear_gaussian_dag

from dcpc import DCPC
from dcpc.conquer import Langevin, Underdamped
from dcpc.divide import Conditional, Density, ScoredDensity
from dcpc.errors import DataError, DegenerateWeightsError
from dcpc.recombine import LogWeights
from dcpc.sweep import SweepState, resample, retarget

pytestmark = pytest.mark.usefixtures("float64")


def copied(state: SweepState):
    tensors = [state.log_joint, state.log_weight.log_weight, *state.latents.values()]
    for learned in state.adaptation.values():
        tensors += [*learned.preconditioner.values(), *learned.step_size.values()]
    return tensors, [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-smc", "dcpc-paper", "pgd"])
def test_sweeping_leaves_the_old_state_as_it_was(algorithm):
    exact = linear_gaussian_dag(3)
    engine = DCPC(exact.model, num_particles=20, algorithm=algorithm)
    state, _ = engine.sweep(engine.init())
    tensors, before = copied(state)
    engine.sweep(state)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-smc"])
@pytest.mark.parametrize("seed", range(3))
def test_log_joint_that_particles_carry_is_that_of_their_values(algorithm, seed):
    """The sum of the units' gains is the change of the joint: no unit lacks a child."""
    exact = linear_gaussian_dag(seed)
    engine = DCPC(exact.model, num_particles=20, algorithm=algorithm)
    state = engine.init()
    for _ in range(4):
        state, _ = engine.sweep(state)
        expected = engine.bind().density.log_joint(state.latents)
        torch.testing.assert_close(state.log_joint, expected)


@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-smc"])
def test_scores_that_sweeps_hand_on_are_those_of_the_particles(algorithm):
    """After moves that were rejected and accepted, and after whole particles were resampled."""
    exact = linear_gaussian_dag(0)
    engine = DCPC(exact.model, num_particles=30, algorithm=algorithm, blocks=[tuple(exact.names)])
    problem = engine.bind(*exact.args)
    state = problem.init()
    state = problem.scored(problem.sweep(state)[0])
    (group,) = problem.division.groups
    for number in range(6):
        if number == 3:
            tilted = state.log_weight.add(3.0 * torch.randn(30))
            state = replace(state, log_weight=tilted)
        state, info = problem.sweep(state, retargets=False)
        assert (info.ancestors is not None) == (number == 3) or algorithm == "dcpc-smc"
        unit = problem.density.conditional(group, state.latents)
        expected = unit.evaluate_raw(unit.value)
        torch.testing.assert_close(state.scored[group.name].log_density, expected.log_density)
        torch.testing.assert_close(state.scored[group.name].score, expected.score)


def test_scores_are_not_handed_on_where_units_move_in_turn():
    chain = gaussian_chain()
    problem = DCPC(chain.model, num_particles=4).bind(*chain.args)
    state, _ = problem.sweep(problem.init())
    assert not problem.scored(state).scored


def test_log_joint_is_carried_per_population_cell_too():
    chain = gaussian_chain(6)
    engine = DCPC(chain.model, num_particles=5)
    state = engine.init(*chain.args)
    assert state.log_joint.shape == (5, 6)
    for _ in range(3):
        state, _ = engine.sweep(state, *chain.args)
        expected = engine.bind(*chain.args).density.log_joint(state.latents)
        torch.testing.assert_close(state.log_joint, expected)


def test_weights_take_the_ratio_when_the_parameters_move():
    def model(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor(0.5)
    engine = DCPC(model, num_particles=30, resample_threshold=0.0)
    state = engine.init(x)
    state, _ = engine.sweep(state, x)
    old, z = state.log_weight.log_weight, state.latents["z"]
    with torch.no_grad():
        pyro.param("loc").add_(0.4)
    new = retarget(engine.bind(x).density, state).log_weight.log_weight
    expected = dist.Normal(0.4, 1.0).log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z)
    torch.testing.assert_close(new - old, expected)
    swept, _ = engine.sweep(state, x)
    torch.testing.assert_close(swept.log_weight.log_weight, new)


def test_tempering_applies_to_likelihoods_only():
    exact = linear_gaussian_dag(1)
    engine = DCPC(exact.model, num_particles=7)
    state = engine.init()
    density = engine.bind().density
    factors = density.log_factors(state.latents)
    for beta in (0.0, 0.3, 1.0):
        expected = sum(
            (beta if site.is_observed else 1.0) * factors[name]
            for name, site in density.division.sites.items()
        )
        got = density.at(beta).log_joint(state.latents)
        torch.testing.assert_close(got, expected)


def test_unit_densities_are_tempered_like_the_joint():
    exact = linear_gaussian_dag(2)
    engine = DCPC(exact.model, num_particles=7)
    state = engine.init()
    density = engine.bind().density.at(0.3)
    for group in density.division.groups:
        conditional = density.conditional(group, state.latents)
        value = group.pack(state.latents)
        for position in range(len(group.units)):
            moved = value.clone()
            moved[..., position, :] += 0.5
            latents = {**state.latents, **group.unpack(moved)}
            change = conditional.log_density(moved) - conditional.log_density(value)
            expected = density.log_joint(latents) - density.log_joint(state.latents)
            torch.testing.assert_close(change[..., position], expected)


def weighted_state(engine, args, log_weight):
    state = engine.init(*args)
    return SweepState(state.latents, LogWeights(log_weight), state.log_joint)


def test_resampling_moves_whole_particles_of_the_cells_that_need_it():
    chain = gaussian_chain(3)
    engine = DCPC(chain.model, num_particles=4)
    log_weight = torch.zeros(4, 3)
    log_weight[:, 1] = torch.tensor([0.0, -50.0, -50.0, -50.0])
    state = weighted_state(engine, chain.args, log_weight)
    density = engine.bind(*chain.args).density
    after, ancestors = resample(density, state, engine.parts)
    assert ancestors[:, 1].tolist() == [0, 0, 0, 0]
    for cell in (0, 2):
        assert ancestors[:, cell].tolist() == [0, 1, 2, 3]
    for name, u in state.latents.items():
        for cell in range(3):
            assert torch.equal(after.latents[name][:, cell], u[ancestors[:, cell], cell])
    for cell in range(3):
        assert torch.equal(after.log_joint[:, cell], state.log_joint[ancestors[:, cell], cell])
    torch.testing.assert_close(after.log_weight.log_mean(), state.log_weight.log_mean())
    assert torch.equal(after.log_weight.log_weight[0, 1], after.log_weight.log_weight[3, 1])


def test_info_reports_the_resampling_and_the_ess_before_it():
    chain = gaussian_chain()
    engine = DCPC(chain.model, num_particles=4, algorithm="dcpc-smc")
    state = engine.init(*chain.args)
    log_joint = engine.bind(*chain.args).density.log_joint(state.latents)
    skewed = torch.tensor([0.0, -40.0, -40.0, -40.0])
    state = SweepState(state.latents, LogWeights(skewed), log_joint)
    _, info = engine.sweep(state, *chain.args)
    assert info.ess.item() == pytest.approx(1.0)
    assert info.ancestors.tolist() == [0, 0, 0, 0]
    assert set(info.statistic) == set(info.step_size) == {"z1", "z2"}


def test_frozen_adaptation_stays():
    exact = linear_gaussian_dag(1)
    engine = DCPC(exact.model, num_particles=50)
    state = engine.init()
    for _ in range(5):
        state, _ = engine.sweep(state)
    frozen, _ = engine.sweep(state, adapt=False)
    for name, learned in state.adaptation.items():
        for part in ("preconditioner", "step_size"):
            for key, value in getattr(learned, part).items():
                assert torch.equal(getattr(frozen.adaptation[name], part)[key], value)
    moving, _ = engine.sweep(state, adapt=True)
    assert any(
        not torch.equal(moving.adaptation[n].step_size["log_step"], a.step_size["log_step"])
        for n, a in state.adaptation.items()
    )


def test_fixed_step_size_is_not_adapted():
    exact = linear_gaussian_dag(1)
    engine = DCPC(exact.model, num_particles=50, step_size=0.07)
    state = engine.init()
    for _ in range(3):
        state, info = engine.sweep(state)
    for step_size in info.step_size.values():
        torch.testing.assert_close(step_size, torch.full_like(step_size, 0.07))


def test_adaptation_reaches_the_target_acceptance_in_every_unit():
    exact = linear_gaussian_dag(2)
    engine = DCPC(exact.model, num_particles=500, blocks=())
    posterior = engine.run(num_sweeps=300, seed=0, progress=False)
    for name, rate in posterior.acceptance.items():
        assert rate == pytest.approx(0.574, abs=0.06), name


def test_a_cell_without_any_density_is_an_error_that_names_the_site():
    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
            good = pyro.sample("fine", dist.Normal(z, 1.0))
            loc = torch.where(torch.tensor([False, True, False]), good * math.nan, good)
            pyro.sample("broken", dist.Normal(loc, 1.0, validate_args=False), obs=x)

    x = torch.zeros(3)
    engine = DCPC(model, num_particles=6, certify=False)
    state = engine.init(x)
    with pytest.raises(DegenerateWeightsError, match=r"all 6 particles.*1 of 3.*\['broken'\]"):
        engine.sweep(state, x)


def test_single_bad_particles_are_left_behind_and_counted():
    """`sqrt` of a negative latent is NaN: half the prior has zero density."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.sqrt(), 0.5, validate_args=False), obs=x)

    posterior = DCPC(model, num_particles=200).run(
        torch.tensor(0.7), num_sweeps=30, seed=0, progress=False
    )
    assert posterior.num_bad > 0
    assert float(posterior.samples["z"].min()) > 0
    assert "NaN or infinite" in posterior.format_summary()


@pytest.mark.parametrize("leapfrog_steps", [1, 3])
def test_where_only_the_score_is_bad_the_posterior_stays_right(leapfrog_steps):
    """`where` hides the NaN of `sqrt` in the density, but not in its gradient."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.where(z > 0, z.sqrt(), 0.0), 0.5), obs=x)

    def positive(x):
        """All particles start where the score is good: the others have to be moved there."""
        pyro.sample("z", dist.Normal(1.0, 0.1))

    x, count = torch.tensor(0.7), 4000
    engine = DCPC(
        model, positive, num_particles=count, move=Langevin(leapfrog_steps), certify=False
    )
    posterior = engine.run(x, num_sweeps=100, seed=0, progress=False)
    grid = torch.linspace(-8.0, 8.0, 100_001)
    density = dist.Normal(0.0, 1.0).log_prob(grid)
    density = (density + dist.Normal(grid.clamp(min=0.0).sqrt(), 0.5).log_prob(x)).exp()
    negative = float(density[grid < 0].sum() / density.sum())
    share = float((posterior.resample()["z"] < 0).double().mean())
    assert abs(share - negative) < 4 * math.sqrt(negative * (1 - negative) / count)


def test_a_state_of_other_data_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    engine = DCPC(model, num_particles=5)
    state = engine.init(torch.zeros(4))
    with pytest.raises(DataError, match=r"'z' have shape \(5, 4\).*ask for \(5, 3\).*init"):
        engine.sweep(state, torch.zeros(3))


def test_division_serves_new_data_without_dividing_again():
    chain = gaussian_chain(4)
    engine = DCPC(chain.model, num_particles=5)
    first = engine.division(torch.zeros(4))
    assert engine.division(torch.ones(4)) is first
    latents = {"z1": torch.zeros(5, 4), "z2": torch.zeros(5, 4)}
    expected = dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0))
    expected = expected + dist.Normal(0.0, 0.3).log_prob(torch.tensor(0.0))
    expected = expected + dist.Normal(0.0, 1.0).log_prob(torch.tensor(1.0))
    density = Density(first, (torch.ones(4),))
    torch.testing.assert_close(density.log_joint(latents), expected.expand(5, 4))


def test_only_finite_scores_of_what_is_in_the_target_are_moved_along():
    """A reference distribution has a score at masked elements too; nothing moves there."""
    score = torch.tensor([[[1.0, math.nan, math.inf, -2.0]]])
    active = torch.tensor([[[True, True, True, False]]])
    evaluation = ScoredDensity(torch.zeros(1, 1), score)
    unit = Conditional(None, None, {}, active)
    assert unit.usable(evaluation).score.tolist() == [[[1.0, 0.0, 0.0, 0.0]]]
    assert replace(unit, active=None).usable(evaluation).score.tolist() == [[[1.0, 0.0, 0.0, -2.0]]]


def test_what_a_move_keeps_goes_with_its_particle_when_whole_particles_are_resampled():
    chain = gaussian_chain(3)
    engine = DCPC(chain.model, num_particles=4, move="underdamped")
    problem = engine.bind(*chain.args)
    state = problem.init()
    assert set(state.memory) == {"momentum"}
    log_weight = torch.zeros(4, 3)
    log_weight[:, 1] = torch.tensor([0.0, -50.0, -50.0, -50.0])
    state = replace(state, log_weight=LogWeights(log_weight))
    after, ancestors = resample(problem.density, state, engine.parts)
    for name, momentum in state.memory["momentum"].items():
        assert momentum.shape == state.latents[name].shape
        expected = momentum.gather(0, ancestors)
        assert torch.equal(after.memory["momentum"][name], expected)
        assert not torch.equal(expected, momentum)


def test_a_sweep_turns_the_momentum_of_the_particles_that_stay():
    """Steps far too long are all rejected: the momentum is what it was, but for its refreshment."""
    chain = gaussian_chain(500)
    engine = DCPC(chain.model, num_particles=2, move=Underdamped(0.9), step_size=1e4)
    problem = engine.bind(*chain.args)
    before = problem.init()
    after, _ = problem.sweep(before, adapt=False)
    for name, momentum in after.memory["momentum"].items():
        assert torch.equal(after.latents[name], before.latents[name])
        pair = torch.stack([momentum.flatten(), before.memory["momentum"][name].flatten()])
        assert float(torch.corrcoef(pair)[0, 1]) == pytest.approx(-0.9, abs=4 * 0.19 / 1000**0.5)
        assert float(momentum.std()) == pytest.approx(1.0, abs=4 / 2000**0.5)


def test_uncorrected_dynamics_with_a_momentum_have_the_moments_of_the_posterior():
    """Small steps have small errors: of a Gaussian the leapfrog's variance is that of eps^2 / 4."""
    chain = gaussian_chain(2000)
    engine = DCPC(
        chain.model,
        num_particles=2,
        move=Underdamped(0.7),
        correction="none",
        preconditioner="identity",
        step_size=0.005,
        schedule="joint",
    )
    problem = engine.bind(*chain.args)
    torch.manual_seed(0)
    state = problem.init()
    for _ in range(400):
        state, _ = problem.sweep(state)
    z = torch.stack([state.latents[name].flatten() for name in chain.names])
    for index, (mean, cov) in enumerate(zip(chain.mean, chain.covariance.diagonal(), strict=True)):
        assert float(z[index].mean()) == pytest.approx(
            float(mean), abs=4 * float(cov / 4000) ** 0.5
        )
        assert float(z[index].var()) == pytest.approx(float(cov), rel=0.03 + 4 * (2 / 4000) ** 0.5)
