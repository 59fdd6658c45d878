"""Particles in batches: the same numbers, in the memory of one batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from discrete_models import models
from oracles import plain_log_factors
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import CASES

from dcpc import DCPC
from dcpc.divide import Arguments, Density, Tempering, divide, read_sites
from dcpc.divide.batches import in_batches
from dcpc.divide.graph import SCHEDULES
from dcpc.errors import OptionError
from dcpc.presets import PRESETS

K = 7
sizes = pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 9])
backends = pytest.mark.parametrize("backend", ["graph", "vmap", "loop"])


@sizes
@pytest.mark.parametrize("recompute", [False, True])
def test_all_particles_are_evaluated_in_batches_of_one_size(size: int, recompute: bool) -> None:
    """Seven in threes are 0-2, 3-5 and 4-6."""
    rows, slope = torch.arange(7.0), torch.tensor(2.0, requires_grad=True)
    lengths = []

    def double(rows: Tensor, others: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        lengths.append(len(rows))
        return slope * rows, others["z"] + rows[:, None]

    first, second = in_batches(
        double, rows, {"z": 10 * rows[:, None]}, size=size, recompute=recompute
    )
    assert lengths == [min(size, 7)] * -(-7 // size)
    assert first.tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert second.flatten().tolist() == [0, 11, 22, 33, 44, 55, 66]
    first.sum().backward()
    assert slope.grad == rows.sum() == 21


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.usefixtures("float64")
def test_log_densities_in_batches_are_those_of_ordinary_traces(case) -> None:
    model, args, kwargs = case.build()
    arguments = Arguments(args, kwargs)
    sites = read_sites(model, args, kwargs)
    schedule = SCHEDULES["coloured"]
    batched, whole = (divide(model, arguments, sites, n, schedule=schedule) for n in (3, K))
    latents = {name: torch.randn(K, *sites[name].unconstrained_shape) for name in whole.latents}
    one, all_ = (Density(division, arguments.tensors) for division in (batched, whole))
    for k in range(K):
        plain = plain_log_factors(model, {n: u[k] for n, u in latents.items()}, args, kwargs)
        for name, value in one.log_factors(latents).items():
            torch.testing.assert_close(value[k], plain[name], rtol=1e-10, atol=1e-10)
    for compute in (
        lambda density: density.log_joint(latents),
        lambda density: density.learnable_log_joint(latents),
        lambda density: density.slope(latents),
        lambda density: density.at(0.3).log_joint(latents),
    ):
        torch.testing.assert_close(compute(one), compute(all_), rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(batched.groups, whole.groups, strict=True):
        value = mine.pack(latents)
        found, expected = (
            (
                group.log_density(value, latents, arguments.tensors),
                *vars(group.evaluate(value, latents, arguments.tensors, Tempering(0.3))).values(),
            )
            for group in (mine, theirs)
        )
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


class Decoder(nn.Module):
    """Two latents of one number, and a decoder whose activations are a thousand times as large."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(x.new_zeros(len(x)), 1.0))
            z = pyro.sample("z", dist.Normal(top.sin(), 0.5))
            loc = self.network(z[..., None])
            pyro.sample("x", dist.Normal(loc, 0.3).to_event(1), obs=x)


def decoder(width: int = 16) -> Decoder:
    pyro.clear_param_store()
    torch.manual_seed(0)
    return Decoder(width).to(torch.get_default_dtype())


def learn(engine: DCPC, model: nn.Module, x: Tensor) -> dict:
    """Particles after some sweeps, the loss, and its gradient."""
    problem = engine.bind(x)
    torch.manual_seed(3)
    state = problem.init()
    for _ in range(3):
        state, info = problem.sweep(state)
    loss = problem.loss(state)
    loss.backward()
    return {
        **state.latents,
        **problem.constrain(state.latents),
        **problem.observation_means(state),
        "log_weight": state.log_weight.log_weight,
        "log_joint": state.log_joint,
        "joint": problem.log_joint(state),
        "ess": info.ess,
        "loss": loss.detach(),
        **{name: value.grad for name, value in model.named_parameters()},
    }


@pytest.mark.parametrize("algorithm", PRESETS)
@backends
@pytest.mark.usefixtures("float64")
def test_particles_losses_and_gradients_do_not_depend_on_the_batches(
    algorithm: str, backend: str
) -> None:
    """Seven particles in batches of three: the last one holds one that is new."""
    num_particles = 1 if PRESETS[algorithm].single_particle else 7
    x = torch.randn(5, 3)
    found = []
    for size in (None, 3, 1, 100):
        model = decoder()
        engine = DCPC(
            model,
            num_particles=num_particles,
            particle_batch_size=size,
            algorithm=algorithm,
            backend=backend,
        )
        found.append(learn(engine, model, x))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("float64")
def test_runs_with_evidence_do_not_depend_on_the_batches() -> None:
    x = torch.randn(2, 3)
    one, other = (
        DCPC(decoder(), num_particles=8, particle_batch_size=size).run(
            x, num_sweeps=6, seed=2, progress=False
        )
        for size in (None, 3)
    )
    torch.testing.assert_close(other.samples, one.samples, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(other.history, one.history, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(other.log_evidence, one.log_evidence, rtol=1e-9, atol=1e-9)


def summed(x: Tensor) -> None:
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(share), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)


DISCRETE = [(case.name, case.model, case.args, case.options) for case in models()]


@pytest.mark.parametrize(
    ("model", "args", "options"),
    [
        *(pytest.param(*case, id=name) for name, *case in DISCRETE),
        pytest.param(summed, (torch.tensor([0.3, 2.2, -0.4]),), {}, id="summed out"),
    ],
)
@pytest.mark.usefixtures("float64")
def test_draws_of_discrete_latents_do_not_depend_on_the_batches(
    model: Callable, args: tuple, options: dict
) -> None:
    one, other = (
        DCPC(model, num_particles=8, particle_batch_size=size, **options).run(
            *args, num_sweeps=4, seed=2, progress=False
        )
        for size in (None, 3)
    )
    torch.testing.assert_close(other.samples, one.samples, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(other.history, one.history, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(other.log_evidence, one.log_evidence, rtol=1e-9, atol=1e-9)


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors that are alive at once, at most, among those made in a block of code."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._alive = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self._alive += storage.nbytes()
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._alive -= size


def peak_memory(num_particles: int, size: int | None) -> int:
    """Of a training step on new data: draw, sweep, loss, gradient."""
    model, x = decoder(width=1000), torch.randn(4, 3)
    problem = DCPC(model, num_particles=num_particles, particle_batch_size=size).bind(x)
    with PeakMemory() as memory:
        state, _ = problem.sweep(problem.init())
        problem.loss(state).backward()
    return memory.peak


def test_a_training_step_takes_the_memory_of_one_batch_of_particles() -> None:
    """The activations are nearly all of it, and are as many as particles are evaluated at once."""
    four = peak_memory(4, None)
    assert peak_memory(64, None) > 12 * four
    assert peak_memory(64, 4) < 1.3 * four


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "particle_batch_size must be at least 1, got 0"),
        (-4, "particle_batch_size must be at least 1, got -4"),
        (2.0, "particle_batch_size must be an integer, got 2.0"),
        (True, "particle_batch_size must be an integer, got True"),
        ("4", "particle_batch_size must be an integer, got '4'"),
    ],
)
def test_batches_of_no_number_of_particles_are_refused(size: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DCPC(decoder(), num_particles=4, particle_batch_size=size)
