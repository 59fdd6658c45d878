"""The TensorBoard log of a run: one folder and one curve, however often it is resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.cli import SaveConfigCallback
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter, summary

from dcpc.training.callbacks.board import add_text, log_folder, tensorboard
from dcpc.training.modules import MeasuredModule

__all__ = ["RunLogger", "SaveConfig", "describe_run", "hyperparameters"]

UNVARIED = (
    "held_out",
    "store_folder",
    "compile",
    "particle_batch_size",
    "evaluation_batch_size",
    "num_workers",
)
"""Keys that say how a run is computed and measured, and change nothing that is learned."""

BUDGET = ("max_epochs", "max_steps", "max_time", "precision", "gradient_clip_val")
"""Keys of the trainer that change what is learned."""


class RunLogger(TensorBoardLogger):
    """Logs a run to `version_N` in its folder.

    A run that is resumed from a checkpoint of a `version_N` goes on there, and takes the place of
    what was logged after the checkpoint; any other run gets the next number.

    Args:
        root: The run's folder, `trainer.default_root_dir`.
        checkpoint: The checkpoint that the run is resumed from; None at its start.
        num_batches: Number of batches that it had learned from by then.

    Attributes:
        has_curves: Whether measurements are logged as scalars.
    """

    has_curves = True

    def __init__(
        self, root: str | Path, checkpoint: str | Path | None = None, num_batches: int = 0
    ) -> None:
        log = None if checkpoint is None else log_folder(checkpoint)
        goes_on = log is not None and log.parent == Path(root).resolve()
        super().__init__(
            root,
            name="",
            version=log.name if log is not None and goes_on else None,
            # TensorBoard drops steps only at a second start of the log: the first is at step 0.
            purge_step=num_batches if goes_on else 0,
        )

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Leaves out standard errors, and the epoch, which would be TensorBoard's first chart."""
        if self.has_curves:
            shown = {n: v for n, v in metrics.items() if n != "epoch" and not n.endswith("_se")}
            super().log_metrics(shown, step)

    @contextmanager
    def without_curves(self) -> Iterator[None]:
        """Logs no scalars: those of the untrained model are far off the scale of a curve."""
        self.has_curves = False
        try:
            yield
        finally:
            self.has_curves = True

    def save(self) -> None:
        """Writes nothing beside the events: `config.json` has what `hparams.yaml` would hold."""
        self.experiment.flush()


class SaveConfig(SaveConfigCallback):
    """Keeps the whole config beside a training run's log, and shows it in TensorBoard."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        writer = tensorboard(trainer)
        if writer is not None:
            assert isinstance(pl_module, MeasuredModule)
            config = json.loads(self.parser.dump(self.config, skip_none=False))
            describe_run(writer, config, pl_module.charts)


def describe_run(
    writer: SummaryWriter, config: Mapping[str, Any], charts: Mapping[str, str]
) -> None:
    """Adds a config as text and as hyperparameters, and the charts of the tab `Custom Scalars`.

    Args:
        writer: TensorBoard's writer.
        config: The config of `dcpc fit`.
        charts: By title, regular expressions of the tags of every chart.
    """
    add_text(writer, "run/config", f"```json\n{json.dumps(config, indent=2)}\n```", step=0)
    layout = {title: ["Multiline", [tags]] for title, tags in charts.items()}
    writer.add_custom_scalars({"overview": layout})
    # Without the summary of an experiment, which holds for the first run only, TensorBoard finds
    # out itself which hyperparameters and metrics there are in all of the runs.
    _, start, _ = summary.hparams(hyperparameters(config), {})
    writer._get_file_writer().add_summary(start)


def hyperparameters(config: Mapping[str, Any]) -> dict[str, float | str]:
    """The hyperparameters in a config, named as on the command line but for `model.`.

    Classes are shown by their names, lists as text.
    """
    trainer = {key: config["trainer"].get(key) for key in BUDGET}
    groups = {
        "module": config["model"],
        "data": config["data"],
        "optimizer": config.get("optimizer"),
        "lr_scheduler": config.get("lr_scheduler"),
        "seed": config.get("seed_everything"),
        **trainer,
    }
    found = {name: value for key, group in groups.items() for name, value in _flat(key, group)}
    if config.get("optimizer"):
        found.pop("module.learning_rate", None)  # which is ignored then
    return {name.removeprefix("module."): value for name, value in found.items()}


def _flat(name: str, value: Any) -> Iterator[tuple[str, float | str]]:
    """Numbers and strings in nested dictionaries, by names with dots."""
    if isinstance(value, Mapping):
        if "class_path" in value:
            yield name, str(value["class_path"]).rpartition(".")[2]
            value = value.get("init_args") or {}
        for key, entry in value.items():
            if key not in UNVARIED:
                yield from _flat(f"{name}.{key}", entry)
    elif isinstance(value, list | tuple | bool):
        yield name, json.dumps(value)
    elif value not in (None, -1):  # -1: no bound of the number of steps
        yield name, value
