"""The comparison's bookkeeping; its trainings are the configs', which have tests of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dcpc.training import AmortisedModule, ParticleModule
from experiments import head_to_head
from experiments.deep_latent_gaussian import DeepLatentGaussian
from experiments.encoders import MLPEncoder

ROOT = Path(__file__).parents[2]


def run(algorithm: str, seed: int, nll: float) -> dict[str, Any]:
    figures = {
        "evidence_nll": nll,
        "reconstruction_cross_entropy": 70.0,
        "reconstruction_mse": 0.01,
    }
    spent = {"seconds": 180.0, "gradient_evaluations": 2_000_000}
    head = {"algorithm": algorithm, "seed": seed, "budget": "seconds", **spent}
    return {**head, "curve": [{**spent, **figures}], "final": figures}


def write(folder: Path, *runs: dict[str, Any]) -> None:
    (folder / "head_to_head").mkdir()
    for one in runs:
        name = f"{one['budget']}-{one['algorithm']}-seed{one['seed']}.json"
        (folder / "head_to_head" / name).write_text(json.dumps(one))


def test_finished_runs_are_not_repeated_and_make_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write(
        tmp_path,
        run("pgd", 0, 110.0),
        run("pgd", 1, 114.0),
        run("dcpc", 0, 108.0),
        run("dcpc", 1, 108.0),
    )
    options = ["--path", "nowhere", "--algorithms", "dcpc", "pgd", "--seeds", "0", "1"]
    head_to_head.main([*options, "--results", str(tmp_path)])
    table = (tmp_path / "head_to_head_seconds.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    # The standard error of 110 and 114 is their half difference.
    assert [row[:3] for row in rows] == [
        ["`dcpc`", "2", "108.00 ± 0.00"],
        ["`pgd`", "2", "112.00 ± 2.00"],
    ]
    assert rows[0][-1] == "2 million"
    assert table in capsys.readouterr().out
    assert (tmp_path / "head_to_head_seconds.png").stat().st_size > 1000


def test_the_budget_by_gradients_is_what_dcpc_took_by_time(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="run --budget seconds first"):
        head_to_head.main(["--budget", "gradients", "--results", str(tmp_path)])
    (tmp_path / "head_to_head").rmdir()
    write(tmp_path, run("dcpc", 0, 108.0))
    assert head_to_head._gradients_of_dcpc(tmp_path / "head_to_head") == 2_000_000


@pytest.mark.parametrize(
    ("algorithm", "num_particles", "leapfrog_steps", "expected"),
    [
        ("dcpc", 4, 1, 3 * 4 * 2 * 2),
        ("dcpc", 4, 3, 3 * 4 * 4 * 2),
        ("pgd", 4, 1, 3 * 4 * 2),
        ("mcpc", 1, 1, 3 * 2),
        ("mcpc", 1, 3, 3 * 3 * 2),
    ],
)
def test_gradients_of_a_step(
    algorithm: str, num_particles: int, leapfrog_steps: int, expected: int
) -> None:
    # Latents x particles x evaluations per move x sweeps.
    module = ParticleModule(
        DeepLatentGaussian([2, 3, 4], [1, 2, 2]),
        algorithm=algorithm,
        num_particles=num_particles,
        sweeps_per_step=2,
        leapfrog_steps=leapfrog_steps,
    )
    assert head_to_head.gradients_per_datum(module, torch.rand(5, 1, 2, 2)) == expected


def test_gradients_of_a_step_of_the_autoencoder() -> None:
    sizes, shape = [2, 3, 4], [1, 2, 2]
    module = AmortisedModule(
        DeepLatentGaussian(sizes, shape), MLPEncoder(sizes, shape), num_samples=5
    )
    assert head_to_head.gradients_per_datum(module, torch.rand(5, 1, 2, 2)) == 3 * 5


@pytest.mark.slow
def test_a_run_from_images_to_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for number in range(40):
        folder = tmp_path / "images" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    options = {
        "path": tmp_path / "images",
        "minutes": 0.05,
        "num_training": 30,
        "num_measured": 4,
        "num_temperatures": 3,
        "num_threads": 1,
        "seeds": 0,
        "results": tmp_path,
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    head_to_head.main([*arguments, "--algorithms", "vae"])
    (file,) = (tmp_path / "head_to_head").glob("*.json")
    measured = json.loads(file.read_text())
    assert 3.0 <= measured["seconds"] < 60.0
    assert measured["gradient_evaluations"] % (3 * 30) == 0
    assert measured["curve"][-1]["seconds"] == measured["seconds"]
    assert measured["final"]["num_data"] == 4
