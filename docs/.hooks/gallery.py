"""Cards of the gallery: a figure of each notebook above what the page says of it.

The first figure of a notebook is shown, unless a comment after the link names another one, as in
`<!-- figure 3 -->`.
"""

from __future__ import annotations

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

ITEM = re.compile(
    r"^- (\[[^\]]+\]\(\.\./(notebooks/\w+)\.ipynb\))(?:<!-- figure (\d+) -->)?", re.MULTILINE
)
LIST = re.compile(r"(?:^- .*\n(?:  .*\n)*)+", re.MULTILINE)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str | None:
    if page.file.src_uri != "gallery.md":
        return None

    def with_figure(item: re.Match[str]) -> str:
        link, notebook, number = item.groups(default="1")
        figures = [uri for uri in files.src_uris if uri.startswith(f"{notebook}_files/")]
        shown = figures[int(number) - 1]
        return f"\n-   ![](../{shown}){{ .figure }}\n\n    **{link}**"

    def as_cards(items: re.Match[str]) -> str:
        cards = ITEM.sub(with_figure, items[0])
        return f'<div class="grid cards" markdown>\n\n{cards}\n</div>\n'

    return LIST.sub(as_cards, markdown)
