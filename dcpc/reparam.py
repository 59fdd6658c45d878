"""Models whose latents are held in other coordinates: standardised, or those of Pyro's own."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyro
import torch
from pyro.infer.reparam import AutoReparam
from pyro.infer.reparam.reparam import Reparam
from pyro.poutine.messenger import Messenger

from dcpc.divide.handlers import is_random, plate_scale
from dcpc.divide.model import Model
from dcpc.divide.supports.discrete import is_discrete
from dcpc.divide.supports.standardised import standardised
from dcpc.errors import ModelError, OptionError

__all__ = ["NonCentred", "Reparameterised", "reparameterised"]

Config = Mapping[str, Reparam] | Callable[[Any], Reparam | None]
"""Configurations of `pyro.poutine.reparam`: by site, or a strategy."""


class _Wrapped(torch.nn.Module):
    """A model that runs under a handler."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.__qualname__ = getattr(model, "__qualname__", type(model).__name__)
        with contextlib.suppress(TypeError, ValueError):
            self.__signature__ = inspect.signature(model)


class Reparameterised(_Wrapped):
    """A model under `pyro.poutine.reparam`: latents that it moves are deterministic sites now.

    Args:
        model: A Pyro program.
        config: Reparameterisations by site, or a strategy.
    """

    def __init__(self, model: Model, config: Config) -> None:
        super().__init__(model)
        self.config = dict(config) if isinstance(config, Mapping) else config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with pyro.poutine.reparam(config=self.config):
            return self.model(*args, **kwargs)


class NonCentred(_Wrapped):
    """A model whose latents are held by what their parents leave open, `e` in `z = loc + scale e`.

    Sites keep their names and values: it is the unconstrained coordinate of a latent that is
    another one, in which its prior depends on no other latent. A latent has such a coordinate where
    it is drawn from a location-scale family (normal, multivariate normal, Laplace, Cauchy, Student
    t, Gumbel), or from a transformation of one, and no handler masks or scales its density.

    Args:
        model: A Pyro program.
        sites: The latents to hold so; None for all that can be.

    Raises:
        ModelError: In a run, if one of the sites cannot be held so.
        OptionError: In a run, if one of them is no latent of the model.
    """

    def __init__(self, model: Model, sites: Collection[str] | None = None) -> None:
        super().__init__(model)
        self.sites = None if sites is None else frozenset(sites)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        handler = _Standardise(self.sites)
        with handler:
            result = self.model(*args, **kwargs)
        unknown = (self.sites or frozenset()) - handler.found
        if unknown:
            raise OptionError(
                f"the non-centred latents are to be {sorted(self.sites or ())}, but "
                f"{sorted(unknown)} are no latents of the model"
            )
        return result


class _Standardise(Messenger):
    """Holds latents in standardised coordinates.

    Attributes:
        found: Those among `sites` that were met.
    """

    def __init__(self, sites: frozenset[str] | None) -> None:
        super().__init__()
        self.sites = sites
        self.found: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if not is_random(msg) or msg["is_observed"]:
            return
        if self.sites is not None and name not in self.sites:
            return
        self.found.add(name)
        changed = msg["mask"] is not None or plate_scale(msg)[1]
        coordinates = None if changed or is_discrete(msg["fn"]) else standardised(msg["fn"])
        if coordinates is not None:
            msg["fn"] = coordinates
        elif self.sites is not None:
            reason = "a handler masks or scales its density"
            if not changed:
                reason = f"{type(msg['fn']).__name__} is no location-scale family known here"
            raise ModelError(f"site '{name}' cannot be held non-centred: {reason}; leave it out")


def reparameterised(model: Model, reparam: str | Config | None) -> Model:
    """The model in the coordinates that a user asks for.

    Args:
        model: A Pyro program.
        reparam: `noncentred` for all latents that can be `NonCentred`; `auto` for Pyro's
            `AutoReparam`, non-centred; reparameterisations by site or a strategy; None for the
            model as it is.

    Raises:
        OptionError: Something else.
    """
    if reparam is None:
        return model
    if reparam == "noncentred":
        return NonCentred(model)
    if reparam == "auto":
        return Reparameterised(model, AutoReparam(centered=0.0))
    if isinstance(reparam, str) or not (isinstance(reparam, Mapping) or callable(reparam)):
        raise OptionError(
            "reparam must be 'noncentred', 'auto', a dictionary from sites to reparameterisations, "
            f"as in {{'theta': LocScaleReparam(0.0)}}, or one of Pyro's strategies, got {reparam!r}"
        )
    return Reparameterised(model, reparam)
