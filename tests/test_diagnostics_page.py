"""`docs/diagnostics.md` has a word on every number and every warning that a user can see."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from types import ModuleType

import pyro
import pyro.distributions as dist
import pytest
import torch
from pages import ROOT

from dcpc import DCPC, advice, convergence
from dcpc.divide import dividing
from dcpc.evaluation.quantities import QUANTITIES
from dcpc.filtering import posterior as filtered
from dcpc.training import divergence

NUM_CHARACTERS = 30
"""Of the longest fixed part of a message, so many have to be on the page."""


def flat(text: str) -> str:
    """Text on one line, without the marks of a quotation."""
    return re.sub(r"\s+", " ", text.replace("`", "").replace("\n>", "\n"))


PAGE = flat((ROOT / "docs" / "diagnostics.md").read_text())


def messages(module: ModuleType) -> Iterator[ast.expr]:
    """The texts that a module's functions yield, return, append to a list, or warn by."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Yield | ast.Return) and node.value is not None:
            yield node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("append", "warn"):
                yield node.args[0]
        elif isinstance(node, ast.IfExp):
            yield node.body
            yield node.orelse


def longest_fixed_part(message: ast.expr) -> str:
    """The longest part of a text that does not depend on the run; empty for what is no text."""
    pieces = message.values if isinstance(message, ast.JoinedStr) else [message]
    fixed = [str(p.value) for p in pieces if isinstance(p, ast.Constant) and p.value is not None]
    return max(fixed, key=len, default="")


FIXED = {
    part
    for module in (advice, convergence, dividing, divergence, filtered)
    for message in messages(module)
    if len(part := flat(longest_fixed_part(message)).strip()) >= NUM_CHARACTERS // 2
    and part != "posterior.summary() shows R-hat, ESS and MCSE of every value."
}


@pytest.mark.parametrize("text", sorted(FIXED))
def test_every_warning_has_a_place_on_the_page(text: str) -> None:
    assert text[:NUM_CHARACTERS] in PAGE


def test_the_warnings_were_found() -> None:
    assert len(FIXED) >= 20


def ridge(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(a + b, 0.05), obs=y)


def test_every_number_of_the_tables_has_a_place_on_the_page() -> None:
    posterior = DCPC(ridge, num_particles=20).run(torch.tensor(1.0), num_sweeps=20, seed=0)
    shown = {
        *posterior.statistics()["a"],
        *posterior.diagnostics()["a"],
        *(quantity.label for quantity in QUANTITIES.values()),
    }
    assert [name for name in shown if name not in PAGE] == []
