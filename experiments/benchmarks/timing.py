"""What the benchmarks share: a fair clock, and the line that says what they ran on."""

import platform
import statistics
import time
from collections.abc import Callable

import torch


def interleaved_medians(
    *functions: Callable[[], object], repeats: int = 15, warmup: int = 3
) -> list[float]:
    """Median wall time of each function in milliseconds, called in turns.

    Turns share whatever else the machine is doing, so that the ratio of two medians is steadier
    than either.
    """
    for _ in range(warmup):
        for function in functions:
            function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, record in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            record.append(time.perf_counter() - start)
    return [1e3 * statistics.median(record) for record in times]


def describe_machine() -> str:
    """Processor, threads and versions, to print beside the figures."""
    return (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )
