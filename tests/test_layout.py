"""Imports point down: read off the source, so that no order of importing hides anything."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "dcpc").rglob("*.py"))
}


def imported(name: str, nodes: Iterator[ast.AST] | list[ast.stmt]) -> set[str]:
    """What the statements import: modules of the package, and others."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{name} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {n if n in SOURCES else node.module for n in names}
    return found


def test_nothing_below_training_imports_lightning() -> None:
    below = {n: path for n, path in SOURCES.items() if not f"{n}.".startswith("dcpc.training.")}
    upward = {
        (name, module)
        for name, path in below.items()
        for module in imported(name, ast.walk(ast.parse(path.read_text())))
        if "lightning" in module or f"{module}.".startswith("dcpc.training.")
    }
    assert len(below) < len(SOURCES)
    assert upward == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        name: imported(name, ast.parse(path.read_text()).body) & SOURCES.keys()
        for name, path in SOURCES.items()
    }
    assert graph["dcpc.training.modules"] > {"dcpc.training.modules.particle"}
    assert len(list(TopologicalSorter(graph).static_order())) == len(SOURCES)  # or CycleError
