from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from dcpc.evaluation import FrozenParticles
from dcpc.training.cli import ConfiguredCLI
from experiments import front_page

ROOT = Path(__file__).parents[2]
CHECKPOINT = "checkpoints/digits.pt"


def test_each_row_shows_what_its_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    model = ConfiguredCLI(["fit", "--config=configs/digits.json"]).model.model
    frozen = FrozenParticles.from_checkpoint(CHECKPOINT, model)
    rows = front_page.rows(frozen, num_temperatures=10, seed=0)
    images = rows["held-out images"]
    positions = [(frozen.originals == image).flatten(1).all(1).nonzero()[0] for image in images]
    assert frozen.labels[torch.cat(positions)].tolist() == list(range(10))
    for name in ("lower halves", "completed"):
        assert torch.equal(rows[name][:, :, 4:], images[:, :, 4:])
        assert not torch.equal(rows[name][:, :, :4], images[:, :, :4])
    error = (rows["reconstructed"] - images).square().mean()
    assert error < 0.5 * (images - frozen.originals.mean(0)).square().mean()


def test_the_picture_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    files = ["--config=configs/digits.json", f"--checkpoint={CHECKPOINT}"]
    front_page.main([*files, "--num_temperatures=2", f"--results={tmp_path}"])
    with Image.open(tmp_path / "front_page.png") as picture:
        assert picture.width > 800
