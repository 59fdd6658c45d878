from __future__ import annotations

from pathlib import Path

import pytest

from experiments import temperatures

ROOT = Path(__file__).parents[2]


def test_the_study_of_a_checkpoint_has_a_row_for_every_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    files = ["--config=configs/digits.json", "--checkpoint=checkpoints/digits.pt"]
    sizes = ["--num_images=24", "--num_temperatures", "2", "4", "--num_particles", "2", "4"]
    temperatures.main([*files, *sizes, f"--results={tmp_path}"])
    table = (tmp_path / "temperatures_digits.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["2", "2"], ["4", "2"], ["2", "4"], ["4", "4"]]
    assert table in capsys.readouterr().out
    # Two temperatures are far from enough: doubling lowers the NLL by nats.
    change, _, error = rows[2][3].split()
    assert float(change) < -4 * float(error)
