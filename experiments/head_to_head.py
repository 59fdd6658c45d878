"""Every algorithm on the same model and the same images, at equal time and at equal gradients.

    python -m experiments.head_to_head --path ylecun/mnist

One run per algorithm and seed trains `configs/mnist.json` with the algorithm's layer on 10,000
images, at a constant learning rate, until both budgets are spent: so many minutes, and so many
gradient evaluations. The models as they were then go to `runs/head_to_head`, and are measured on
the same held-out images by the same annealing, which leaves one file in
`experiments/results/head_to_head`. What is there already is neither trained nor measured again, so
that an interrupted comparison continues where it stopped; with another measurement and other
`--results`, nothing is trained again. Then the tables and the learning curves are written anew from
all files. `dcpc-warm` is `dcpc` after an encoder's warm-up, which is part of its budgets, and so is
`pgd-warm` of `pgd`.

A gradient evaluation is the gradient of a log-density with respect to one latent of one particle of
one datum: a sweep takes one per latent and leapfrog step, and one more where the correction looks
at the way back; a step of the autoencoder takes one per latent and sample, as does one of an
encoder's warm-up. Gradients of the parameters are not counted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from dcpc.evaluation import evaluate, held_out_inference, prior_sample_estimate, summarise
from dcpc.training.cli import one_line_errors
from experiments.head_to_head_report import (
    ALGORITHMS,
    CURVE_IMAGES,
    CURVE_TEMPERATURES,
    Run,
    load_runs,
    write_report,
)
from experiments.head_to_head_training import Snapshot, Trained, TrainingSetting, build, train

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Measurement:
    """How trained models are measured.

    Attributes:
        num_measured: Held-out images.
        num_temperatures: Of the annealing.
        num_particles: Of the annealing.
    """

    num_measured: int
    num_temperatures: int
    num_particles: int


def measure(
    algorithm: str, seed: int, trained: Trained, setting: TrainingSetting, how: Measurement
) -> Run:
    """Measures the models of a run on held-out images."""
    module, data = build(algorithm, seed, setting)
    data.setup("test")
    assert data.held_out_set is not None
    x = data.held_out_set.first(how.num_measured)[0]

    def measured(snapshot: Snapshot, images: Tensor, num_temperatures: int) -> dict[str, float]:
        module.model.load_state_dict(snapshot.parameters)
        coordinates = module.held_out.coordinates
        inference = held_out_inference(module.model, how.num_particles, **coordinates)
        # The same seed for every model, so that they differ by their parameters.
        return summarise([evaluate(inference, images, num_temperatures, seed=0)])

    curve = [
        {**point.spent, **measured(point, x[:CURVE_IMAGES], CURVE_TEMPERATURES)}
        for point in trained.curve
    ]
    spent = {}
    for budget, snapshot in trained.kept.items():
        spent[budget] = {
            **snapshot.spent,
            **measured(snapshot, x, how.num_temperatures),
            "prior_sample_nll": -float(prior_sample_estimate(module.model, x).mean()),
        }
    about = {"algorithm": algorithm, "seed": seed, "setting": setting.shared() | asdict(how)}
    return {**about, "curve": curve, "spent": spent, **trained.sweep}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    folder = options.results / "head_to_head"
    folder.mkdir(parents=True, exist_ok=True)
    setting = TrainingSetting(
        path=options.path,
        seconds=60.0 * options.minutes,
        gradients=1e6 * options.million_gradients,
        num_training=options.num_training,
        num_threads=options.num_threads,
    )
    how = Measurement(options.num_measured, options.num_temperatures, options.num_particles)
    for file in folder.glob("*.json"):
        then = json.loads(file.read_text())["setting"]
        _require_same_setting(file, then, setting.shared() | asdict(how))
    for algorithm, seed in ((a, s) for s in options.seeds for a in options.algorithms):
        file = folder / f"{algorithm}-seed{seed}.json"
        if file.exists():
            continue
        trained = _trained(options.models / f"{file.stem}.pt", algorithm, seed, setting)
        run = measure(algorithm, seed, trained, setting, how)
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(run, indent=1) + "\n")
        unfinished.rename(file)
        print(f"{algorithm}, seed {seed}: {_describe(run)}", flush=True)
    write_report(load_runs(folder), options.results)


def _trained(file: Path, algorithm: str, seed: int, setting: TrainingSetting) -> Trained:
    """The models of a run, trained unless they are in the file."""
    if not file.exists():
        train(algorithm, seed, setting).save(file)
    trained = Trained.load(file)
    _require_same_setting(file, trained.setting, setting.shared())
    return trained


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
    parser.add_argument(
        "--models", type=Path, default=Path("runs/head_to_head"), help="where trained models go"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def _require_same_setting(file: Path, then: Mapping[str, float], now: Mapping[str, float]) -> None:
    changed = [f"{n}={then.get(n)}, now {now[n]}" for n in now if then.get(n) != now[n]]
    if changed:
        raise SystemExit(
            f"'{file}' is a run of another setting ({'; '.join(changed)}), which does not compare; "
            "give the same options, another --results or --models, or delete it to run it again"
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
