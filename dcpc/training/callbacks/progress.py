"""The progress line of a run."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import Any, TextIO

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

from dcpc.training.run_length import fractions_done

__all__ = ["RunProgress"]

REFRESH_SECONDS = 0.2

WITH_END = "{desc} {percentage:3.0f}%|{bar:10}| [{elapsed}<{remaining}{postfix}]"
"""Line of a run that has an end; `elapsed<remaining` are of the whole run."""

WITHOUT_END = "{desc} [{elapsed}{postfix}]"

MEASURING = "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"


class RunProgress(ProgressBar):
    """One line on the whole run, with the time that it still takes, and one on measurements.

    While a line is shown, whatever is printed appears above it, warnings too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_enabled = True
        self._run: tqdm | None = None
        self._round: tqdm | None = None
        self._terminal = sys.stdout
        self._streams = ExitStack()
        self._start: list[float] = []
        self._shown = 0.0

    def disable(self) -> None:
        self.is_enabled = False

    def enable(self) -> None:
        self.is_enabled = True

    # -- training ----------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = fractions_done(trainer, _num_batches(trainer))
        self._run = self._line(
            desc=_epoch(trainer),
            total=1.0 if self._start else None,
            initial=max(self._start, default=0.0),
            bar_format=WITH_END if self._start else WITHOUT_END,
            leave=True,
        )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is not None:
            self._run.set_description_str(_epoch(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *arguments: Any
    ) -> None:
        if time.monotonic() - self._shown >= REFRESH_SECONDS:
            self._show(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def _show(self, trainer: Trainer) -> None:
        if self._run is None:
            return
        limits = zip(self._start, fractions_done(trainer, _num_batches(trainer)), strict=True)
        if self._start:  # tqdm's time to go is then by the limit that is reached first
            self._run.initial, self._run.n = min(limits, key=_time_to_go)
        self._run.set_postfix_str(_in_words(trainer.progress_bar_metrics))  # refreshes the line
        self._shown = time.monotonic()

    # -- measurements ------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_round("measuring", trainer.num_val_batches)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_round("measuring", trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_round("predicting", trainer.num_predict_batches)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._round is not None:
            self._round.update()

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._round is not None:
            self._round.close()
            self._round = None
        if self._run is None:
            self._close()

    on_test_end = on_predict_end = on_validation_end

    def _begin_round(self, doing: str, batches: Sequence[int | float] | int | float) -> None:
        total = sum(batches) if isinstance(batches, Sequence) else batches
        self._round = self._line(
            desc=f"{doing} held-out data, batch",
            total=total if math.isfinite(total) else None,
            bar_format=MEASURING,
            leave=False,
            position=int(self._run is not None),
            mininterval=REFRESH_SECONDS,
        )

    # -- the terminal ------------------------------------------------------------------------

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Takes the lines away: an error is all that is left to say."""
        if self._run is not None:
            self._run.leave = False
        self._close()

    def _line(self, **options: Any) -> tqdm | None:
        if not self.is_enabled:
            return None
        if self._run is None:  # the first line
            self._terminal = sys.stdout
            self._streams.enter_context(redirect_stdout(_Above(sys.stdout)))
            self._streams.enter_context(redirect_stderr(_Above(sys.stderr)))
        return tqdm(file=self._terminal, smoothing=0, **_size(self._terminal), **options)

    def _close(self) -> None:
        for line in (self._round, self._run):
            if line is not None:
                line.close()
        self._round = self._run = None
        self._streams.close()


class _Above(DummyTqdmFile):
    """A stream whose lines appear above those of tqdm.

    tqdm looks for streams by equality: of the terminal's two, either moves the lines of both.
    """

    def __eq__(self, other: object) -> bool:
        return self._wrapped is getattr(other, "_wrapped", other)

    __hash__ = None  # type: ignore[assignment]


def _size(terminal: TextIO) -> dict[str, Any]:
    """Options of tqdm; a terminal that tells no size has 80 columns, where tqdm would take none."""
    try:
        columns = os.get_terminal_size(terminal.fileno()).columns
    except (OSError, ValueError):  # no terminal
        columns = None
    return {"ncols": 80, "nrows": 24} if columns == 0 else {"dynamic_ncols": True}


def _epoch(trainer: Trainer) -> str:
    epochs = trainer.max_epochs or 0
    return f"epoch {trainer.current_epoch + 1}{f'/{epochs}' if epochs > 0 else ''}"


def _time_to_go(limit: tuple[float, float]) -> float:
    """The time that a limit is away, in units of the time that has gone."""
    start, done = limit
    return (1.0 - done) / (done - start) if done > start else math.inf


def _num_batches(trainer: Trainer) -> int:
    return trainer.fit_loop.total_batch_idx + 1


def _in_words(metrics: Any) -> str:
    """The metrics of the progress bar, without the groups that their names are in."""
    return ", ".join(f"{n.rpartition('/')[2]} {value:.4g}" for n, value in metrics.items())
