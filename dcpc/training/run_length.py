"""How much of a training run is done."""

from __future__ import annotations

import math

from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Timer

__all__ = ["fractions_done"]


def fractions_done(trainer: Trainer, num_batches: int) -> list[float]:
    """Fraction of a run that is done, by each of its limits; none for a run without any.

    Args:
        trainer: The trainer, with `max_epochs`, `max_steps` or `max_time`.
        num_batches: Batches that were trained on, those before a resumption included.
    """
    done = []
    total = trainer.num_training_batches * (trainer.max_epochs or 0)
    if 0 < total < math.inf:
        done.append(num_batches / total)
    if trainer.max_steps > 0:
        done.append(trainer.global_step / trainer.max_steps)
    for timer in (c for c in trainer.callbacks if isinstance(c, Timer)):  # type: ignore[attr-defined]
        remaining, elapsed = timer.time_remaining(), timer.time_elapsed()
        if remaining is not None and elapsed + remaining > 0:
            done.append(elapsed / (elapsed + remaining))
    return [min(fraction, 1.0) for fraction in done]
