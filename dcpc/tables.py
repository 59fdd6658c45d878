"""Tables, and posteriors as text and as HTML: what `summary` prints and notebooks show."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from tabulate import tabulate
from torch import Tensor

from dcpc.divide.supports.discrete import ONE_HOT, DiscreteSupport

if TYPE_CHECKING:
    from dcpc.posterior import Posterior

MAX_ROWS = 60
"""Values that a summary lists."""

MAX_SHARES = 4
"""Values of a discrete latent whose probabilities a summary lists."""

MAX_SITES = 16
"""Sites that a `repr` lists."""

INEXACT = "this algorithm does not leave the posterior invariant: its samples are approximate"


def format_posterior(posterior: Posterior, prob: float) -> str:
    """The table of `posterior.statistics(prob)`, and the footnotes."""
    tables = [
        table(header, rows, "plain", right=range(1, len(header)))
        for header, rows in _tables(posterior, prob)
    ]
    return "\n".join(["\n\n".join(tables), *_more(posterior), "", *_footnotes(posterior)])


def html_posterior(posterior: Posterior, prob: float = 0.9) -> str:
    """The same for a notebook."""
    rows = "".join(table(*part, "html") for part in _tables(posterior, prob))
    notes = "<br>".join(map(html.escape, [*_more(posterior), *_footnotes(posterior)]))
    return f"{rows}<p>{notes}</p>"


def summarise_posterior(posterior: Posterior) -> str:
    """A line per site: what `repr` shows."""
    lines = [f"Posterior: {_particles(posterior)}; {_evidence(posterior)}"]
    mean, std = posterior.mean(), posterior.std()
    names = list(posterior.samples)
    width = max(len(name) for name in names[:MAX_SITES])
    for name in names[:MAX_SITES]:
        shape = tuple(posterior.samples[name].shape[1:])
        about = f"mean {_span(mean[name])}, std {_span(std[name])}"
        lines.append(f"  {name:<{width}}  {shape or '()'!s:<8} {about}")
    if len(names) > MAX_SITES:
        lines.append(f"  ... and {len(names) - MAX_SITES} more sites")
    if posterior.warnings:
        count = len(posterior.warnings)
        lines.append(f"{count} warning{'s' * (count > 1)}: see summary() or .warnings")
    return "\n".join(lines)


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    style: Literal["plain", "github", "html"],
    right: Sequence[int] = (),
) -> str:
    """A table of text by `tabulate`, without a header where that is empty; `right`: flush right."""
    sides = [
        "right" if column in right else "left" for column in range(len(rows[0] if rows else header))
    ]
    return tabulate(rows, header, tablefmt=style, colalign=sides, disable_numparse=True)


def _tables(posterior: Posterior, prob: float) -> list[tuple[list[str], list[list[str]]]]:
    """Headers and rows: of the latents with moments, and of those with probabilities."""
    numbers = _rows(posterior, prob)
    discrete = _discrete_rows(posterior, MAX_ROWS - len(numbers[1]))
    return [part for part in (numbers, discrete) if part[1]]


def _discrete_rows(posterior: Posterior, room: int) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the discrete latents: modes, probabilities, and their quality."""
    columns = ("ess_bulk", "r_hat")
    rows: list[list[str]] = []
    for name, support in posterior.discrete.items():
        about, shares = posterior.statistics()[name], posterior.probabilities(name)
        offset = 0 if support.kind == ONE_HOT else int(support.lower)
        modes = posterior.mode(name)
        quality = torch.stack([_by_element(about[c], support, c) for c in columns], -1)
        elements = zip(
            itertools.islice(_labels(name, modes.shape), max(0, room - len(rows))),
            modes.flatten().tolist(),
            shares.flatten(0, -2).tolist() if shares.dim() > 1 else [shares.tolist()],
            quality.reshape(-1, len(columns)).tolist(),
            strict=False,
        )
        for label, mode, share, numbers in elements:
            rows.append([label, str(mode), _shares(share, offset), *_cells(columns, numbers)])
    return ["", "mode", "probabilities", *columns], rows


def _by_element(values: Tensor, support: DiscreteSupport, column: str) -> Tensor:
    """A statistic of each element; of a one-hot vector, that of the entry known least."""
    if support.kind != ONE_HOT:
        return values.double()
    values = values.double().nan_to_num(nan=math.inf if column == "ess_bulk" else -math.inf)
    return values.amin(-1) if column == "ess_bulk" else values.amax(-1)


def _shares(shares: Sequence[float], offset: int) -> str:
    """The most probable values with their probabilities, as text."""
    order = sorted(range(len(shares)), key=lambda i: -shares[i])[:MAX_SHARES]
    return "  ".join(f"{i + offset}: {shares[i]:.3f}" for i in order)


def _rows(posterior: Posterior, prob: float) -> tuple[list[str], list[list[str]]]:
    """Header and rows of `posterior.statistics(prob)`, but for discrete latents."""
    statistics = posterior.statistics(prob)
    columns = list(next(iter(statistics.values())))
    rows: list[list[str]] = []
    for name, about in statistics.items():
        if name in posterior.discrete:
            continue
        room = MAX_ROWS - len(rows)
        values = torch.stack([about[column].double().flatten()[:room] for column in columns], -1)
        labels = itertools.islice(_labels(name, about["mean"].shape), room)
        for label, numbers in zip(labels, values.tolist(), strict=True):
            rows.append([label, *_cells(columns, numbers)])
    return ["", *columns], rows


def _labels(name: str, shape: torch.Size) -> Iterator[str]:
    for index in itertools.product(*map(range, shape)):
        yield f"{name}[{','.join(map(str, index))}]" if index else name


def _cells(columns: Sequence[str], numbers: Sequence[float]) -> list[str]:
    """Numbers as text: ESS as integers, R-hat to three decimals."""
    formats = {"ess_bulk": ".0f", "ess_tail": ".0f", "r_hat": ".3f", "mcse": ".2g"}
    return [
        format(number, formats.get(column, ".4g"))
        for column, number in zip(columns, numbers, strict=True)
    ]


def _more(posterior: Posterior) -> list[str]:
    total = sum(z[0].numel() for z in posterior.samples.values())
    return [f"... and {total - MAX_ROWS} more values"] if total > MAX_ROWS else []


def _footnotes(posterior: Posterior) -> list[str]:
    used = "all kept draws" if posterior.describes_history else "the final weighted particles"
    lines = [f"{_particles(posterior)}; the table is of {used}", _evidence(posterior)]
    if not posterior.is_exact:
        lines.append(INEXACT)
    lines += [f"{unit} moved jointly: {reason}" for unit, reason in posterior.joined.items()]
    lines += [
        f"{count} of the values of {name} are masked out: they are no part of the posterior, and "
        "keep their draws of the prior"
        for name, count in posterior.num_masked.items()
    ]
    if posterior.num_bad:
        lines.append(
            f"{posterior.num_bad} log-densities were NaN or infinite and counted as density zero"
        )
    lines += [f"warning: {message}" for message in posterior.warnings]
    return lines


def _particles(posterior: Posterior) -> str:
    share = float(posterior.ess.mean()) / posterior.num_particles
    kept = posterior.num_kept
    return (
        f"{posterior.num_particles} particles"
        + (f", {kept} sweeps kept of each" if kept else "")
        + f"; ESS of the final weights {share:.0%}"
    )


def _evidence(posterior: Posterior) -> str:
    value = posterior.evidence.log_evidence
    if value is None:
        return "no evidence estimate"
    if value.numel() == 1:
        error = posterior.log_evidence_se.item()
        return f"log evidence {value.item():.3f} (standard error {error:.3f})"
    return f"mean log evidence per cell {value.mean().item():.3f}"


def _span(values: Tensor) -> str:
    if not values.numel():
        return "-"
    low, high = float(values.min()), float(values.max())
    return f"{low:.4g}" if values.numel() == 1 else f"{low:.4g} to {high:.4g}"
