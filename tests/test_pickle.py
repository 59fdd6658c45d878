"""Engines that have run can be pickled, copied, and run in other processes."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from picklable import Shift, regression, regression_data, run_elsewhere
from torch import Tensor

from dcpc import DCPC
from dcpc.conquer import Langevin
from dcpc.presets import PRESETS

OPTIONS = {"num_sweeps": 20, "progress": False}


def through_pickle(engine: DCPC) -> DCPC:
    return pickle.loads(pickle.dumps(engine))


COPIES = {"pickle": through_pickle, "deepcopy": copy.deepcopy, "copy": copy.copy}
copied = pytest.mark.parametrize("copied", COPIES.values(), ids=list(COPIES))


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@copied
def test_a_copy_of_an_engine_that_has_run_has_its_posterior(copied: Callable, capsys):
    engine = DCPC(regression, num_particles=10)
    engine.run(*regression_data(), seed=0, **OPTIONS)
    other = copied(engine)
    engine.summary()
    expected = capsys.readouterr().out
    other.summary()
    assert capsys.readouterr().out == expected
    torch.manual_seed(0)
    samples = engine.get_samples()
    torch.manual_seed(0)
    assert_same(other.get_samples(), samples)


@copied
def test_a_copy_runs_bit_for_bit_like_its_original(copied: Callable):
    engine = DCPC(regression, num_particles=10, blocks=[("slope", "scale")], move=Langevin(2))
    x, y = regression_data()
    engine.run(x, y, seed=0, **OPTIONS)
    other = copied(engine)
    # Other data, in the same shapes: neither may stick to what was captured for the first.
    expected = engine.run(x, y + 1.0, seed=1, **OPTIONS)
    got = other.run(x, y + 1.0, seed=1, **OPTIONS)
    assert_same(got.samples, expected.samples)
    assert_same(got.history, expected.history)
    assert torch.equal(got.log_evidence, expected.log_evidence)
    assert got.warnings == expected.warnings


@pytest.mark.parametrize("algorithm", PRESETS)
def test_engines_of_every_algorithm_can_be_pickled(algorithm: str):
    model = Shift()
    count = 1 if PRESETS[algorithm].single_particle else 4
    engine = DCPC(model, num_particles=count, algorithm=algorithm)
    x = torch.tensor([1.0, -1.0])
    expected = engine.run(x, seed=1, **OPTIONS).samples
    assert_same(through_pickle(engine).run(x, seed=1, **OPTIONS).samples, expected)


def test_a_copied_module_has_parameters_of_its_own():
    engine = DCPC(Shift(), num_particles=10)
    x = torch.tensor([1.0, -1.0])
    engine.run(x, seed=0, **OPTIONS)
    other = copy.deepcopy(engine)
    with torch.no_grad():
        other.model.shift.fill_(3.0)
    moved = float(other.run(x, seed=0, **OPTIONS).mean()["z"].mean())
    stayed = float(engine.run(x, seed=0, **OPTIONS).mean()["z"].mean())
    assert float(engine.model.shift.detach()) == 0.5
    # The posterior of z is N((x - shift) / 2, 1/2), and x is zero on average.
    assert moved == pytest.approx(-1.5, abs=0.6)
    assert stayed == pytest.approx(-0.25, abs=0.6)


def test_nothing_captured_is_pickled():
    engine = DCPC(regression, num_particles=10)
    before = len(pickle.dumps(engine))
    engine.bind(*regression_data())
    assert len(pickle.dumps(engine)) == before


def test_a_local_model_cannot_be_pickled_as_python_says():
    engine = DCPC(lambda: None, num_particles=4)
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(engine)


def test_an_engine_that_has_run_runs_the_same_in_a_spawned_process():
    engine = DCPC(regression, num_particles=10)
    data = regression_data()
    expected = engine.run(*data, seed=1, **OPTIONS).samples
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        got = pool.submit(run_elsewhere, engine, data, {"seed": 1, **OPTIONS}).result()
    assert got == {name: z.tolist() for name, z in expected.items()}
