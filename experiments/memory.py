"""Sequential memory: recall of stored sequences from their first frames, by how many are stored.

    python -m experiments.memory [--counts 4 8 16 32 64 128] [--seeds 3] [--output results/memory]

Stores sequences of scikit-learn's digits, as `configs/memory.json` has them, and recalls each from
its first frame: the mean squared error of the frames that follow. Prints a table, and draws the
curves where `--output` says. All have states of the same size:

- `dcpc`: the config, trained by `dcpc fit`; recall from the posterior of the first state.
- `tpc`: temporal predictive coding with two layers: states inferred one frame after the other by
  gradient descent on the squared prediction errors, the state before held fixed; every weight
  learns from the error and the activity at its two ends. Tang, Barron & Bogacz, "Sequential memory
  with temporal predictive coding", NeurIPS 2023.
- `tpc-1`: the same with one layer, in which a frame predicts the next.
- `mean`: the mean of all stored frames, and `repeat`: the first frame again; neither knows a
  sequence.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from torch import Tensor, nn

from dcpc.seeding import seeded
from dcpc.tables import table
from dcpc.training import GenerativeModule
from dcpc.training.cli import ConfiguredCLI
from dcpc.training.command import main as dcpc

Errors = dict[str, dict[int, list[float]]]
"""Recall errors by contender and by number of sequences, one for each seed."""

CONFIG = Path(__file__).parents[1] / "configs" / "memory.json"


class TemporalPredictiveCoding:
    """A network of two layers that learns sequences by local rules.

        E_t = |z_t - W f(z_{t-1}) - b|^2 / 2 + |x_t - U f(z_t) - c|^2 / 2,   f = tanh

    The first state's prediction is zero. Errors are `dE / d(prediction)`, so that the gradient of a
    weight is minus the product of the error above it and the activity below it; Adam takes one step
    after every frame, as the authors' experiments do.

    Args:
        num_pixels: Pixels of a frame.
        state_size: Size of the states.
        num_passes: Passes over all sequences.
        learning_rate: Adam learning rate, which falls to zero linearly.
        num_iterations: Steps of gradient descent that infer a state.
        step_size: Their size.
    """

    def __init__(
        self,
        num_pixels: int,
        state_size: int,
        num_passes: int = 400,
        learning_rate: float = 2e-3,
        num_iterations: int = 20,
        step_size: float = 0.1,
    ) -> None:
        self.transition = nn.Linear(state_size, state_size)
        self.emission = nn.Linear(state_size, num_pixels)
        self.num_passes = num_passes
        self.learning_rate = learning_rate
        self.num_iterations = num_iterations
        self.step_size = step_size

    @torch.no_grad()
    def infer(self, predicted: Tensor, frame: Tensor) -> Tensor:
        """The state `(N, state_size)` that lowers the errors of its prediction and of its frame."""
        state = predicted.clone()
        for _ in range(self.num_iterations):
            active = state.tanh()
            error = frame - self.emission(active)
            slope = predicted - state + (1 - active.square()) * (error @ self.emission.weight)
            state = state + self.step_size * slope
        return state

    @torch.no_grad()
    def learn(self, frames: Tensor) -> None:
        """Stores sequences `(N, T, pixels)`."""
        weights = [*self.transition.parameters(), *self.emission.parameters()]
        optimizer = torch.optim.Adam(weights, self.learning_rate)
        for number in range(self.num_passes):
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * (1 - number / self.num_passes)
            predicted = frames.new_zeros(len(frames), self.transition.in_features)
            before: Tensor | None = None
            for frame in frames.unbind(1):
                state = self.infer(predicted, frame)
                active = state.tanh()
                _local_gradient(self.emission, frame - self.emission(active), active)
                _local_gradient(self.transition, state - predicted, before)
                optimizer.step()
                before, predicted = active, self.transition(active)

    @torch.no_grad()
    def recall(self, frames: Tensor) -> Tensor:
        """Sequences `(N, T, pixels)` as they follow from their first frames."""
        start = frames.new_zeros(len(frames), self.transition.in_features)
        active = self.infer(start, frames[:, 0]).tanh()
        recalled = [self.emission(active)]
        for _ in range(frames.shape[1] - 1):
            active = self.transition(active).tanh()
            recalled.append(self.emission(active))
        return torch.stack(recalled, 1)


class SingleLayer:
    """A frame predicts the next: `x_t = W f(x_{t-1}) + b`, learned by the delta rule.

    Args:
        num_pixels: Pixels of a frame.
        num_passes: Passes over all transitions.
        learning_rate: Adam learning rate, which falls to zero linearly.
    """

    def __init__(
        self, num_pixels: int, num_passes: int = 20_000, learning_rate: float = 5e-3
    ) -> None:
        self.weight = nn.Linear(num_pixels, num_pixels)
        self.num_passes = num_passes
        self.learning_rate = learning_rate

    @torch.no_grad()
    def learn(self, frames: Tensor) -> None:
        """Stores sequences `(N, T, pixels)`."""
        active, following = frames[:, :-1].tanh().flatten(0, 1), frames[:, 1:].flatten(0, 1)
        optimizer = torch.optim.Adam(self.weight.parameters(), self.learning_rate)
        for number in range(self.num_passes):
            optimizer.param_groups[0]["lr"] = self.learning_rate * (1 - number / self.num_passes)
            _local_gradient(self.weight, following - self.weight(active), active)
            optimizer.step()

    @torch.no_grad()
    def recall(self, frames: Tensor) -> Tensor:
        """Sequences `(N, T, pixels)` as they follow from their first frames."""
        recalled = [frames[:, 0]]
        for _ in range(frames.shape[1] - 1):
            recalled.append(self.weight(recalled[-1].tanh()))
        return torch.stack(recalled, 1)


def _local_gradient(layer: nn.Linear, error: Tensor, active: Tensor | None) -> None:
    """Sets minus the product of errors and activities, averaged; none without activities."""
    if active is None:
        layer.weight.grad = layer.bias.grad = None
        return
    layer.weight.grad = -error.T @ active / len(active)
    layer.bias.grad = -error.mean(0)


def by_dcpc(options: Sequence[str], seed: int) -> float:
    """Recall error after `dcpc fit` with the config and further options."""
    with tempfile.TemporaryDirectory() as folder:
        given = [f"--config={CONFIG}", *options, f"--seed_everything={seed}"]
        given += [f"--data.seed={seed}", f"--trainer.default_root_dir={folder}"]
        given += ["--trainer.logger=false", "--trainer.limit_val_batches=0"]
        dcpc(["fit", *given])
        built = ConfiguredCLI(["test", *given])
        built.trainer.test(built.model, built.datamodule, ckpt_path=f"{folder}/last.ckpt")
        assert isinstance(built.model, GenerativeModule)
        return built.model.measurements()["forecast_mse"]


def stored_frames(options: Sequence[str], seed: int) -> Tensor:
    """The sequences that all contenders store, `(N, T, pixels)`."""
    data = ConfiguredCLI(["fit", f"--config={CONFIG}", *options, f"--data.seed={seed}"]).datamodule
    data.setup("fit")
    return data.training_set.first(len(data.training_set))[0].flatten(2)


def error(recalled: Tensor, frames: Tensor) -> float:
    """Mean squared error of all frames but the first."""
    return float((recalled - frames)[:, 1:].square().mean())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--seeds", type=int, default=3, help="of the sequences and the weights")
    parser.add_argument("--passes", type=int, default=400, help="of temporal predictive coding")
    parser.add_argument("--output", type=Path, help="of the figure and the table, without suffix")
    parser.add_argument("--only", nargs="+", choices=("dcpc", "tpc", "tpc-1", "mean", "repeat"))
    parser.add_argument("options", nargs="*", help="further options of dcpc fit, after --")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> Errors:
    """Prints a table of recall errors, draws it, and returns them."""
    options = parse(arguments)
    size = json.loads(CONFIG.read_text())["model"]["model"]["init_args"]["state_size"]
    errors: Errors = {}
    for count in options.counts:
        given = [*options.options, f"--data.num_sequences={count}"]
        for seed in range(options.seeds):
            frames = stored_frames(given, seed)

            def learned(make: Callable[[], TemporalPredictiveCoding | SingleLayer]) -> float:
                network = make()
                network.learn(frames)  # noqa: B023
                return error(network.recall(frames), frames)  # noqa: B023

            pixels = frames.shape[2]
            contenders: dict[str, Callable[[], float]] = {
                "dcpc": lambda: by_dcpc(given, seed),  # noqa: B023
                "tpc": lambda: learned(
                    lambda: TemporalPredictiveCoding(pixels, size, options.passes)  # noqa: B023
                ),
                "tpc-1": lambda: learned(lambda: SingleLayer(pixels)),  # noqa: B023
                "mean": lambda: error(frames.mean((0, 1)).expand_as(frames), frames),  # noqa: B023
                "repeat": lambda: error(frames[:, :1].expand_as(frames), frames),  # noqa: B023
            }
            for name in options.only or contenders:
                start = time.process_time()
                with seeded(seed):
                    value = contenders[name]()
                errors.setdefault(name, {}).setdefault(count, []).append(value)
                spent = time.process_time() - start
                print(
                    f"{name} {count} sequences, seed {seed}: {value:.4f} ({spent:.0f} CPU s)",
                    flush=True,
                )
    report(errors, options.output)
    return errors


def report(errors: Errors, output: Path | None) -> None:
    """Prints means over the seeds, writes the errors as JSON, and draws them."""
    counts = sorted({count for row in errors.values() for count in row})
    rows = [
        (name, *(f"{sum(row[n]) / len(row[n]):.4f}" for n in counts))
        for name, row in errors.items()
    ]
    print(table(("recall MSE", *(str(count) for count in counts)), rows, "github"))
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(errors, indent=1) + "\n")
    figure, axes = pyplot.subplots(figsize=(5, 3.5))
    draw(errors, axes)
    figure.tight_layout()
    figure.savefig(output.with_suffix(".png"), dpi=120)
    pyplot.close(figure)


def draw(errors: Errors, axes: Axes) -> None:
    """Curves of means over the seeds, with bands from the least to the greatest error."""
    for name, row in errors.items():
        counts = [int(count) for count in row]
        values = [row[count] for count in row]
        axes.plot(counts, [sum(v) / len(v) for v in values], marker="o", label=name)
        axes.fill_between(counts, [min(v) for v in values], [max(v) for v in values], alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("stored sequences")
    axes.set_ylabel("mean squared error of recalled frames")
    axes.set_ylim(bottom=0)
    axes.legend()


if __name__ == "__main__":
    main()
