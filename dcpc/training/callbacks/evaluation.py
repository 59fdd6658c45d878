"""Measurements of held-out data: as a table, in TensorBoard, and as a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from dcpc.evaluation import held_out_tag
from dcpc.evaluation.quantities import sign_rule
from dcpc.io import write_json
from dcpc.training.callbacks.board import add_text, log_folder, tensorboard, tested_run
from dcpc.training.modules import MeasuredModule
from dcpc.version import __version__

__all__ = ["EvaluationTable", "HeldOutTables"]


class HeldOutTables(Callback):
    """Shows the whole table of every evaluation of `dcpc fit` in TensorBoard, as text."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, MeasuredModule)
        writer = tensorboard(trainer)
        if writer is not None and not trainer.sanity_checking:
            when = "" if pl_module.is_trained else "Before training: "
            table = pl_module.table(is_test=False, style="github")
            add_text(writer, "held_out", when + table, pl_module.last_step)


class EvaluationTable(Callback):
    """Prints what `dcpc test` and `dcpc validate` measure, and keeps it.

    It is kept beside the log of the checkpoint, as `test.json` or `validate.json`, and in the log,
    at the step of the checkpoint: as scalars and as a table. The file of a checkpoint that has no
    log goes to the run's folder, `trainer.default_root_dir`.
    """

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module, is_test=True)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module, is_test=False)

    def _report(self, trainer: Trainer, module: LightningModule, is_test: bool) -> None:
        assert isinstance(module, MeasuredModule)
        trainer.print("\n" + module.table(is_test))
        if trainer.state.fn == "fit" or not trainer.is_global_zero:
            return
        command = "test" if is_test else "validate"
        checkpoint = trainer.ckpt_path
        log = None if checkpoint is None else log_folder(checkpoint)
        folder = log or Path(trainer.default_root_dir)
        path = folder / f"{command}.json"
        content = {"dcpc": __version__, "command": command}
        if checkpoint is not None:
            content["checkpoint"] = os.path.relpath(Path(checkpoint).resolve(), folder.resolve())
        write_json(content | _contents(module, is_test), path)
        shown = os.path.relpath(path) if path.absolute().is_relative_to(Path.cwd()) else path
        trainer.print(f"results: {shown}")
        with tested_run(trainer) as writer:
            if writer is not None:
                group = f"held_out_{command}"
                for name, result in module.results().items():
                    writer.add_scalar(held_out_tag(name, group), result.value, module.last_step)
                table = module.table(is_test, style="github")
                add_text(writer, group, table, module.last_step)


def _contents(module: MeasuredModule, is_test: bool) -> dict[str, Any]:
    """The results with all that belongs to them, for a file."""
    measured = module.results()
    return {
        "step": module.last_step,
        "seed": module.seed,
        **module.conditions(is_test),
        "signs": sign_rule(measured),
        "results": {
            name: {
                "label": result.quantity.label,
                "value": result.value,
                "standard_error": result.standard_error,
                "unit": result.quantity.unit,
                "meaning": result.quantity.meaning,
                "better": result.quantity.better,
            }
            for name, result in measured.items()
        },
    }
