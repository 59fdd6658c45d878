"""What a sampler is given and returns, and the clock that it runs against."""

from __future__ import annotations

import builtins
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np

SAMPLING = "sampling"
"""The stage in which the kept draws are made; all others are set-up."""

SUMMARY = "summary"
"""The stage after it, in which draws are made ready for the user; no set-up either."""


IMPORTS = "imports"
"""The stage of modules that are imported on the way, which counts as nothing."""


@dataclass(frozen=True)
class Task:
    """A model, its data and a seed.

    Attributes:
        name: Name of the posterior.
        model: The Pyro program.
        data: Its argument.
        quantities: Names of the quantities that are compared.
        seed: Seed of the run.
        num_particles: Particles of `dcpc`.
    """

    name: str
    model: Callable[..., Any]
    data: Mapping[str, Any]
    quantities: tuple[str, ...] = ()
    seed: int = 0
    num_particles: int = 1000

    def sites(self) -> set[str]:
        """Names of the sites that the quantities are elements of."""
        return {name.split("[")[0] for name in self.quantities}


class Stopwatch:
    """CPU time of this process, all its threads together, by stage.

    Attributes:
        seconds: CPU seconds by stage, in the order in which they began.
        stage: The present stage; empty where it stands still.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.stage = ""
        self._began = 0.0

    @contextmanager
    def running(self, stage: str) -> Iterator[None]:
        """Begins with a stage, keeps imports apart, and stops in the end."""
        imported = builtins.__import__

        def timed_import(*args: Any, **kwargs: Any) -> Any:
            if self.stage in ("", IMPORTS):
                return imported(*args, **kwargs)
            interrupted = self.stage
            self.start(IMPORTS)
            try:
                return imported(*args, **kwargs)
            finally:
                self.start(interrupted)

        with patch.object(builtins, "__import__", timed_import):
            self.start(stage)
            yield
        self.stop()

    def start(self, stage: str) -> None:
        """Ends the present stage and begins another, or goes on with the same."""
        if stage == self.stage:
            return
        self.stop()
        self.seconds.setdefault(stage, 0.0)
        self.stage, self._began = stage, time.process_time()

    def stop(self) -> None:
        """Ends the present stage."""
        if self.stage:
            self.seconds[self.stage] += time.process_time() - self._began
        self.stage = ""


@dataclass(frozen=True)
class Sampled:
    """The draws of a sampler and what they took.

    Attributes:
        draws: Constrained values by site, `(chains, draws, *batch, *event)`; of latents and of
            deterministic sites.
        seconds: CPU seconds by stage.
        num_gradients: Gradients of the log-density that the stage `sampling` took, each for one
            chain; None where they were not counted.
        warning: What the sampler itself says is wrong.
        own_ess: Bulk ESS by site, `(*batch, *event)`, as the sampler itself estimates it.
    """

    draws: Mapping[str, np.ndarray]
    seconds: Mapping[str, float]
    num_gradients: int | None = None
    warning: str = ""
    own_ess: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def cost(self) -> tuple[float, float]:
        """CPU seconds of the set-up, and of the rest."""
        rest = sum(self.seconds.get(stage, 0.0) for stage in (SAMPLING, SUMMARY))
        total = sum(seconds for stage, seconds in self.seconds.items() if stage != IMPORTS)
        return total - rest, rest
