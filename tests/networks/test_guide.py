"""What the guide on networks promises of its example and its command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pages import ROOT, commands, fences

from dcpc.training.command import main

GUIDE = fences((ROOT / "docs" / "guides" / "networks.md").read_text())


def test_the_example_learns() -> None:
    (example,) = [block.text for block in GUIDE if block.kind == "python"]
    names: dict[str, Any] = {}
    exec(compile(example, "networks.md", "exec"), names)
    assert float(names["accuracy"]) > 0.9


def test_the_command_draws_the_boundary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = [c for block in GUIDE if block.kind == "bash" for c in commands(block.text)]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    main([*command.split()[1:], "--trainer.max_epochs=1"])
    assert (tmp_path / "runs" / "networks" / "two-moons" / "decision_boundary.png").exists()
