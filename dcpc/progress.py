"""A progress bar over the stages of a run."""

from __future__ import annotations

import math
import time

from tqdm import tqdm

from dcpc.sweep import SweepInfo

REFRESH_SECONDS = 0.5


class ProgressBar:
    """Annealing by temperature, then a number of sweeps; silent if asked to be."""

    def __init__(self, show: bool) -> None:
        self._show = show
        self._bar: tqdm | None = None
        self._shown = time.monotonic()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def stage(self, name: str, total: int | None = None) -> None:
        """Starts a stage: annealing by temperature, or a number of sweeps."""
        if self._bar is not None:
            self._bar.close()
        layout = None if total is not None else "{l_bar}{bar}| {n:.3g}/1 [{elapsed}{postfix}]"
        self._bar = tqdm(
            total=1.0 if total is None else total,
            desc=name,
            disable=not self._show,
            bar_format=layout,
        )

    def temperature(self, temperature: float) -> None:
        """The temperature that annealing has reached."""
        assert self._bar is not None
        self._bar.update(temperature - self._bar.n)

    def say(self, text: str) -> None:
        """Shows what the stage is at."""
        if self._bar is not None and self._show:
            self._bar.set_postfix_str(text)

    def step(self) -> None:
        """One step of the stage is done."""
        assert self._bar is not None
        self._bar.update(1)

    def advance(self, info: SweepInfo) -> None:
        """One sweep is done."""
        assert self._bar is not None
        if self._show and time.monotonic() - self._shown > REFRESH_SECONDS:
            self._shown = time.monotonic()
            ess = float(info.ess.mean())
            rates = [float(s.mean()) for s in info.statistic.values()]
            accept = sum(rates) / len(rates) if rates else math.nan
            self._bar.set_postfix_str(f"ess {ess:.0f}, acceptance {accept:.2f}", refresh=False)
        self._bar.update(1)
