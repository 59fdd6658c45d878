"""The documentation site: it builds without a warning, and what it should show is there."""

from __future__ import annotations

import ast
import html.parser
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(ROOT / name / "README.md" for name in ("checkpoints", "configs")),
        *(ROOT / "experiments").rglob("*.md"),
        *DOCS.rglob("*.md"),
    ]
)
CODE = re.compile(r"^( *)```.*?^\1```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
ELSEWHERE = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=["']?https?://[^>]*>""")
"""What a tag loads when a page is shown."""
PUBLIC = (
    "dcpc",
    "dcpc.conquer",
    "dcpc.divide",
    "dcpc.evaluation",
    "dcpc.evaluation.evidence",
    "dcpc.evaluation.generation",
    "dcpc.evaluation.images",
    "dcpc.evaluation.particles",
    "dcpc.models",
    "dcpc.networks",
    "dcpc.recombine",
    "dcpc.training",
    "dcpc.training.callbacks",
    "dcpc.training.data",
    "dcpc.training.modules",
)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as repository views and the site make them."""
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in HEADING.findall(text))
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_of_a_page_hold_in_the_repository(page: Path) -> None:
    for target in LINK.findall(CODE.sub("", page.read_text())):
        link = urlsplit(target)
        if link.scheme:
            continue
        file = Path(os.path.normpath(page.parent / unquote(link.path))) if link.path else page
        assert file.exists(), f"{target}: there is no {file}"
        if link.fragment and file.suffix == ".md":
            assert link.fragment in anchors(file), f"{target}: no such heading"


def test_every_notebook_is_in_the_gallery() -> None:
    shown = re.findall(r"\(\.\./notebooks/(\w+)\.ipynb\)", (DOCS / "gallery.md").read_text())
    assert sorted(shown) == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def test_every_public_name_is_in_the_reference() -> None:
    pages = "".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    listed = re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)
    assert len(listed) == len(set(listed))
    public = {n for package in PUBLIC for n in exported(package) if not n.startswith("_")}
    assert public - {name.rpartition(".")[2] for name in listed} == set()


def exported(package: str) -> list[str]:
    """The names of `__all__`, read off the source."""
    source = (ROOT / package.replace(".", "/") / "__init__.py").read_text()
    (names,) = [
        ast.literal_eval(statement.value)
        for statement in ast.parse(source).body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__"
    ]
    return names


class Targets(html.parser.HTMLParser):
    """What a page of the site links to, and the identifiers that it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {value for key in ("id", "name") if (value := values.get(key))}
        if target := values.get({"a": "href", "img": "src", "script": "src"}.get(tag, "")):
            self.links.append(target)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", ".mkdocs.yml"]
    built = subprocess.run(
        [*command, "--site-dir", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[-3000:]
    return folder


def test_links_of_the_built_site_lead_to_files_and_anchors(site: Path) -> None:
    pages = {path: Targets(path) for path in site.rglob("*.html") if path.name != "404.html"}
    missing = []
    for page, targets in pages.items():
        for target in targets.links:
            link = urlsplit(target)
            if link.scheme or link.path.startswith("/"):
                continue
            path = posixpath.normpath(page.parent / unquote(link.path)) if link.path else page
            other = pages.get(Path(path))
            found = Path(path).exists() and (
                not link.fragment or other is None or link.fragment in other.ids
            )
            if not found and link.fragment != "__skip":
                missing.append(f"{page.relative_to(site)}: {target}")
    assert missing == []


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loads = [tag for tag in ELSEWHERE.findall(page.read_text()) if 'rel="canonical"' not in tag]
        assert loads == [], page.relative_to(site)


def test_notebooks_have_their_stored_figures_on_the_site(site: Path) -> None:
    gallery = (site / "gallery.html").read_text()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        count = path.read_text().count('"image/png"')
        page = (site / "notebooks" / f"{path.stem}.html").read_text()
        assert page.count(f'src="{path.stem}_files/') == count
        assert f'src="notebooks/{path.stem}_files/' in gallery
        assert (site / "notebooks" / path.name).read_bytes() == path.read_bytes()
