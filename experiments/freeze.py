"""Makes a small file of a trained model: its parameters, and particles of held-out images.

    python -m experiments.freeze --config configs/digits.json --output checkpoints/digits.pt

Infers the first images of the held-out set from scratch, by annealing, keeps some of the particles,
and writes them with the parameters, the images and their labels. `checkpoints/README.md` lists the
commands that made the files there; `FrozenParticles.from_checkpoint` opens them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dcpc.evaluation import FrozenParticles, infer_and_freeze
from dcpc.evaluation.intensities import to_unit
from dcpc.observed import main_tensor
from dcpc.training import GenerativeModule, ImageData
from dcpc.training.checkpoint import check_parameters, read_checkpoint
from dcpc.training.cli import ConfiguredCLI, one_line_errors


def freeze(
    module: GenerativeModule,
    data: ImageData,
    num_images: int,
    num_particles: int,
    num_temperatures: int,
) -> FrozenParticles:
    """Particles of the first held-out images, with equal weights.

    Of data by name, the first tensor alone is given to the model.

    Args:
        num_images: At most so many.
        num_particles: Particles to keep per image, at most those that are annealed.
        num_temperatures: Of the annealing.
    """
    data.setup("test")
    assert data.held_out_set is not None
    x, labels, index = data.held_out_set.first(num_images)
    inferred = infer_and_freeze(
        module.held_out_inference, main_tensor(x), index, labels, num_temperatures=num_temperatures
    )
    return inferred.resample(num_particles, seed=0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Further options override keys of the config."
    )
    parser.add_argument("--config", required=True, action="append", help="once per layer")
    parser.add_argument("--ckpt_path", help="default: last.ckpt in the config's folder of runs")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num_images", type=int, default=512)
    parser.add_argument("--num_kept", type=int, default=4, help="particles per image")
    parser.add_argument("--num_temperatures", type=int, default=400)
    options, overrides = parser.parse_known_args(arguments)
    built = ConfiguredCLI(["fit", *(f"--config={layer}" for layer in options.config), *overrides])
    path = options.ckpt_path or Path(built.trainer.default_root_dir) / "last.ckpt"
    checkpoint = read_checkpoint(path)
    check_parameters(checkpoint, built.model, path)
    built.model.load_state_dict(checkpoint["state_dict"])
    frozen = freeze(
        built.model,
        built.datamodule,
        options.num_images,
        options.num_kept,
        options.num_temperatures,
    )
    frozen.save(options.output)
    assert frozen.originals is not None
    pairs = (frozen.reconstruct(frozen.originals), frozen.originals)
    shown, original = (to_unit(images, built.datamodule.intensity_range) for images in pairs)
    error = (shown - original).square().mean()
    print(
        f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB, parameters and "
        f"{frozen.num_particles} particles of {len(frozen)} held-out images; mean squared error of "
        f"their reconstructions {float(error.detach()):.4f}"
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
