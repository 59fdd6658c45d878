"""The coordinates that particles are kept, moved and learned from in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import nn

from dcpc.errors import OptionError
from dcpc.inference import DCPC
from dcpc.observed import Observed, call
from dcpc.problem import Problem
from dcpc.reparam import NonCentred

__all__ = ["Coordinates", "Parameterization", "Views"]

Coordinates = Literal["centred", "noncentred"]


@dataclass(frozen=True)
class Parameterization:
    """Whether particles are kept, moved and learned from by values of latents or by errors.

    A latent of a location-scale family is `z = loc + scale e`, with its parents' prediction `loc`
    and the standardised prediction error `e`. `centred` stands for `z`, `noncentred` for `e`. The
    model is the same in all of them, and stays as it is written.

    Args:
        keep: What is kept of particles between visits. Errors that are kept let a particle move
            along with the parameters, where values go stale; weights take `p(x, e)` under the new
            parameters over `p(x, e)` under those of the last visit.
        move: What a unit moves, with those of the other units fixed. A unit of values touches its
            parents' predictions and its children; one of errors all that hangs below it, and its
            prior depends on nothing.
        learn: What the gradient of the parameters holds fixed: of values, that of
            `log p(x, z)`; of errors, that of `log p(x given e)`.
        sites: Latents whose errors are meant; null for all that have one: normal, multivariate
            normal, Laplace, Cauchy, Student t and Gumbel ones, and transformations of these.

    Raises:
        OptionError: Another word than `centred` and `noncentred`.
    """

    keep: Coordinates = "centred"
    move: Coordinates = "centred"
    learn: Coordinates = "centred"
    sites: list[str] | None = None

    def __post_init__(self) -> None:
        for name in ("keep", "move", "learn"):
            given = getattr(self, name)
            if given not in ("centred", "noncentred"):
                raise OptionError(
                    f"model.parameterization.{name} must be 'centred' or 'noncentred', got "
                    f"{given!r}"
                )

    def __str__(self) -> str:
        told = {f.name: getattr(self, f.name) for f in fields(self)}
        return ", ".join(f"{name} {value}" for name, value in told.items() if value is not None)

    def engines(self, model: nn.Module, **options: Any) -> dict[Coordinates, DCPC]:
        """An engine for each of the coordinates in use.

        Args:
            model: The Pyro program.
            **options: Options of `DCPC`.
        """
        models = {"centred": model, "noncentred": NonCentred(model, self.sites)}
        used = dict.fromkeys((self.move, self.keep, self.learn))
        return {name: DCPC(models[name], **options) for name in used}

    def views(self, engines: Mapping[Coordinates, DCPC], x: Observed) -> Views:
        """The model bound to a batch, in each of the coordinates."""
        bound = {name: call(engine.bind, x) for name, engine in engines.items()}
        return Views(bound[self.keep], bound[self.move], bound[self.learn])


@dataclass(frozen=True)
class Views:
    """A model bound to a batch: the same problem, or one for each of several coordinates.

    Attributes:
        keep: In the coordinates that particles are kept in.
        move: In those that they are moved in.
        learn: In those that parameters learn in.
    """

    keep: Problem
    move: Problem
    learn: Problem
