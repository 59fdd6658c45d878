"""The checkpoint of a run: at the end of every epoch, and wherever training stops."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint

from dcpc.io import remove_stale
from dcpc.training.callbacks.board import CHECKPOINTS
from dcpc.training.signals import Signals

__all__ = ["RunCheckpoint"]

NAME = "last.ckpt"


class RunCheckpoint(Checkpoint):
    """Keeps the newest state of a run in `checkpoints/last.ckpt` of its folder of logs.

    It is saved at the end of every epoch, and after the last batch where training stops within one:
    by `trainer.max_steps`, by `trainer.max_time`, because a callback asks for it, or by a signal.
    `last.ckpt` in `trainer.default_root_dir` is a link to it.

    Args:
        signals: Signals that stop the run; None to leave them to others.

    Attributes:
        path: The checkpoint; None before there is one.
    """

    def __init__(self, signals: Signals | None = None) -> None:
        self.signals = Signals() if signals is None else signals
        self.path: Path | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes what killed runs have left of files that they were writing."""
        if trainer.is_global_zero:
            for folder in Path(trainer.default_root_dir).glob(f"*/{CHECKPOINTS}"):
                remove_stale(folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.signals.are_awaited = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.signals.are_awaited = False
        if self._is_signalled(trainer):  # since the last epoch's end
            self._exit(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._is_signalled(trainer):
            self._interrupt(trainer)
        if stops_within_epoch(trainer):
            self.save(trainer)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        if trainer.state.fn == "fit" and self._is_signalled(trainer):
            self._interrupt(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not stops_within_epoch(trainer):
            self.save(trainer)
        if self._is_signalled(trainer):
            self._exit(trainer)

    def save(self, trainer: Trainer) -> None:
        """Saves the state of the run, and points the link to it."""
        folder = trainer.strategy.broadcast(trainer.log_dir or trainer.default_root_dir)
        self.path = Path(folder) / CHECKPOINTS / NAME
        trainer.save_checkpoint(self.path)
        self.signals.have_saved = True
        if trainer.is_global_zero:
            _link(self.link(trainer), self.path)

    def link(self, trainer: Trainer) -> Path:
        """Where the link to the newest checkpoint is."""
        return Path(trainer.default_root_dir) / NAME

    def _is_signalled(self, trainer: Trainer) -> bool:
        is_received = self.signals.received is not None
        if trainer.world_size == 1:
            return is_received
        return trainer.strategy.reduce_boolean_decision(is_received, all=False)

    def _interrupt(self, trainer: Trainer) -> None:
        self.save(trainer)
        self._exit(trainer)

    def _exit(self, trainer: Trainer) -> None:
        signal = self.signals.received
        if signal is None:  # another process had it
            raise SystemExit(1)
        if trainer.is_global_zero:
            link = self.link(trainer)
            print(
                f"stopped by {signal.name} after step {trainer.global_step}, epoch "
                f"{trainer.current_epoch}; go on with --ckpt_path {link}"
            )
        raise SystemExit(self.signals.exit_status)


def stops_within_epoch(trainer: Trainer) -> bool:
    """Whether training stops now although the epoch has more batches."""
    if trainer.is_last_batch:
        return False
    epochs, steps = trainer.current_epoch, trainer.global_step
    may_stop = epochs >= (trainer.min_epochs or 0) and steps >= (trainer.min_steps or 0)
    return 0 < trainer.max_steps <= steps or (trainer.should_stop and may_stop)


def _link(link: Path, target: Path) -> None:
    """Points a link to a file, in one step."""
    unfinished = link.with_name(f".{link.name}.{os.getpid()}")
    unfinished.unlink(missing_ok=True)
    unfinished.symlink_to(os.path.relpath(target, link.parent))
    os.replace(unfinished, link)
