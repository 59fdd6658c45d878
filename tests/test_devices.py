"""Whatever torch's default device is, an inference stays on that of the model's data."""

from __future__ import annotations

from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from dcpc import DCPC

ZERO, ONE, WIDE = torch.tensor(0.0), torch.tensor(1.0), torch.tensor(1000.0)


def hierarchy(y: Tensor) -> None:
    mu, tau = pyro.sample("mu", dist.Normal(ZERO, ONE)), pyro.sample("tau", dist.HalfCauchy(ONE))
    with pyro.plate("groups", len(y), device="cpu"):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, ONE), obs=y)


def vague_line(y: Tensor) -> None:
    a, b = pyro.sample("a", dist.Normal(ZERO, WIDE)), pyro.sample("b", dist.Normal(ZERO, WIDE))
    with pyro.plate("data", len(y), device="cpu"):
        x = torch.arange(float(len(y)), device="cpu")
        pyro.sample("y", dist.Normal(a + b * x, ONE), obs=y)


def many_groups(y: Tensor) -> None:
    """More latents than the particles can fit one normal distribution to."""
    mu = pyro.sample("mu", dist.Normal(ZERO, WIDE))
    with pyro.plate("groups", len(y), device="cpu"):
        theta = pyro.sample("theta", dist.Normal(mu, ONE))
        pyro.sample("y", dist.Normal(theta, ONE), obs=y)


@pytest.fixture
def nowhere() -> Iterator[None]:
    """New tensors whose device is not named have no values."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def run(model, y: Tensor, engine: DCPC) -> list[Tensor]:
    posterior = engine.run(y, num_sweeps=6, num_warmup=4, progress=False, seed=0)
    posterior.summary()
    weights = posterior.state.log_weight.log_weight
    return [*posterior.samples.values(), weights, posterior.evidence.log_evidence]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("model", [hierarchy, vague_line, many_groups])
def test_a_run_makes_nothing_on_the_default_device(model, request):
    y = 3.0 + torch.randn(150 if model is many_groups else 8)
    expected = run(model, y, DCPC(model, num_particles=64))
    engine = DCPC(model, num_particles=64)
    engine.init(y)  # the model's own tensors
    request.getfixturevalue("nowhere")
    for one, other in zip(run(model, y, engine), expected, strict=True):
        assert torch.equal(one, other)
