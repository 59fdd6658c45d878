"""A picture of what a classifier of points makes of the plane."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer

from dcpc.errors import OptionError
from dcpc.observed import main_tensor
from dcpc.training.callbacks.board import add_figure, tensorboard
from dcpc.training.data import LabelledData
from dcpc.training.modules import ClassifierModule

__all__ = ["DecisionBoundary", "draw_decision_boundary"]

RESOLUTION = 200
MARGIN = 0.5


class DecisionBoundary(Callback):
    """Shows the classes of the plane and the held-out points, in TensorBoard and as a file.

    The picture of the trained network is `decision_boundary.png` in `trainer.default_root_dir`.

    Raises:
        OptionError: The data are no points of the plane.
    """

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        writer = tensorboard(trainer)
        if writer is not None:
            assert isinstance(pl_module, ClassifierModule)
            figure = self._draw(trainer, pl_module)
            add_figure(writer, "images/decision_boundary", figure, pl_module.last_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = Path(trainer.default_root_dir) / "decision_boundary.png"
        self._draw(trainer, pl_module).savefig(path, dpi=150)
        print(f"decision boundary: {path}")

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> Figure:
        assert isinstance(pl_module, ClassifierModule)
        data = trainer.datamodule  # type: ignore[attr-defined]
        return draw_decision_boundary(pl_module, data)


def draw_decision_boundary(module: ClassifierModule, data: LabelledData) -> Figure:
    """The classes that a module gives to the plane, behind the held-out points.

    Args:
        module: The classifier.
        data: Points of the plane, set up.

    Raises:
        OptionError: The data are no points of the plane.
    """
    assert data.held_out_set is not None
    observed, labels, _ = data.held_out_set.first(len(data.held_out_set))
    points = main_tensor(observed)
    if points.dim() != 2 or points.shape[1] != 2:
        raise OptionError(
            f"a decision boundary is drawn of points in the plane, of shape (2,), but the data "
            f"have shape {tuple(points.shape[1:])}; take the callback out of trainer.callbacks"
        )
    low, high = points.min(0).values - MARGIN, points.max(0).values + MARGIN
    across, up = (torch.linspace(float(low[i]), float(high[i]), RESOLUTION) for i in (0, 1))
    plane = torch.stack(torch.meshgrid(across, up, indexing="xy"), -1).reshape(-1, 2)
    classes = module.predict(plane.to(module.device, points.dtype)).argmax(1).cpu()
    figure = Figure(figsize=(4.5, 3.5), layout="constrained")
    axes = figure.subplots()
    extent = (float(low[0]), float(high[0]), float(low[1]), float(high[1]))
    colours: dict[str, Any] = {"cmap": "coolwarm", "vmin": 0, "vmax": module.num_classes - 1}
    axes.imshow(
        classes.view(RESOLUTION, RESOLUTION).numpy(),
        origin="lower",
        extent=extent,
        aspect="auto",
        alpha=0.4,
        **colours,
    )
    horizontal, vertical = points.T.numpy()
    axes.scatter(
        horizontal, vertical, c=labels.numpy(), s=10, edgecolors="black", linewidths=0.3, **colours
    )
    is_right = module.predict(points.to(module.device)).argmax(1).cpu() == labels
    axes.set_title(f"held-out accuracy {100 * float(is_right.float().mean()):.1f} %")
    return figure
