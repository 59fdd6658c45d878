"""The comparison of a transformer's gradients: its baselines by hand, its table and its curves."""

from __future__ import annotations

import json
import math

import torch

from dcpc.training.data import ArrayData, PixelSequences
from experiments import transformer


def test_the_baselines_are_those_of_counted_symbols(tmp_path):
    import numpy as np

    # Place 0 is always black; place 1 is white in half of the images, whatever the split.
    images = np.zeros((40, 1, 2), np.uint8)
    images[::2, 0, 1] = 255
    np.save(tmp_path / "images.npy", images)
    data = PixelSequences(ArrayData(str(tmp_path), num_held_out=10), num_levels=2)
    told = transformer.baselines(data)
    x = data.training_set.first(30)[0].flatten(1)
    held_out = data.held_out_set.first(10)[0].flatten(1)
    white = (float(x.sum()) + 1) / (60 + 2)
    share = float(held_out.double().mean())
    expected = -share * math.log2(white) - (1 - share) * math.log2(1 - white)
    assert told["uniform"] == 1.0
    assert math.isclose(told["frequencies"], expected, rel_tol=1e-6)
    at_one = (float(x[:, 1].sum()) + 1) / 32
    here = float(held_out[:, 1].double().mean())
    second = -here * math.log2(at_one) - (1 - here) * math.log2(1 - at_one)
    expected = (-math.log2(31 / 32) + second) / 2
    assert math.isclose(told["frequencies by place"], expected, rel_tol=1e-6)


def test_contenders_are_trained_once_and_told_in_a_table(tmp_path, capsys):
    arguments = ["--seconds", "0.01", "--seeds", "0", "--folder", str(tmp_path), "--only"]
    only = [transformer.FULL, transformer.SAME_STEPS, "4 latents, dcpc"]
    small = [
        "--model.model.width=4",
        "--model.model.num_heads=1",
        "--model.held_out.prior_samples=2",
        "--model.compile=false",
        "--data.images.num_held_out=9",
        "--data.images.batch_size=5",
    ]
    transformer.main([*arguments, *only, "--", *small])
    told = capsys.readouterr().out
    for name in (*only, "uniform", "frequencies by place"):
        assert name in told
    files = sorted(tmp_path.glob("*.json"))
    assert len(files) == 3
    steps = {r["name"]: r["steps"] for r in (json.loads(path.read_text()) for path in files)}
    assert steps[transformer.FULL] == steps[transformer.SAME_STEPS] >= 1
    assert (tmp_path / "transformer.png").stat().st_size > 0
    written = [path.stat().st_mtime_ns for path in files]
    transformer.main([*arguments, *only, "--", *small])
    assert written == [path.stat().st_mtime_ns for path in files]
    assert "uniform" in (tmp_path / "transformer.md").read_text()


def test_backpropagation_learns_by_cross_entropy():
    built = transformer.ConfiguredCLI(
        [
            "fit",
            f"--config={transformer.CONFIG}",
            *transformer.CONTENDERS[transformer.BACKPROPAGATION],
            "--model.model.width=4",
        ]
    )
    x = torch.randint(0, 8, (3, 64))
    told = built.model.model.network(x).log_softmax(-1)
    expected = -told.gather(-1, x.unsqueeze(-1)).mean()
    torch.testing.assert_close(transformer.losses(built.model)(x), expected)
