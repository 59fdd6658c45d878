"""Models with discrete latents, in the idioms of Pyro's users, with what enumerates them.

Each is small enough for `oracles.enumerate_posterior`: every assignment is run through Pyro.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from oracles import vectors
from pyro.ops.indexing import Vindex
from torch import Tensor


@dataclass(frozen=True)
class Discrete:
    """A model whose latents are all discrete.

    Attributes:
        name: Name of the test.
        model: The Pyro program.
        args: Its arguments.
        values: By latent, all values that it can take.
        options: Options of the engine.
    """

    name: str
    model: Callable
    args: tuple
    values: dict[str, list[Tensor]]
    options: dict


def _integers(count: int) -> list[Tensor]:
    return [torch.tensor(value) for value in range(count)]


def _counts(count: int) -> list[Tensor]:
    return [torch.tensor(float(value)) for value in range(count)]


def coin(x):
    z = pyro.sample("z", dist.Bernoulli(0.3))
    pyro.sample("x", dist.Normal(z * 2.0, 1.0), obs=x)


def categories(x):
    z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
    pyro.sample("x", dist.Normal(torch.tensor([-1.0, 0.0, 2.0])[z], 1.0), obs=x)


def one_hot(x):
    z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.5, 0.3])))
    pyro.sample("x", dist.Normal(z @ torch.tensor([-1.0, 0.0, 2.0]), 1.0), obs=x)


def mixture(x):
    """Assignments in a plate, their common weights fixed."""
    loc = torch.tensor([-1.0, 1.5])
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.7, 0.3])))
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def hidden_markov(x):
    """As in Pyro's tutorial on enumeration, with a transition matrix and `pyro.markov`."""
    move = torch.tensor([[0.9, 0.1], [0.25, 0.75]])
    loc, z = torch.tensor([-1.0, 1.0]), 0
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(move[z]))
        pyro.sample(f"x_{t}", dist.Normal(loc[z], 1.0), obs=x[t])


def second_order(x):
    """A chain in which a state depends on the two before it."""
    move = torch.tensor([[[0.9, 0.1], [0.4, 0.6]], [[0.7, 0.3], [0.2, 0.8]]])
    a, b = torch.tensor(0), torch.tensor(0)
    for t in pyro.markov(range(len(x)), history=2):
        a, b = b, pyro.sample(f"z_{t}", dist.Categorical(Vindex(move)[a, b]))
        pyro.sample(f"x_{t}", dist.Normal(2.0 * b.to(x.dtype), 1.0), obs=x[t])


def tree(x):
    """A root, two children, and a grandchild of both, which makes a loop."""
    table = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    a = pyro.sample("a", dist.Categorical(torch.tensor([0.6, 0.4])))
    b = pyro.sample("b", dist.Categorical(table[a]))
    c = pyro.sample("c", dist.Categorical(table[a]))
    d = pyro.sample("d", dist.Bernoulli(0.1 + 0.4 * b + 0.4 * c))
    pyro.sample("x", dist.Normal(d, 0.7), obs=x)


def alarm():
    """Pearl's burglary, with booleans made of a table."""
    burglary = pyro.sample("burglary", dist.Bernoulli(0.1))
    quake = pyro.sample("quake", dist.Bernoulli(0.2))
    p = torch.tensor([[0.01, 0.3], [0.9, 0.95]])[burglary.long(), quake.long()]
    alarm = pyro.sample("alarm", dist.Bernoulli(p))
    pyro.sample("john", dist.Bernoulli(0.05 + 0.85 * alarm), obs=torch.tensor(1.0))
    pyro.sample("mary", dist.Bernoulli(0.01 + 0.69 * alarm), obs=torch.tensor(0.0))


def binary_vector(x):
    """A vector of bits behind `to_event`, all of which the data see."""
    z = pyro.sample("z", dist.Bernoulli(torch.full((8,), 0.4)).to_event(1))
    loading = torch.linspace(-1.0, 1.5, 8)
    pyro.sample("x", dist.Normal(z @ loading, 0.5), obs=x)


def belief_network(x):
    """A sigmoid belief network: one plate of causes, one of effects."""
    weights = torch.tensor([[1.5, -1.0, 0.5, 2.0, -2.0], [0.5, 1.0, -1.5, 0.0, 1.0]])
    with pyro.plate("top", 2):
        h = pyro.sample("h", dist.Bernoulli(0.4))
    with pyro.plate("bottom", 5):
        g = pyro.sample("g", dist.Bernoulli(logits=h @ weights - 0.3))
    pyro.sample("x", dist.Normal(g.sum(), 1.0), obs=x)


def poisson_count(x):
    z = pyro.sample("z", dist.Poisson(4.0))
    pyro.sample("x", dist.Normal(z, 1.5), obs=x)


def geometric_count(x):
    z = pyro.sample("z", dist.Geometric(torch.tensor(0.2)))
    pyro.sample("x", dist.Normal(z, 2.0), obs=x)


def binomial_totals(x):
    """Elements with totals of their own."""
    total = torch.tensor([3.0, 6.0])
    with pyro.plate("data", 2):
        z = pyro.sample("z", dist.Binomial(total, torch.tensor(0.4)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def many_tosses(x):
    """More values than are enumerated."""
    z = pyro.sample("z", dist.Binomial(400, torch.tensor(0.5)))
    pyro.sample("x", dist.Normal(z, 10.0), obs=x)


def allocation(x):
    z = pyro.sample("z", dist.Multinomial(4, torch.tensor([0.2, 0.3, 0.5])))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def coupled_counts(x):
    """Two counts of which the data see the sum."""
    a = pyro.sample("a", dist.Poisson(2.0))
    b = pyro.sample("b", dist.Poisson(3.0))
    pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)


def labelled(y, seen):
    """A label that is seen in some elements only."""
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3), obs=y, obs_mask=seen)
        pyro.sample("x", dist.Normal(z.to(torch.get_default_dtype()), 1.0), obs=torch.ones(len(y)))


def _compositions(total: int) -> list[Tensor]:
    return [
        torch.tensor([float(a), float(b), float(total - a - b)])
        for a in range(total + 1)
        for b in range(total + 1 - a)
    ]


def models() -> list[Discrete]:
    """The models, in the default dtype of the moment."""
    x = torch.tensor(1.2)
    series = torch.tensor([0.5, -1.2, 1.4, 0.8, 0.3])
    bits = [torch.tensor(0.0), torch.tensor(1.0)]
    hot = list(torch.eye(3))
    chain = {f"z_{t}": _integers(2) for t in range(5)}
    separate = {"blocks": [(name,) for name in chain]}
    labels = [torch.tensor(row) for row in torch.cartesian_prod(*[torch.arange(3)] * 2).tolist()]
    seen = torch.tensor([True, False, False])
    return [
        Discrete("coin", coin, (x,), {"z": bits}, {}),
        Discrete("categories", categories, (x,), {"z": _integers(3)}, {}),
        Discrete("one_hot", one_hot, (x,), {"z": hot}, {}),
        Discrete("mixture", mixture, (series,), {"z": _long(vectors(5, [0, 1]))}, {}),
        Discrete("hidden_markov", hidden_markov, (series,), chain, {}),
        Discrete("separate_states", hidden_markov, (series,), chain, separate),
        Discrete("second_order", second_order, (series,), chain, {}),
        Discrete("tree", tree, (x,), {**{name: _integers(2) for name in "abc"}, "d": bits}, {}),
        Discrete("alarm", alarm, (), {n: bits for n in ("burglary", "quake", "alarm")}, {}),
        Discrete("binary_vector", binary_vector, (x,), {"z": vectors(8, [0.0, 1.0])}, {}),
        Discrete(
            "belief_network",
            belief_network,
            (x,),
            {"h": vectors(2, [0.0, 1.0]), "g": vectors(5, [0.0, 1.0])},
            {},
        ),
        Discrete("poisson_count", poisson_count, (x,), {"z": _counts(40)}, {}),
        Discrete("geometric_count", geometric_count, (x,), {"z": _counts(60)}, {}),
        Discrete(
            "binomial_totals",
            binomial_totals,
            (series[2:4],),
            {"z": [torch.tensor([float(a), float(b)]) for a in range(4) for b in range(7)]},
            {},
        ),
        Discrete("many_tosses", many_tosses, (190.0 + x,), {"z": _counts(401)}, {}),
        Discrete("allocation", allocation, (series[2:],), {"z": _compositions(4)}, {}),
        Discrete("coupled_counts", coupled_counts, (x + 4,), {n: _counts(25) for n in "ab"}, {}),
        Discrete(
            "labelled",
            labelled,
            (torch.tensor([2, 0, 0]), seen),
            {"z_unobserved": [torch.cat([torch.zeros(1, dtype=torch.long), v]) for v in labels]},
            {},
        ),
    ]


def _long(values: list[Tensor]) -> list[Tensor]:
    return [value.long() for value in values]
