"""Transport: the same particles in other coordinates of the same model.

Values `z` and standardised coordinates `e` are one to one, given the parameters: `z = T(e)`, latent
after latent from the top. A density takes the Jacobian, `p(e) = p(z) |dz/de|`.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributions.transforms import Transform

from dcpc.divide import capture
from dcpc.divide.division import Division
from dcpc.divide.handlers import Substitute, Until, running, transform_of
from dcpc.divide.model import Latents, Model
from dcpc.divide.program import Arguments, GraphProgram, map_particles
from dcpc.divide.unit import sum_terms, sum_to_plates
from dcpc.divide.vectorised import vectorised
from dcpc.errors import ModelError

__all__ = ["coordinates_of", "transport", "values_of"]


def transport(
    source: Division, target: Division, latents: Latents, arguments: Arguments
) -> tuple[dict[str, Tensor], Tensor]:
    """Particles in the coordinates of another division of the same model.

    Args:
        source: The division whose coordinates the particles are in.
        target: The other one; its latents are the same, up to their coordinates.
        latents: Unconstrained latents `(K, *batch, *event)` of the source.
        arguments: The model's arguments.

    Returns:
        Those of the target, and how much larger the log-density of these is, `(K, *population)`.

    Raises:
        ModelError: A latent that the coordinates of others are relative to is summed out.
    """
    known = _TRANSPORTS.setdefault(source, WeakKeyDictionary())
    if target not in known:
        known[target] = _Transport(source, target)
    return known[target](source, latents, arguments)


def values_of(
    model: Model, latents: Latents, args: tuple, kwargs: dict
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Constrained values of one particle, and `log |dz/du|` of batch shape, by latent."""
    return _run(model, _Outward(latents), args, kwargs)


def coordinates_of(
    model: Model, values: Latents, args: tuple, kwargs: dict
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Unconstrained values of one particle, the inverse of `values_of`, and `log |dz/du|`."""
    return _run(model, _Inward(values), args, kwargs)


def _run(
    model: Model, handler: _Coordinates, args: tuple, kwargs: dict
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    with torch.no_grad(), running(model, args, kwargs), handler:
        Until(list(handler.latents))(model)(*args, **kwargs)
    return handler.moved, handler.log_dets


class _Transport:
    """The way from the coordinates of one division to those of another.

    It holds neither of them.
    """

    def __init__(self, source: Division, target: Division) -> None:
        self._models = source.program.model, target.program.model
        self._names = list(source.latents)
        self._changed = _changed(source, target)
        self._graph: Any = None
        if isinstance(source.program, GraphProgram) and isinstance(target.program, GraphProgram):
            self._graph = self._capture(source)

    def __call__(
        self, source: Division, latents: Latents, arguments: Arguments
    ) -> tuple[dict[str, Tensor], Tensor]:
        def run(batch: Latents) -> dict[str, Tensor]:
            if self._graph is None:
                return map_particles(lambda one: self._one(one, arguments), dict(batch))
            values = (*(batch[name] for name in self._names), *arguments.tensors)
            outputs = self._graph(*(value.contiguous() for value in values))
            return dict(zip(self._outputs, outputs, strict=True))

        with torch.no_grad():
            result = source.in_batches(run, latents)
        gained = [
            sum_to_plates(result[_log_det(name)], source.population) for name in self._changed
        ]
        moved = {name: result.get(name, latents[name]) for name in self._names}
        none = latents[self._names[0]].new_zeros(())
        return moved, sum_terms([none, *gained])

    @property
    def _outputs(self) -> list[str]:
        return [key for name in self._changed for key in (name, _log_det(name))]

    def _capture(self, source: Division) -> Any:
        program = source.program
        count = len(self._names)

        def flat(*values: Tensor) -> tuple[Tensor, ...]:
            latents = dict(zip(self._names, values[:count], strict=True))
            with vectorised():
                found = self._one(latents, program.arguments.replace(values[count:]))
            return tuple(found[key] for key in self._outputs)

        module = capture.capture(
            flat,
            [program.example[name].contiguous() for name in self._names],
            [value.contiguous() for value in program.arguments.tensors],
        )
        return capture.slice_outputs(module, range(len(self._outputs)))

    def _one(self, latents: Latents, arguments: Arguments) -> dict[str, Tensor]:
        """One particle: its changed latents, and the gains of their log-densities."""
        args, kwargs = arguments.rebuild(arguments.tensors)
        source, target = self._models
        values, out = values_of(source, latents, args, kwargs)
        moved, into = coordinates_of(target, values, args, kwargs)
        gains = {_log_det(name): into[name] - out[name] for name in self._changed}
        return {name: moved[name] for name in self._changed} | gains


class _Coordinates(Substitute):
    """Gives latents their values, and notes the log-determinants of their coordinates.

    Attributes:
        moved: By latent, what comes out: values of coordinates, or coordinates of values.
        log_dets: By latent, `log |dz/du|` of batch shape.
    """

    def __init__(self, latents: Latents) -> None:
        super().__init__(latents, None)
        self.moved: dict[str, Tensor] = {}
        self.log_dets: dict[str, Tensor] = {}

    def _note(self, msg: Any, transform: Transform, u: Tensor, value: Tensor) -> None:
        log_det = transform.log_abs_det_jacobian(u, value)
        extra = log_det.dim() - (value.dim() - msg["fn"].event_dim)
        self.log_dets[msg["name"]] = log_det.sum(tuple(range(-extra, 0))) if extra > 0 else log_det


class _Outward(_Coordinates):
    """From coordinates to values."""

    def _value(self, msg: Any) -> Tensor:
        transform, u = transform_of(msg["fn"]), self.latents[msg["name"]]
        value = self.moved[msg["name"]] = transform(u)
        self._note(msg, transform, u, value)
        return value


class _Inward(_Coordinates):
    """From values to coordinates."""

    def _value(self, msg: Any) -> Tensor:
        transform, value = transform_of(msg["fn"]), self.latents[msg["name"]]
        u = self.moved[msg["name"]] = transform.inv(value)
        self._note(msg, transform, u, value)
        return value


def _changed(source: Division, target: Division) -> list[str]:
    """Latents whose coordinates are standardised in one of the divisions only."""
    alone = set(source.latents) ^ set(target.latents)
    if alone:
        held = max((source, target), key=lambda division: len(division.latents))
        below = sorted(name for name in held.latents if held.graph.parents((name,)) & alone)
        raise ModelError(
            f"sites {below} cannot be held non-centred: they depend on {sorted(alone)}, which "
            "would then be summed out; leave them out of the sites that are"
        )
    return [
        name
        for name in source.latents
        if source.sites[name].is_standardised != target.sites[name].is_standardised
    ]


def _log_det(name: str) -> str:
    return f"log|det| {name}"


_TRANSPORTS: WeakKeyDictionary[Division, WeakKeyDictionary[Division, _Transport]] = (
    WeakKeyDictionary()
)
