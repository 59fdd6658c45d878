"""Generators of colour images, by several algorithms at equal time.

    python -m experiments.colour --path uoft-cs/cifar10 --minutes 20

Trains `configs/cifar10.json` with each algorithm's layer on 9,000 images for so many minutes, as
`dcpc fit` does, into `runs/colour`; what is there already is not trained again. The algorithms
ending in `-warm` begin as autoencoders, for a number of epochs that suits these sizes. Then it
measures all of them on the same held-out images, and writes a table and, for each algorithm, a
picture: held-out images, their reconstructions, samples of the prior and of the pseudo-posterior.

The pseudo-posterior is a Gaussian mixture of the training images' latents: of their particles, or
of the encoder's samples where there are no particles. Frechet distances are in the features of a
classifier that is trained here, and in Inception's where its weights are present, from
`--num_samples` generated images: with few of them, the distance depends on which.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from dcpc.evaluation import (
    FeatureClassifier,
    FrozenParticles,
    InceptionError,
    InceptionFeatures,
    PseudoPosterior,
    decode,
    evaluate,
    frechet_feature_distance,
    summarise,
)
from dcpc.evaluation.batches import BATCH_SIZE
from dcpc.evaluation.intensities import to_unit
from dcpc.presets import PRESETS
from dcpc.seeding import seeded
from dcpc.tables import table
from dcpc.training import AmortisedModule, GenerativeModule, ImageData
from dcpc.training.callbacks import image_grid, save_png
from dcpc.training.checkpoint import check_parameters, read_checkpoint
from dcpc.training.cli import ConfiguredCLI, one_line_errors
from dcpc.training.command import main as dcpc_command
from experiments.layers import layers

ALGORITHMS = (*PRESETS, "dcpc-warm", "pgd-warm", "vae")
RESULTS = Path(__file__).parent / "results"
SITE = "z"
ABOUT = "comparison.json"
INTENSITIES = (-1.0, 1.0)
COLUMNS = 10
SEED = 0


@dataclass(frozen=True)
class Measured:
    """What one algorithm's generator is worth.

    Attributes:
        summary: Of held-out images, by `dcpc.evaluation.summarise`.
        prior: Generated from samples of the prior, `(N, *shape)`.
        pseudo: Generated from samples of the pseudo-posterior, `(N, *shape)`.
        picture: Rows of images.
    """

    summary: Mapping[str, float]
    prior: Tensor
    pseudo: Tensor
    picture: Tensor


def train(algorithm: str, options: argparse.Namespace) -> Path:
    """The checkpoint of a training that takes the given time, without any validation."""
    folder = options.runs / f"{algorithm}-{options.minutes:g}-minutes"
    configs = [
        json.loads(Path(layer.partition("=")[2]).read_text()) for layer in _layers(algorithm)
    ]
    about = {"configs": configs, "options": _overrides(options)}
    if (folder / "last.ckpt").exists():
        _require_same(folder / ABOUT, about)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
        minutes, seconds = divmod(round(60 * options.minutes), 60)
        dcpc_command(
            [
                "fit",
                *_config(algorithm, options),
                f"--trainer.default_root_dir={folder}",
                f"--trainer.max_time=00:{minutes // 60:02}:{minutes % 60:02}:{seconds:02}",
                "--trainer.max_epochs=-1",
                "--trainer.limit_val_batches=0",
            ]
        )
    return folder / "last.ckpt"


def measure(algorithm: str, checkpoint: Path, options: argparse.Namespace) -> Measured:
    """Measures a trained generator on the held-out images."""
    module, data = _build(algorithm, options)
    saved = read_checkpoint(checkpoint)
    check_parameters(saved, module, checkpoint)
    module.load_state_dict(saved["state_dict"])
    held_out = _held_out(data)
    seen = held_out[: options.num_measured]
    evaluation = evaluate(
        module.held_out_inference, seen, options.num_temperatures, SEED, INTENSITIES
    )
    latents = training_latents(module, data, checkpoint)
    mixture = PseudoPosterior.fit(SITE, latents, num_components=options.num_components, seed=SEED)
    prior, pseudo = (
        generate(module, held_out.shape[1:], options.num_samples, sampled)
        for sampled in ({}, mixture.sample(options.num_samples, SEED))
    )
    rows = (seen, evaluation.reconstructions, prior, pseudo)
    return Measured(
        summary=summarise([evaluation]),
        prior=prior,
        pseudo=pseudo,
        picture=torch.cat([row[:COLUMNS] for row in rows]),
    )


def generate(
    module: GenerativeModule, shape: Sequence[int], count: int, latents: Mapping[str, Tensor]
) -> Tensor:
    """Means of images, `(count, *shape)`, of given latents `(count, d)`, or else of the prior's."""
    means = []
    for number, start in enumerate(range(0, count, BATCH_SIZE)):
        stop = min(start + BATCH_SIZE, count)
        part = {name: values[start:stop] for name, values in latents.items()}
        template = torch.zeros(stop - start, *shape)
        means.append(decode(module.model, part, template, SEED + number).means)
    return torch.cat(means)


def training_latents(module: GenerativeModule, data: ImageData, checkpoint: Path) -> Tensor:
    """One latent per training image, `(1, N, d)`: a particle, or a sample of the encoder."""
    if isinstance(module, AmortisedModule):
        assert data.training_set is not None
        x = data.training_set.first(len(data.training_set))[0]
        with torch.no_grad(), seeded(SEED):
            guide: Any = poutine.trace(module.guide)
            values = [guide.get_trace(part).nodes[SITE]["value"] for part in x.split(BATCH_SIZE)]
        return torch.cat(values).unsqueeze(0)
    frozen = FrozenParticles.from_checkpoint(checkpoint, module.model)
    return frozen.resample(1, SEED).latents[SITE]


def format_table(
    measured: Mapping[str, Measured], training: Tensor, held_out: Tensor, networks: Mapping
) -> str:
    """Markdown, one row per algorithm, and one of training images: how small a distance can be."""

    def distances(images: Tensor) -> list[str]:
        pair = (to_unit(images, INTENSITIES), to_unit(held_out, INTENSITIES))
        return [f"{frechet_feature_distance(network, *pair):.2f}" for network in networks.values()]

    names = [f"{name}, {kind}" for kind in ("pseudo-posterior", "prior") for name in networks]
    rows = []
    for algorithm, result in measured.items():
        nll, error = result.summary["evidence_nll"], result.summary["evidence_nll_se"]
        figures = [f"{nll:.0f} ± {error:.0f}", f"{result.summary['reconstruction_mse']:.4f}"]
        frechet = distances(result.pseudo) + distances(result.prior)
        rows.append([f"`{algorithm}`", *figures, *frechet])
    rows.append(["training images", "", "", *distances(training), *[""] * len(networks)])
    return table(["", "evidence NLL", "reconstruction MSE", *names], rows, "github") + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    checkpoints = {algorithm: train(algorithm, options) for algorithm in options.algorithms}
    _, data = _build(options.algorithms[0], options)
    held_out = _held_out(data)
    assert data.training_set is not None
    training, labels, _ = data.training_set.first(min(len(data.training_set), options.num_samples))
    measured = {a: measure(a, checkpoint, options) for a, checkpoint in checkpoints.items()}
    options.results.mkdir(parents=True, exist_ok=True)
    for algorithm, result in measured.items():
        grid = image_grid(result.picture, COLUMNS, INTENSITIES)
        save_png(options.results / f"colour_{algorithm}.png", grid)
    table = format_table(measured, training, held_out, _networks(training, labels))
    (options.results / "colour.md").write_text(table)
    print(table)


def _networks(training: Tensor, labels: Tensor) -> dict[str, FeatureClassifier | InceptionFeatures]:
    shape = (training.shape[1], training.shape[2], training.shape[3])
    classifier = FeatureClassifier(shape, int(labels.max()) + 1, seed=SEED)
    classifier.fit(to_unit(training, INTENSITIES), labels, num_epochs=10)
    networks: dict[str, FeatureClassifier | InceptionFeatures] = {
        "Frechet distance (classifier)": classifier
    }
    try:
        networks["FID (Inception)"] = InceptionFeatures()
    except InceptionError as error:
        print(f"no FID: {error}")
    return networks


def _layers(algorithm: str) -> list[str]:
    return layers("cifar10", algorithm)


def _overrides(options: argparse.Namespace) -> list[str]:
    return [
        f"--data.path={options.path}",
        f"--data.num_training={options.num_training}",
        f"--seed_everything={SEED}",
        f"--num_threads={options.num_threads}",
        "--data.num_held_out=null",
    ]


def _config(algorithm: str, options: argparse.Namespace) -> list[str]:
    return [*_layers(algorithm), *_overrides(options)]


def _require_same(file: Path, about: Mapping[str, Any]) -> None:
    if not file.exists() or json.loads(file.read_text()) != about:
        raise SystemExit(
            f"'{file.parent}' is a run of another config or of other options, which does not "
            "compare; delete it to train it again, or give another --runs"
        )


def _build(algorithm: str, options: argparse.Namespace) -> tuple[GenerativeModule, ImageData]:
    built = ConfiguredCLI(["fit", *_config(algorithm, options), "--trainer.logger=false"])
    built.datamodule.setup("fit")
    built.datamodule.setup("test")
    return built.model, built.datamodule


def _held_out(data: ImageData) -> Tensor:
    assert data.held_out_set is not None
    return data.held_out_set.first(len(data.held_out_set))[0]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--path", default="uoft-cs/cifar10", help="CIFAR-10: a hub name or folder")
    parser.add_argument(
        "--algorithms", nargs="+", choices=ALGORITHMS, default=("dcpc", "dcpc-warm", "pgd", "vae")
    )
    parser.add_argument("--num_training", type=int, default=9_000, help="images to train on")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training, per algorithm")
    parser.add_argument("--num_measured", type=int, default=50, help="held-out images to infer")
    parser.add_argument("--num_temperatures", type=int, default=100, help="to infer them")
    parser.add_argument(
        "--num_samples", type=int, default=10_000, help="to generate for the Frechet distances"
    )
    parser.add_argument("--num_components", type=int, default=10, help="of the pseudo-posterior")
    parser.add_argument("--num_threads", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/colour"), help="where runs go")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    with one_line_errors():
        main()
