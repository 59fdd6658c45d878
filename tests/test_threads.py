"""Threads: an inference is right and reproducible, or refused in one sentence."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import gaussian_chain
from pyro.poutine.runtime import _PYRO_STACK

from dcpc import DCPC
from dcpc.errors import DCPCError, ThreadError
from dcpc.seeding import random_state_kept, seeded

OPTIONS = {"num_sweeps": 5, "seed": 3, "progress": False}


class Gate:
    """A model that another thread runs, and that waits in its middle until it may go on."""

    def __init__(self) -> None:
        self.is_shut = False
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, x: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if self.is_shut:
            self.reached.set()
            assert self.opened.wait(60)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def hold(self, work: Callable, meanwhile: Callable[[], None]) -> object:
        """Result of some work in another thread that stands in the model meanwhile."""
        self.is_shut = True
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work)
            try:
                assert self.reached.wait(60)
                meanwhile()
            finally:
                self.is_shut = False
                self.opened.set()
            return future.result()


X = torch.tensor(1.0)


def test_a_second_run_in_another_thread_is_refused_and_the_first_is_right():
    gate = Gate()
    expected = DCPC(gate, num_particles=20).run(X, **OPTIONS)
    chain = gaussian_chain()
    other = DCPC(chain.model, num_particles=20)
    message = "DCPC.run was called while another thread is in DCPC.run: .* one after the other, or"

    def refused() -> None:
        with pytest.raises(ThreadError, match=message) as caught:
            other.run(*chain.args, **OPTIONS)
        assert isinstance(caught.value, DCPCError)
        assert "\n" not in str(caught.value)

    got = gate.hold(lambda: DCPC(gate, num_particles=20).run(X, **OPTIONS), refused)
    assert torch.equal(got.samples["z"], expected.samples["z"])
    assert torch.equal(got.history["z"], expected.history["z"])
    assert torch.equal(got.log_evidence, expected.log_evidence)
    # Afterwards it is the other's turn, and nothing of the first is left.
    assert len(_PYRO_STACK) == 0
    first, second = (other.run(*chain.args, **OPTIONS).samples["z1"] for _ in range(2))
    assert torch.equal(first, second)


def test_every_way_into_the_engine_is_refused_while_another_thread_is_in_it():
    gate, chain = Gate(), gaussian_chain()
    engine = DCPC(chain.model, num_particles=20)
    problem = engine.bind(*chain.args)
    state = problem.init()
    ways = {
        "DCPC.run": lambda: engine.run(*chain.args, progress=False),
        "DCPC.anneal": lambda: engine.anneal(*chain.args),
        "DCPC.bind": lambda: engine.bind(*chain.args),
        "Problem.init": problem.init,
        "Problem.sweep": lambda: problem.sweep(state),
        "Problem.loss": lambda: problem.loss(state),
        "Problem.guide_loss": lambda: problem.guide_loss(state),
        "Problem.anneal": problem.anneal,
        "Problem.constrain": lambda: problem.constrain(state.latents),
        "Problem.observation_means": lambda: problem.observation_means(state),
    }

    def refused() -> None:
        for name, way in ways.items():
            with pytest.raises(ThreadError, match=f"^{name} was called while another thread is in"):
                way()

    gate.hold(lambda: DCPC(gate, num_particles=20).bind(X), refused)
    problem.sweep(state)


def test_a_run_that_fails_in_a_thread_leaves_the_turn_to_others():
    def broken(x):
        raise RuntimeError("the model is broken")

    engine = DCPC(broken, num_particles=4)
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(engine.run, X, progress=False)
    with pytest.raises(RuntimeError, match="the model is broken"):
        work.result()
    chain = gaussian_chain()
    DCPC(chain.model, num_particles=4).run(*chain.args, **OPTIONS)


def test_runs_one_after_the_other_in_two_threads_are_those_of_one_thread():
    chain = gaussian_chain()
    engine = DCPC(chain.model, num_particles=20)
    expected = [engine.run(*chain.args, **{**OPTIONS, "seed": s}).samples["z1"] for s in (0, 1)]
    got = []
    for seed in (0, 1):
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(engine.run, *chain.args, **{**OPTIONS, "seed": seed})
            got.append(work.result().samples["z1"])
    assert all(map(torch.equal, got, expected))


def test_seeded_blocks_of_two_threads_cannot_overlap():
    """Else the second would keep the first one's seed, and leave it behind for everybody."""
    before = torch.get_rng_state()
    inside, done = threading.Event(), threading.Event()

    def first() -> float:
        with seeded(1):
            inside.set()
            assert done.wait(60)
            return float(torch.rand(()))

    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(first)
        try:
            assert inside.wait(60)
            for block in (seeded(2), random_state_kept()):
                with pytest.raises(ThreadError, match="a seeded block was called while"), block:
                    pass
        finally:
            done.set()
        got = work.result()
    with seeded(1):
        assert float(torch.rand(())) == got
    assert torch.equal(torch.get_rng_state(), before)


def test_a_thread_with_a_generator_of_its_own_is_not_disturbed_and_disturbs_nothing():
    gate = Gate()
    expected = DCPC(gate, num_particles=20).run(X, **OPTIONS).samples["z"]
    numbers = torch.rand(8, generator=torch.Generator().manual_seed(5))
    mine = torch.Generator().manual_seed(5)
    got = [torch.rand(4, generator=mine)]
    before = torch.get_rng_state()
    work = gate.hold(
        lambda: DCPC(gate, num_particles=20).run(X, **OPTIONS),
        lambda: got.append(torch.rand(4, generator=mine)),
    )
    assert torch.equal(torch.cat(got), numbers)
    assert torch.equal(work.samples["z"], expected)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_process_forked_while_a_thread_runs_may_run_itself():
    gate = Gate()

    def fork() -> None:
        child = os.fork()
        if child == 0:
            try:
                with seeded(1):
                    os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    gate.hold(lambda: DCPC(gate, num_particles=4).bind(X), fork)
