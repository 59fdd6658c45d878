"""Benchmark (j): Pyro's own static programs against independent oracles, as a table.

    python -m experiments.benchmarks.acceptance [--only hmm] [--output docs/acceptance.md]

Each program of `tests/acceptance` is run as its authors wrote it; its posterior is compared with an
exact one (enumeration, conjugacy, a grid), or with that of many Hamiltonian chains on a density
that is written out beside it. Then follow the programs that are refused, with the error's sentence.
"""

import argparse
import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyro
import torch
from tabulate import tabulate

from dcpc import DCPC
from dcpc.errors import ModelError
from experiments.benchmarks.timing import describe_machine
from tests.acceptance.case import Program
from tests.acceptance.catalogue import programs, refused
from tests.acceptance.comparison import LARGEST_DIFFERENCE, LARGEST_Z, SD_RATIOS, Row, compare

HEADER = (
    "program",
    "original",
    "backend",
    "oracle",
    "largest difference of a mean (standard errors)",
    "ratios of standard deviations",
    "largest difference of a probability",
    "seconds",
)

INTRODUCTION = f"""# Acceptance: Pyro's own programs

The static programs of Pyro's examples and tutorials, restated on small synthetic data in the idioms
of their authors, with their annotations left in. A row agrees if the means of all quantities are
within {LARGEST_Z:.0f} Monte Carlo standard errors of the oracle's, the ratios of standard
deviations in [{SD_RATIOS[0]}, {SD_RATIOS[1]}], and the probabilities of discrete latents within
{LARGEST_DIFFERENCE}. Rows that do not are in bold. Originals are files of Pyro's `examples/`, if
nothing else is said. The programs are in `tests/acceptance`, and `pytest -m slow tests/acceptance`
checks the same.

    python -m experiments.benchmarks.acceptance --output docs/acceptance.md
"""


def cells(row: Row) -> tuple[str, ...]:
    """A row as strings."""
    reference = row.program.reference()
    low, high = row.sd_ratios
    name = row.program.name if row.agrees else f"**{row.program.name}**"
    return (
        name,
        row.program.source,
        row.backend,
        row.program.oracle,
        f"{row.z:.1f}" if reference.mean else "",
        f"{low:.2f} to {high:.2f}" if reference.mean else "",
        f"{row.probability:.3f}" if reference.probabilities else "",
        f"{row.seconds:.0f}",
    )


def run(name: str) -> tuple[str, ...]:
    """The row of a program, by its name."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # short runs ask for more sweeps
    pyro.set_rng_seed(0)
    return cells(compare(next(program for program in programs() if program.name == name)))


def remarks(chosen: list[Program]) -> str:
    """What differs from the originals, beside the size of the data."""
    lines = [f"- {program.name}: {program.remark}." for program in chosen if program.remark]
    return "What differs from the originals:\n\n" + "\n".join(lines) if lines else ""


def refusals() -> str:
    """The programs that are refused, each with its sentence."""
    rows = []
    for case in refused():
        try:
            DCPC(case.model, num_particles=4).division(*case.args)
            sentence = "runs"
        except ModelError as error:
            sentence = str(error).replace(f"{Path.cwd()}/", "")
        rows.append((case.name, case.source, sentence))
    return "## What is refused\n\n" + tabulate(rows, ("program", "original", "error"), "github")


def main() -> None:
    """Runs the programs, prints the table, and writes it to a file if one is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a part of the names of the programs to run")
    parser.add_argument("--output", type=Path, help="file to write the table to")
    parser.add_argument("--processes", type=int, default=1, help="programs to run side by side")
    options = parser.parse_args()
    chosen = [program for program in programs() if options.only in program.name]
    rows = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=spawn) as pool:
        for row in pool.map(run, [program.name for program in chosen]):
            rows.append(row)
            print(*row, sep=" | ", flush=True)
    table = tabulate(rows, HEADER, "github", disable_numparse=True)
    parts = [INTRODUCTION, table, f"Measured on {describe_machine()}.", remarks(chosen), refusals()]
    text = "\n\n".join(part.strip("\n") for part in parts if part) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
