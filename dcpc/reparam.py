"""Models whose latents are written in other coordinates, by Pyro's own strategies."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro.infer.reparam import AutoReparam
from pyro.infer.reparam.reparam import Reparam

from dcpc.divide.model import Model
from dcpc.errors import OptionError

__all__ = ["Reparameterised", "reparameterised"]

Config = Mapping[str, Reparam] | Callable[[Any], Reparam | None]
"""Configurations of `pyro.poutine.reparam`: by site, or a strategy."""


class Reparameterised(torch.nn.Module):
    """A model under `pyro.poutine.reparam`: latents that it moves are deterministic sites now.

    Args:
        model: A Pyro program.
        config: Reparameterisations by site, or a strategy.
    """

    def __init__(self, model: Model, config: Config) -> None:
        super().__init__()
        self.model = model
        self.config = dict(config) if isinstance(config, Mapping) else config
        self.__qualname__ = getattr(model, "__qualname__", type(model).__name__)
        with contextlib.suppress(TypeError, ValueError):
            self.__signature__ = inspect.signature(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with pyro.poutine.reparam(config=self.config):
            return self.model(*args, **kwargs)


def reparameterised(model: Model, reparam: str | Config | None) -> Model:
    """The model in the coordinates that a user asks for.

    Args:
        model: A Pyro program.
        reparam: `auto` for Pyro's `AutoReparam`, non-centred; reparameterisations by site or a
            strategy; None for the model as it is.

    Raises:
        OptionError: Something else.
    """
    if reparam is None:
        return model
    if reparam == "auto":
        return Reparameterised(model, AutoReparam(centered=0.0))
    if isinstance(reparam, str) or not (isinstance(reparam, Mapping) or callable(reparam)):
        raise OptionError(
            "reparam must be 'auto', a dictionary from sites to reparameterisations, as in "
            f"{{'theta': LocScaleReparam(0.0)}}, or one of Pyro's strategies, got {reparam!r}"
        )
    return Reparameterised(model, reparam)
