"""The programs in `docs/` run as they are written, but for the number of sweeps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROGRAMS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in sorted(DOCS.glob("*.md"))
    for number, block in enumerate(BLOCK.findall(page.read_text()))
]


@pytest.mark.filterwarnings("ignore::dcpc.ConvergenceWarning")
@pytest.mark.parametrize("program", PROGRAMS)
def test_program_of_a_page_runs(program, capsys):
    short = re.sub(r"num_sweeps=[\d_]+", "num_sweeps=20", program)
    names: dict = {}
    exec(compile(short, "page", "exec"), names)
    values = names["posterior"].samples if "posterior" in names else names["state"].latents
    assert values
    assert all(bool(value.isfinite().all()) for value in values.values())
