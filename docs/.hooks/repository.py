"""Brings files of the repository into the site, and lets links to them hold in both.

Pages link as the repository's own view needs it, `../configs/README.md` from a page in `docs/`. On
the site such a file lies where it lies in the repository, with `docs/` as the root.
"""

from __future__ import annotations

import os
import posixpath
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree.ElementTree import Element

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "checkpoints/README.md",
    "configs/README.md",
    "experiments/benchmarks/README.md",
    "experiments/results/*.md",
)


def address(target: str, page: File, files: Files, config: MkDocsConfig) -> str:
    """Link target of the repository's view as one that MkDocs resolves.

    A file that no page is made of is added to the site where a page links to it.
    """
    parts = urlsplit(target)
    if parts.scheme or parts.netloc or not parts.path or parts.path.startswith("/"):
        return target
    is_outside = page.abs_src_path is None or not Path(page.abs_src_path).is_relative_to(
        config.docs_dir
    )
    folder = posixpath.dirname(page.src_uri if is_outside else f"docs/{page.src_uri}")
    path = posixpath.normpath(posixpath.join(folder, parts.path))
    uri = path.removeprefix("docs/")
    if path.startswith("notebooks/"):
        uri = path.removesuffix(".ipynb") + ".md" if path.endswith(".ipynb") else path
    if uri not in files.src_uris and (ROOT / path).is_file():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return parts._replace(path=posixpath.relpath(uri, posixpath.dirname(page.src_uri))).geturl()


class RepositoryLinks(Extension, Treeprocessor):
    """Markdown extension that rewrites the links of the page at hand."""

    def __init__(self) -> None:
        Extension.__init__(self)
        self.page: Page | None = None

    def extendMarkdown(self, md: Markdown) -> None:
        md.treeprocessors.register(self, "repository_links", 10)  # MkDocs' own come at 0

    def show(self, page: Page, files: Files, config: MkDocsConfig) -> None:
        self.page, self.files, self.config = page, files, config

    def run(self, root: Element) -> None:
        if self.page is None:
            return
        for element in root.iter():
            for key in {"a": ("href",), "img": ("src",)}.get(str(element.tag), ()):
                if target := element.get(key):
                    element.set(key, address(target, self.page.file, self.files, self.config))


links = RepositoryLinks()


def on_config(config: MkDocsConfig) -> None:
    config.markdown_extensions.append(links)  # type: ignore[arg-type]


@event_priority(50)
def on_files(files: Files, config: MkDocsConfig) -> Files:
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=os.fspath(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    links.show(page, files, config)
