"""The picture of the front page: digits of MNIST that were never trained on, and new ones.

    python -m experiments.front_page

Reconstructions and completions are averages over particles of the decoder's mean, samples are its
mean. Writes `front_page.png` to `experiments/results`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from dcpc.evaluation import FrozenParticles, bottom_half, complete, prior_samples
from dcpc.training.callbacks import image_grid
from dcpc.training.cli import ConfiguredCLI, one_line_errors

RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the options and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/mnist.json")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/mnist.pt"))
    parser.add_argument("--num_temperatures", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    model = ConfiguredCLI(["fit", f"--config={options.config}"]).model.model
    frozen = FrozenParticles.from_checkpoint(options.checkpoint, model)
    images = rows(frozen, options.num_temperatures, options.seed)
    options.results.mkdir(parents=True, exist_ok=True)
    draw(images, options.results / "front_page.png")


def rows(frozen: FrozenParticles, num_temperatures: int, seed: int) -> dict[str, Tensor]:
    """Rows of images, `(classes, *shape)`, by name; of each class the first held-out image."""
    first = [int((frozen.labels == label).nonzero()[0]) for label in frozen.labels.unique()]
    chosen = frozen.select(torch.tensor(first))
    model, visible = chosen.model, bottom_half(chosen.originals.shape[1:])
    completed = complete(
        model, chosen.originals, visible, num_temperatures=num_temperatures, seed=seed
    )
    return {
        "held-out images": chosen.originals,
        "reconstructed": chosen.reconstruct(chosen.originals),
        "lower halves": torch.where(visible, chosen.originals, 0.2),
        "completed": completed.completions,
        "drawn from the prior": prior_samples(model, chosen.originals, seed).means,
    }


def draw(images: dict[str, Tensor], path: Path) -> None:
    """Writes the rows below each other, each with its name on the left."""
    figure, axes = plt.subplots(len(images), 1, figsize=(9, 4.1), layout="constrained")
    for axis, (name, row) in zip(axes, images.items(), strict=True):
        axis.imshow(image_grid(row, len(row))[0].numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_frame_on(False)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11)
    figure.savefig(path, dpi=100, bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)


if __name__ == "__main__":
    with one_line_errors():
        main()
