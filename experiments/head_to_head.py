"""Every algorithm on the same model and the same images, at equal time and at equal gradients.

    python -m experiments.head_to_head --path ylecun/mnist

One run per algorithm and seed trains `configs/mnist/<algorithm>.json` on 10,000 images, at a
constant learning rate, until both budgets are spent: so many minutes, and so many gradient
evaluations. The model as it was when each was spent is measured on the same held-out images by the
same annealing. Every run leaves one file in `experiments/results/head_to_head`; runs that are there
already are not repeated, so that an interrupted comparison continues where it stopped. Then the
tables and the learning curves are written anew from all files. `dcpc-warm` is `dcpc` after an
encoder's warm-up, which is part of its budgets, and so is `pgd-warm` of `pgd`.

A gradient evaluation is the gradient of a log-density with respect to one latent of one particle of
one datum: a sweep takes one per latent and leapfrog step, and one more where the correction looks
at the way back; a step of the autoencoder takes one per latent and sample, as does one of an
encoder's warm-up. Gradients of the parameters are not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from dcpc.conquer import Langevin
from dcpc.evaluation import evaluate, held_out_inference, prior_sample_estimate, summarise
from dcpc.training import AmortisedModule, GenerativeModule, ImageData, ParticleModule
from dcpc.training.cli import ConfiguredCLI, one_line_errors
from experiments.head_to_head_report import (
    ALGORITHMS,
    CURVE_IMAGES,
    CURVE_TEMPERATURES,
    Budget,
    Run,
    load_runs,
    write_report,
)

RESULTS = Path(__file__).parent / "results"
CURVE_POINTS = (0.1, 0.2, 0.4, 0.7, 1.0)
"""Fractions of the time after which the learning curves are measured."""


@dataclass(frozen=True)
class SharedSetting:
    """What all runs share.

    Attributes:
        path: Of MNIST: a hub name or a folder.
        seconds: Of training.
        gradients: Gradient evaluations of training.
        num_training: Images to train on.
        num_measured: Held-out images to measure.
        num_temperatures: Of the measurement.
        num_particles: Of the measurement.
        num_threads: Of torch.
    """

    path: str
    seconds: float
    gradients: float
    num_training: int
    num_measured: int
    num_temperatures: int
    num_particles: int
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
    """Gradient evaluations of a training step, per datum; see this module's docstring."""
    if isinstance(module, AmortisedModule):
        return num_latents * module.objective.num_particles
    assert isinstance(module, ParticleModule)
    if module.is_warming_up:
        return num_latents
    inference = module.inference
    move = inference.parts.move
    per_latent = move.leapfrog_steps if isinstance(move, Langevin) else 1
    per_latent += inference.parts.correction.scores_proposal
    return module.sweeps_per_step * inference.num_particles * num_latents * per_latent


def train_and_measure(algorithm: str, seed: int, setting: SharedSetting) -> Run:
    """One run: trains until both budgets are spent, then measures what was kept."""
    pyro.clear_param_store()
    module, data = build(algorithm, seed, setting)
    data.setup("fit")
    data.setup("test")
    assert data.held_out_set is not None
    x = data.held_out_set.first(setting.num_measured)[0]
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

    def measured(snapshot: Snapshot, images: Tensor, num_temperatures: int) -> dict[str, float]:
        module.model.load_state_dict(snapshot.parameters)
        inference = held_out_inference(module.model, setting.num_particles)
        # The same seed for every model, so that they differ by their parameters.
        return summarise([evaluate(inference, images, num_temperatures, seed=0)])

    curve = [
        {**point.spent, **measured(point, x[:CURVE_IMAGES], CURVE_TEMPERATURES)}
        for point in budgets.curve
    ]
    spent = {}
    for budget, snapshot in budgets.kept.items():
        spent[budget] = {
            **snapshot.spent,
            **measured(snapshot, x, setting.num_temperatures),
            "prior_sample_nll": -float(prior_sample_estimate(module.model, x).mean()),
        }
    about = {"algorithm": algorithm, "seed": seed, "setting": setting.shared()}
    return {**about, "curve": curve, "spent": spent, **last_sweep(module, x)}


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


def build(algorithm: str, seed: int, setting: SharedSetting) -> tuple[GenerativeModule, ImageData]:
    """The module and the data of a config, with a constant learning rate and one likelihood."""
    prefix = "model.init_args" if algorithm == "vae" else "model"
    built = ConfiguredCLI(
        [
            "fit",
            f"--config=configs/mnist/{algorithm}.json",
            f"--seed_everything={seed}",
            f"--num_threads={setting.num_threads}",
            f"--{prefix}.learning_rate_schedule=null",
            f"--{prefix}.model.init_args.likelihood=bernoulli",
            f"--data.path={setting.path}",
            f"--data.num_training={setting.num_training}",
            f"--data.num_held_out={setting.num_measured}",
            "--trainer.logger=false",
        ]
    )
    return built.model, built.datamodule


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    folder = options.results / "head_to_head"
    folder.mkdir(parents=True, exist_ok=True)
    setting = SharedSetting(
        path=options.path,
        seconds=60.0 * options.minutes,
        gradients=1e6 * options.million_gradients,
        num_training=options.num_training,
        num_measured=options.num_measured,
        num_temperatures=options.num_temperatures,
        num_particles=options.num_particles,
        num_threads=options.num_threads,
    )
    for file in folder.glob("*.json"):
        _require_same_setting(file, setting)
    for algorithm, seed in ((a, s) for s in options.seeds for a in options.algorithms):
        file = folder / f"{algorithm}-seed{seed}.json"
        if file.exists():
            continue
        run = train_and_measure(algorithm, seed, setting)
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(run, indent=1) + "\n")
        unfinished.rename(file)
        print(f"{algorithm}, seed {seed}: {_describe(run)}", flush=True)
    write_report(load_runs(folder), options.results)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--path", default="ylecun/mnist", help="MNIST: a hub name or a folder")
    parser.add_argument("--minutes", type=float, default=3.0, help="of training, per run")
    parser.add_argument(
        "--million_gradients", type=float, default=3.0, help="gradient evaluations, per run"
    )
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num_training", type=int, default=10_000, help="images to train on")
    parser.add_argument("--num_measured", type=int, default=50, help="images to measure")
    parser.add_argument("--num_temperatures", type=int, default=100, help="of the measurement")
    parser.add_argument("--num_particles", type=int, default=16, help="of the measurement")
    parser.add_argument("--num_threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def _require_same_setting(file: Path, setting: SharedSetting) -> None:
    then, now = json.loads(file.read_text())["setting"], setting.shared()
    changed = [f"{n}={then.get(n)}, now {now[n]}" for n in now if then.get(n) != now[n]]
    if changed:
        raise SystemExit(
            f"'{file}' is a run of another setting ({'; '.join(changed)}), which does not compare; "
            "give the same options, another --results, or delete it to run it again"
        )


def _describe(run: Run) -> str:
    parts = (
        f"{one['evidence_nll']:.2f} after {one['seconds']:.0f} seconds and "
        f"{one['gradients'] / 1e6:.1f} million gradients"
        for one in run["spent"].values()
    )
    return "evidence NLL " + ", ".join(parts)


if __name__ == "__main__":
    with one_line_errors():
        main()
