"""Benchmark (e): a training step with this package's operators, and with formulas in plain torch.

    python -m experiments.benchmarks.operators

For every distribution that has an operator of its own, the step of benchmark (a) (or the same for a
convolutional generator) is timed with the operator and with the shortest formula in plain torch
there is, in turns. An operator that gains less than 15 % is not worth its lines, unless it is there
for its digits: the plain formula of the discretised normal cancels.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dcpc import kernels
from dcpc.kernels import SPACING
from dcpc.models import ConvolutionalGenerator, DeepLatentGaussian
from experiments.benchmarks.dlgm_step import engine_step
from experiments.benchmarks.timing import describe_machine, interleaved_medians


def continuous_bernoulli(value: Tensor, logits: Tensor) -> Tensor:
    """`x l - relu(l) - log((1 - e^-|l|) / |l|)`."""
    magnitude = logits.abs().clamp(min=1e-6)
    return value * logits - logits.relu() - (-torch.expm1(-magnitude) / magnitude).log()


def discretized_normal(centre: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Logarithm of the difference of two distribution functions, floored where it cancels."""
    upper, lower = (0.5 * (centre - loc + shift) for shift in (SPACING / 2, -SPACING / 2))
    upper, lower = (torch.erf(x * 2 / scale / math.sqrt(2)) for x in (upper, lower))
    upper = torch.where(centre > 1 - SPACING / 2, 1.0, upper)
    lower = torch.where(centre < SPACING / 2 - 1, -1.0, lower)
    return (0.5 * (upper - lower)).clamp(min=1e-12).log()


PLAIN = {
    "continuous_bernoulli_log_prob": continuous_bernoulli,
    "discretized_normal_log_prob": discretized_normal,
}


@contextmanager
def replaced(name: str) -> Iterator[None]:
    """A block of code in which an operator is its formula in plain torch."""
    original = getattr(kernels, name)
    setattr(kernels, name, PLAIN[name])
    try:
        yield
    finally:
        setattr(kernels, name, original)


def main() -> None:
    """Prints the times and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-particles", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    print(describe_machine())

    def deep() -> nn.Module:
        return DeepLatentGaussian([20, 128, 256], [1, 28, 28], likelihood="continuous_bernoulli")

    def colour() -> nn.Module:
        return ConvolutionalGenerator(40, [3, 32, 32], likelihood="discretized_normal")

    cases: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
        "continuous_bernoulli_log_prob": (deep, torch.rand(256, 1, 28, 28)),
        "discretized_normal_log_prob": (colour, torch.randint(256, (32, 3, 32, 32)) / 127.5 - 1),
    }
    for name, (make, x) in cases.items():
        for num_particles in options.num_particles:
            torch.manual_seed(0)
            ours = engine_step(make(), x, num_particles)
            with replaced(name):
                # Its gradient cancels, which the certificate would not let pass.
                plain = engine_step(make(), x, num_particles, certify=False)
            own, other = interleaved_medians(ours, plain, repeats=options.repeats)
            print(
                f"{name}, K = {num_particles}: operator {own:.1f} ms, plain torch {other:.1f} ms, "
                f"ratio {other / own:.2f}"
            )


if __name__ == "__main__":
    main()
