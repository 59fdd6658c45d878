"""Formulas as MathML, so that pages need no script for them."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\(?:\(|\[)(.*?)\\(?:\)|\])</\1>', re.DOTALL
)


def on_page_content(content: str, **_: object) -> str:
    def as_mathml(formula: re.Match[str]) -> str:
        kind, latex = formula.groups()
        display = "block" if kind == "div" else "inline"
        return f"<{kind}>{convert(html.unescape(latex), display=display)}</{kind}>"

    return FORMULA.sub(as_mathml, content)
