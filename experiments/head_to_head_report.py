"""What the runs of `experiments.head_to_head` say: tables, the papers' figures, learning curves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, get_args

from matplotlib.figure import Figure

from dcpc.tables import table

ALGORITHMS = (
    "dcpc",
    "dcpc-warm",
    "dcpc-smc",
    "dcpc-paper",
    "pgd",
    "pgd-warm",
    "lpc",
    "mcpc",
    "pc",
    "ipc",
    "vae",
)

CURVE_TEMPERATURES = 50
CURVE_IMAGES = 25

PAPER_ALGORITHMS = ("dcpc-paper", "dcpc", "mcpc")
PAPER_FIGURES = (
    ("reconstruction cross-entropy", "reconstruction_cross_entropy", "102.5, as NLL (DCPC)", 2),
    ("reconstruction MSE", "reconstruction_mse", ".01 (DCPC)", 4),
    ("minus the prior-sample estimate", "prior_sample_nll", "144.6, as NLL (MCPC)", 2),
    ("evidence NLL", "evidence_nll", "", 2),
)
"""Label, name in a run, what the papers report on MNIST, digits."""

PAPER_CAVEAT = """\
The papers trained for longer and on all images. That of DCPC reports reconstructions of images
whose particles were fitted during training, under a continuous Bernoulli likelihood; here they are
of images inferred from scratch, under the Bernoulli likelihood. A run of `dcpc-paper` on all images
under the paper's likelihood is among the
[results](../../docs/results.md#the-papers-algorithm-with-its-likelihood).
"""

Budget = Literal["seconds", "gradients"]
BUDGETS: tuple[Budget, ...] = get_args(Budget)
Run = dict[str, Any]


def write_report(runs: Mapping[str, Sequence[Run]], results: Path) -> None:
    """Writes the tables and the learning curves, and prints the tables."""
    caption = _caption([run for results in runs.values() for run in results])
    for budget in BUDGETS:
        table = f"{format_table(runs, budget)}\n{caption}"
        (results / f"head_to_head_{budget}.md").write_text(table)
        figure = draw_curves(runs, budget)
        figure.savefig(results / f"head_to_head_{budget}.png", dpi=130)
        print(f"Equal {budget}:\n\n{table}")
    (results / "paper.md").write_text(f"{format_paper(runs)}\n{caption}\n{PAPER_CAVEAT}")


def load_runs(folder: Path) -> dict[str, list[Run]]:
    """The finished runs, by algorithm."""
    runs: dict[str, list[Run]] = {}
    for algorithm in ALGORITHMS:
        files = sorted(folder.glob(f"{algorithm}-seed*.json"))
        if files:
            runs[algorithm] = [json.loads(file.read_text()) for file in files]
    return runs


def format_table(runs: Mapping[str, Sequence[Run]], budget: Budget) -> str:
    """What the runs had learned when a budget was spent, as Markdown, the best evidence first."""
    header = (
        "algorithm",
        "seeds",
        "evidence NLL",
        "reconstruction cross-entropy",
        "reconstruction MSE",
        "seconds",
        "gradient evaluations",
    )
    rows = []
    for algorithm, results in runs.items():
        spent = [run["spent"][budget] for run in results]
        figures = {name: [one[name] for one in spent] for name in spent[0]}
        cells = (
            f"`{algorithm}`",
            str(len(results)),
            _with_error(figures["evidence_nll"], 2),
            _with_error(figures["reconstruction_cross_entropy"], 2),
            _with_error(figures["reconstruction_mse"], 4),
            f"{mean(figures['seconds']):.0f}",
            f"{mean(figures['gradients']) / 1e6:.1f} million",
        )
        rows.append((mean(figures["evidence_nll"]), cells))
    return table(header, [cells for _, cells in sorted(rows)], "github") + "\n"


def format_paper(runs: Mapping[str, Sequence[Run]]) -> str:
    """The papers' figures beside those of the runs by time, as Markdown."""
    algorithms = [algorithm for algorithm in PAPER_ALGORITHMS if algorithm in runs]
    header = ("", "reported", *(f"`{algorithm}`" for algorithm in algorithms))
    rows = []
    for label, name, reported, digits in PAPER_FIGURES:
        columns = ([run["spent"]["seconds"][name] for run in runs[a]] for a in algorithms)
        rows.append((label, reported, *(_with_error(column, digits) for column in columns)))
    return table(header, rows, "github") + "\n"


def draw_curves(runs: Mapping[str, Sequence[Run]], budget: Budget) -> Figure:
    """Evidence NLL against what was spent of a budget, and the table's final figures beside it.

    Curves and figures are means over the seeds with their standard errors, in the table's order.
    An algorithm has the colour of the one that it warms up for, with dashes and hollow dots.
    """
    figure = Figure(figsize=(9.5, 4.5), layout="constrained")
    curves, finals = figure.subplots(1, 2, width_ratios=(1.3, 1))
    colours: dict[str, str] = {}
    dots: dict[str, Any] = {"marker": "o", "markersize": 4}
    unit = 1.0 if budget == "seconds" else 1e6
    final = {name: [run["spent"][budget]["evidence_nll"] for run in runs[name]] for name in runs}
    order = sorted(final, key=lambda name: mean(final[name]))
    for algorithm, results in runs.items():
        points = list(zip(*(run["curve"] for run in results), strict=True))
        spent = [mean(point[budget] for point in group) / unit for group in points]
        nll = [[point["evidence_nll"] for point in group] for group in points]
        base = algorithm.removesuffix("-warm")
        colour = colours.setdefault(base, f"C{len(colours)}")
        style, fill = ("-", colour) if algorithm == base else ("--", "white")
        middle, error = [mean(one) for one in nll], [_standard_error(one) for one in nll]
        curves.errorbar(spent, middle, error, color=colour, linestyle=style, mfc=fill, **dots)
        figures, place = final[algorithm], order.index(algorithm)
        centre, error = mean(figures), _standard_error(figures)
        finals.errorbar(centre, place, xerr=error, fmt="o", color=colour, mfc=fill)
        label = f"  {algorithm}  {_with_error(figures, 2)}"
        finals.text(centre + error, place, label, va="center", fontsize=9)
    budgets = [run["spent"][budget][budget] for results in runs.values() for run in results]
    curves.axvline(mean(budgets) / unit, color="grey", linestyle=":", label="budget")
    curves.legend(loc="upper right")
    curves.set_xlabel(
        "seconds of training" if budget == "seconds" else "gradient evaluations, millions"
    )
    curves.set_ylabel("evidence NLL, nats per image")
    curves.set_title(
        f"While training: {CURVE_IMAGES} images, {CURVE_TEMPERATURES} temperatures", fontsize=10
    )
    finals.set(xlabel="evidence NLL, nats per image", yticks=[])
    finals.margins(x=0.6)
    finals.set_xlim(left=min(mean(one) for one in final.values()) - 1)
    finals.invert_yaxis()
    finals.set_title("Budget spent: the table's figures", fontsize=10)
    return figure


def _standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean over the seeds; zero of a single one."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _with_error(values: Sequence[float], digits: int) -> str:
    """Mean and standard error over the seeds."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {_standard_error(values):.{digits}f}"


def _caption(runs: Sequence[Run]) -> str:
    setting = runs[0]["setting"]
    spread = mean(run["spent"]["seconds"]["evidence_nll_se"] for run in runs)
    return (
        "Mean ± standard error over the seeds, of first parameters and of training's noise; the "
        "images trained on and their order are the same. All models are measured on the same "
        f"{setting['num_measured']} held-out images by the same annealing, of "
        f"{setting['num_particles']} particles over {setting['num_temperatures']} temperatures: "
        "they compare more closely than images differ, of which others would move all figures "
        f"together, by some {spread:.1f} nats.\n"
    )
