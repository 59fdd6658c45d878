"""Notebooks as pages, with the outputs and figures that are stored in them."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
DOWNLOAD = '\n\n<a href="{0}" download>Download this notebook</a>\n'


def on_config(config: MkDocsConfig) -> None:
    (gallery,) = [entry["Gallery"] for entry in config.nav if "Gallery" in entry]
    gallery += [f"notebooks/{path.stem}.md" for path in sorted(NOTEBOOKS.glob("*.ipynb"))]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        folder = f"{path.stem}_files"
        exporter = MarkdownExporter(preprocessors=[CoalesceStreamsPreprocessor])
        text, resources = exporter.from_filename(
            str(path), resources={"output_files_dir": folder, "unique_key": path.stem}
        )
        title, rest = re.match(r"(# [^\n]*)(.*)", text.strip(), re.DOTALL).groups()
        page = title + DOWNLOAD.format(path.name) + rest
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page))
        raw = File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path))
        files.append(raw)
        for name, content in resources["outputs"].items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files
