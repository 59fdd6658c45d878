"""All rows of the acceptance table, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch

from tests.acceptance import (
    capture_recapture,
    deep,
    hidden_markov,
    mixtures,
    processes,
    regressions,
)
from tests.acceptance.case import Program

FAMILIES = (regressions, mixtures, hidden_markov, capture_recapture, processes, deep)


def programs() -> list[Program]:
    """All programs, by family."""
    return [program for family in FAMILIES for program in family.programs()]


@dataclass(frozen=True)
class Refused:
    """A program that is refused, as its original is written.

    Attributes:
        name: Name of the row.
        source: Where its original is.
        model: The program.
        args: Its arguments.
        message: A part of the error's sentence, as a regular expression.
    """

    name: str
    source: str
    model: Callable
    args: tuple
    message: str


def simulated_plane(times):
    """The simulator of the inclined plane, whose number of steps depends on the friction."""
    mu = pyro.sample("mu", dist.Uniform(0.0, 0.5))
    acceleration = 9.8 * (math.sin(math.pi / 6) - math.cos(math.pi / 6) * mu)
    time, velocity, displacement = torch.zeros(()), torch.zeros(()), torch.zeros(())
    while displacement < 2.0:
        displacement = displacement + velocity * 0.05
        velocity = velocity + acceleration * 0.05
        time = time + 0.05
    pyro.sample("time", dist.Normal(time, 0.02), obs=times[0])


def only_a_prior(a, b):
    """The banana of `neutra.py`, which is sampled without data."""
    pyro.sample("x", regressions.BananaShaped(a, b))


def epidemic(infections):
    """Counts whose totals are counts themselves, as in `sir_hmc.py`'s discrete model."""
    susceptible, infected = torch.tensor(20.0), torch.tensor(1.0)
    rate = pyro.sample("rate", dist.Beta(2.0, 2.0))
    for t, seen in enumerate(infections):
        chance = 1 - (1 - rate) ** (infected / 20)
        new = pyro.sample(f"new_{t}", dist.Binomial(susceptible, chance))
        susceptible, infected = susceptible - new, infected + new
        pyro.sample(f"seen_{t}", dist.Normal(new, 1.0), obs=seen)


def as_many_as_a_latent_says(x):
    """A number of components that is drawn, as objects are in `air`."""
    count = pyro.sample("count", dist.Poisson(2.0))
    total = torch.zeros(())
    for i in range(int(count)):
        total = total + pyro.sample(f"size_{i}", dist.Normal(1.0, 1.0))
    pyro.sample("x", dist.Normal(total, 1.0), obs=x)


def refused() -> list[Refused]:
    """What has no static structure, or no posterior."""
    return [
        Refused(
            "inclined plane, simulated",
            "inclined_plane.py",
            simulated_plane,
            (torch.tensor([0.5]),),
            r"the model branches on a latent",
        ),
        Refused(
            "banana without data",
            "neutra.py",
            only_a_prior,
            (torch.tensor(1.0), torch.tensor(1.0)),
            r"no observed sample site, so its posterior is its prior",
        ),
        Refused(
            "epidemic of counts",
            "sir_hmc.py",
            epidemic,
            (torch.tensor([2.0, 3.0]),),
            r"discrete latent whose support .* depends on another latent",
        ),
        Refused(
            "a drawn number of objects",
            "air",
            as_many_as_a_latent_says,
            (torch.tensor(2.0),),
            r"takes a latent out of torch|set of sites must not change",
        ),
    ]
