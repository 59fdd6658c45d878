"""Samplers that are compared on the same posteriors, one file each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from experiments.benchmarks.peers.sampled import Sampled, Task

__all__ = ["SAMPLERS", "Sampled", "Sampler", "Task"]


@dataclass(frozen=True)
class Sampler:
    """A sampler of the comparison.

    Attributes:
        title: Its name in the table.
        module: The module of its function, imported when it is run.
        function: The function's name in there: of a task, it returns what it sampled.
        settings: How it is run, in words.
        needs: Packages that it needs beside those of `dcpc`.
    """

    title: str
    module: str
    function: str
    settings: str
    needs: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """Packages that it needs and that are not installed."""
        return [name for name in self.needs if find_spec(name) is None]

    def load(self) -> Callable[[Task], Sampled]:
        """The function, with all that it imports."""
        return getattr(importlib.import_module(f"{__name__}.{self.module}"), self.function)


JAX = ("jax", "numpyro")

SAMPLERS = {
    "dcpc": Sampler("DCPC", "dcpc_default", "sample", "a default call of `run`"),
    "pyro": Sampler(
        "Pyro NUTS",
        "pyro_nuts",
        "sample",
        "`jit_compile=True`, 2 chains one after the other, 300 + 300 draws each",
    ),
    "numpyro": Sampler(
        "NumPyro NUTS",
        "numpyro_nuts",
        "sample",
        "4 chains one after the other, 1000 + 1000 draws each",
        JAX,
    ),
    "blackjax": Sampler(
        "BlackJAX NUTS, 4 chains",
        "blackjax_nuts",
        "sample_few",
        "`window_adaptation` of every chain, 1000 + 1000 draws each",
        (*JAX, "blackjax"),
    ),
    "blackjax-256": Sampler(
        "BlackJAX NUTS, 256 chains",
        "blackjax_nuts",
        "sample_many",
        "`window_adaptation` of 4 chains (1000 steps), whose mean proposal and whose later states "
        "256 vectorised chains start from; 50 + 100 draws each",
        (*JAX, "blackjax"),
    ),
    "chees": Sampler(
        "BlackJAX ChEES",
        "blackjax_chees",
        "sample",
        "256 vectorised chains, `chees_adaptation` with a diagonal metric, 1000 + 100 draws each",
        (*JAX, "blackjax", "optax"),
    ),
}
