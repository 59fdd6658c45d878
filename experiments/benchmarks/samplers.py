"""Benchmark (b): effective draws per CPU second against other samplers, on posteriordb's models.

    python -m experiments.benchmarks.samplers [--output samplers.md] [--samplers dcpc numpyro]

Every sampler runs on every model in a process of its own, so that nothing is compiled or cached
before. Those that are not installed are left out, and all where the references are absent.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks.peers import SAMPLERS
from experiments.benchmarks.peers.cell import PYRO_MODELS, task_of
from experiments.benchmarks.peers.table import (
    LARGEST_ERROR,
    LARGEST_R_HAT,
    SD_RATIOS,
    TARGET,
    cells,
    main_table,
    ratio_table,
    stage_table,
)
from experiments.benchmarks.timing import describe_machine
from tests.posteriordb import FILES, references

ROOT = Path(__file__).parents[2]
CHEAP = "eight_schools-eight_schools_noncentered"
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}
PACKAGES = ("pyro-ppl", "numpyro", "blackjax", "jax", "arviz")

INTRODUCTION = f"""# Samplers on posteriordb's models

    python -m experiments.benchmarks.samplers --output samplers.md

Errors are of the worst quantity of a model: the largest difference of a mean from the reference's,
in its standard deviations, the range of the ratios of standard deviations to the reference's, the
largest R-hat, the smallest bulk ESS. A sampler in bold does not agree with the reference: an error
of {LARGEST_ERROR} or more, a ratio outside of {SD_RATIOS}, or an R-hat of {LARGEST_R_HAT} or more.

- Seconds are CPU time of the process, of all its threads, each limited to one. Imports are left
  out. Set-up is all else before the draws that are kept: capture, compilation, annealing, warm-up.
- The bulk ESS is ArviZ's, of `(chains, draws)`; the particles of DCPC are chains. Of many short
  chains it is biased, by .7 to 1.3 times (`peers/scores.py`; on eight schools the error of DCPC's
  means over 24 seeds has .93 times the variance that it tells, `--check`). For more than 16 chains
  rates are therefore of the ESS by the spread of the chains' means, which has no bias where chains
  are independent, or of DCPC's own where that is smaller: it allows for particles that descend from
  the same one.
- R-hat is rank-normalised and split; of more than 16 chains it is that of four superchains
  (`dcpc.draws.r_hat`).
- CPU seconds to {TARGET:,} effective draws are the set-up and the sampling that these take.
- CPU time per gradient is that of the sampling over the gradients of all chains: the sampler's own
  work is in it. A sweep of DCPC counts as one gradient per particle and leapfrog step.
- All are in double precision.
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; models by a part of their names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="table in Markdown; JSON goes beside it")
    parser.add_argument("--models", nargs="+", default=[""], help="parts of names of models")
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, help="all by default")
    parser.add_argument("--num-particles", type=int, default=1000, help="particles of DCPC")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--references",
        type=Path,
        default=Path("../shared/refs"),
        help=f"folder of {' and '.join(FILES)}",
    )
    parser.add_argument(
        "--time-limit", type=int, default=600, help="CPU seconds of a sampler on a model"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="only compare the ESS with the spread over seeds, by default on eight schools of dcpc "
        "and blackjax",
    )
    parser.add_argument("--check-seeds", type=int, default=24, help="number of these seeds")
    parser.add_argument(
        "--check-models", action="store_true", help="only compare the models with those in NumPyro"
    )
    options = parser.parse_args(arguments)
    options.names = [n for n in PYRO_MODELS if any(part in n for part in options.models)]
    if not options.names:
        parser.error(f"--models {' '.join(options.models)}: none of {', '.join(PYRO_MODELS)}")
    return options


def installed(names: Sequence[str]) -> list[str]:
    """The samplers that are installed; says which are not."""
    for name in names:
        if missing := SAMPLERS[name].missing():
            print(f"{SAMPLERS[name].title} is left out: {', '.join(missing)} not installed")
    return [name for name in names if not SAMPLERS[name].missing()]


def run_cell(sampler: str, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """A row, measured in a process of its own with empty caches."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "row.json"
        command = [sys.executable, "-m", "experiments.benchmarks.peers.cell", sampler, model]
        command += ["--output", str(output), "--references", str(options.references.resolve())]
        command += ["--seed", str(options.seed), "--num-particles", str(options.num_particles)]
        environment = {**os.environ, **ONE_THREAD, "TORCHINDUCTOR_CACHE_DIR": folder}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        command += ["--time-limit", str(options.time_limit)]
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if ended.returncode == -signal.SIGXCPU:
            return failed(sampler, model, f"more than {options.time_limit} s")
        if ended.returncode:
            return failed(sampler, model, (ended.stderr.strip() or "no message").splitlines()[-1])
        return json.loads(output.read_text())


def failed(sampler: str, model: str, why: str) -> dict[str, Any]:
    """The row of a sampler that has no draws."""
    return {"sampler": sampler, "model": model, "failure": why}


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The whole page."""
    used = list(dict.fromkeys(row["sampler"] for row in rows))
    settings = "\n".join(f"- {SAMPLERS[s].title}: {SAMPLERS[s].settings}." for s in used)
    warned = [row for row in rows if row.get("warning")]
    parts = [INTRODUCTION, f"Settings:\n\n{settings}", main_table(rows)]
    if "dcpc" in used:
        parts += ["## DCPC over the others", ratio_table(rows)]
        parts += ["## CPU seconds of DCPC by stage", stage_table(rows, "dcpc")]
    if warned:
        lines = (f"- {row['model']}: {' '.join(row['warning'].split())}" for row in warned)
        parts.append("DCPC itself warned:\n\n" + "\n".join(lines))
    parts.append(f"Measured on {describe_machine()}, {versions()}.")
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def versions() -> str:
    """Versions of the packages that are installed."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def write(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Writes the page, and its rows beside it."""
    output.write_text(report(rows))
    output.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table, and writes it to a file if one is named."""
    options = parse(arguments)
    if not all((options.references / name).exists() for name in FILES):
        print(f"nothing is compared: there is no {' or '.join(FILES)} in {options.references}")
        return
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    known = references(options.references)
    if options.check:
        from experiments.benchmarks.peers.ess_check import check_ess

        samplers = installed(options.samplers or ["dcpc", "blackjax"])
        for name in options.names if options.models != [""] else [CHEAP]:
            task = task_of(name, known[name], num_particles=options.num_particles)
            print(f"{name}:\n\n{check_ess(samplers, task, options.check_seeds)}")
        return
    if options.check_models:
        from experiments.benchmarks.peers.model_check import check_model

        for name in options.names:
            print(f"{name}: same within {check_model(task_of(name, known[name])):.1e}")
        return
    rows: list[dict[str, Any]] = []
    samplers = installed(options.samplers or list(SAMPLERS))
    for model in options.names:
        for sampler in samplers:
            rows.append(run_cell(sampler, model, options))
            print(*cells(rows[-1]), sep=" | ", flush=True)
            if options.output:
                write(rows, options.output)
    print(report(rows))


if __name__ == "__main__":
    main()
