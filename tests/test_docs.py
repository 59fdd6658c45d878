"""Every page of `docs/` runs from top to bottom, and prints what it shows (see `pages`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from pages import ROOT, Page, commands, difference, fences
from torch import Tensor

DOCS = ROOT / "docs"
RUN = ("python", "bash", "console")
PAGES = [
    pytest.param(page, id=str(page.relative_to(DOCS).with_suffix("")))
    for page in sorted(DOCS.rglob("*.md"))
    if any(block.kind in RUN for block in fences(page.read_text()))
]


@pytest.mark.filterwarnings("ignore::dcpc.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # by other tests
@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")  # of ArviZ, as is
@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.sort_values is deprecated")
@pytest.mark.parametrize("path", PAGES)
def test_page_runs_from_top_to_bottom(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = Page(path)
    page.run()
    for value in (page.names.get("posterior"), page.names.get("state")):
        samples: Mapping[str, Tensor] = getattr(value, "samples", getattr(value, "latents", {}))
        assert all(bool(z.isfinite().all()) for z in samples.values())


def test_output_that_is_shown_may_differ_in_noise_but_not_in_words() -> None:
    shown = "mu  4.39 +- 0.10\n...\nlog evidence -31.28"
    assert difference(shown, "mu  4.21 +- 0.11\ntau 3.6\nlog evidence -31.30\n") == ""
    assert "shown 'mu" in difference(shown, "nu  4.39 +- 0.10\nlog evidence -31.28\n")
    assert "shown 'mu" in difference(shown, "mu  5.90 +- 0.10\nlog evidence -31.28\n")
    assert "not shown" in difference(shown, "mu 4.39 +- 0.10\nlog evidence -31.28\nmore\n")
    assert "shown 'log" in difference(shown, "mu 4.39 +- 0.10\nlog evidence -20.00\n")


def test_commands_may_span_lines_and_have_remarks() -> None:
    assert commands("# first\ndcpc fit \\\n  --config a.json  # train\n\ntensorboard\n") == [
        "dcpc fit --config a.json",
        "tensorboard",
    ]
