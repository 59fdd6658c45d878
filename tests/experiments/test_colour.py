"""The comparison of colour generators, in a small setting from pictures to the table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dcpc.evaluation import frechet_distance
from experiments import colour

ROOT = Path(__file__).parents[2]


class Mean:
    """Features that are known: the mean of each channel, in [0, 1]."""

    def features(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def test_the_table_measures_samples_against_held_out_images() -> None:
    torch.manual_seed(0)
    black, white = -torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    summary = {"evidence_nll": 4321.4, "evidence_nll_se": 12.3, "reconstruction_mse": 0.0123}
    measured = colour.Measured(summary, prior=black, pseudo=white, picture=white)
    table = colour.format_table({"dcpc": measured}, white, white, {"Frechet": Mean()})
    # All images of a set are alike, so that the distance is that of the means, 0 or 1 by channel.
    exact = frechet_distance(torch.zeros(3), torch.zeros(3, 3), torch.ones(3), torch.zeros(3, 3))
    assert exact == pytest.approx(3.0)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert rows[0][3:] == ["Frechet, pseudo-posterior", "Frechet, prior"]
    assert rows[2] == ["`dcpc`", "4321 ± 12", "0.0123", "0.00", "3.00"]
    assert rows[3] == ["training images", "", "", "0.00", ""]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The number of training batches")  # one of 50 images
def test_from_pictures_to_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for number in range(60):
        folder = tmp_path / "images" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    options = {
        "path": tmp_path / "images",
        "minutes": 0.05,
        "num_training": 50,
        "num_measured": 2,
        "num_temperatures": 2,
        "num_components": 1,
        "num_samples": 70,
        "num_threads": 1,
        "runs": tmp_path / "runs",
        "results": tmp_path / "results",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    colour.main([*arguments, "--algorithms", "pgd", "vae"])
    table = (tmp_path / "results" / "colour.md").read_text()
    assert [row.split(" | ")[0] for row in table.splitlines()[2:]] == [
        "| `pgd`",
        "| `vae`",
        "| training images",
    ]
    for algorithm in ("pgd", "vae"):
        assert (tmp_path / "results" / f"colour_{algorithm}.png").stat().st_size > 1000
    before = (tmp_path / "runs" / "pgd-0.05-minutes" / "last.ckpt").stat().st_mtime_ns
    colour.main([*arguments, "--algorithms", "pgd"])
    assert (tmp_path / "runs" / "pgd-0.05-minutes" / "last.ckpt").stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match=r"another config or of other options.*delete it to train"):
        colour.main([*arguments, "--algorithms", "pgd", "--num_training", "40"])
