"""The shipped checkpoints: small, listed, and of the models that their configs name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dcpc.evaluation import FrozenParticles
from dcpc.training.cli import ConfiguredCLI

ROOT = Path(__file__).parents[1]
CONFIGS = {
    "digits.pt": "digits.json",
    "digits-semi.pt": "digits-semi.json",
    "digits-style.pt": "digits-style.json",
    "mnist.pt": "mnist.json",
    "cifar10.pt": "cifar10.json",
    "bouncing-digits.pt": "bouncing-digits.json",
    "memory.pt": "memory.json",
    "transformer.pt": "transformer.json",
}
FILES = sorted((ROOT / "checkpoints").glob("*.pt"))


def test_checkpoints_are_small_and_listed() -> None:
    sizes = [path.stat().st_size for path in FILES]
    assert {path.name for path in FILES} == set(CONFIGS)
    assert max(sizes) < 10e6
    assert sum(sizes) < 40e6
    listed = (ROOT / "checkpoints" / "README.md").read_text()
    for path in FILES:
        assert f"| `{path.name}` |" in listed
        assert f"--output checkpoints/{path.name}" in listed


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_checkpoint_reconstructs_its_images_without_inference(path: Path, tmp_path: Path) -> None:
    config = ROOT / "configs" / CONFIGS[path.name]
    built = ConfiguredCLI(
        ["fit", f"--config={config}", f"--trainer.default_root_dir={tmp_path}", "--num_threads=1"]
    )
    frozen = FrozenParticles.from_checkpoint(path, built.model.model)
    originals = frozen.originals[:100]
    x = originals.to(torch.get_default_dtype())
    error = (frozen.select(range(len(x))).reconstruct(originals) - x).square().mean()
    # A model that had learned nothing but the mean image would do no better than the variance;
    # that of sequences predicts every symbol from those before it.
    share = 0.9 if path.name == "transformer.pt" else 0.5
    assert error < share * (x - x.mean(0)).square().mean()
