"""The small files: made by the command, opened by the library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dcpc.evaluation import FrozenParticles
from dcpc.models import DeepLatentGaussian
from dcpc.training.command import main as dcpc_command
from experiments import freeze

ROOT = Path(__file__).parents[2]
SMALL = ["--model.held_out.num_particles=3", "--data.num_held_out=1700", "--num_threads=1"]


def test_a_trained_model_becomes_a_file_that_the_library_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    folder = f"--trainer.default_root_dir={tmp_path / 'run'}"
    config = "--config=configs/digits.json"
    quick = [
        "--trainer.max_epochs=1",
        "--trainer.log_every_n_steps=1",
        "--trainer.limit_val_batches=0",
    ]
    dcpc_command(["fit", config, folder, *quick, *SMALL])
    output = tmp_path / "files" / "digits.pt"
    sizes = ["--num_images=6", "--num_kept=2", "--num_temperatures=3"]
    freeze.main([config, f"--output={output}", *sizes, folder, *SMALL])
    assert f"{output}: " in capsys.readouterr().out

    model = DeepLatentGaussian([10, 32], [1, 8, 8])
    frozen = FrozenParticles.from_checkpoint(output, model)
    assert frozen.latents["z1"].shape == (2, 6, 10)
    assert frozen.labels.shape == (6,)
    saved = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(model.layers[0].weight, saved["model.layers.0.weight"])
    assert frozen.reconstruct(frozen.originals).shape == (6, 1, 8, 8)
    assert float(frozen.originals.max()) == 1.0
