"""Every algorithm on the same model, the same images and the same budget.

    python -m experiments.head_to_head --path ylecun/mnist                       # by time
    python -m experiments.head_to_head --path ylecun/mnist --budget gradients    # by gradients

One run per algorithm and seed trains `configs/mnist/<algorithm>.json` on 10,000 images until the
budget is spent, and measures the model on the same held-out images by the same annealing. Every
run leaves one file in `experiments/results/head_to_head`; runs that are there already are not
repeated, so that an interrupted comparison continues where it stopped. Then the table and the
learning curves are written anew from all files.

A gradient evaluation is the gradient of a log-density with respect to one latent of one particle of
one datum: a sweep takes one per latent and leapfrog step, and one more where the move is corrected;
a step of the autoencoder takes one per latent and sample. Gradients of the parameters are not
counted.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pyro
import torch
from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from dcpc.conquer import Langevin
from dcpc.evaluation import Evaluation, evaluate, held_out_inference, summarise
from dcpc.recombine.correction import Uncorrected
from dcpc.training import AmortisedModule, GenerativeModule, ImageData, ParticleModule
from dcpc.training.cli import ConfiguredCLI

ALGORITHMS = ("dcpc", "dcpc-smc", "dcpc-paper", "pgd", "lpc", "mcpc", "pc", "ipc", "vae")
RESULTS = Path(__file__).parent / "results"
NUM_PARTICLES = 16
CURVE_TEMPERATURES = 100
CURVE_IMAGES = 50
CURVE_POINTS = (0.1, 0.2, 0.4, 0.7)


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Attributes:
        path: Of MNIST: a hub name or a folder.
        num_training: Images to train on.
        num_measured: Held-out images to measure.
        num_temperatures: Of the final measurement.
        num_threads: Of torch.
    """

    path: str
    num_training: int
    num_measured: int
    num_temperatures: int
    num_threads: int


class Budget(Callback):
    """Stops a training when it has taken so many seconds or gradients, and keeps snapshots.

    Args:
        kind: `seconds` or `gradients`.
        size: How many.
        points: When to keep the parameters, as fractions of the budget; at the end in any case.
    """

    def __init__(self, kind: str, size: float, points: Sequence[float]) -> None:
        self.kind = kind
        self.size = size
        self.points = [point * size for point in points]
        self.snapshots: list[dict[str, Any]] = []
        self.gradients = 0
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
        self.gradients += gradients_per_datum(pl_module, batch[0]) * len(batch[0])
        seconds = time.perf_counter() - self._started
        spent = seconds if self.kind == "seconds" else self.gradients
        if self.points and spent >= self.points[0]:
            self.points = [point for point in self.points if point > spent]
            self._keep(pl_module, seconds)
        if spent >= self.size:
            self._keep(pl_module, seconds)
            trainer.should_stop = True

    def _keep(self, module: GenerativeModule, seconds: float) -> None:
        state = {name: value.clone() for name, value in module.model.state_dict().items()}
        spent = {"seconds": seconds, "gradient_evaluations": self.gradients}
        self.snapshots.append({**spent, "state": state})


def gradients_per_datum(module: GenerativeModule, x: Tensor) -> int:
    """Gradient evaluations of a training step, per datum; see this module's docstring."""
    num_latents = len(module.held_out_inference.division(x).latents)
    if isinstance(module, AmortisedModule):
        return num_latents * module.objective.num_particles
    assert isinstance(module, ParticleModule)
    inference = module.inference
    move = inference.parts.move
    per_latent = move.leapfrog_steps if isinstance(move, Langevin) else 1
    if not isinstance(inference.parts.correction, Uncorrected):
        per_latent += 1
    return module.sweeps_per_step * inference.num_particles * num_latents * per_latent


def train_and_measure(
    algorithm: str, seed: int, kind: str, size: float, setting: Setting
) -> dict[str, Any]:
    """One run: trains until the budget is spent, then measures its snapshots."""
    pyro.clear_param_store()
    module, data = build(algorithm, seed, setting)
    budget = Budget(kind, size, CURVE_POINTS)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            callbacks=[budget],
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            limit_val_batches=0,
            logger=False,
            max_epochs=-1,
        )
        trainer.fit(module, datamodule=data)
    assert data.held_out_set is not None
    x = data.held_out_set.first(setting.num_measured)[0]
    curve = []
    for snapshot in budget.snapshots:
        module.model.load_state_dict(snapshot.pop("state"))
        measured = measure(module.model, x[:CURVE_IMAGES], CURVE_TEMPERATURES)
        curve.append({**snapshot, **summarise([measured])})
    final = summarise([measure(module.model, x, setting.num_temperatures)])
    run = {"algorithm": algorithm, "seed": seed, "budget": kind, **snapshot}
    return {**run, "curve": curve, "final": final}


def build(algorithm: str, seed: int, setting: Setting) -> tuple[GenerativeModule, ImageData]:
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


def measure(model: torch.nn.Module, x: Tensor, num_temperatures: int) -> Evaluation:
    """Measures held-out images by annealing, with the same seed for every model."""
    return evaluate(held_out_inference(model, NUM_PARTICLES), x, num_temperatures, seed=0)


def load_runs(folder: Path, kind: str) -> dict[str, list[dict[str, Any]]]:
    """The finished runs of a kind of budget, by algorithm."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for algorithm in ALGORITHMS:
        files = sorted(folder.glob(f"{kind}-{algorithm}-seed*.json"))
        if files:
            runs[algorithm] = [json.loads(file.read_text()) for file in files]
    return runs


def format_table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """The runs' final measurements as a Markdown table, the best evidence first."""
    header = (
        "algorithm",
        "seeds",
        "evidence NLL",
        "reconstruction cross-entropy",
        "reconstruction MSE",
        "seconds",
        "gradient evaluations",
    )
    rows = [header, ("---",) * len(header)]
    for algorithm, results in sorted(runs.items(), key=lambda item: _average(item[1])):
        final = {name: [run["final"][name] for run in results] for name in results[0]["final"]}
        rows.append(
            (
                f"`{algorithm}`",
                str(len(results)),
                _with_error(final["evidence_nll"], 2),
                _with_error(final["reconstruction_cross_entropy"], 2),
                _with_error(final["reconstruction_mse"], 4),
                f"{mean(run['seconds'] for run in results):.0f}",
                f"{mean(run['gradient_evaluations'] for run in results) / 1e6:.0f} million",
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def draw_curves(runs: dict[str, list[dict[str, Any]]], kind: str) -> Figure:
    """Evidence NLL against the budget spent, averaged over the seeds."""
    unit = "seconds" if kind == "seconds" else "gradient_evaluations"
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for algorithm, results in runs.items():
        points = list(zip(*(run["curve"] for run in results), strict=False))
        spent = [mean(point[unit] for point in group) for group in points]
        nll = [mean(point["evidence_nll"] for point in group) for group in points]
        axes.plot(spent, nll, marker="o", markersize=3, label=algorithm)
    axes.set_xlabel("seconds of training" if kind == "seconds" else "gradient evaluations")
    axes.set_ylabel(f"evidence NLL of {CURVE_IMAGES} images, {CURVE_TEMPERATURES} temperatures")
    axes.set_yscale("log")
    axes.legend(ncols=2)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    folder = options.results / "head_to_head"
    folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(
        options.path,
        options.num_training,
        options.num_measured,
        options.num_temperatures,
        options.num_threads,
    )
    for algorithm, seed in ((a, s) for s in options.seeds for a in options.algorithms):
        file = folder / f"{options.budget}-{algorithm}-seed{seed}.json"
        if file.exists():
            continue
        size = 60.0 * options.minutes
        if options.budget == "gradients":
            size = _gradients_of_dcpc(folder)
        run = train_and_measure(algorithm, seed, options.budget, size, setting)
        file.write_text(json.dumps(run, indent=1) + "\n")
        print(f"{algorithm}, seed {seed}: {_describe(run)}", flush=True)
    runs = load_runs(folder, options.budget)
    table = format_table(runs)
    (options.results / f"head_to_head_{options.budget}.md").write_text(table)
    figure = draw_curves(runs, options.budget)
    figure.savefig(options.results / f"head_to_head_{options.budget}.png", dpi=130)
    print(table)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--path", default="ylecun/mnist", help="MNIST: a hub name or a folder")
    parser.add_argument("--budget", choices=("seconds", "gradients"), default="seconds")
    parser.add_argument("--minutes", type=float, default=3.0, help="of training, per run")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num_training", type=int, default=10_000, help="images to train on")
    parser.add_argument("--num_measured", type=int, default=100, help="held-out images")
    parser.add_argument("--num_temperatures", type=int, default=400, help="of the last measurement")
    parser.add_argument("--num_threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def _gradients_of_dcpc(folder: Path) -> float:
    """The budget by gradients: what `dcpc` took on average in the runs by time."""
    runs = load_runs(folder, "seconds").get("dcpc")
    if not runs:
        raise SystemExit(
            "--budget gradients: the budget is what dcpc takes in the runs by time, and there are "
            f"none in '{folder}'; run --budget seconds first"
        )
    return mean(run["gradient_evaluations"] for run in runs)


def _average(runs: Sequence[dict[str, Any]]) -> float:
    return mean(run["final"]["evidence_nll"] for run in runs)


def _with_error(values: Sequence[float], digits: int) -> str:
    """Mean and standard error over the seeds."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values) / math.sqrt(len(values)):.{digits}f}"


def _describe(run: dict[str, Any]) -> str:
    final = run["final"]
    return f"evidence NLL {final['evidence_nll']:.2f} after {run['seconds']:.0f} seconds"


if __name__ == "__main__":
    main()
