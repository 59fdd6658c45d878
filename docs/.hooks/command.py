"""Help screens as the command prints them, where a page asks for them.

A page asks by a comment, which the repository's view does not show: `<!-- dcpc fit --help -->`.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

MARK = re.compile(r"^<!-- (dcpc [^>]*--help) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: object) -> str:
    def screen(mark: re.Match[str]) -> str:
        script, *words = shlex.split(mark[1])
        shown = subprocess.run(
            [str(Path(sys.executable).with_name(script)), *words],
            capture_output=True,
            text=True,
            check=True,
        )
        return f"```text\n$ {mark[1]}\n{shown.stdout.strip()}\n```"

    return MARK.sub(screen, markdown)
