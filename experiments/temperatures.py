"""How many temperatures and particles the evidence of a trained model takes.

    python -m experiments.temperatures \\
        --config configs/mnist.json --checkpoint checkpoints/mnist.pt

Anneals held-out images that came with a small file of `experiments.freeze`, at several settings,
and writes the table with the changes on doubling to `experiments/results`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dcpc.evaluation import FrozenParticles, temperature_study
from dcpc.training.cli import ConfiguredCLI, one_line_errors

RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    model = ConfiguredCLI(["fit", f"--config={options.config}"]).model.model
    frozen = FrozenParticles.from_checkpoint(options.checkpoint, model)
    if frozen.originals is None:
        raise SystemExit(
            f"--checkpoint: '{options.checkpoint}' holds no images to measure; use a file that "
            "experiments.freeze made"
        )
    study = temperature_study(
        model,
        frozen.originals[: options.num_images],
        options.num_temperatures,
        options.num_particles,
    )
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / f"temperatures_{options.checkpoint.stem}.md"
    file.write_text(study.format() + "\n")
    print(study.format())


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="that the model was trained with")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--num_images", type=int, default=50)
    parser.add_argument("--num_temperatures", type=int, nargs="+", default=[200, 400, 800, 1600])
    parser.add_argument("--num_particles", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    with one_line_errors():
        main()
