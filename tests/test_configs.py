from __future__ import annotations

import json
from pathlib import Path

import pytest

from dcpc.training import ImageData, ParticleModule
from dcpc.training.cli import TrainingCLI

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("**/*.json"))


class Parsed(TrainingCLI):
    """Parses a config and builds its classes, but runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_builds_what_it_names(path: Path, tmp_path: Path) -> None:
    folder = f"--trainer.default_root_dir={tmp_path}"
    built = Parsed(["fit", "--config", str(path), folder])
    assert isinstance(built.model, ParticleModule)
    assert isinstance(built.datamodule, ImageData)
    written = json.loads(path.read_text())
    assert built.model.inference.num_particles == written["model"]["num_particles"]
    assert built.trainer.max_epochs == written["trainer"]["max_epochs"]


def test_there_are_configs() -> None:
    assert "digits" in {path.stem for path in CONFIGS}
