"""Recorded and compiled sweeps: the same numbers, exact posteriors, honest refusals."""

from __future__ import annotations

import gc
import warnings
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import gaussian_chain, linear_gaussian_dag
from torch import Tensor, nn

from dcpc import DCPC
from dcpc.conquer import Langevin
from dcpc.graphs import stages, tiers
from dcpc.graphs.compiler import compile_recording
from dcpc.graphs.learning import LearningSweep
from dcpc.graphs.runner import CompileWarning, RecordedRunner

pytestmark = pytest.mark.usefixtures("float64")

NUM_SWEEPS = 14  # the first 8 are as written


def schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        trans = pyro.sample("trans", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * trans, sigma), obs=y)


DATA = torch.tensor([28.0, 8.0, -3.0, 7.0]), torch.tensor([15.0, 10.0, 16.0, 11.0])


class Layers(nn.Module):
    """Two layers of latents for every datum, and pixels; a decoder to learn."""

    def __init__(self, likelihood: str = "continuous_bernoulli") -> None:
        super().__init__()
        torch.manual_seed(3)
        from dcpc.models import DeepLatentGaussian

        self.model = DeepLatentGaussian([2, 3], [1, 2, 2], likelihood).double()

    def forward(self, x: Tensor) -> None:
        self.model(x)


def recordings(engine: DCPC) -> list[int]:
    assert isinstance(engine._runner, RecordedRunner)
    return engine._runner.num_operators()


def sweep(engine: DCPC, args: tuple, options: list[dict] | None = None) -> list[Tensor]:
    """Everything that a dozen sweeps give, from a seed."""
    torch.manual_seed(0)
    state = engine.init(*args)
    seen = []
    for adapt in options or [{"adapt": True}] * NUM_SWEEPS:
        state, info = engine.bind(*args).sweep(state, **adapt)
        seen += [*state.latents.values(), state.log_weight.log_weight, state.log_joint, info.ess]
        seen += [*info.statistic.values(), *info.step_size.values(), torch.as_tensor(info.num_bad)]
        for learned in state.adaptation.values():
            seen += [*learned.preconditioner.values(), *learned.step_size.values()]
    return seen


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"particle_batch_size": 7},
        {"algorithm": "dcpc-smc"},
        {"algorithm": "pgd"},
        {"algorithm": "lpc"},
        {"move": "barker"},
        {"move": "underdamped"},
        {"move": Langevin(3)},
        {"preconditioner": "second_moment", "schedule": "sequential"},
        {"blocks": [("mu", "tau")]},
    ],
    ids=str,
)
def test_recorded_sweeps_are_those_as_written_bit_for_bit(options):
    recorded = DCPC(schools, num_particles=20, **options)
    written = DCPC(schools, num_particles=20, compile=False, **options)
    assert equal(sweep(recorded, DATA), sweep(written, DATA))
    assert recordings(recorded)


def test_mixtures_are_recorded():
    """The derivative of their `logsumexp` writes in place."""

    def mixture(y: Tensor) -> None:
        weight, loc = pyro.sample("weight", dist.Beta(2.0, 2.0)), torch.tensor([-2.0, 2.0])
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        choice = dist.Categorical(torch.stack([weight, 1 - weight]))
        with pyro.plate("data", len(y)):
            parts = dist.Normal(loc + shift, 1.0)
            pyro.sample("y", dist.MixtureSameFamily(choice, parts), obs=y)

    args = (torch.randn(7) * 2.0,)
    recorded = DCPC(mixture, num_particles=20)
    assert equal(sweep(recorded, args), sweep(DCPC(mixture, num_particles=20, compile=False), args))
    assert recordings(recorded)


def test_one_recording_serves_whatever_adapts():
    options = [
        {"adapt": True},
        {"adapt": True, "adapt_preconditioner": False},
        {"adapt": False},
        {"adapt": False, "retargets": False},
    ]
    recorded = DCPC(schools, num_particles=20)
    got = sweep(recorded, DATA, options[:1] * NUM_SWEEPS + options * 4)
    written = DCPC(schools, num_particles=20, compile=False)
    assert equal(got, sweep(written, DATA, options[:1] * NUM_SWEEPS + options * 4))


def test_other_data_of_the_same_shape_are_seen():
    recorded, written = (
        DCPC(schools, num_particles=20),
        DCPC(schools, num_particles=20, compile=False),
    )
    for shift in (0.0, 5.0):
        args = DATA[0] + shift, DATA[1]
        assert equal(sweep(recorded, args), sweep(written, args))


@pytest.mark.parametrize("num_particles", [1, 4])
@pytest.mark.parametrize("likelihood", ["continuous_bernoulli", "bernoulli"])
def test_learning_with_recorded_sweeps_is_learning_as_written_bit_for_bit(
    num_particles, likelihood
):
    x = torch.rand(6, 1, 2, 2)
    learned = []
    for mode in ("auto", False):
        model = Layers(likelihood)
        engine = DCPC(model, num_particles=num_particles, compile=mode)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        torch.manual_seed(0)
        state, losses = engine.init(x), []
        for _ in range(2 * NUM_SWEEPS):
            problem = engine.bind(x)
            state, _ = problem.sweep(state)
            loss = problem.loss(state)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        learned.append([*losses, *state.latents.values(), *model.parameters()])
        if mode == "auto":
            kept = engine.division(x).recordings.values()
            sweeps = [sweep for sweep in kept if isinstance(sweep, LearningSweep)]
            assert any(sweep.num_operators for sweep in sweeps)
            assert not any(sweep.refusal for sweep in sweeps)
    assert equal(*learned)


def learned_at_once(
    x: Tensor, num_particles: int, mode: bool | str
) -> tuple[list[Tensor], list[LearningSweep]]:
    """What a loop of learning gives from a seed, with particles that are resampled, and how."""
    model = Layers()
    engine = DCPC(model, num_particles=num_particles, compile=mode)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(0)
    state, num_resampled = engine.init(x), 0
    for _ in range(NUM_SWEEPS):
        problem = engine.bind(x)
        state, info = problem.sweep(state, learns=True)
        num_resampled += info.ancestors is not None
        optimizer.zero_grad()
        problem.loss(state).backward()
        optimizer.step()
    assert num_resampled > 1 or num_particles == 1
    kept = engine.division(x).recordings.values()
    sweeps = [sweep for sweep in kept if isinstance(sweep, LearningSweep)]
    return [*state.latents.values(), *model.parameters()], sweeps


@pytest.mark.parametrize("num_particles", [1, 4])
def test_learning_that_is_recorded_at_once_is_learning_as_written_but_for_rounding(num_particles):
    x, learned = torch.rand(16, 1, 2, 2), []
    for mode in ("auto", False):
        values, sweeps = learned_at_once(x, num_particles, mode)
        learned.append(values)
        if mode == "auto":
            (sweep,) = sweeps  # and no other for particles that were resampled
            assert sweep.num_operators
    for one, other in zip(*learned, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_a_loss_after_a_step_of_the_parameters_is_that_of_the_new_ones():
    x, model = torch.rand(6, 1, 2, 2), Layers()
    engine = DCPC(model, num_particles=1)
    state = engine.init(x)
    for _ in range(NUM_SWEEPS):
        state, _ = engine.sweep(state, x)
        engine.loss(state, x)
    state, _ = engine.sweep(state, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    expected = DCPC(model, num_particles=1, compile=False).loss(state, x)
    assert torch.equal(engine.loss(state, x), expected)


def test_a_loss_may_be_taken_twice():
    x, model = torch.rand(6, 1, 2, 2), Layers()
    engine = DCPC(model, num_particles=1)
    state = engine.init(x)
    for _ in range(NUM_SWEEPS):
        state, _ = engine.sweep(state, x)
        first, second = engine.loss(state, x), engine.loss(state, x)
        assert torch.equal(first.detach(), second.detach())


def test_a_recorded_run_has_one_graph_for_all_temperatures(monkeypatch):
    monkeypatch.setattr("dcpc.approach.joint_problem", lambda problem: None)  # from the prior
    chain = gaussian_chain()
    engine = DCPC(chain.model, num_particles=400, blocks=())  # none that are found on the way
    posterior = engine.run(*chain.args, num_sweeps=400, seed=0, progress=False)
    assert len(recordings(engine)) == 2  # of the log-density and of the moves
    weights = posterior.log_weight.softmax(0)
    mean, sd, correlation = chain.errors(posterior.samples, weights)
    assert mean < 4 / 400**0.5 * 1.5
    assert sd < 0.15
    assert correlation < 0.15
    assert abs(float(posterior.log_evidence) - chain.log_evidence) < 0.3


def test_a_recorded_run_is_reproduced_by_its_seed():
    chain = gaussian_chain()
    runs = [
        DCPC(chain.model, num_particles=20).run(
            *chain.args, num_sweeps=tiers.WORTH_RECORDING, seed=5, progress=False
        )
        for _ in range(2)
    ]
    assert all(torch.equal(runs[0].samples[n], runs[1].samples[n]) for n in chain.names)


def test_what_was_recorded_goes_with_its_engine():
    engine = DCPC(schools, num_particles=20)
    sweep(engine, DATA)
    kept = weakref.ref(engine.division(*DATA))
    del engine
    gc.collect()
    assert kept() is None


class Halved(Langevin):
    """A user's own move."""

    def propose(self, start):
        return super().propose(start)


def coin() -> None:
    side = pyro.sample("side", dist.Bernoulli(0.3))
    pyro.sample("x", dist.Normal(side, 1.0), obs=torch.tensor(0.5))


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        (schools, {"move": Halved()}, "Halved"),
        (schools, {"backend": "vmap"}, "vmap"),
        (schools, {"algorithm": "dcpc-paper"}, "values"),
        (coin, {}, "discrete"),
    ],
)
def test_what_cannot_be_compiled_says_why_once_and_runs_as_written(model, options, why):
    args = DATA if model is schools else ()
    engine = DCPC(model, num_particles=20, compile=True, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = sweep(engine, args)
    said = [str(w.message) for w in caught if w.category is CompileWarning]
    assert len(said) == 1
    assert why in said[0]
    assert equal(got, sweep(DCPC(model, num_particles=20, compile=False, **options), args))


def test_a_recording_that_is_wrong_is_found_out(monkeypatch):
    said: list[str] = []
    tier = tiers.Tiered(lambda settled, moving: moving["u"] + 1.0, "auto")
    right = tiers.record
    wrong = lambda settled, moving: moving["u"] + 2.0  # noqa: E731
    monkeypatch.setattr(tiers, "record", lambda f, *trees, **how: right(wrong, *trees, **how))
    u = torch.zeros(3)
    for _ in range(3):
        tier({}, {"u": u}, [u], 1000, said.append)
    assert tier.refusal
    assert torch.equal(tier({}, {"u": u}, [u], 1000, said.append), torch.ones(3))
    assert len(said) == 1


def test_auto_compiles_where_the_sweeps_make_up_for_it(monkeypatch):
    """Few operators on many elements are worth it from fewer sweeps on than on few elements."""
    compiled: list[int] = []
    monkeypatch.setattr(tiers, "compile_recording", lambda r: compiled.append(r.num_operators))

    def run(size: int, num_expected: int) -> bool:
        tier = tiers.Tiered(lambda settled, moving: moving["u"].exp().sum(), "auto")
        u = torch.zeros(size)
        tier({}, {"u": u}, [u], num_expected, lambda text: None)
        return tier.is_compiled

    assert not run(10, 1000)
    assert run(10, 10_000_000)
    assert not run(3_000_000, 200)
    assert run(3_000_000, 10_000)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"particle_batch_size": 7}, {"algorithm": "dcpc-smc"}], ids=str
)
def test_compiled_sweeps_are_those_as_written_but_for_rounding(options):
    compiled = DCPC(schools, num_particles=20, compile=True, **options)
    written = DCPC(schools, num_particles=20, compile=False, **options)
    got, expected = sweep(compiled, DATA), sweep(written, DATA)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    args = DATA[0] + 5.0, DATA[1]
    for one, other in zip(sweep(compiled, args), sweep(written, args), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def learn(engine: DCPC, x: Tensor, num_sweeps: int) -> None:
    state = engine.init(x)
    for _ in range(num_sweeps):
        problem = engine.bind(x)
        state, _ = problem.sweep(state, learns=True)
        problem.loss(state).backward()


def test_auto_compiles_learning_where_its_steps_make_up_for_it(monkeypatch):
    """A loop says how many steps there are; the rest of a batch is a shape of its own."""
    compiled: list[int] = []

    def counted(inputs, nodes, outputs, examples):
        compiled.append(len(nodes))
        raise RuntimeError("no compiler here\nsecond line")

    monkeypatch.setattr(stages, "compile_nodes", counted)
    monkeypatch.setattr(tiers, "compile_recording", lambda _: pytest.fail("of no use here"))
    for num_steps in (100, 10_000_000):
        said: list[str] = []
        engine = DCPC(Layers(), num_particles=2)
        with engine.expecting(num_steps, said.append):
            learn(engine, torch.rand(6, 1, 2, 2), 3)
            assert bool(compiled) == bool(said) == (num_steps > 100)
        learn(engine, torch.rand(5, 1, 2, 2), 3)
        assert len(compiled) == len(said) == (num_steps > 100)


def test_learning_that_cannot_be_compiled_is_recorded_and_says_why_once(monkeypatch):
    def failing(inputs, nodes, outputs, examples):
        raise RuntimeError("no compiler here\nsecond line")

    monkeypatch.setattr(stages, "compile_nodes", failing)
    x, engine = torch.rand(6, 1, 2, 2), DCPC(Layers(), num_particles=2, compile=True)
    monkeypatch.setattr(engine._runner, "_run", lambda *_: pytest.fail("not a learning sweep"))
    state = DCPC(engine.model, num_particles=2, compile=False).init(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state, _ = DCPC(engine.model, num_particles=2, compile=False).sweep(state, x)
        for _ in range(3):
            state, _ = engine.bind(x).sweep(state, learns=True)
            engine.loss(state, x)
    said = [str(w.message) for w in caught if w.category is CompileWarning]
    assert said == ["sweeps are not compiled: torch's compiler failed: no compiler here"]
    assert sum(recordings(engine)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("num_particles", [1, 4])
def test_compiled_learning_is_learning_as_written_but_for_rounding(num_particles):
    """In all three stages, with particles that are resampled between them."""
    x, results = torch.rand(16, 1, 2, 2), []
    for mode in (True, False):
        values, sweeps = learned_at_once(x, num_particles, mode)
        results.append(values)
        assert [sweep.is_compiled for sweep in sweeps] == [True] * (mode is True)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_compiled_learning_sees_parameters_that_change_in_place():
    x, results = torch.rand(6, 1, 2, 2), []
    for mode in (True, False):
        model = Layers()
        engine = DCPC(model, num_particles=4, compile=mode)
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        torch.manual_seed(0)
        state = engine.init(x)
        for _ in range(NUM_SWEEPS):
            state, _ = engine.sweep(state, x)
            optimizer.zero_grad()
            engine.loss(state, x).backward()
            optimizer.step()
        results.append([*state.latents.values(), *model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_compiled_runs_have_the_moments_of_linear_gaussian_posteriors(seed, monkeypatch):
    compiled: list[int] = []

    def counted(recording):
        compiled.append(recording.num_operators)
        compile_recording(recording)

    monkeypatch.setattr(tiers, "compile_recording", counted)
    exact = linear_gaussian_dag(seed)
    engine = DCPC(exact.model, num_particles=1000, compile=True)
    runs = [engine.run(*exact.args, num_sweeps=300, seed=0, progress=False) for _ in range(2)]
    assert len(compiled) == 2  # whatever the number of temperatures
    assert all(torch.equal(runs[0].samples[n], runs[1].samples[n]) for n in exact.names)
    weights = runs[0].log_weight.softmax(0)
    mean, sd, correlation = exact.errors(runs[0].samples, weights)
    assert mean < 0.15
    assert sd < 0.12
    assert correlation < 0.12


@pytest.mark.slow
def test_zhat_of_compiled_sweeps_is_unbiased():
    """The mean of `Zhat / Z` over 3000 populations of 8 particles is one, within 4 errors."""
    chain = gaussian_chain(3000)
    engine = DCPC(chain.model, num_particles=8, compile=True)
    annealed = engine.anneal(*chain.args, num_temperatures=6, seed=0)
    ratio = (annealed.log_evidence.double() - chain.log_evidence).exp()
    error = float(ratio.std()) / 3000**0.5
    assert error < 0.03
    assert abs(float(ratio.mean()) - 1) < 4 * error
