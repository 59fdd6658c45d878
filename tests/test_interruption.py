"""Runs that Ctrl-C ends early: what was done is a posterior, and goes on bit for bit."""

from __future__ import annotations

import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import gaussian_chain
from picklable import Shift, regression, regression_data

from dcpc import DCPC, ConvergenceWarning, Posterior
from dcpc.conquer import Langevin
from dcpc.errors import DataError, OptionError
from dcpc.interruption import Interruption
from dcpc.progress import ProgressBar
from dcpc.recorder import Recorder

DATA = regression_data()
OPTIONS = {"num_sweeps": 40, "progress": False}


@pytest.fixture(autouse=True)
def _pythons_own_handler() -> Iterator[None]:
    """Ctrl-C is Python's own affair, as in a script; and is so again in the end."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has Ctrl-C pressed at the n-th call of a method of the progress bar, `times` times."""

    def at(number: int, method: str = "advance", times: int = 1) -> None:
        original, calls = getattr(ProgressBar, method), []

        def counting(self: ProgressBar, value: object) -> None:
            original(self, value)
            calls.append(value)
            if len(calls) == number:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(ProgressBar, method, counting)

    return at


@pytest.fixture(scope="module")
def whole() -> tuple[DCPC, Posterior]:
    """An engine, and its run to the end."""
    engine = DCPC(regression, num_particles=10)
    return engine, engine.run(*DATA, seed=0, **OPTIONS)


def assert_same(got: Posterior, expected: Posterior) -> None:
    """All that a posterior tells is the same, bit for bit."""
    assert torch.equal(got.log_weight, expected.log_weight)
    for kind in ("samples", "history"):
        values, wanted = getattr(got, kind), getattr(expected, kind)
        assert values.keys() == wanted.keys()
        assert all(torch.equal(values[name], wanted[name]) for name in wanted)
    assert (got.families is None) == (expected.families is None)
    assert got.families is None or torch.equal(got.families, expected.families)
    assert got.format_summary() == expected.format_summary()
    for name in ("acceptance", "step_size", "num_bad", "is_chains", "warnings", "is_partial"):
        assert getattr(got, name) == getattr(expected, name)


# 7 and 20 of 40 sweeps are warm-up, of which the first 10 adapt preconditioners.
@pytest.mark.parametrize("number", [1, 7, 20, 33, 39])
def test_an_interrupted_run_goes_on_bit_for_bit(number, interrupt, whole):
    engine, expected = whole
    interrupt(number)
    with pytest.warns(ConvergenceWarning, match=f"after {number} of 40 sweeps") as caught:
        partial = engine.run(*DATA, seed=0, **OPTIONS)
    assert [warning.filename for warning in caught] == [__file__]
    assert partial.is_partial
    assert partial.num_kept == max(0, number - 20)
    torch.rand(3)
    before = torch.get_rng_state()
    assert_same(engine.resume(partial, *DATA, progress=False), expected)
    assert_same(engine.resume(partial, *DATA, progress=False), expected)  # it is not used up
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "dcpc-smc"},
        {"algorithm": "dcpc-paper"},
        {"algorithm": "lpc"},
        {"move": "underdamped"},
        {"backend": "loop", "num_particles": 3},
    ],
    ids=str,
)
def test_other_algorithms_go_on_bit_for_bit(options, interrupt):
    engine = DCPC(regression, **{"num_particles": 10, **options})
    expected = engine.run(*DATA, seed=0, **OPTIONS)
    interrupt(27)
    partial = engine.run(*DATA, seed=0, **OPTIONS)
    assert_same(engine.resume(partial, *DATA, progress=False), expected)


@pytest.mark.parametrize("model_and_data", [(regression, DATA), (Shift(), (torch.ones(3),))])
def test_a_run_with_blocks_and_moves_that_it_found_goes_on_bit_for_bit(
    model_and_data, interrupt, tmp_path
):
    """A hundred particles find their blocks, the length of their moves, and where to jump."""
    model, data = model_and_data
    expected = DCPC(model, num_particles=100).run(*data, seed=0, **OPTIONS)
    interrupt(27)
    partial = DCPC(model, num_particles=100).run(*data, seed=0, **OPTIONS)
    assert partial.continuation.leapfrog_steps > 0
    assert any(learned.reference for learned in partial.state.adaptation.values())
    partial.save(tmp_path / "partial.pt")
    partial = Posterior.load(tmp_path / "partial.pt")
    engine = DCPC(model, num_particles=100)
    assert_same(engine.resume(partial, *data, progress=False), expected)


def test_blocks_that_a_run_found_are_not_those_of_another_engine(interrupt):
    interrupt(27)
    partial = DCPC(regression, num_particles=100).run(*DATA, seed=0, **OPTIONS)
    with pytest.raises(OptionError, match="moved the units"):
        DCPC(regression, num_particles=100, blocks=()).resume(partial, *DATA, progress=False)


@pytest.mark.parametrize(
    "options", [{"blocks": [("slope", "scale")]}, {"move": Langevin(2)}, {"move": "underdamped"}]
)
def test_moves_that_a_run_tuned_are_not_those_of_another_engine(options, interrupt):
    interrupt(27)
    partial = DCPC(regression, num_particles=100).run(*DATA, seed=0, **OPTIONS)
    engine = DCPC(regression, num_particles=100, **options)
    with pytest.raises(OptionError, match="tuned its moves to 1 leapfrog steps"):
        engine.resume(partial, *DATA, progress=False)


def test_the_number_of_sweeps_that_compiling_reckons_with_is_that_of_a_resumed_run(monkeypatch):
    engine, seen = DCPC(regression, num_particles=100), set()
    original = Recorder.add

    def add(recorder, *args):
        seen.add((engine._runner._num_expected, recorder._num_sweeps))
        original(recorder, *args)

    monkeypatch.setattr(Recorder, "add", add)
    engine.run(*DATA, seed=0, progress=False)
    ((expected, num_sweeps),) = seen
    assert expected == num_sweeps < 1000


def test_a_warm_up_of_its_own_leaves_sweeps_to_record():
    engine = DCPC(regression, num_particles=100)
    posterior = engine.run(*DATA, num_warmup=500, keep_every=50, seed=0, progress=False)
    assert posterior.num_kept == 10


def test_an_interrupted_run_without_a_seed_follows_the_global_generator(interrupt):
    engine = DCPC(regression, num_particles=10)
    torch.manual_seed(4)
    expected = engine.run(*DATA, **OPTIONS)
    interrupt(23)
    torch.manual_seed(4)
    partial = engine.run(*DATA, **OPTIONS)
    assert_same(engine.resume(partial, *DATA, progress=False), expected)


def test_a_run_may_be_interrupted_again_and_resumed_by_a_copy(interrupt, whole):
    engine, expected = whole
    interrupt(9)
    engine.run(*DATA, seed=0, **OPTIONS)
    other = pickle.loads(pickle.dumps(engine))
    interrupt(18)  # 9 sweeps later
    with pytest.warns(ConvergenceWarning, match="interrupted after 27 of 40 sweeps"):
        second = other.resume(other._last(), *DATA, progress=False)
    assert_same(other.resume(second, *DATA, progress=False), expected)


def test_a_population_of_problems_goes_on_with_its_weights(interrupt):
    engine = DCPC(Shift(), num_particles=10, algorithm="dcpc-smc")
    x = torch.tensor([1.0, -1.0, 2.0])
    expected = engine.run(x, seed=0, **OPTIONS)
    interrupt(25)
    partial = engine.run(x, seed=0, **OPTIONS)
    assert partial.log_weight.shape == (10, 3)
    assert_same(engine.resume(partial, x, progress=False), expected)


def test_a_partial_posterior_is_that_of_the_sweeps_that_were_made(interrupt, capsys, whole):
    """The kept sweeps are the first ones of the whole run, and all that describes it works."""
    engine, expected = whole
    interrupt(38)
    partial = engine.run(*DATA, seed=0, **OPTIONS)
    assert torch.equal(partial.history["slope"], expected.history["slope"][:, :18])
    assert torch.equal(partial.samples["slope"], expected.history["slope"][:, 17])
    assert torch.equal(partial.log_evidence, expected.log_evidence)
    engine.summary()
    assert "interrupted after 38 of 40 sweeps" in capsys.readouterr().out
    assert set(engine.get_samples()) == {"slope", "scale", "first"}
    assert 0.0 < engine.diagnostics()["slope"]["acceptance"] < 1.0


def test_an_interrupt_in_the_last_sweep_leaves_nothing_to_resume(interrupt, whole):
    engine, expected = whole
    interrupt(40)
    assert_same(engine.run(*DATA, seed=0, **OPTIONS), expected)


def test_an_interrupt_within_a_sweep_lets_the_sweep_finish(monkeypatch):
    presses = []

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if presses == ["soon"]:
            presses.append("now")
            signal.raise_signal(signal.SIGINT)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def after_seven(self, info, advance=ProgressBar.advance):
        advance(self, info)
        done.append(info)
        if len(done) == 7:
            presses.append("soon")

    done: list = []
    monkeypatch.setattr(ProgressBar, "advance", after_seven)
    engine = DCPC(model, num_particles=3, backend="loop")
    partial = engine.run(torch.tensor(1.0), seed=0, **OPTIONS)
    assert presses == ["soon", "now"]
    assert partial.continuation.num_done == 8


def test_a_second_interrupt_raises_and_the_engine_stays_usable(interrupt):
    engine = DCPC(regression, num_particles=10)
    expected = engine.run(*DATA, seed=0, **OPTIONS)
    before = torch.get_rng_state()
    interrupt(5, times=2)
    with pytest.raises(KeyboardInterrupt):
        engine.run(*DATA, seed=1, **OPTIONS)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert torch.equal(torch.get_rng_state(), before)
    assert engine._last() is expected
    assert_same(engine.run(*DATA, seed=0, **OPTIONS), expected)


@pytest.mark.parametrize("number", [1, 4])
def test_an_interrupt_while_annealing_raises_and_leaves_the_engine_as_it_was(number, interrupt):
    engine = DCPC(regression, num_particles=10)
    expected = engine.run(*DATA, seed=0, **OPTIONS)
    before = torch.get_rng_state()
    interrupt(number, "temperature")
    with pytest.raises(KeyboardInterrupt):
        engine.run(*DATA, seed=1, **OPTIONS)
    assert torch.equal(torch.get_rng_state(), before)
    assert engine._last() is expected
    assert_same(engine.run(*DATA, seed=0, **OPTIONS), expected)


@pytest.mark.parametrize("call", [1, 2, 5, 9])
def test_an_interrupt_while_the_model_is_divided_raises_and_leaves_the_engine_usable(call):
    calls: list[int] = []

    def model(x):
        calls.append(0)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    engine = DCPC(model, num_particles=10)
    with pytest.raises(KeyboardInterrupt):
        engine.run(torch.tensor(1.0), seed=0, **OPTIONS)
    got = engine.run(torch.tensor(1.0), seed=0, **OPTIONS)
    assert_same(got, DCPC(model, num_particles=10).run(torch.tensor(1.0), seed=0, **OPTIONS))


# -- what interrupts are left alone ------------------------------------------------------------


def test_a_handler_of_the_program_stays_in_charge():
    seen = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGINT)
        assert seen == [signal.SIGINT]
        assert not interruption.is_requested
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_run_in_another_thread_installs_no_handler(whole):
    engine, expected = whole
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(engine.run, *DATA, seed=0, **OPTIONS).result()
    assert threading.current_thread() is threading.main_thread()
    assert_same(got, expected)


# -- what cannot be resumed --------------------------------------------------------------------


@pytest.fixture
def partial(interrupt) -> Posterior:
    interrupt(25)
    return DCPC(regression, num_particles=10).run(*DATA, seed=0, **OPTIONS)


def test_a_complete_posterior_cannot_be_resumed(whole):
    engine, posterior = whole
    with pytest.raises(OptionError, match=r"resume needs .* is_partial\), got a complete one"):
        engine.resume(posterior, *DATA)
    with pytest.raises(OptionError, match=r"resume needs .*, got tensor"):
        engine.resume(*DATA)


def test_other_data_are_noticed(partial):
    x, y = DATA
    engine = DCPC(regression, num_particles=10)
    with pytest.raises(DataError, match="another log-density under these arguments; resume it"):
        engine.resume(partial, x, y + 0.1, progress=False)
    with pytest.raises(DataError, match="site 'slope' have shape"):
        DCPC(regression, num_particles=11).resume(partial, x, y, progress=False)


def test_other_units_are_noticed(partial):
    engine = DCPC(regression, num_particles=10, blocks=[("slope", "scale")])
    with pytest.raises(OptionError, match=r"the interrupted run moved the units .*'scale'"):
        engine.resume(partial, *DATA, progress=False)


def test_another_number_of_population_cells_is_noticed(partial):
    told = replace(partial.continuation, log_joint=torch.zeros(10, 4))
    engine = DCPC(regression, num_particles=10)
    with pytest.raises(DataError, match="another log-density"):
        engine.resume(replace(partial, continuation=told), *DATA, progress=False)


def test_the_chain_of_the_design_is_exact_after_an_interrupt(interrupt, float64):
    """Independent of the uninterrupted run: exact moments, within Monte Carlo errors."""
    exact = gaussian_chain()
    engine = DCPC(exact.model, num_particles=1000)
    interrupt(30)
    partial = engine.run(*exact.args, num_sweeps=200, seed=0, progress=False)
    posterior = engine.resume(partial, *exact.args, progress=False)
    mean, sd, correlation = exact.errors(posterior.samples, posterior.state.log_weight.normalized())
    assert mean < 0.16
    assert sd < 0.11
    assert correlation < 0.13
