"""Benchmark (g): what a datum costs while training: disk, time in the store, time in a checkpoint.

    python -m experiments.benchmarks.scale

Writes and reads the particles of random batches, and saves and loads a checkpoint, for several
numbers of data. Costs per datum that do not grow with their number are the claim.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch

from dcpc.recombine import LogWeights
from dcpc.sweep import SweepState
from dcpc.training.checkpoint import DurableFiles
from dcpc.training.store import ParticleStore
from experiments.benchmarks.timing import describe_machine

AXES = {"z": 1}


def particles(num_data: int, num_particles: int, size: int) -> SweepState:
    """Random particles."""
    return SweepState(
        {"z": torch.randn(num_particles, num_data, size)},
        LogWeights(torch.randn(num_particles, num_data)),
        torch.randn(num_particles, num_data),
    )


def measure(num_data: int, options: argparse.Namespace, folder: Path) -> list[str]:
    """Row of the table."""
    store, files = ParticleStore(folder, num_data), DurableFiles()
    state = particles(options.batch_size, options.num_particles, options.latent_size)
    spent = {"write": 0.0, "read": 0.0}
    order = torch.randperm(num_data).split(options.batch_size)
    for index in order:
        part = particles(len(index), options.num_particles, options.latent_size)
        start = time.perf_counter()
        store.write(index, part, AXES)
        spent["write"] += time.perf_counter() - start
    for index in order:
        start = time.perf_counter()
        store.read(index, lambda: state, AXES)
        spent["read"] += time.perf_counter() - start
    disk = sum(path.stat().st_size for path in store.folder.glob("*.bin"))
    path = folder / "a.ckpt"
    start = time.perf_counter()
    files.save_checkpoint({"state_dict": {}, "particles": store.state_dict()}, path)
    saved = time.perf_counter()
    files.load_checkpoint(path)
    loaded = time.perf_counter()
    store.close()
    return [
        f"{num_data:,}",
        f"{disk / num_data:.0f}",
        *(f"{1e6 * seconds / num_data:.1f}" for seconds in spent.values()),
        f"{1e6 * (saved - start) / num_data:.1f}",
        f"{1e6 * (loaded - saved) / num_data:.1f}",
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_data", type=int, nargs="+", default=[20_000, 100_000, 500_000])
    parser.add_argument("--num_particles", type=int, default=4)
    parser.add_argument("--latent_size", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=500)
    options = parser.parse_args()
    print(describe_machine())
    print("data; bytes on disk; microseconds to write, read, save, load; GiB resident at most")
    for num_data in options.num_data:
        with tempfile.TemporaryDirectory() as folder:
            print("; ".join(measure(num_data, options, Path(folder))))


if __name__ == "__main__":
    main()
