"""Benchmark (c): time of a sweep of a Gaussian chain, and of its capture, against its length.

    python -m experiments.benchmarks.chain_sweep [--lengths 100 400 1000]

The model is an ordinary Pyro loop over T latents, each with an observation. Coloured units of one
shape move as one tensor, so a sweep is two moves whatever T is; what grows with T is the program,
and, once sweeps are recorded, the tensors that its like operators work on.
"""

import argparse
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from dcpc import DCPC
from dcpc.sweep import SweepState
from experiments.benchmarks.timing import describe_machine, interleaved_medians

NUM_UNRECORDED = 12
"""Sweeps after which a loop of sweeps is recorded, and the recording checked."""


def chain(observations: Tensor) -> None:
    """A Gaussian random walk observed in noise."""
    z = torch.zeros(())
    for t in pyro.markov(range(len(observations))):
        z = pyro.sample(f"z{t}", dist.Normal(z, 0.3))
        pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=observations[t])


def sweeps(dcpc: DCPC, state: SweepState, observations: Tensor) -> Callable[[], None]:
    """A function that sweeps once, and goes on from there at the next call."""

    def sweep() -> None:
        nonlocal state
        state, _ = dcpc.sweep(state, observations)

    return sweep


def main() -> None:
    """Prints capture time, time per sweep and their growth for every length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 400, 1000])
    parser.add_argument("--num-particles", type=int, default=64)
    options = parser.parse_args()
    torch.manual_seed(0)
    print(describe_machine())
    steps = []
    for length in options.lengths:
        observations = torch.randn(length)
        dcpc = DCPC(chain, num_particles=options.num_particles)
        start = time.perf_counter()
        state = dcpc.init(observations)
        capture = time.perf_counter() - start
        groups = len(dcpc.division(observations).groups)
        print(f"T = {length:4d}: capture {capture:6.1f} s, moves per sweep {groups}")
        steps.append(sweeps(dcpc, state, observations))
    times = interleaved_medians(*steps, repeats=9, warmup=NUM_UNRECORDED)
    for length, milliseconds in zip(options.lengths, times, strict=True):
        print(
            f"T = {length:4d}: {milliseconds:7.1f} ms per sweep, "
            f"{milliseconds / times[0]:.2f} times T = {options.lengths[0]}"
        )


if __name__ == "__main__":
    main()
