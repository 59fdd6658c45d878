"""One sampler on one model, in a process of its own: nothing is compiled or cached before.

python -m experiments.benchmarks.peers.cell dcpc kidiq-kidscore_momiq --output /tmp/cell.json
"""

from __future__ import annotations

import argparse
import json
import resource
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks.peers import SAMPLERS, Sampled, Task
from experiments.benchmarks.peers.scores import by_label, score
from tests.posteriordb import CASES, FOLDER, HARD, references

PYRO_MODELS = {case.name: case.model for case in (*CASES, *HARD)}


def task_of(name: str, reference: dict[str, Any], seed: int = 0, num_particles: int = 1000) -> Task:
    """The task of a posterior, given what the references have of it."""
    quantities = tuple(reference["mean"])
    return Task(name, PYRO_MODELS[name], reference["data"], quantities, seed, num_particles)


def measure(sampler: str, task: Task, reference: dict[str, Any]) -> dict[str, Any]:
    """A row of the table, as plain numbers."""
    sample = SAMPLERS[sampler].load()
    began = time.perf_counter()
    sampled: Sampled = sample(task)
    wall = time.perf_counter() - began
    set_up, rest = sampled.cost
    own = by_label(sampled.own_ess, axes=0)
    return {
        "sampler": sampler,
        "model": task.name,
        **asdict(score(sampled.draws, reference)),
        "set_up": set_up,
        "sampling": rest,
        "stages": dict(sampled.seconds),
        "wall": wall,
        "own_ess": min(float(own[name]) for name in task.quantities) if own else None,
        "num_gradients": sampled.num_gradients,
        "warning": sampled.warning,
    }


def main() -> None:
    """Writes the row to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sampler", choices=SAMPLERS)
    parser.add_argument("model", choices=PYRO_MODELS)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the row")
    parser.add_argument("--references", type=Path, default=FOLDER, help="folder of the references")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-particles", type=int, default=1000, help="particles of dcpc")
    parser.add_argument("--time-limit", type=int, help="CPU seconds after which it is ended")
    options = parser.parse_args()
    if options.time_limit:
        resource.setrlimit(resource.RLIMIT_CPU, (options.time_limit, options.time_limit + 10))
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    reference = references(options.references)[options.model]
    task = task_of(options.model, reference, options.seed, options.num_particles)
    options.output.write_text(json.dumps(measure(options.sampler, task, reference)))


if __name__ == "__main__":
    main()
