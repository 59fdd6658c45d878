"""Small models of every shape that Pyro users write, each with its graph written by hand.

Latents that enter a later latent's support (as in `Uniform(0, z)`) are parents of everything
that the later latent enters: graphs are in unconstrained space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model with what is known about it.

    Attributes:
        build: Returns the model, its arguments and keyword arguments.
        depends: For every site, the latents that its factor is a function of.
        plates: For every latent, names of the plates whose elements are independent.
        population: Names of the plates that hold every latent and observation independently.
    """

    name: str
    build: Callable[[], tuple[Callable, tuple, dict]]
    depends: dict[str, set[str]]
    plates: dict[str, tuple[str, ...]]
    population: tuple[str, ...] = ()


def data(*shape: int) -> Tensor:
    """Fixed data in the default dtype, on the default device."""
    generator = torch.Generator().manual_seed(17)
    values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return values.to(torch.get_default_device(), torch.get_default_dtype())


def chain():
    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 0.3))
        c = pyro.sample("c", dist.Normal(b.sin(), 0.5))
        pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    return model, (data(),), {}


def tree():
    def model(x):
        root = pyro.sample("root", dist.Normal(0.0, 1.0))
        left = pyro.sample("left", dist.Normal(root, 1.0))
        right = pyro.sample("right", dist.Normal(root, 2.0))
        pyro.sample("x", dist.Normal(left, 1.0), obs=x[0])
        pyro.sample("y", dist.Normal(right, 1.0), obs=x[1])

    return model, (data(2),), {}


def collider():
    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        c = pyro.sample("c", dist.Normal(a * b, 1.0))
        pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    return model, (data(),), {}


def eight_schools():
    def model(y, sigma):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            trans = pyro.sample("trans", dist.Normal(0.0, 1.0))
            theta = pyro.deterministic("theta", mu + tau * trans)
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return model, (10 * data(8), 10 + data(8).abs()), {}


def deep_generative():
    torch.manual_seed(3)
    with torch.device("cpu"):  # the same weights on every device
        hidden, decoder = nn.Linear(2, 3), nn.Linear(3, 4)
    hidden, decoder = (layer.to(torch.get_default_device()) for layer in (hidden, decoder))

    def model(x):
        pyro.module("hidden", hidden)
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
            z2 = pyro.sample("z2", dist.Normal(hidden(z1.tanh()), scale).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z2.relu())).to_event(1), obs=x)

    return model, ((data(5, 4) > 0).to(torch.get_default_dtype()),), {}


def nested_plates():
    def model(x):
        outer = pyro.plate("outer", 3, dim=-2)
        inner = pyro.plate("inner", 4, dim=-1)
        top = pyro.sample("top", dist.Normal(0.0, 1.0))
        with outer:
            a = pyro.sample("a", dist.Normal(top, 1.0))
        with inner:
            b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with outer, inner:
            c = pyro.sample("c", dist.Normal(a + b.sum(-1), 1.0))
            pyro.sample("x", dist.Normal(c, 0.5), obs=x)

    return model, (data(3, 4),), {}


def population_of_two_plates():
    """Both plates hold everything; the second latent has an event dimension too."""

    def model(x):
        with pyro.plate("rows", 2, dim=-1), pyro.plate("columns", 3, dim=-2):
            a = pyro.sample("a", dist.Gamma(torch.tensor(2.0), 1.0))
            b = pyro.sample("b", dist.Normal(torch.zeros(3, 2, 4), a[..., None]).to_event(1))
            pyro.sample("x", dist.Normal(b, 1.0).to_event(1), obs=x)

    return model, (data(3, 2, 4),), {}


def markov():
    def model(x):
        z = torch.zeros(())
        for t in pyro.markov(range(4)):
            z = pyro.sample(f"z{t}", dist.Normal(z, 0.5))
            pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[t])

    return model, (data(4),), {}


def sequential_plate():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        for i in pyro.plate("rows", 3):
            z = pyro.sample(f"z{i}", dist.Normal(mu, 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    return model, (data(3),), {}


def bayesian_regression():
    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[nn.Linear](3, 1)
            self.linear.weight = PyroSample(
                dist.Normal(torch.tensor(0.0), 1.0).expand([1, 3]).to_event(2)
            )
            self.linear.bias = PyroSample(
                dist.Normal(torch.tensor(0.0), 2.0).expand([1]).to_event(1)
            )
            self.scale = PyroParam(torch.tensor(0.7), constraint=dist.constraints.positive)

        def forward(self, design, y=None):
            mean = self.linear(design).squeeze(-1)
            with pyro.plate("rows", len(design)):
                pyro.sample("y", dist.Normal(mean, self.scale), obs=y)

    return Regression(), (data(6, 3),), {"y": data(6)}


def conditioned():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(b, 1.0))

    return poutine.condition(model, data={"x": data()}), (), {}


def dict_of_data():
    def model(batch, width=1.0):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 4):
            pyro.sample("y", dist.Normal(slope * batch["x"], width), obs=batch["y"])

    return model, ({"x": data(4), "y": 2 * data(4)},), {"width": 0.5}


def buffer_write():
    """In-place writes of latents into a plain buffer, which lose edges to tracers."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        buffer = torch.zeros(4)
        buffer[1:] = z
        buffer[0] = w
        pyro.sample("x", dist.Normal(buffer, 1.0).to_event(1), obs=x)

    return model, (data(4),), {}


def buffer_write_in_a_loop():
    def model(x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        path = torch.zeros(3)
        for t in range(3):
            step = pyro.sample(f"step{t}", dist.Normal(0.0, 1.0))
            path[t] = step if t == 0 else path[t - 1] + step
        pyro.sample("x", dist.Normal(path, scale).to_event(1), obs=x)

    return model, (data(3),), {}


def detached():
    """`.detach()` blocks gradients for learning, not the dependence."""

    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a.detach(), 1.0))
        pyro.sample("x", dist.Normal(b, a.detach().exp()), obs=x)

    return model, (data(),), {}


def inner_vmap():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        mean = torch.vmap(lambda v: v.sin() + 1.0)(z)
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    return model, (data(4),), {}


def deterministic_between():
    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        middle = pyro.deterministic("middle", a.exp())
        b = pyro.sample("b", dist.Gamma(middle + 1.0, 1.0))
        final = pyro.deterministic("final", (a + b)[None], event_dim=1)
        pyro.sample("x", dist.Normal(final.squeeze(), 1.0), obs=x)

    return model, (data(),), {}


def dependent_support():
    def model(x):
        top = pyro.sample("top", dist.Gamma(2.0, 1.0))
        z = pyro.sample("z", dist.Pareto(top, 3.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model, (data(),), {}


def where_instead_of_if():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        mean = torch.where(z > 0, 2 * z, z)
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    return model, (data(),), {}


def shape_only():
    """`zeros_like(z)` uses the shape of a latent, not its value: no edge."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        pyro.sample("free", dist.Normal(torch.zeros_like(z), 1.0).to_event(1), obs=x)

    return model, (data(3),), {}


def mixture():
    def model(x):
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        weight = pyro.sample("weight", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("n", 5):
            components = dist.Normal(locs, 1.0)
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weight), components), obs=x)

    return model, (data(5),), {}


def rolled():
    """`x[i]` uses `z[i-1]`: the plate is not independent."""

    def model(x):
        with pyro.plate("n", 5):
            z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0))
            pyro.sample("x", dist.Normal(z + 0.5 * z.roll(1, -1), 1.0), obs=x)

    return model, (data(5),), {}


def summed():
    """Every `x[i]` uses the sum of all `a`; `b` is independent given `a`."""

    def model(x):
        with pyro.plate("n", 4):
            a = pyro.sample("a", dist.Normal(torch.zeros(4), 1.0))
            b = pyro.sample("b", dist.Normal(torch.zeros(4), 1.0))
            pyro.sample("x", dist.Normal(a.sum() + b, 1.0), obs=x)

    return model, (data(4),), {}


def last_pair_coupled():
    """Only the last two elements of the plate touch."""

    def model(x):
        with pyro.plate("n", 6):
            z = pyro.sample("z", dist.Normal(torch.zeros(6), 1.0))
            mean = torch.cat([z[:5], (z[5] * z[4].exp())[None]])
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    return model, (data(6),), {}


def observed_outside():
    """Latents in a plate whose observation is outside: elements are tied together."""

    def model(x):
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    return model, (data(3),), {}


CASES = [
    Case("chain", chain, {"a": {"a"}, "b": {"a", "b"}, "c": {"b", "c"}, "x": {"c"}},
         {"a": (), "b": (), "c": ()}),
    Case("tree", tree,
         {"root": {"root"}, "left": {"root", "left"}, "right": {"root", "right"},
          "x": {"left"}, "y": {"right"}},
         {"root": (), "left": (), "right": ()}),
    Case("collider", collider,
         {"a": {"a"}, "b": {"b"}, "c": {"a", "b", "c"}, "x": {"c"}},
         {"a": (), "b": (), "c": ()}),
    Case("eight_schools", eight_schools,
         {"mu": {"mu"}, "tau": {"tau"}, "trans": {"trans"}, "y": {"mu", "tau", "trans"}},
         {"mu": (), "tau": (), "trans": ("schools",)}),
    Case("deep_generative", deep_generative,
         {"z1": {"z1"}, "z2": {"z1", "z2"}, "x": {"z2"}},
         {"z1": ("data",), "z2": ("data",)}, ("data",)),
    Case("nested_plates", nested_plates,
         {"top": {"top"}, "a": {"top", "a"}, "b": {"b"}, "c": {"a", "b", "c"}, "x": {"c"}},
         {"top": (), "a": ("outer",), "b": ("inner",), "c": ("outer", "inner")}),
    Case("population_of_two_plates", population_of_two_plates,
         {"a": {"a"}, "b": {"a", "b"}, "x": {"b"}},
         {"a": ("columns", "rows"), "b": ("columns", "rows")}, ("columns", "rows")),
    Case("markov", markov,
         {"z0": {"z0"}, "z1": {"z0", "z1"}, "z2": {"z1", "z2"}, "z3": {"z2", "z3"},
          "x0": {"z0"}, "x1": {"z1"}, "x2": {"z2"}, "x3": {"z3"}},
         {f"z{t}": () for t in range(4)}),
    Case("sequential_plate", sequential_plate,
         {"mu": {"mu"}, **{f"z{i}": {"mu", f"z{i}"} for i in range(3)},
          **{f"x{i}": {f"z{i}"} for i in range(3)}},
         {"mu": (), "z0": (), "z1": (), "z2": ()}),
    Case("bayesian_regression", bayesian_regression,
         {"linear.weight": {"linear.weight"}, "linear.bias": {"linear.bias"},
          "y": {"linear.weight", "linear.bias"}},
         {"linear.weight": (), "linear.bias": ()}),
    Case("conditioned", conditioned, {"a": {"a"}, "b": {"a", "b"}, "x": {"b"}},
         {"a": (), "b": ()}),
    Case("dict_of_data", dict_of_data, {"slope": {"slope"}, "y": {"slope"}}, {"slope": ()}),
    Case("buffer_write", buffer_write, {"z": {"z"}, "w": {"w"}, "x": {"z", "w"}},
         {"z": (), "w": ()}),
    Case("buffer_write_in_a_loop", buffer_write_in_a_loop,
         {"scale": {"scale"}, **{f"step{t}": {f"step{t}"} for t in range(3)},
          "x": {"scale", "step0", "step1", "step2"}},
         {"scale": (), "step0": (), "step1": (), "step2": ()}),
    Case("detached", detached, {"a": {"a"}, "b": {"a", "b"}, "x": {"a", "b"}}, {"a": (), "b": ()}),
    Case("inner_vmap", inner_vmap, {"z": {"z"}, "x": {"z"}}, {"z": ()}),
    Case("deterministic_between", deterministic_between,
         {"a": {"a"}, "b": {"a", "b"}, "x": {"a", "b"}}, {"a": (), "b": ()}),
    Case("dependent_support", dependent_support,
         {"top": {"top"}, "z": {"top", "z"}, "x": {"top", "z"}}, {"top": (), "z": ()}),
    Case("where_instead_of_if", where_instead_of_if, {"z": {"z"}, "x": {"z"}}, {"z": ()}),
    Case("shape_only", shape_only, {"z": {"z"}, "x": {"z"}, "free": set()}, {"z": ()}),
    Case("mixture", mixture,
         {"locs": {"locs"}, "weight": {"weight"}, "x": {"locs", "weight"}},
         {"locs": (), "weight": ()}),
    Case("rolled", rolled, {"z": {"z"}, "x": {"z"}}, {"z": ()}),
    Case("summed", summed, {"a": {"a"}, "b": {"b"}, "x": {"a", "b"}}, {"a": (), "b": ("n",)}),
    Case("last_pair_coupled", last_pair_coupled, {"z": {"z"}, "x": {"z"}}, {"z": ()}),
    Case("observed_outside", observed_outside, {"z": {"z"}, "x": {"z"}}, {"z": ()}),
]  # fmt: skip
