"""Moves against formulas written out, and every registered move against the laws of its kind."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import gaussian_chain
from torch.distributions import MultivariateNormal, Normal

from dcpc import DCPC
from dcpc.conquer import (
    MOVES,
    Barker,
    Dense,
    Diagonal,
    Gradient,
    Kinetic,
    Langevin,
    Move,
    Start,
    Underdamped,
)
from dcpc.draws import effective_sample_size
from dcpc.errors import OptionError
from dcpc.recombine.correction import CORRECTIONS
from dcpc.sweep import SweepState

pytestmark = pytest.mark.usefixtures("float64")

K, PLATE, N, D = 6, 4, 2, 3


def setting():
    torch.manual_seed(1)
    value, score, other = torch.randn(3, K, PLATE, N, D).unbind(0)
    return value, score, other, torch.tensor([0.3, 0.05])


def diagonal():
    return Diagonal(torch.rand(PLATE, N, D) + 0.5)


def dense():
    return Dense(torch.randn(PLATE, N, D, D) + 2 * torch.eye(D))


def unused(value):
    raise AssertionError("a single step needs no score but the first")


def propose(move, value, score, eta, metric, score_at=unused, memory=None):
    if memory is None:
        memory = move.init_memory(value)
    return move.propose(Start(value, score, eta, metric, score_at, memory))


def covariance(metric) -> torch.Tensor:
    """P as a full matrix, `(*plates, n, d, d)`."""
    if isinstance(metric, Diagonal):
        return metric.scale.square().diag_embed()
    return metric.factor @ metric.factor.mT


@pytest.mark.parametrize("make", [diagonal, dense])
def test_metric_is_a_factor_of_its_preconditioner(make):
    torch.manual_seed(0)
    metric, score = make(), torch.randn(K, PLATE, N, D)
    p = covariance(metric)
    torch.testing.assert_close(
        metric.colour(metric.whiten_score(score)), (p @ score[..., None])[..., 0]
    )
    torch.testing.assert_close(metric.half_log_det(), 0.5 * torch.logdet(p))


@pytest.mark.parametrize("make", [diagonal, dense])
def test_langevin_densities_are_multivariate_normal_both_ways(make):
    value, score, other, eta = setting()
    metric = make()
    p = covariance(metric)
    step = eta[:, None]

    def density(start, start_score, end):
        mean = start + step * (p @ start_score[..., None])[..., 0]
        return MultivariateNormal(mean, 2 * eta[:, None, None] * p).log_prob(end)

    proposal = propose(Langevin(), value, score, eta, metric)
    forward = density(value, score, proposal.value)
    torch.testing.assert_close(proposal.log_density, forward)
    backward = density(proposal.value, other, value)
    torch.testing.assert_close(proposal.way_back(other).log_ratio, backward - forward)


def test_langevin_with_a_diagonal_metric_is_a_product_of_normals():
    value, score, _, eta = setting()
    metric = diagonal()
    proposal = propose(Langevin(), value, score, eta, metric)
    mean = value + eta[:, None] * metric.scale**2 * score
    scale = (2 * eta[:, None]).sqrt() * metric.scale
    expected = Normal(mean, scale).log_prob(proposal.value).sum(-1)
    torch.testing.assert_close(proposal.log_density, expected)


@pytest.mark.parametrize("make", [diagonal, dense])
def test_langevin_proposals_have_the_mean_and_covariance_of_the_formula(make):
    torch.manual_seed(2)
    metric = make()
    count = 40_000
    value = torch.randn(PLATE, N, D)
    score = torch.randn(PLATE, N, D)
    eta = torch.tensor([0.3, 0.05])
    many = value.expand(count, PLATE, N, D), score.expand(count, PLATE, N, D)
    draws = propose(Langevin(), *many, eta, metric).value
    p = covariance(metric)
    mean = value + eta[:, None] * (p @ score[..., None])[..., 0]
    expected = 2 * eta[:, None, None] * p
    sd = expected.diagonal(dim1=-2, dim2=-1).sqrt()
    assert float(((draws.mean(0) - mean) / sd).abs().max()) < 5 / count**0.5
    centred = (draws - mean) / sd
    correlation = torch.einsum("k...i,k...j->...ij", centred, centred) / count
    target = expected / sd[..., None] / sd[..., None, :]
    assert float((correlation - target).abs().max()) < 5 * (2 / count) ** 0.5


@pytest.mark.parametrize("make", [diagonal, dense])
def test_gradient_step_is_the_langevin_mean_without_noise_or_density(make):
    value, score, other, eta = setting()
    metric = make()
    proposal = propose(Gradient(), value, score, eta, metric)
    expected = value + eta[:, None] * (covariance(metric) @ score[..., None])[..., 0]
    torch.testing.assert_close(proposal.value, expected)
    assert proposal.log_density is None
    assert torch.equal(proposal.way_back(other).log_ratio, torch.zeros(K, PLATE, N))


@pytest.mark.parametrize("make", [diagonal, dense])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_leapfrog_steps_follow_hamiltons_equations(make, steps):
    """Textbook leapfrog in position and momentum, with mass matrix P^-1 and eps^2 = 2 eta."""
    value, _, _, eta = setting()
    metric = make()

    def score_at(u):
        return 1 - 2 * u.tanh()

    def log_density(u):
        return (u - 2 * u.cosh().log()).sum(-1)

    torch.manual_seed(5)
    move = Langevin(leapfrog_steps=steps)
    proposal = propose(move, value, score_at(value), eta, metric, score_at)
    torch.manual_seed(5)
    if steps > 1:  # the length of several steps is drawn
        eta = eta * (1.0 + 0.2 * (2.0 * torch.rand(value.shape[:-1]) - 1.0)) ** 2
    p, eps = covariance(metric), (2 * eta)[..., None].sqrt()
    whitened = torch.randn_like(value)
    factor = metric.factor if hasattr(metric, "factor") else metric.scale.diag_embed()
    momentum = torch.linalg.solve(factor.mT, whitened[..., None])[..., 0]

    def kinetic(m):
        return 0.5 * (m * (p @ m[..., None])[..., 0]).sum(-1)

    u, start = value, kinetic(momentum)
    for _ in range(steps):
        momentum = momentum + eps / 2 * score_at(u)
        u = u + eps * (p @ momentum[..., None])[..., 0]
        momentum = momentum + eps / 2 * score_at(u)
    torch.testing.assert_close(proposal.value, u)
    ratio = proposal.way_back(score_at(u)).log_ratio
    torch.testing.assert_close(ratio, start - kinetic(momentum))
    assert float((log_density(u) - log_density(value)).abs().max()) > 0.1  # it went somewhere


@pytest.mark.parametrize("steps", [0, 2.5, True])
def test_no_number_of_leapfrog_steps_is_an_error(steps):
    message = f"leapfrog_steps must be an integer of at least 1, got {steps}"
    with pytest.raises(OptionError, match=message):
        Langevin(leapfrog_steps=steps)


@pytest.mark.parametrize("jitter", [-0.1, 1.0])
def test_steps_that_might_have_no_length_are_an_error(jitter):
    with pytest.raises(OptionError, match=rf"jitter must lie in \[0, 1\), got {jitter}"):
        Langevin(leapfrog_steps=2, jitter=jitter)


def test_the_length_of_several_steps_varies_by_its_jitter_and_that_of_one_is_kept():
    """Where nothing pulls, two steps lead twice as far as one step of the same length."""
    eta = torch.full((1,), 0.3)
    nothing, metric = torch.zeros(10_000, 1, 1), Diagonal(torch.ones(1, 1))
    for move, lowest, highest in (
        (Langevin(1), 1.0, 1.0),
        (Langevin(2), 0.8, 1.2),
        (Langevin(2, jitter=0.9), 0.1, 1.9),
    ):
        steps = move.leapfrog_steps
        torch.manual_seed(0)
        end = propose(move, nothing, nothing, eta, metric, torch.zeros_like).value
        torch.manual_seed(0)
        if steps > 1:
            torch.rand(10_000, 1)
        noise = torch.randn(10_000, 1, 1)
        ratio = (end / (steps * 0.6**0.5 * noise)).flatten()
        assert lowest - 1e-9 <= float(ratio.min()) <= lowest + 1e-3
        assert highest - 1e-3 <= float(ratio.max()) <= highest + 1e-9


def test_four_steps_of_a_quarter_period_do_not_return_to_where_they_started():
    # On a standard normal, a leapfrog step of length sqrt(2) is a quarter turn of phase space.
    torch.manual_seed(0)

    def model():
        with pyro.plate("copies", 4000):
            z = pyro.sample("z", dist.Normal(torch.zeros(4000), math.sqrt(2.0)))
            pyro.sample("x", dist.Normal(z, math.sqrt(2.0)), obs=torch.zeros(4000))

    engine = DCPC(
        model, num_particles=1, move=Langevin(4), step_size=1.0, preconditioner="identity"
    )
    state = engine.init()
    start = SweepState({"z": torch.full((1, 4000), 2.0)}, state.log_weight, state.log_joint)
    state, _ = engine.sweep(start, adapt=False)
    for _ in range(20):
        state, _ = engine.sweep(state, adapt=False)
    z = state.latents["z"]
    assert abs(float(z.mean())) < 4 / math.sqrt(4000)
    assert float(z.var()) == pytest.approx(1.0, abs=4 * math.sqrt(2 / 4000))


def langevin_of_no_friction() -> list[Move]:
    return [Langevin(3), Underdamped(0.0), Underdamped(0.99)]


EXACT = [kind() for kind in MOVES.values() if kind.is_reversible] + langevin_of_no_friction()
"""Every registered move that a correction makes exact, and some in other settings."""


def name(move) -> str:
    return repr(move)


def test_the_registry_is_what_the_tests_look_at():
    assert {type(move) for move in EXACT} == {Langevin, Barker, Underdamped}
    assert not Gradient().is_reversible
    assert not Gradient().is_random
    assert not Kinetic().is_reversible
    assert Kinetic().is_random


@pytest.mark.parametrize("move", EXACT, ids=name)
@pytest.mark.parametrize("make", ["diagonal", "dense"])
def test_corrected_moves_leave_a_gaussian_invariant(make, move):
    """Exact draws in, exact draws out: mean, covariance and fourth moments after ten steps."""
    torch.manual_seed(3)
    count = 40_000
    precision = torch.tensor([[2.0, 0.8], [0.8, 1.0]])
    target = MultivariateNormal(torch.zeros(2), precision_matrix=precision)
    metric = (
        Diagonal(torch.tensor([[0.5, 1.0]]))
        if make == "diagonal"
        else Dense(torch.linalg.cholesky(torch.linalg.inv(precision))[None])
    )
    eta = torch.tensor([0.6])
    z = target.sample((count, 1))
    memory, rates = move.init_memory(z), []
    for _ in range(10):
        proposal = propose(move, z, -z @ precision, eta, metric, lambda u: -u @ precision, memory)
        back = proposal.way_back(-proposal.value @ precision)
        ratio = target.log_prob(proposal.value) - target.log_prob(z) + back.log_ratio
        accept = torch.rand(count, 1).log() < ratio
        rates.append(float(accept.double().mean()))
        z = torch.where(accept[..., None], proposal.value, z)
        memory = {
            kind: torch.where(accept[..., None], kept, proposal.memory_if_rejected[kind])
            for kind, kept in back.memory.items()
        }
    assert 0.2 < min(rates) < 0.98
    white = z[:, 0] @ torch.linalg.cholesky(precision)
    assert float(white.mean(0).abs().max()) < 4.5 / count**0.5
    assert float((white.T @ white / count - torch.eye(2)).abs().max()) < 4.5 * (2 / count) ** 0.5
    assert float((white**4).mean(0).sub(3).abs().max()) < 4.5 * (96 / count) ** 0.5
    for kept in memory.values():  # standard normal, and independent of the value
        assert abs(float(kept.square().mean()) - 1) < 4.5 * (2 / (2 * count)) ** 0.5
        assert float((kept[:, 0] * white).mean(0).abs().max()) < 4.5 / count**0.5


@pytest.mark.parametrize("move", [m for m in EXACT if m.has_density], ids=name)
@pytest.mark.parametrize("make", [diagonal, dense])
def test_densities_of_proposals_integrate_to_one(make, move):
    """`E[f(u') / q(u' | u)] = 1` for any density f; here of the normal of a wide Langevin step."""
    torch.manual_seed(4)
    count, metric, eta = 100_000, make(), torch.tensor([0.3, 0.05])
    value, score = torch.randn(2, PLATE, N, D).unbind(0)
    start = value.expand(count, PLATE, N, D), score.expand(count, PLATE, N, D)
    proposal = propose(move, *start, eta, metric)
    narrow = MultivariateNormal(value, eta[:, None, None] * covariance(metric))
    weight = (narrow.log_prob(proposal.value) - proposal.log_density).exp()
    error = (weight.mean(0) - 1).abs() / (weight.std(0) / count**0.5)
    assert float(error.max()) < 4.5


@pytest.mark.parametrize("move", [m for m in EXACT if m.has_density], ids=name)
def test_ways_back_are_densities_of_proposals_from_the_other_end(move):
    """`E[pi(u') / pi(u) e^ratio h(u, u')] = E[h(u', u)]`: here of h = u^2 u' + u."""
    torch.manual_seed(6)
    count, metric, eta = 400_000, Diagonal(torch.tensor([[0.7]])), torch.tensor([0.4])
    u = torch.randn(count, 1, 1)
    proposal = propose(move, u, -u, eta, metric)
    v = proposal.value
    ratio = (u.square() - v.square()).sum(-1) / 2 + proposal.way_back(-v).log_ratio
    left = (ratio.exp()[..., None] * (u.square() * v + u)).flatten()
    right = (v.square() * u + v).flatten()
    difference = left - right
    assert abs(float(difference.mean())) < 4.5 * float(difference.std()) / count**0.5
    squares = ratio.exp().flatten() * (v.square() * u.square()).flatten()
    difference = squares - (v.square() * u.square()).flatten()
    assert abs(float(difference.mean())) < 4.5 * float(difference.std()) / count**0.5


@pytest.mark.parametrize("move", [*EXACT, Gradient()], ids=name)
def test_moves_keep_shapes_precision_and_what_they_were_given(move):
    value, score = torch.randn(2, K, PLATE, N, D).float().unbind(0)
    eta, metric = torch.tensor([0.3, 0.05]).float(), Diagonal(torch.ones(PLATE, N, D).float())
    memory = move.init_memory(value)
    given = [value, score, eta, *memory.values()]
    before = [tensor.clone() for tensor in given]
    proposal = propose(move, value, score, eta, metric, torch.neg, memory)
    back = proposal.way_back(-proposal.value)
    assert set(back.memory) == set(proposal.memory_if_rejected) == set(memory)
    for tensor in (proposal.value, *back.memory.values(), *proposal.memory_if_rejected.values()):
        assert (tensor.shape, tensor.dtype) == (value.shape, torch.float32)
    assert (back.log_ratio.shape, back.log_ratio.dtype) == ((K, PLATE, N), torch.float32)
    assert (proposal.log_density is not None) == move.has_density
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize("move", [*EXACT, Gradient()], ids=name)
def test_moves_take_as_many_scores_as_they_say(move):
    taken = []

    def score_at(value):
        taken.append(1)
        return -value

    propose(
        move,
        torch.ones(K, N, D),
        -torch.ones(K, N, D),
        torch.ones(N),
        Diagonal(torch.ones(N, D)),
        score_at,
    )
    assert move.num_scores == 1 + len(taken)


@pytest.mark.parametrize("move", [m for m in EXACT if m != Underdamped(0.99)], ids=name)
@pytest.mark.parametrize("correction", [n for n, kind in CORRECTIONS.items() if kind.is_exact])
def test_the_engine_is_exact_with_every_move(move, correction):
    """Posterior mean, variance and evidence of a skewed conjugate pair and of a stiff chain."""
    for model, args, mean, variance, log_evidence in problems():
        blocks = [tuple(mean)]  # the chain is too stiff for moves of one latent at a time
        engine = DCPC(model, num_particles=300, move=move, correction=correction, blocks=blocks)
        posterior = engine.run(*args, num_sweeps=400, keep_every=1, seed=0, progress=False)
        table = posterior.statistics()
        for site, expected in mean.items():
            error = abs(float(table[site]["mean"]) - expected)
            assert error < 4.5 * float(table[site]["mcse"]), site
            sd = variance[site] ** 0.5
            squares = (posterior.draws(site) - expected).square()
            ess = float(effective_sample_size(squares, is_chains=posterior.is_chains))
            assert float(table[site]["std"]) == pytest.approx(sd, rel=5 / ess**0.5), site
        error = abs(float(posterior.log_evidence) - log_evidence)
        assert error < 4.5 * float(posterior.log_evidence_se) < 1.0


def problems():
    def counts(x):
        rate = pyro.sample("rate", dist.Gamma(1.5, 0.5))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    x = torch.tensor([0.0, 2.0, 1.0])
    shape, scale = 1.5 + 3.0, 0.5 + 3.0
    evidence = 1.5 * math.log(0.5) - math.lgamma(1.5) + math.lgamma(shape)
    evidence -= shape * math.log(scale) + math.log(2.0)
    yield counts, (x,), {"rate": shape / scale}, {"rate": shape / scale**2}, evidence
    chain = gaussian_chain()
    moments = dict(zip(chain.names, chain.mean.tolist(), strict=True))
    variances = dict(zip(chain.names, chain.covariance.diagonal().tolist(), strict=True))
    yield chain.model, chain.args, moments, variances, chain.log_evidence


@pytest.mark.parametrize("persistence", [-0.1, 1.0, math.nan])
def test_a_momentum_that_never_or_always_changes_is_refused(persistence):
    with pytest.raises(OptionError, match=r"persistence must lie in \[0, 1\), got"):
        Underdamped(persistence)


def test_a_momentum_persists():
    """Where nothing pulls, steps of one particle are correlated as the persistence says."""
    torch.manual_seed(0)
    move, metric, count = Underdamped(0.8), Diagonal(torch.ones(1, 1)), 20_000
    value, nothing = torch.zeros(count, 1, 1), torch.zeros(count, 1, 1)
    memory, steps = move.init_memory(value), []
    for _ in range(2):
        proposal = propose(move, value, nothing, torch.tensor([0.5]), metric, unused, memory)
        steps.append((proposal.value - value).flatten())
        value, memory = proposal.value, proposal.way_back(nothing).memory
    correlation = torch.corrcoef(torch.stack(steps))[0, 1]
    assert float(correlation) == pytest.approx(0.8, abs=4 * 0.36 / count**0.5)
    assert float(steps[0].std()) == pytest.approx(1.0, abs=4 / (2 * count) ** 0.5)
    turned = proposal.memory_if_rejected["momentum"].flatten()
    torch.testing.assert_close(turned, -steps[1])  # eps is 1


def test_barker_noise_leans_to_the_score():
    """The share of noise that goes up is the mean of the sigmoid, by quadrature."""
    torch.manual_seed(0)
    count, eta, slope = 200_000, 0.5, 1.3
    value = torch.zeros(count, 1, 1)
    metric = Diagonal(torch.ones(1, 1))
    step = propose(Barker(), value, value + slope, torch.tensor([eta]), metric).value.flatten()
    grid = torch.linspace(0.0, 12.0, 200_001)
    normal = Normal(0.0, (2 * eta) ** 0.5).log_prob(grid).exp()
    up = float(torch.trapezoid(2 * normal * torch.sigmoid(slope * grid), grid))
    share = float((step > 0).double().mean())
    assert share == pytest.approx(up, abs=4 * (up * (1 - up) / count) ** 0.5)
    assert float(step.square().mean()) == pytest.approx(2 * eta, rel=4 * (2 / count) ** 0.5)


@pytest.mark.parametrize("persistence", [0.05, math.exp(-1), 0.9, 0.999])
def test_the_kinetic_move_solves_its_equations(persistence):
    """Mean and covariance by matrix exponentials of the linear equations, as Van Loan (1978)."""
    eta, score, metric = 0.3, 1.7, Diagonal(torch.full((1, 1), 2.0))
    factor, eps = float(metric.colour(torch.ones(1, 1, 1))), math.sqrt(2 * eta)
    friction = -math.log(persistence) / eps
    drift = torch.tensor([[0.0, factor], [0.0, -friction]])
    noise = torch.tensor([[0.0, 0.0], [0.0, 2 * friction]])
    blocks = torch.zeros(4, 4)
    blocks[:2, :2], blocks[:2, 2:], blocks[2:, 2:] = -drift, noise, drift.mT
    both = torch.matrix_exp(eps * blocks)
    covariance = both[2:, 2:].mT @ both[:2, 2:]
    with_force = torch.zeros(3, 3)
    with_force[:2, :2], with_force[1, 2] = drift, factor * score
    u, m, count = 0.7, -1.1, 400_000
    mean = (torch.matrix_exp(eps * with_force) @ torch.tensor([u, m, 1.0]))[:2]

    shape = (count, 1, 1)
    start = Start(
        torch.full(shape, u),
        torch.full(shape, score),
        torch.tensor([eta]),
        metric,
        lambda value: value,
        {"momentum": torch.full(shape, m)},
    )
    proposal = Kinetic(persistence).propose(start)
    drawn = torch.stack([proposal.value, proposal.memory["momentum"]], -1).reshape(count, 2)
    error = 5 * (covariance.diagonal() / count).sqrt()
    assert bool(((drawn.mean(0) - mean).abs() < error).all())
    scale = covariance.diagonal().sqrt()
    ratio = drawn.mT.cov() / scale / scale[:, None]
    torch.testing.assert_close(ratio, covariance / scale / scale[:, None], atol=0.012, rtol=0.0)


def test_kinetic_particles_find_a_gaussian_posterior_in_the_limit_of_small_steps():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    engine = DCPC(model, num_particles=4000, algorithm="mpgd", step_size=0.01)
    x = torch.tensor(1.0)
    state = engine.init(x)
    for _ in range(150):
        state, _ = engine.sweep(state, x)
    z, count = state.latents["z"], 4000
    assert abs(float(z.mean()) - 0.5) < 4.5 * math.sqrt(0.5 / count)
    assert float(z.var()) == pytest.approx(0.5, rel=0.01 + 4.5 * math.sqrt(2 / count))
    with pytest.raises(OptionError, match="persistence must lie in"):
        Kinetic(0.0)
    with pytest.raises(OptionError, match="move 'kinetic' has no way back"):
        DCPC(model, num_particles=2, move="kinetic")
