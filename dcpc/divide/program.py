"""The vectorised log-factors of a Pyro program: one interface, three backends.

    captured graph   `make_fx(vmap(model))`, sliced to the factors that are asked for
    vmap             the model under `torch.vmap`
    loop             the model, particle by particle

All of them give the same numbers; the first is the fast one. `build_program` takes the first
that works.
"""

from __future__ import annotations

import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dcpc.divide import capture
from dcpc.divide.model import Latents, Model, Site, constrain, log_factors, sample_prior
from dcpc.errors import ModelError, OptionError

Factors = dict[str, Tensor]


class Arguments:
    """A call's arguments, split into tensors (inputs) and everything else (part of the key)."""

    def __init__(self, args: tuple, kwargs: dict) -> None:
        leaves, self._structure = pytree.tree_flatten((args, kwargs))
        self._static = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        self.tensors: tuple[Tensor, ...] = tuple(
            leaf for leaf in leaves if isinstance(leaf, Tensor)
        )

    def rebuild(self, tensors: Sequence[Tensor]) -> tuple[tuple, dict]:
        """The arguments with other tensors in the places of the tensors."""
        rest = iter(tensors)
        leaves = [
            next(rest) if is_tensor else static
            for is_tensor, static in zip(self._is_tensor, self._static, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self._structure)

    @property
    def key(self) -> tuple:
        """What a capture depends on: shapes, dtypes, devices, and the non-tensor arguments."""
        return (
            str(self._structure),
            tuple((tuple(t.shape), t.dtype, t.device) for t in self.tensors),
            tuple(_static_key(leaf) for leaf in self._static),
        )


class Program(ABC):
    """The log-factors of a model as a function of `K` particles' unconstrained latents.

    Args:
        model: The Pyro program.
        sites: Its sites, in program order.
        arguments: The arguments that it was built with.
        example: Unconstrained latents `(K, *batch, *event)`, to run and capture with.
    """

    name: str

    def __init__(
        self,
        model: Model,
        sites: Mapping[str, Site],
        arguments: Arguments,
        example: Latents,
    ) -> None:
        self.model = model
        self.num_particles = next(iter(example.values())).shape[0]
        self.sites = dict(sites)
        self.latents = [name for name, site in sites.items() if not site.is_observed]
        self.arguments = arguments

    @abstractmethod
    def select(
        self, names: Sequence[str], *, for_score: bool = False
    ) -> Callable[[Latents, Sequence[Tensor]], Factors]:
        """The program of some of the factors.

        Args:
            names: Sites.
            for_score: Whether it is to be differentiated with respect to latents. Then a
                captured program drops `.detach()`: the score is the derivative of the
                log-density, whatever the author detaches for learning.

        Returns:
            Function of unconstrained latents `(K, *batch, *event)` and the tensors among the
            arguments, giving log-factors `(K, *batch_shape)` by name.
        """

    def single(self, latents: Latents, tensors: Sequence[Tensor]) -> Factors:
        """All log-factors of one particle by a plain run of the model."""
        args, kwargs = self.arguments.rebuild(tensors)
        return log_factors(self.model, latents, args, kwargs, self.sites)

    def _flat(self, *values: Tensor) -> tuple[Tensor, ...]:
        """`single` as a function of a flat list, in the order of `latents` and `sites`."""
        count = len(self.latents)
        latents = dict(zip(self.latents, values[:count], strict=True))
        return tuple(self.single(latents, values[count:]).values())


class GraphProgram(Program):
    """The captured ATen graph; every selection of factors is a slice of it."""

    name = "graph"

    def __init__(
        self,
        model: Model,
        sites: Mapping[str, Site],
        arguments: Arguments,
        example: Latents,
    ) -> None:
        super().__init__(model, sites, arguments, example)
        self._module = capture.capture(
            self._flat,
            [example[name].contiguous() for name in self.latents],
            [value.contiguous() for value in arguments.tensors],
        )

    def select(
        self, names: Sequence[str], *, for_score: bool = False
    ) -> Callable[[Latents, Sequence[Tensor]], Factors]:
        order = {name: position for position, name in enumerate(self.sites)}
        module = self._module
        if for_score or set(names) != set(self.sites):
            module = capture.slice_outputs(module, [order[name] for name in names])
        else:
            names = list(self.sites)

        def run(latents: Latents, tensors: Sequence[Tensor]) -> Factors:
            # A capture holds the views that contiguous examples allowed.
            values = (*(latents[name] for name in self.latents), *tensors)
            outputs = module(*(value.contiguous() for value in values))
            return dict(zip(names, outputs, strict=True))

        return run

    def dependencies(self) -> dict[str, frozenset[str]]:
        """The latents that each factor depends on, by reachability in the graph."""
        count = len(self.latents)
        return {
            name: frozenset(self.latents[position] for position in inputs if position < count)
            for name, inputs in zip(self.sites, capture.dependencies(self._module), strict=True)
        }


class VmapProgram(Program):
    """The model under `torch.vmap`."""

    name = "vmap"

    def select(
        self, names: Sequence[str], *, for_score: bool = False
    ) -> Callable[[Latents, Sequence[Tensor]], Factors]:
        def run(latents: Latents, tensors: Sequence[Tensor]) -> Factors:
            in_dims = (0,) * len(self.latents) + (None,) * len(tensors)
            vectorised = torch.vmap(self._flat, in_dims=in_dims, randomness="different")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outputs = vectorised(*(latents[name] for name in self.latents), *tensors)
            factors = dict(zip(self.sites, outputs, strict=True))
            return {name: factors[name] for name in names}

        return run


class LoopProgram(Program):
    """The model, one particle after the other: slow, and right by construction."""

    name = "loop"

    def select(
        self, names: Sequence[str], *, for_score: bool = False
    ) -> Callable[[Latents, Sequence[Tensor]], Factors]:
        def run(latents: Latents, tensors: Sequence[Tensor]) -> Factors:
            num_particles = next(iter(latents.values())).shape[0]
            particles = [
                self.single({name: u[k] for name, u in latents.items()}, tensors)
                for k in range(num_particles)
            ]
            return {name: torch.stack([p[name] for p in particles]) for name in names}

        return run


BACKENDS = ("graph", "vmap", "loop")


def build_program(
    model: Model,
    sites: Mapping[str, Site],
    arguments: Arguments,
    example: Latents,
    backend: str = "auto",
) -> Program:
    """The first backend that can run the model, or the one that is asked for.

    Args:
        example: Unconstrained latents `(K, *batch, *event)` to capture with.
        backend: `"auto"`, `"graph"`, `"vmap"` or `"loop"`.

    Raises:
        ModelError: The model branches on a latent or takes one out of torch.
        OptionError: Unknown backend, or the one asked for cannot run this model.
    """
    if backend not in ("auto", *BACKENDS):
        raise OptionError(f"backend must be 'auto' or one of {BACKENDS}, got {backend!r}")
    for name in BACKENDS if backend == "auto" else (backend,):
        try:
            if name == "graph":
                return GraphProgram(model, sites, arguments, example)
            backend_class = VmapProgram if name == "vmap" else LoopProgram
            program = backend_class(model, sites, arguments, example)
            program.select(list(sites))(example, arguments.tensors)
            return program
        except ModelError:
            raise
        except Exception as error:
            _raise_if_not_static(error, list(example))
            if backend != "auto" or name == "loop":
                raise
    raise AssertionError("the loop above returns or raises")


def prior_particles(
    model: Model,
    sites: Mapping[str, Site],
    arguments: Arguments,
    num_particles: int,
) -> dict[str, Tensor]:
    """Independent samples of the prior, unconstrained `(K, *batch, *event)`.

    Vectorised where the model allows it, else one run of the model per particle.
    """
    args, kwargs = arguments.rebuild(arguments.tensors)

    def draw(_: Tensor) -> dict[str, Tensor]:
        return sample_prior(model, args, kwargs)

    return map_particles(draw, torch.zeros(num_particles), _latent_names(sites))


def constrained_particles(
    model: Model, sites: Mapping[str, Site], arguments: Arguments, latents: Latents
) -> dict[str, Tensor]:
    """Constrained values `T(u)` of `K` particles, by name."""
    args, kwargs = arguments.rebuild(arguments.tensors)
    return map_particles(
        lambda particle: constrain(model, particle, args, kwargs),
        dict(latents),
        _latent_names(sites),
    )


def map_particles(
    function: Callable[[Any], dict[str, Tensor]], batched: Any, latents: Sequence[str]
) -> dict[str, Tensor]:
    """`vmap` of a function of one particle where it works, a loop over particles elsewhere.

    Args:
        function: From one particle's tree of tensors to tensors by name.
        batched: The tree, with a leading particle axis.
        latents: Names of the model's latents, for the error message.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = torch.vmap(function, randomness="different")(batched)
    except Exception as error:
        _raise_if_not_static(error, latents)
        leaves = pytree.tree_leaves(batched)
        particles = [
            function(pytree.tree_map(lambda leaf, k=k: leaf[k], batched))
            for k in range(leaves[0].shape[0])
        ]
        result = {name: torch.stack([p[name] for p in particles]) for name in particles[0]}
    return {name: value.detach() for name, value in result.items()}


_NOT_STATIC = {
    "data-dependent control flow": "branches on a latent (an if, while or assert on a tensor)",
    "calling .item()": "takes a latent out of torch (.item(), float(), int())",
    "_local_scalar_dense": "branches on a latent or calls .item() on one",
    "doesn't have storage": "takes a latent out of torch (numpy)",
    "can't call numpy": "takes a latent out of torch (numpy)",
}


def _raise_if_not_static(error: Exception, latents: Sequence[str]) -> None:
    """Turns torch's complaint about a dynamic model into one that names the site and the line."""
    what = next((text for mark, text in _NOT_STATIC.items() if mark in str(error)), None)
    if what is None:
        return
    line = next(
        (
            f" at line {frame.lineno} of {frame.filename}: {frame.line}"
            for frame in reversed(traceback.extract_tb(error.__traceback__))
            if not any(part in frame.filename for part in ("/torch/", "/pyro/", "/dcpc/divide/"))
            and frame.filename != "<string>"
        ),
        "",
    )
    raise ModelError(
        f"the model {what}{line}. Its latent sites are {list(latents)}; the structure of the "
        "model must be the same for all values of them: use torch.where instead of branches, "
        "and torch operations instead of numpy or Python numbers."
    ) from error


def _latent_names(sites: Mapping[str, Site]) -> list[str]:
    return [name for name, site in sites.items() if not site.is_observed]


def _static_key(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf.shape, str(leaf.dtype), hash(leaf.tobytes())
    try:
        hash(leaf)
    except TypeError:
        return repr(leaf)
    return leaf


def parameter_key(model: Model) -> tuple:
    """Identity of the parameters, Pyro's and the module's, and the training mode.

    A capture holds parameters and buffers by reference: it sees in-place updates, but not that
    one was replaced by another.
    """
    store = pyro.get_param_store()
    named = tuple((name, id(value)) for name, value in sorted(store._params.items()))
    if not isinstance(model, torch.nn.Module):
        return named, (), ()
    tensors = tuple(id(value) for value in (*model.parameters(), *model.buffers()))
    return named, tensors, tuple(module.training for module in model.modules())
