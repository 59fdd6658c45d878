"""Notebooks with their outputs, executed anew."""

from __future__ import annotations

from nbformat.v4 import new_code_cell, new_notebook

from experiments.store_figures import execute, strip


def test_what_a_run_shows_is_stored_and_what_belongs_to_the_run_is_not() -> None:
    constants = new_code_cell("COUNT = 2", metadata={"tags": ["parameters"], "trusted": True})
    loud = new_code_cell("import sys\nprint(COUNT * 10)\nprint('a warning', file=sys.stderr)")
    notebook = new_notebook(cells=[constants, loud])
    execute(notebook, ["COUNT = 3"])
    strip(notebook)
    first, second = notebook.cells
    assert first.source == "COUNT = 2"
    assert first.metadata == {"tags": ["parameters"]}
    assert second.metadata == {}
    assert [output.text for output in second.outputs] == ["30\n"]
    assert [cell.execution_count for cell in notebook.cells] == [1, 2]
    assert notebook.metadata.language_info == {"name": "python"}
