"""Minibatches: where they come from, and a model that takes its subsample as an argument."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from dcpc.divide.handlers import TensorObservations, draws_subsample, quiet
from dcpc.divide.model import Model
from dcpc.errors import DataError, OptionError


class _Indices(Messenger):
    """Gives plates their subsamples."""

    def __init__(self, indices: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.indices = indices

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["name"] in self.indices:
            msg["value"], msg["done"] = self.indices[msg["name"]], True


class Subsampled:
    """A model that takes the subsamples of its plates as its first argument.

    Args:
        model: A Pyro program whose plates draw subsamples (`subsample_size=`).
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(self, indices: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        with _Indices(indices):
            return self.model(*args, **kwargs)


@dataclass(frozen=True)
class Minibatch:
    """Arguments of one sweep.

    Attributes:
        args: Arguments of the model.
        kwargs: Keyword arguments.
        index: Indices of the data among all, `(B)`; None where the model has no latents of single
            data.
    """

    args: tuple
    kwargs: dict[str, Any]
    index: Tensor | None


def drawn_subsamples(model: Model, args: tuple, kwargs: dict) -> dict[str, tuple[int, int]]:
    """Plates of a model that draw a subsample, with their sizes and those of the subsample."""
    with torch.no_grad(), quiet():
        traced = pyro.poutine.trace(TensorObservations()(model))
        nodes: dict[str, Any] = traced.get_trace(*args, **kwargs).nodes
    return {
        name: (int(node["fn"].size), int(node["fn"].subsample_size))
        for name, node in nodes.items()
        if draws_subsample(node)
    }


class Source(ABC):
    """Where minibatches come from."""

    @abstractmethod
    def endless(self) -> Iterator[Minibatch]:
        """Minibatches without end, epoch after epoch."""

    @abstractmethod
    def once(self) -> Iterator[Minibatch]:
        """Minibatches that show all data."""


@dataclass(frozen=True)
class Drawn(Source):
    """Subsamples for a `Subsampled` model, independent of each other.

    The noise of subsamples that divide an epoch among them sums to zero over it, so that it would
    not be the noise that moves on noisy scores reckon with.

    Attributes:
        plates: Sizes of the plates that draw subsamples, and of these.
        args: Arguments of the model.
        kwargs: Keyword arguments.

    Raises:
        OptionError: Several plates draw subsamples.
    """

    plates: Mapping[str, tuple[int, int]]
    args: tuple
    kwargs: dict[str, Any]

    def __post_init__(self) -> None:
        if len(self.plates) > 1:
            raise OptionError(
                f"the plates {sorted(self.plates)} all draw subsamples; one may, and the others "
                "take all of their elements"
            )

    def endless(self) -> Iterator[Minibatch]:
        ((_, (size, batch_size)),) = self.plates.items()
        while True:
            yield self._minibatch(torch.randperm(size)[:batch_size])

    def once(self) -> Iterator[Minibatch]:
        """Minibatches that show all data; the last two may overlap."""
        ((_, (size, batch_size)),) = self.plates.items()
        for start in range(0, size, batch_size):
            yield self._minibatch(torch.arange(batch_size) + min(start, size - batch_size))

    def _minibatch(self, index: Tensor) -> Minibatch:
        ((name, _),) = self.plates.items()
        return Minibatch(({name: index}, *self.args), self.kwargs, index)


@dataclass(frozen=True)
class Loaded(Source):
    """Minibatches of a loader.

    Attributes:
        loader: Gives tuples of the model's arguments, or dictionaries of its keyword arguments.
        index: Which of them are the indices of the data.
    """

    loader: Iterable[Any]
    index: str | int | None

    def endless(self) -> Iterator[Minibatch]:
        while True:
            yield from self.once()

    def once(self) -> Iterator[Minibatch]:
        """The minibatches of one pass.

        Raises:
            DataError: The loader is empty, or an item has no argument with indices.
        """
        batch = None
        for batch in self.loader:
            named = dict(batch) if isinstance(batch, Mapping) else {}
            args = () if named else tuple(batch) if isinstance(batch, list | tuple) else (batch,)
            yield Minibatch(args, named, _indices(args, named, self.index))
        if batch is None:
            raise DataError(
                "the loader gives no minibatch; it must be possible to go through it many times"
            )


def _indices(args: tuple, kwargs: Mapping[str, Any], index: str | int | None) -> Tensor | None:
    if index is None:
        return None
    known: Mapping[Any, Any] = kwargs if isinstance(index, str) else dict(enumerate(args))
    if index not in known:
        raise DataError(
            f"index={index!r} is none of the arguments {list(kwargs) or list(range(len(args)))} of "
            "a minibatch; give the position of the one that holds the indices of its data where "
            "minibatches are tuples, its name where they are dictionaries"
        )
    return known[index]
