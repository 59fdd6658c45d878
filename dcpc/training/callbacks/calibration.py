"""A picture of how far predicted labels can be trusted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.utils.tensorboard import SummaryWriter

from dcpc.evaluation import Calibration
from dcpc.training.callbacks.board import add_figure, tensorboard, tested_run
from dcpc.training.modules import GenerativeModule

__all__ = ["CalibrationCurve", "draw_calibration"]


class CalibrationCurve(Callback):
    """Shows the calibration of held-out labels, in TensorBoard and as a file of `dcpc test`.

    The file is `calibration.png` in `trainer.default_root_dir`. Idle where no labels are predicted.
    """

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        writer, told = tensorboard(trainer), _calibration(pl_module)
        if writer is not None and told is not None:
            _show(writer, "images/calibration", told, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        told = _calibration(pl_module)
        if told is None or not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / "calibration.png"
        draw_calibration(told).savefig(path, dpi=150)
        print(f"calibration curve: {path}")
        with tested_run(trainer) as writer:
            if writer is not None:
                _show(writer, "images/test_calibration", told, pl_module)


def draw_calibration(told: Calibration) -> Figure:
    """Accuracy against confidence, and how many predictions have it."""
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    curve, histogram = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    confidence, accuracy = told.confidence.cpu().numpy(), told.accuracy.cpu().numpy()
    count = told.count.cpu().numpy()
    curve.plot([0, 1], [0, 1], color="grey", linestyle="dashed", label="calibrated")
    error = np.sqrt(accuracy * (1 - accuracy) / count)
    curve.errorbar(confidence, accuracy, error, marker="o", capsize=3, label="held-out data")
    curve.set(ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.02))
    curve.set_title(
        f"{100 * told.error_rate:.1f} % wrong, expected calibration error "
        f"{told.expected_error:.3f}",
        fontsize=10,
    )
    curve.legend(loc="upper left", fontsize=8)
    histogram.bar(confidence, count, width=0.05)
    histogram.set(xlabel="probability of the most probable class", ylabel="data", yscale="log")
    return figure


def _show(writer: SummaryWriter, tag: str, told: Calibration, module: LightningModule) -> None:
    assert isinstance(module, GenerativeModule)
    add_figure(writer, tag, draw_calibration(told), module.last_step)


def _calibration(module: LightningModule) -> Calibration | None:
    return module.calibration if isinstance(module, GenerativeModule) else None
