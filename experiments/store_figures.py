"""Executes notebooks and stores their outputs in them, as the tests demand.

    python -m experiments.store_figures quick_start digits
    python -m experiments.store_figures mnist --constant "DATA_PATH='data/mnist'"

Each runs in a kernel of its own, from its own folder. What changes from run to run or belongs to
the machine is left out: times, what was written to stderr, versions of the kernel. A constant
replaces that of the first code cell for this run, and is not stored.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "notebooks"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", help="notebooks, without folder and suffix")
    parser.add_argument("--constant", action="append", default=[], help="NAME=VALUE of this run")
    options = parser.parse_args()
    for name in options.names:
        path = FOLDER / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        execute(notebook, options.constant)
        strip(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def execute(notebook: NotebookNode, constants: list[str]) -> None:
    """Runs all cells, the first code cell with other constants in its end."""
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    written = first.source
    first.source = "\n".join([written, *constants])
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=None, record_timing=False, resources=resources).execute()
    first.source = written


def strip(notebook: NotebookNode) -> None:
    """Takes away what belongs to this run and this machine."""
    notebook.metadata = METADATA
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata.tags} if "tags" in cell.metadata else {}
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]


if __name__ == "__main__":
    main()
