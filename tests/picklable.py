"""Models that other processes find by their import path."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from dcpc import DCPC


def regression(x: Tensor, y: Tensor) -> None:
    """Two units with a scale that is constrained to be positive, and a deterministic site."""
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    pyro.deterministic("first", slope[0])
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ slope, scale), obs=y)


def regression_data() -> tuple[Tensor, Tensor]:
    """Twelve points."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(12, 2, generator=generator)
    return x, x @ torch.tensor([0.5, -1.0]) + 0.3 * torch.randn(12, generator=generator)


class Shift(nn.Module):
    """`z ~ N(0, 1)`, `x ~ N(shift + z, 1)`, one z per datum."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(self.shift + z, 1.0), obs=x)


def run_elsewhere(engine: DCPC, args: tuple, options: dict) -> dict[str, list]:
    """What a worker process computes: the final particles of a run, as lists."""
    torch.set_num_threads(1)
    samples = engine.run(*args, **options).samples
    return {name: z.tolist() for name, z in samples.items()}
