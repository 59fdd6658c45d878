"""Posteriors in files: bit for bit, checked, and without any code in them."""

from __future__ import annotations

import copy
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from picklable import Shift, regression, regression_data

from dcpc import DCPC, Posterior
from dcpc.errors import EvidenceError, FileError
from dcpc.io import read_tensors, write_tensors
from dcpc.progress import ProgressBar

DATA = regression_data()
OPTIONS = {"num_sweeps": 60, "progress": False, "seed": 0}


def assert_same_bits(got: Any, expected: Any) -> None:
    """Compares two posteriors by pickle, which knows nothing of how files are written."""
    for name, value in vars(expected).items():
        if isinstance(getattr(type(expected), name, None), cached_property):
            continue
        other = vars(got)[name]
        if isinstance(value, torch.Tensor):
            assert value.dtype == other.dtype
            assert value.stride() == other.stride()
            assert value.numpy().tobytes() == other.numpy().tobytes()
        elif hasattr(value, "__dict__"):
            assert type(other) is type(value)
            assert_same_bits(other, value)
        elif isinstance(value, dict):
            assert list(other) == list(value)
            assert_same_bits(_Named(other), _Named(value))
        else:
            assert repr(other) == repr(value)  # NaN is not equal to itself


class _Named:
    def __init__(self, values: dict) -> None:
        self.__dict__ = values


def smc() -> Posterior:
    """Unequal weights, no chains, one problem per datum."""
    engine = DCPC(Shift(), num_particles=10, algorithm="dcpc-smc")
    return engine.run(torch.tensor([1.0, -1.0, 2.0]), **OPTIONS)


def masked() -> Posterior:
    """Values that are masked out, and infinities among the deterministic ones."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3), pyro.poutine.mask(mask=torch.tensor([True, False, True])):
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)
        pyro.deterministic("edge", z / torch.zeros(()))

    return DCPC(model, num_particles=10).run(torch.ones(3), **OPTIONS)


KINDS = {
    "chains": lambda: DCPC(regression, num_particles=10).run(*DATA, **OPTIONS),
    "no history": lambda: DCPC(regression, num_particles=10).run(*DATA, **OPTIONS, keep_every=0),
    "no evidence": lambda: DCPC(regression, num_particles=10).run(*DATA, **OPTIONS, evidence=False),
    "momenta": lambda: DCPC(regression, num_particles=10, move="underdamped").run(*DATA, **OPTIONS),
    "paper": lambda: DCPC(regression, num_particles=10, algorithm="dcpc-paper").run(
        *DATA, **OPTIONS
    ),
    "smc": smc,
    "masked": masked,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_posterior_comes_back_bit_for_bit(kind, tmp_path):
    posterior = KINDS[kind]()
    path = tmp_path / "new" / "posterior.pt"
    posterior.save(path)
    loaded = Posterior.load(path)
    path.unlink()  # nothing hangs on the file any more
    assert_same_bits(loaded, posterior)
    assert loaded.format_summary(0.8) == posterior.format_summary(0.8)
    assert repr(loaded) == repr(posterior)
    for name, about in posterior.statistics().items():
        for column, value in about.items():
            assert torch.equal(loaded.statistics()[name][column].nan_to_num(), value.nan_to_num())
    assert str(loaded.diagnostics()) == str(posterior.diagnostics())
    drawn = []
    for one in (loaded, posterior):
        torch.manual_seed(1)
        drawn.append(one.resample())
    assert all(torch.equal(drawn[0][name], z) for name, z in drawn[1].items())
    if kind == "no evidence":
        with pytest.raises(EvidenceError, match="evidence=False"):
            loaded.log_evidence  # noqa: B018


def test_arviz_has_the_same_draws_of_a_loaded_posterior(tmp_path):
    pytest.importorskip("arviz")
    posterior = KINDS["chains"]()
    posterior.save(tmp_path / "posterior.pt")
    exported = Posterior.load(tmp_path / "posterior.pt").to_arviz()
    assert exported.posterior.equals(posterior.to_arviz().posterior)


def test_parts_of_larger_tensors_are_saved_alone(tmp_path):
    posterior = KINDS["chains"]()
    large = torch.zeros(10, 100_000)
    large[:, 0] = posterior.samples["first"]
    part = replace(posterior, samples={**posterior.samples, "first": large[:, 0]})
    part.save(tmp_path / "part.pt")
    assert (tmp_path / "part.pt").stat().st_size < 100_000
    assert torch.equal(Posterior.load(tmp_path / "part.pt").samples["first"], large[:, 0])


def test_sweeps_go_on_from_a_loaded_posterior(tmp_path):
    engine = DCPC(regression, num_particles=10)
    posterior = engine.run(*DATA, **OPTIONS)
    posterior.save(tmp_path / "posterior.pt")
    states = []
    for one in (posterior, Posterior.load(tmp_path / "posterior.pt")):
        torch.manual_seed(0)
        states.append(engine.sweep(one.state, *DATA)[0].latents)
    assert all(torch.equal(states[1][name], u) for name, u in states[0].items())


RESUME = """
import sys, torch, warnings
warnings.simplefilter("ignore")
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from picklable import regression, regression_data
from dcpc import DCPC, Posterior
partial = Posterior.load(sys.argv[2])
engine = DCPC(regression, num_particles=10)
engine.resume(partial, *regression_data(), progress=False).save(sys.argv[2])
"""


def interrupted(run: Callable[[], Posterior]) -> Posterior:
    """Interrupts a run in the forty-first of its sixty sweeps."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    calls = []

    def advance(self, info):
        calls.append(info)
        if len(calls) == 41:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressBar, "advance", advance)
        posterior = run()
    signal.signal(signal.SIGINT, before)
    return posterior


@pytest.fixture(scope="module")
def partial() -> Posterior:
    return interrupted(KINDS["chains"])


def test_another_process_resumes_a_saved_run_bit_for_bit(partial, tmp_path):
    expected = KINDS["chains"]()
    path = tmp_path / "partial.pt"
    partial.save(path)
    assert_same_bits(Posterior.load(path), partial)
    command = [sys.executable, "-c", RESUME, Path(__file__).parent, path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    got = Posterior.load(path)
    assert not got.is_partial
    assert got.format_summary() == expected.format_summary()
    for name, z in expected.history.items():
        assert torch.equal(got.history[name], z)


@pytest.mark.gpu
def test_a_run_on_the_gpu_goes_on_from_a_file_bit_for_bit(tmp_path):
    def model(x, y):
        slope = pyro.sample("slope", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x @ slope, 0.3), obs=y)

    data = [tensor.cuda() for tensor in DATA]
    engine = DCPC(model, num_particles=10)
    expected = engine.run(*data, **OPTIONS)
    interrupted(lambda: engine.run(*data, **OPTIONS)).save(tmp_path / "partial.pt")
    loaded = Posterior.load(tmp_path / "partial.pt", device="cuda")
    got = engine.resume(loaded, *data, progress=False)
    assert got.samples["slope"].device.type == "cuda"
    assert torch.equal(got.history["slope"], expected.history["slope"])


# -- what is wrong with a file ---------------------------------------------------------------


@pytest.fixture
def path(partial, tmp_path) -> Path:
    """A file with every kind of entry."""
    partial.save(tmp_path / "partial.pt")
    return tmp_path / "partial.pt"


def refused(path: Path, match: str) -> None:
    with pytest.raises(FileError, match=match) as caught:
        Posterior.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


class Malicious:
    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple:
        return Path.touch, (self.made,)


def test_pickled_code_is_never_run(path, tmp_path):
    made = tmp_path / "made"
    content = copy.deepcopy(read_tensors(path))
    content["posterior"]["num_bad"] = Malicious(made)
    torch.save(content, path)
    assert not made.exists()
    refused(path, "no file of Posterior.save: .* got other objects")
    path.write_bytes(pickle.dumps(Malicious(made)))
    refused(path, "is truncated, or is no file of tensors")
    assert not made.exists()


def test_truncated_and_absent_files_are_one_line(path):
    refused(path.with_name("absent.pt"), "there is no file")
    content = path.read_bytes()
    for size in (0, 1000, len(content) - 1):
        path.write_bytes(content[:size])
        refused(path, "is truncated, or is no file of tensors")


def test_flipped_bits_of_a_tensor_are_noticed(path):
    content = path.read_bytes()
    values = read_tensors(path)["posterior"]["samples"]["scale"].clone().numpy().tobytes()
    place = content.find(values)
    for bit in range(0, 8 * len(values), 7):
        damaged = bytearray(content)
        damaged[place + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        refused(path, "is damaged: its entry '.*' does not have the checksum")


@pytest.mark.parametrize("content", [{}, {"format": 3}, {"format": "dcpc-frozen-particles-1"}])
def test_files_of_something_else_are_refused(content, path):
    write_tensors(content, path)
    refused(path, r"no file of Posterior\.save: expected .*'dcpc-posterior-5', got format")
    torch.save([1, 2], path)
    refused(path, r"no file of Posterior\.save")


def leaves(value: Any, keys: tuple = ()) -> Iterator[tuple]:
    """Keys of all values in nested dictionaries that are none themselves."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*keys, key))
    else:
        yield keys


def name_of(keys: tuple) -> str:
    return ".".join(keys)


def odd(path: Path, content: dict, keys: tuple, change: Callable[[dict, str], object]) -> Path:
    """Another file, in which one entry is changed."""
    content = copy.deepcopy(content)
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    change(inner, keys[-1])
    torch.save(content, path.with_name("odd.pt"))
    return path.with_name("odd.pt")


def test_entries_that_are_absent_unknown_or_of_another_type_are_named(path):
    """Wherever they are: nothing of a file is taken on trust."""
    content = read_tensors(path)
    entries = list(leaves({"posterior": content["posterior"]}))
    assert len(entries) > 60

    def put_other_type(inner: dict, key: str) -> None:
        inner[key] = 3.5 if isinstance(inner[key], str | torch.Tensor | dict | list) else "no"

    for keys in entries:
        if keys[1] not in ("acceptance", "step_size"):  # which are numbers like 3.5
            refused(odd(path, content, keys, put_other_type), f"'{name_of(keys)}")

    for keys in entries:
        if keys[1] in ("acceptance", "step_size", "unit_of", "num_masked"):
            continue  # whose names may be any
        if "adaptation" in keys or keys[-2] in ("statistic", "step_size", "bad_scores"):
            continue  # which only the engine knows
        if keys[-2] in ("kept", "squared_moves", "random_state"):
            continue  # one name each, which may be empty altogether
        without = odd(path, content, keys, lambda inner, key: inner.pop(key))
        refused(without, "entry 'posterior")

    def add(inner: dict, key: str) -> None:
        inner["surprise"] = 1

    for keys in (("posterior", "num_bad"), ("posterior", "state", "log_joint")):
        refused(odd(path, content, keys, add), r"must be one of .* in every name, got 'surprise'")


def test_tensors_of_another_shape_are_named(path):
    content = read_tensors(path)
    strange = (torch.zeros(2, 3, 5, 7), torch.zeros(()))
    count = 0
    for keys in leaves({"posterior": content["posterior"]}):
        inner: Any = content
        for key in keys:
            inner = inner[key]
        if not isinstance(inner, torch.Tensor) or "adaptation" in keys:
            continue
        if keys[-2] in ("statistic", "step_size", "bad_scores"):
            continue
        for value in (tensor for tensor in strange if tensor.shape != inner.shape):
            count += 1
            other = odd(path, content, keys, lambda d, key, v=value: d.update({key: v}))
            refused(other, r"entry 'posterior\.")
    assert count > 20


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ("families", torch.full((10,), 10), "indices below 10, got torch.int64 up to 10"),
        ("families", torch.zeros(10), "indices below 10, got torch.float32"),
        ("state.latents.scale", torch.zeros(10, dtype=torch.long), "floating-point numbers, got"),
        ("population_axes.slope", [1], r"axes of sizes \(\), got \(1,\)"),
        ("population_axes.slope", [7], "axes of sizes"),
        ("continuation.num_done", 60, "less than num_sweeps, 60"),
        ("continuation.keep_every", -1, "0 or more, got -1"),
        ("continuation.random_state.cpu", torch.zeros(9), "the bytes of a generator"),
        (
            "samples.scale",
            torch.full((10,), torch.nan),
            "scale' must have 0 numbers that are NaN or infinite, got 10",
        ),
        ("state.log_weight.log_weight", torch.zeros(10, dtype=torch.long), "floating point"),
    ],
)
def test_values_that_no_posterior_has_are_named(keys, value, message, path):
    def put(inner: dict, key: str) -> None:
        inner[key] = value

    keys = ("posterior", *keys.split("."))
    refused(odd(path, read_tensors(path), keys, put), message)


def test_a_full_disk_keeps_the_posterior_that_was_there(path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 0}))
    with pytest.raises(FileError, match="the disk is full"):
        KINDS["chains"]().save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
