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
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dcpc.divide import capture
from dcpc.divide.handlers import Undetached
from dcpc.divide.model import Latents, Model, constrain, log_factors_and_masks, sample_prior
from dcpc.divide.sites import Sites
from dcpc.divide.vectorised import vectorised, writable
from dcpc.divide.watch import is_plain, plain_key
from dcpc.errors import ModelError, OptionError

if TYPE_CHECKING:
    from dcpc.divide.summed_out import SummedOut

Factors = dict[str, Tensor]


class Arguments:
    """A call's arguments, split into tensors (inputs) and everything else (part of the key).

    Attributes:
        tensors: The tensors, in the order of the arguments' tree.
        objects: Leaves that are neither tensors nor plain values, and whose contents may change.
    """

    def __init__(self, args: tuple, kwargs: dict) -> None:
        leaves, self._structure = pytree.tree_flatten((args, kwargs))
        self._static = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        self.tensors: tuple[Tensor, ...] = tuple(
            leaf for leaf in leaves if isinstance(leaf, Tensor)
        )
        self.objects = [leaf for leaf in self._static if not is_plain(leaf)]

    def rebuild(self, tensors: Sequence[Tensor]) -> tuple[tuple, dict]:
        """The arguments with other tensors in the places of the tensors."""
        rest = iter(tensors)
        leaves = [
            next(rest) if is_tensor else static
            for is_tensor, static in zip(self._is_tensor, self._static, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self._structure)

    def replace(self, tensors: Sequence[Tensor]) -> Arguments:
        """Arguments like these, with other tensors."""
        return Arguments(*self.rebuild(tensors))

    @property
    def key(self) -> tuple:
        """Key of a capture: structure, shapes, dtypes, devices, and plain values.

        Of other objects it holds the type only; `watch` looks at their contents.
        """
        return (
            _structure_key(self._structure),
            tuple((tuple(t.shape), t.dtype, t.device) for t in self.tensors),
            tuple(plain_key(leaf) if is_plain(leaf) else type(leaf) for leaf in self._static),
        )


def _structure_key(spec: pytree.TreeSpec) -> tuple:
    context = spec.context
    return (
        spec.type,
        tuple(map(plain_key, context)) if isinstance(context, list | tuple) else context,
        tuple(_structure_key(child) for child in spec.children()),
    )


class Program(ABC):
    """The log-factors of a model as a function of `K` particles' unconstrained latents.

    Args:
        model: The Pyro program.
        sites: Its sites, in program order.
        arguments: The arguments that it was built with.
        example: Unconstrained latents `(K, *batch, *event)`, to run and capture with.
        summed_out: Latents that are summed out, from whose sites the others are.

    Attributes:
        reads_data: Whether it holds numbers that the model took out of its data, so that it is
            right for these very data only.
        reason: What stopped a faster backend; empty if nothing did.
    """

    name: str
    reads_data = False
    reason = ""

    def __init__(
        self,
        model: Model,
        sites: Sites,
        arguments: Arguments,
        example: Latents,
        summed_out: SummedOut | None = None,
    ) -> None:
        self.model = model
        self.summed_out = summed_out
        self.num_particles = next(iter(example.values())).shape[0]
        self.sites = sites
        self.latents = sites.latents
        self.arguments = arguments
        self.example = example

    @abstractmethod
    def select(
        self, names: Sequence[str], *, for_score: bool = False
    ) -> Callable[[Latents, Sequence[Tensor]], Factors]:
        """The program of some of the factors.

        Args:
            names: Sites.
            for_score: Whether it is to be differentiated with respect to latents. Then
                `.detach()` has no effect: the score is the derivative of the log-density,
                whatever the author detaches for learning.

        Returns:
            Function of unconstrained latents `(K, *batch, *event)` and the tensors among the
            arguments, giving log-factors `(K, *batch_shape)` by name.
        """

    def select_repeated(
        self, names: Sequence[str], varying: Sequence[str]
    ) -> Callable[[Latents, Latents, Sequence[Tensor]], Factors]:
        """The program of some of the factors at many values of some latents, without gradients.

        Args:
            names: Sites.
            varying: Latents that have many values.

        Returns:
            Function of the varying latents `(C, K, *batch, *event)`, the unconstrained latents and
            the tensors among the arguments, giving log-factors `(C, K, *batch_shape)` by name.
        """
        factors = self.select(names)

        def run(many: Latents, latents: Latents, tensors: Sequence[Tensor]) -> Factors:
            count = len(next(iter(many.values())))
            with torch.no_grad():
                each = [
                    factors({**latents, **{name: u[c] for name, u in many.items()}}, tensors)
                    for c in range(count)
                ]
            return {name: torch.stack([one[name] for one in each]) for name in names}

        return run

    def masks(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """For every masked latent, which elements its density has: boolean `batch_shape`."""
        particle = {name: u[0] for name, u in self.example.items()}
        return self._factors_and_masks(particle, tensors)[1]

    def single(self, latents: Latents, tensors: Sequence[Tensor]) -> Factors:
        """All log-factors of one particle by a plain run of the model."""
        return self._factors_and_masks(latents, tensors)[0]

    def _factors_and_masks(
        self, latents: Latents, tensors: Sequence[Tensor]
    ) -> tuple[Factors, dict[str, Tensor]]:
        args, kwargs = self.arguments.rebuild(tensors)
        if self.summed_out is None:
            return log_factors_and_masks(
                self.model, latents, args, kwargs, self.sites, self.sites.masked
            )
        base = self.summed_out.base

        def run(values: Latents) -> tuple[Factors, dict[str, Tensor]]:
            everything = {**latents, **values}
            return log_factors_and_masks(
                self.model, everything, args, kwargs, base, self.sites.masked
            )

        return self.summed_out.factors_and_masks(run, next(iter(latents.values())))

    def _flat(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Factors, then masks, as a function of a flat list: latents, then tensors."""
        count = len(self.latents)
        latents = dict(zip(self.latents, values[:count], strict=True))
        with vectorised():
            factors, masks = self._factors_and_masks(latents, values[count:])
        return (*factors.values(), *masks.values())


class GraphProgram(Program):
    """The captured ATen graph; every selection of factors is a slice of it."""

    name = "graph"

    def __init__(
        self,
        model: Model,
        sites: Sites,
        arguments: Arguments,
        example: Latents,
        summed_out: SummedOut | None = None,
    ) -> None:
        super().__init__(model, sites, arguments, example, summed_out)
        reads = capture.ReadsOfData()
        self._module = capture.capture(
            self._flat,
            [example[name].contiguous() for name in self.latents],
            [value.contiguous() for value in arguments.tensors],
            reads,
        )
        self.reads_data = reads.found
        self._outputs = {name: position for position, name in enumerate(self.sites)}
        self._masks = self._slice([len(sites) + i for i in range(len(sites.masked))])

    def select(
        self, names: Sequence[str], *, for_score: bool = False
    ) -> Callable[[Latents, Sequence[Tensor]], Factors]:
        learns = not for_score and set(names) == set(self.sites)
        run = self._slice([self._outputs[name] for name in names], learns)

        def factors(latents: Latents, tensors: Sequence[Tensor]) -> Factors:
            return dict(zip(names, run(latents, tensors), strict=True))

        return factors

    def select_repeated(
        self, names: Sequence[str], varying: Sequence[str]
    ) -> Callable[[Latents, Latents, Sequence[Tensor]], Factors]:
        positions = [self._outputs[name] for name in names]
        module = capture.slice_outputs(self._module, positions)
        which = [self.latents.index(name) for name in varying]
        recorded: dict[int, capture.Function] = {}  # by the number of values

        def run(many: Latents, latents: Latents, tensors: Sequence[Tensor]) -> Factors:
            values = (*({**latents, **many}[name] for name in self.latents), *tensors)
            values = tuple(value.contiguous() for value in values)
            count = len(many[varying[0]])
            with torch.no_grad():
                if count not in recorded:
                    recorded[count] = capture.repeat(module, which, values)
                return dict(zip(names, recorded[count](*values), strict=True))

        return run

    def masks(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        if not self.sites.masked:
            return {}
        outputs = self._masks(self.example, tensors)
        return {name: mask[0] for name, mask in zip(self.sites.masked, outputs, strict=True)}

    def _slice(
        self, positions: Sequence[int], learns: bool = False
    ) -> Callable[[Latents, Sequence[Tensor]], tuple[Tensor, ...]]:
        """Some of the outputs; with `learns`, of a graph through which parameters learn."""
        module = capture.slice_outputs(self._module, positions, learns=learns)

        def run(latents: Latents, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            # A capture holds the views that contiguous examples allowed.
            values = (*(latents[name] for name in self.latents), *tensors)
            return module(*(value.contiguous() for value in values))

        return run

    def dependencies(self) -> dict[str, frozenset[str]]:
        """The latents that each factor depends on, by reachability in the graph."""
        count = len(self.latents)
        reached = capture.dependencies(self._module)
        return {
            name: frozenset(self.latents[i] for i in reached[position] if i < count)
            for name, position in self._outputs.items()
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
            with warnings.catch_warnings(), Undetached() if for_score else nullcontext():
                warnings.simplefilter("ignore")
                outputs = vectorised(*(latents[name] for name in self.latents), *tensors)
            factors = dict(zip(self.sites, outputs, strict=False))  # the masks come last
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
            with Undetached() if for_score else nullcontext():
                particles = [
                    self.single({name: u[k] for name, u in latents.items()}, tensors)
                    for k in range(num_particles)
                ]
            return {name: torch.stack([p[name] for p in particles]) for name in names}

        return run


BACKENDS = ("graph", "vmap", "loop")


def build_program(
    model: Model,
    sites: Sites,
    arguments: Arguments,
    example: Latents,
    backend: str = "auto",
    summed_out: SummedOut | None = None,
) -> Program:
    """The first backend that can run the model, or the one that is asked for.

    Args:
        example: Unconstrained latents `(K, *batch, *event)` to capture with.
        backend: `"auto"`, `"graph"`, `"vmap"` or `"loop"`.
        summed_out: Latents that are summed out.

    Raises:
        ModelError: The model branches on a latent or takes one out of torch.
        OptionError: Unknown backend, or the one asked for cannot run this model.
    """
    if backend not in ("auto", *BACKENDS):
        raise OptionError(f"backend must be 'auto' or one of {BACKENDS}, got {backend!r}")
    reason = ""
    for name in BACKENDS if backend == "auto" else (backend,):
        try:
            if name == "graph":
                return GraphProgram(model, sites, arguments, example, summed_out)
            backend_class = VmapProgram if name == "vmap" else LoopProgram
            program = backend_class(model, sites, arguments, example, summed_out)
            program.select(list(sites))(example, arguments.tensors)
            program.reason = reason
            return program
        except ModelError:
            raise
        except Exception as error:
            _raise_if_not_static(error, list(example))
            if backend != "auto" or name == "loop":
                raise
            reason = _describe(error)
    raise AssertionError("the loop above returns or raises")


def prior_particles(
    model: Model,
    sites: Sites,
    arguments: Arguments,
    num_particles: int,
    given: Latents | None = None,
) -> dict[str, Tensor]:
    """Independent samples of the prior, unconstrained `(K, *batch, *event)`.

    Vectorised where the model allows it, else one run of the model per particle.

    Args:
        given: Latents whose values are given, of the same shapes.
    """
    args, kwargs = arguments.rebuild(arguments.tensors)

    def draw(particle: dict[str, Tensor]) -> dict[str, Tensor]:
        known = {name: particle[name] for name in given or {}}
        drawn = sample_prior(model, args, kwargs, sites.latents, known)
        missing = [name for name in sites.latents if name not in drawn]
        if missing:
            raise ModelError(
                f"latent '{missing[0]}' was there in the first run of the model but not in another "
                "one; the set of sites must not change between runs (static structure)"
            )
        return {name: drawn[name] for name in sites.latents}

    return map_particles(draw, {**(given or {}), "": torch.zeros(num_particles)})


def constrained_particles(
    model: Model, arguments: Arguments, latents: Latents
) -> dict[str, Tensor]:
    """Constrained values `T(u)` of `K` particles by name, and the deterministic values."""
    args, kwargs = arguments.rebuild(arguments.tensors)
    return map_particles(lambda particle: constrain(model, particle, args, kwargs), dict(latents))


def map_particles(function: Callable[[Any], dict[str, Tensor]], batched: Any) -> dict[str, Tensor]:
    """`vmap` of a function of one particle where it works, a loop over particles elsewhere.

    Args:
        function: From one particle's tree of tensors to tensors by name.
        batched: The tree, with a leading particle axis.
    """
    for handler in (nullcontext(), writable()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with vectorised(), handler:
                    result = torch.vmap(function, randomness="different")(batched)
        except Exception as error:  # a sampler with a loop inside, a write by boolean mask
            if capture.WRITES_IN_PLACE not in str(error):
                break
        else:
            return {name: value.detach() for name, value in result.items()}
    leaves = pytree.tree_leaves(batched)
    particles = [
        function(pytree.tree_map(lambda leaf, k=k: leaf[k], batched))
        for k in range(leaves[0].shape[0])
    ]
    result = {name: torch.stack([p[name] for p in particles]) for name in particles[0]}
    return {name: value.detach() for name, value in result.items()}


_MACHINERY = (
    "/dcpc/divide/",
    "/torch/_",
    "/torch/fx/",
    "/torch/overrides",
    "/torch/utils/",
    "/pyro/poutine/",
    "/pyro/primitives",
)
"""Where a traceback passes through on its way from the engine to the model and back."""

_NOT_STATIC = {
    "data-dependent control flow": "branches on a latent (an if, while or assert on a tensor)",
    "calling .item()": "takes a latent out of torch (.item(), float(), int())",
    "_local_scalar_dense": "branches on a latent or calls .item() on one",
    "doesn't have storage": "takes a latent out of torch (numpy)",
    "can't call numpy": "takes a latent out of torch (numpy)",
}


def _describe(error: Exception) -> str:
    """The operation that could not be vectorised, and where the model called it."""
    return f"{str(error).strip().splitlines()[0][:200]}{_line_of(error)}"


def _raise_if_not_static(error: Exception, latents: Sequence[str]) -> None:
    """Turns torch's complaint about a dynamic model into one that names the site and the line."""
    what = next((text for mark, text in _NOT_STATIC.items() if mark in str(error)), None)
    if what is None or _is_in_a_distribution(error):
        return
    raise ModelError(
        f"the model {what}{_line_of(error)}. Its latent sites are {list(latents)}; the structure "
        "of the model must be the same for all values of them: use torch.where instead of "
        "branches, and torch operations instead of numpy or Python numbers."
    ) from error


def _is_in_a_distribution(error: Exception) -> bool:
    """Whether torch's or Pyro's own code raised, not a line of the model."""
    inside = [
        frame.filename
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(part in frame.filename for part in _MACHINERY) and frame.filename != "<string>"
    ]
    return bool(inside) and any(part in inside[-1] for part in ("/torch/", "/pyro/"))


def _line_of(error: Exception) -> str:
    """The user's line that raised, in words; empty where there is none."""
    return next(
        (
            f" at line {frame.lineno} of {frame.filename}: {frame.line}"
            for frame in reversed(traceback.extract_tb(error.__traceback__))
            if not any(part in frame.filename for part in ("/torch/", "/pyro/", "/dcpc/divide/"))
            and frame.filename != "<string>"
        ),
        "",
    )
