"""Posteriors, units and engines as text and as HTML."""

from __future__ import annotations

import html.parser
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

from dcpc import DCPC

NAME = "<b>&mu</b>"
"""A site whose name is markup."""


def many_sites(x):
    for index in range(20):
        pyro.sample(f"z{index}", dist.Normal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(5, 30), 1.0).to_event(2))
    pyro.sample("x", dist.Normal(w.sum(), 1.0), obs=x)


def marked_up(x):
    m = pyro.sample(NAME, dist.Normal(0.0, 1.0))
    with pyro.plate("<i>", 3):
        pyro.sample("z", dist.Normal(m, 1.0))
    pyro.sample("x", dist.Normal(m, 1.0), obs=x)


@pytest.fixture(scope="module")
def posteriors():
    options = {"num_sweeps": 40, "seed": 0, "progress": False, "evidence": False}
    x = torch.tensor(1.0)
    found = {}
    for model in (many_sites, marked_up):
        posterior = DCPC(model, num_particles=100, certify=False).run(x, **options)
        found[model] = replace(posterior, warnings=("a <i>fault</i>", "advice"))
    return found


class Tags(html.parser.HTMLParser):
    """Counts tags, and checks that they are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_repr_has_one_short_line_per_site_and_fits_a_screen(posteriors):
    lines = repr(posteriors[marked_up]).splitlines()
    assert len(lines) == 4  # particles, two sites, warnings
    assert lines[0].startswith("Posterior: 100 particles, 20 sweeps kept of each")
    mean = float(posteriors[marked_up].mean()[NAME])
    assert lines[1].split()[0] == NAME
    assert f"mean {mean:.4g}" in lines[1]
    lines = repr(posteriors[many_sites]).splitlines()
    assert len(lines) <= 20
    assert max(map(len, lines)) <= 120
    assert "5 more sites" in lines[-2]


def test_a_summary_lists_the_first_values_and_counts_the_others(posteriors):
    posterior = posteriors[many_sites]
    lines = posterior.format_summary().splitlines()
    assert "w[1,9]" in lines[60]
    assert lines[61] == "... and 110 more values"
    table = posterior.statistics()["w"]
    row = lines[60].split()
    assert float(row[1]) == pytest.approx(float(table["mean"][1, 9]), rel=1e-3)
    assert float(row[6]) == pytest.approx(float(table["mcse"][1, 9]), rel=0.05)


def test_a_summary_says_what_it_is_of_and_what_is_wrong(posteriors):
    posterior = posteriors[marked_up]
    text = posterior.format_summary()
    assert "100 particles, 20 sweeps kept of each; ESS of the final weights 100%" in text
    assert text.count("ESS of the") == 1
    assert repr(posterior).endswith("2 warnings: see summary() or .warnings")
    for message in posterior.warnings:
        assert f"warning: {message}" in text


@pytest.mark.parametrize("model", [many_sites, marked_up])
def test_html_is_the_table_escaped(posteriors, model):
    tags = Tags(posteriors[model]._repr_html_())
    assert {"table", "tr", "th", "td", "p"} <= set(tags.seen)
    assert "b" not in tags.seen
    if model is marked_up:
        assert NAME in tags.text
        assert tags.seen.count("tr") == 5  # header, m, three z


def test_units_print_as_a_table_in_every_way():
    engine = DCPC(marked_up, num_particles=3)
    units = engine.units(torch.tensor(1.0))
    assert repr(units) == str(units)
    assert repr(units).splitlines()[0].split()[:2] == ["unit", "parents"]
    tags = Tags(units._repr_html_())
    assert tags.seen.count("tr") == 3
    assert "<i>(3)" in tags.text


def test_an_engine_names_its_model_and_parts():
    engine = DCPC(marked_up, num_particles=3, algorithm="dcpc-smc", blocks=[(NAME, "z")])
    text = repr(engine)
    assert text.startswith("DCPC(marked_up, num_particles=3, algorithm='dcpc-smc', blocks=")
    assert "\n" not in text
    tags = Tags(engine._repr_html_())
    assert "b" not in tags.seen
    assert "correction" in tags.text


def test_an_inexact_algorithm_says_so_in_the_summary():
    engine = DCPC(marked_up, num_particles=3, algorithm="pgd")
    posterior = engine.run(torch.tensor(1.0), num_sweeps=40, seed=0, progress=False)
    assert "does not leave the posterior invariant" in posterior.format_summary()
