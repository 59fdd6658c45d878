"""Benchmark (h): a training step on the CPU and on a GPU.

    python -m experiments.benchmarks.devices

The model is the deep latent Gaussian model of MNIST, 20-128-256-784, with the settings of
`configs/mnist.json` and `configs/algorithms`. A step is what `dcpc fit` does with a batch, but for
the particle store: it binds the batch, sweeps the particles, and takes a step of Adam. Data and
parameters stay on the device. Steps are recorded, and compiled too with `--compile false true`. The
first columns are what was run, then the median time of a step in milliseconds, thousands of data
per second, and the most memory of the GPU in MiB.
"""

import argparse
import itertools
from collections.abc import Callable

import torch

from dcpc import DCPC
from dcpc.conquer import Langevin
from dcpc.models import DeepLatentGaussian
from experiments.benchmarks.timing import describe_machine, interleaved_medians

ALGORITHMS = {
    "dcpc": {"move": Langevin(leapfrog_steps=3)},
    "dcpc-smc": {},
    "pgd": {"step_size": 0.3},
}


def training_step(
    algorithm: str, num_particles: int, batch_size: int, device: str, compiles: bool
) -> Callable[[], None]:
    """A step on random images, from particles that the last step has left."""
    torch.manual_seed(0)
    model = DeepLatentGaussian([20, 128, 256], [1, 28, 28], "bernoulli", min_scale=0.1).to(device)
    x = torch.rand(batch_size, 1, 28, 28).round().to(device)
    options = ALGORITHMS[algorithm] | {"compile": compiles or "auto"}
    engine = DCPC(model, num_particles=num_particles, algorithm=algorithm, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    state = engine.init(x)

    def step() -> None:
        nonlocal state
        problem = engine.bind(x)
        state, _ = problem.sweep(state, learns=True)
        optimizer.zero_grad()
        (problem.loss(state) / batch_size).backward()
        optimizer.step()
        if device != "cpu":
            torch.cuda.synchronize()

    return step


def main() -> None:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS))
    parser.add_argument("--num_particles", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--devices", nargs="+", default=devices)
    parser.add_argument("--compile", choices=["false", "true"], nargs="+", default=["false"])
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    print(describe_machine())
    if "cuda" in options.devices:
        print(torch.cuda.get_device_name())
    print("algorithm; particles; batch; device; compiled; ms; thousands of data per second; MiB")
    settings = itertools.product(
        options.algorithms,
        options.num_particles,
        options.batch_sizes,
        options.devices,
        options.compile,
    )
    for algorithm, num_particles, batch_size, device, compiles in settings:
        if device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step = training_step(algorithm, num_particles, batch_size, device, compiles == "true")
        (milliseconds,) = interleaved_medians(step, repeats=options.repeats, warmup=4)
        memory = 0 if device == "cpu" else torch.cuda.max_memory_allocated() >> 20
        row = (algorithm, num_particles, batch_size, device, compiles, f"{milliseconds:.1f}")
        print(*row, f"{batch_size / milliseconds:.1f}", memory or "-", sep="; ", flush=True)


if __name__ == "__main__":
    main()
