"""Benchmark (i): peak memory and time of a training step by `particle_batch_size`.

    python -m experiments.benchmarks.particle_batches
    python -m experiments.benchmarks.particle_batches --device cuda --num_particles 1024

A step draws the particles of a batch of images, sweeps them twice, and computes the loss and its
gradient in the parameters of the generator of CIFAR-10. Each setting has a process of its own. On
the CPU, memory is what was resident at most above the size after importing; on a GPU, what torch
allocated at most.
"""

import argparse
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from dcpc import DCPC
from dcpc.models import ConvolutionalGenerator
from experiments.benchmarks.timing import describe_machine


def resident() -> int:
    """Largest resident size of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(batch_size: int | None, options: argparse.Namespace) -> tuple[float, float, float]:
    """Peak memory in MiB, seconds of a step after the first, and the first step's loss."""
    torch.manual_seed(0)
    torch.set_num_threads(options.num_threads)
    is_gpu = options.device == "cuda"
    before = resident()
    model = ConvolutionalGenerator(norm="group").to(options.device)
    x = torch.rand(options.num_images, 3, 32, 32, device=options.device)
    engine = DCPC(model, num_particles=options.num_particles, particle_batch_size=batch_size)
    problem = engine.bind(x)
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    losses, seconds = [], []
    state = problem.init()
    for _ in range(options.num_steps):
        start = time.perf_counter()
        state, _ = problem.sweep(state)
        loss = problem.loss(state) / len(x)
        loss.backward()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if is_gpu else resident() - before
    return peak / 2**20, min(seconds[1:]), losses[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num_images", type=int, default=8)
    parser.add_argument("--num_particles", type=int, default=64)
    parser.add_argument("--num_steps", type=int, default=3)
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    print(describe_machine())
    print(f"{options.num_particles} particles of {options.num_images} images, {options.device}")
    print("particle_batch_size; MiB at most; seconds per step; loss of the first step")
    sizes = [
        None,
        *(options.num_particles // n for n in (2, 4, 16, 64) if options.num_particles >= n),
    ]
    context = get_context("spawn")
    for size in sizes:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            peak, seconds, loss = pool.submit(measure, size, options).result()
        print(f"{size}; {peak:,.0f}; {seconds:.2f}; {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
