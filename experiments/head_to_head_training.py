"""The trainings of `experiments.head_to_head`, and the models that they leave."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from dcpc.training import AmortisedModule, GenerativeModule, ImageData, ParticleModule
from dcpc.training.cli import ConfiguredCLI
from experiments.head_to_head_report import Budget
from experiments.layers import layers

CURVE_POINTS = (0.1, 0.2, 0.4, 0.7, 1.0)
"""Fractions of the time after which the learning curves are measured."""


@dataclass(frozen=True)
class TrainingSetting:
    """What the trainings share.

    Attributes:
        path: Of MNIST: a hub name or a folder.
        seconds: Of training.
        gradients: Gradient evaluations of training.
        num_training: Images to train on.
        num_threads: Of torch.
    """

    path: str
    seconds: float
    gradients: float
    num_training: int
    num_threads: int

    def shared(self) -> dict[str, float]:
        """What must be the same for runs to be compared."""
        return {name: value for name, value in asdict(self).items() if name != "path"}


@dataclass(frozen=True)
class Snapshot:
    """Parameters of a model, and what training them had spent."""

    spent: Mapping[str, float]
    parameters: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: torch.nn.Module, spent: Mapping[str, float]) -> Snapshot:
        return cls(spent, {name: value.clone() for name, value in model.state_dict().items()})


@dataclass(frozen=True)
class Trained:
    """The models of a run, as they were on the way.

    Attributes:
        setting: `TrainingSetting.shared()`.
        kept: When a budget was spent, by budget.
        curve: At `CURVE_POINTS` of the time.
        sweep: `step_size` and `acceptance` by unit, of algorithms that have them.
    """

    setting: Mapping[str, float]
    kept: Mapping[Budget, Snapshot]
    curve: list[Snapshot]
    sweep: Mapping[str, Mapping[str, float]]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        torch.save(asdict(self), unfinished)
        unfinished.rename(path)

    @classmethod
    def load(cls, path: Path) -> Trained:
        saved = torch.load(path, weights_only=True)
        kept = {budget: Snapshot(**one) for budget, one in saved["kept"].items()}
        curve = [Snapshot(**one) for one in saved["curve"]]
        return cls(saved["setting"], kept, curve, saved["sweep"])


class Budgets(Callback):
    """Keeps the model as it is when a budget is spent, and stops when both are.

    Args:
        sizes: By budget.
        gradients_per_datum: Gradient evaluations of the module's next step, per datum.

    Attributes:
        kept: Snapshots, by budget.
        curve: Snapshots for the learning curve, at `CURVE_POINTS` of the time.
    """

    def __init__(
        self,
        sizes: Mapping[Budget, float],
        gradients_per_datum: Callable[[GenerativeModule], int],
    ) -> None:
        self.sizes = sizes
        self.gradients_per_datum = gradients_per_datum
        self.kept: dict[Budget, Snapshot] = {}
        self.curve: list[Snapshot] = []
        self._gradients = 0
        self._started = math.nan

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor, Tensor],
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, GenerativeModule)
        self._gradients += self.gradients_per_datum(pl_module) * len(batch[0])
        spent: dict[str, float] = {
            "seconds": time.perf_counter() - self._started,
            "gradients": self._gradients,
        }
        for point in CURVE_POINTS[len(self.curve) :]:
            if spent["seconds"] >= point * self.sizes["seconds"]:
                self.curve.append(Snapshot.of(pl_module.model, spent))
        for budget, size in self.sizes.items():
            if budget not in self.kept and spent[budget] >= size:
                self.kept[budget] = Snapshot.of(pl_module.model, spent)
        trainer.should_stop = len(self.kept) == len(self.sizes)


def gradients_per_datum(num_latents: int, module: GenerativeModule) -> int:
    """Gradient evaluations of a training step, per datum; see `experiments.head_to_head`."""
    if isinstance(module, AmortisedModule):
        return num_latents * module.num_samples
    assert isinstance(module, ParticleModule)
    if module.is_warming_up:
        return num_latents
    inference = module.inference
    parts = inference.parts
    per_latent = parts.move.num_scores + parts.correction.scores_proposal
    return module.sweeps_per_step * inference.num_particles * num_latents * per_latent


def train(algorithm: str, seed: int, setting: TrainingSetting) -> Trained:
    """Trains until both budgets are spent."""
    pyro.clear_param_store()
    module, data = build(algorithm, seed, setting)
    data.setup("fit")
    assert data.training_set is not None
    x = data.training_set.first(1)[0]
    sizes: dict[Budget, float] = {"seconds": setting.seconds, "gradients": setting.gradients}
    num_latents = len(module.held_out_inference.division(x).latents)
    budgets = Budgets(sizes, partial(gradients_per_datum, num_latents))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            callbacks=[budgets],
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            limit_val_batches=0,
            logger=False,
            max_epochs=-1,
        )
        trainer.fit(module, datamodule=data)
    return Trained(setting.shared(), budgets.kept, budgets.curve, last_sweep(module, x))


def last_sweep(module: GenerativeModule, x: Tensor) -> dict[str, dict[str, float]]:
    """Step sizes and acceptance by unit, where the module sweeps and has them."""
    info = module.last_sweep if isinstance(module, ParticleModule) else None
    if info is None:
        return {}
    division = module.inference.division(x)
    return {
        "step_size": division.by_unit(info.step_size),
        "acceptance": division.by_unit(info.statistic),
    }


def build(
    algorithm: str, seed: int, setting: TrainingSetting
) -> tuple[GenerativeModule, ImageData]:
    """The module and the data of a config, with a constant learning rate."""
    built = ConfiguredCLI(
        [
            "fit",
            *layers("mnist", algorithm),
            f"--seed_everything={seed}",
            f"--num_threads={setting.num_threads}",
            "--model.learning_rate_schedule=null",
            f"--data.path={setting.path}",
            f"--data.num_training={setting.num_training}",
            "--data.num_held_out=null",
            "--trainer.logger=false",
        ]
    )
    return built.model, built.datamodule
