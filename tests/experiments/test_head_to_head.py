"""The comparison's bookkeeping; its trainings are the configs', which have tests of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dcpc.conquer import Langevin
from dcpc.divide import UnitGroup
from dcpc.evaluation import prior_sample_estimate
from dcpc.models import DeepLatentGaussian, MLPEncoder
from dcpc.training import AmortisedModule, ParticleModule, Start
from experiments import head_to_head, head_to_head_training

ROOT = Path(__file__).parents[2]


SETTING = {
    "seconds": 180.0,
    "gradients": 3e6,
    "num_training": 10_000,
    "num_measured": 50,
    "num_temperatures": 100,
    "num_particles": 16,
    "num_threads": 2,
}
OPTIONS = ["--path", "nowhere", "--algorithms", "dcpc", "pgd", "--seeds", "0", "1"]


def run(algorithm: str, seed: int, nll: float) -> dict[str, Any]:
    """A run of 20 million gradients in three minutes, 5 nats worse after the first 3 million."""

    def figures(seconds: float, gradients: float, nll: float) -> dict[str, float]:
        return {
            "seconds": seconds,
            "gradients": gradients,
            "evidence_nll": nll,
            "evidence_nll_se": 2.5,
            "reconstruction_cross_entropy": 70.0,
            "reconstruction_mse": 0.01,
            "prior_sample_nll": 144.0 + nll / 1000,
        }

    whole = figures(180.0, 20e6, nll)
    spent = {"seconds": whole, "gradients": figures(27.0, 3e6, nll + 5.0)}
    return {
        "algorithm": algorithm,
        "seed": seed,
        "setting": SETTING,
        "curve": [whole],
        "spent": spent,
    }


def write(folder: Path, *runs: dict[str, Any]) -> None:
    (folder / "head_to_head").mkdir()
    for one in runs:
        name = f"{one['algorithm']}-seed{one['seed']}.json"
        (folder / "head_to_head" / name).write_text(json.dumps(one))


def cells(table: str) -> list[list[str]]:
    rows = [line for line in table.splitlines()[2:] if line.startswith("|")]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


@pytest.fixture
def four_runs(tmp_path: Path) -> Path:
    write(
        tmp_path,
        run("pgd", 0, 110.0),
        run("pgd", 1, 114.0),
        run("dcpc", 0, 108.0),
        run("dcpc", 1, 108.0),
    )
    return tmp_path


def test_finished_runs_are_not_repeated_and_make_the_tables(
    four_runs: Path, capsys: pytest.CaptureFixture
) -> None:
    head_to_head.main([*OPTIONS, "--results", str(four_runs)])
    table = (four_runs / "head_to_head_seconds.md").read_text()
    # The standard error of 110 and 114 is their half difference.
    assert [row[:3] for row in cells(table)] == [
        ["`dcpc`", "2", "108.00 ± 0.00"],
        ["`pgd`", "2", "112.00 ± 2.00"],
    ]
    assert cells(table)[0][-2:] == ["180", "20.0 million"]
    assert table in capsys.readouterr().out
    assert "50 held-out images" in table
    assert "by some 2.5 nats" in table
    by_gradients = cells((four_runs / "head_to_head_gradients.md").read_text())
    assert [row[2] for row in by_gradients] == ["113.00 ± 0.00", "117.00 ± 2.00"]
    assert by_gradients[0][-2:] == ["27", "3.0 million"]
    paper = cells((four_runs / "paper.md").read_text())
    assert [row[-1] for row in paper] == [
        "70.00 ± 0.00",
        "0.0100 ± 0.0000",
        "144.11 ± 0.00",
        "108.00 ± 0.00",
    ]
    for budget in ("seconds", "gradients"):
        assert (four_runs / f"head_to_head_{budget}.png").stat().st_size > 1000


def test_runs_of_another_setting_do_not_enter_the_table(four_runs: Path) -> None:
    message = r"dcpc-seed0.json' is a run of another setting \(num_measured=50, now 64\)"
    with pytest.raises(SystemExit, match=message):
        head_to_head.main([*OPTIONS, "--num_measured", "64", "--results", str(four_runs)])
    others = ["--algorithms", "vae", "--num_measured", "64"]
    with pytest.raises(SystemExit, match="is a run of another setting"):
        head_to_head.main([*others, "--results", str(four_runs)])


def test_every_budget_keeps_the_model_as_it_was_when_it_was_spent(
    monkeypatch: pytest.MonkeyPatch, deep_module: Callable
) -> None:
    module, trainer = deep_module(), SimpleNamespace(should_stop=False)
    clock = iter([0.0, 30.0, 60.0, 150.0, 200.0, 210.0])
    monkeypatch.setattr(head_to_head_training.time, "perf_counter", lambda: next(clock))
    budgets = head_to_head_training.Budgets({"seconds": 100.0, "gradients": 60.0}, lambda module: 3)
    budgets.on_train_start(trainer, module)
    stopped = []
    for step in range(4):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(step)
        batch = (torch.zeros(5, 1, 2, 2), torch.zeros(5), torch.arange(5))
        budgets.on_train_batch_end(trainer, module, None, batch, step)
        stopped.append(trainer.should_stop)
    # Fifteen gradients a step: 60 after the fourth one, at 200 seconds.
    assert stopped == [False, False, False, True]
    kept = {budget: dict(snapshot.spent) for budget, snapshot in budgets.kept.items()}
    assert kept == {
        "seconds": {"seconds": 150.0, "gradients": 45},
        "gradients": {"seconds": 200.0, "gradients": 60},
    }
    steps = [float(next(iter(s.parameters.values())).flatten()[0]) for s in budgets.kept.values()]
    assert steps == [2.0, 3.0]
    assert [s.spent["seconds"] for s in budgets.curve] == [30.0, 30.0, 60.0, 150.0, 150.0]


@pytest.mark.parametrize(
    ("algorithm", "num_particles", "leapfrog_steps", "expected"),
    [
        ("dcpc", 4, 1, 3 * 4 * 2),
        ("dcpc", 4, 3, 3 * 4 * 4),
        ("dcpc-smc", 4, 1, 3 * 4 * 2),
        ("dcpc-paper", 4, 1, 3 * 4),
        ("pgd", 4, 1, 3 * 4),
        ("mcpc", 1, 1, 3),
        ("mcpc", 1, 3, 3 * 3),
        ("ipc", 1, 1, 3),
    ],
)
def test_gradients_of_a_step(
    monkeypatch: pytest.MonkeyPatch,
    algorithm: str,
    num_particles: int,
    leapfrog_steps: int,
    expected: int,
) -> None:
    # Latents x particles x evaluations per move, of each of two sweeps.
    options = {} if leapfrog_steps == 1 else {"move": Langevin(leapfrog_steps)}
    module = ParticleModule(
        DeepLatentGaussian([2, 3, 4], [1, 2, 2]),
        algorithm=algorithm,
        num_particles=num_particles,
        sweeps_per_step=2,
        **options,
    )
    assert head_to_head_training.gradients_per_datum(3, module) == 2 * expected
    x = torch.rand(5, 1, 2, 2)
    state = module.inference.init(x)
    taken = []
    evaluate = UnitGroup.evaluate

    def counting(group: UnitGroup, value: torch.Tensor, *rest: Any, **options: Any) -> Any:
        # One number for all latents of a block: a joint gradient is that of each of them.
        members = sum(len(unit.sites) for unit in group.units)
        taken.append(value.shape[0] * members)
        return evaluate(group, value, *rest, **options)

    monkeypatch.setattr(UnitGroup, "evaluate", counting)
    module.inference.sweep(state, x)
    assert sum(taken) == expected


def test_gradients_of_a_step_of_the_autoencoder() -> None:
    sizes, shape = [2, 3, 4], [1, 2, 2]
    module = AmortisedModule(
        DeepLatentGaussian(sizes, shape), MLPEncoder(sizes, shape), num_samples=5
    )
    assert head_to_head_training.gradients_per_datum(3, module) == 3 * 5


def test_gradients_of_a_step_while_the_encoder_warms_up() -> None:
    sizes, shape = [2, 3, 4], [1, 2, 2]
    module = ParticleModule(
        DeepLatentGaussian(sizes, shape),
        MLPEncoder(sizes, shape),
        num_particles=4,
        start=Start(warm_up_epochs=1),
    )
    assert head_to_head_training.gradients_per_datum(3, module) == 3


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
        "million_gradients": 0.001,
        "num_training": 30,
        "num_measured": 4,
        "num_temperatures": 3,
        "num_threads": 1,
        "seeds": 0,
        "results": tmp_path,
        "models": tmp_path / "models",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    head_to_head.main([*arguments, "--algorithms", "vae", "dcpc"])
    measured, swept = (
        json.loads((tmp_path / "head_to_head" / f"{algorithm}-seed0.json").read_text())
        for algorithm in ("vae", "dcpc")
    )
    assert swept["step_size"].keys() == swept["acceptance"].keys() == {"z1", "z2", "z3"}
    assert "step_size" not in measured
    by_time, by_gradients = (measured["spent"][budget] for budget in ("seconds", "gradients"))
    assert 3.0 <= by_time["seconds"] < 60.0
    assert measured["curve"][-1]["seconds"] == by_time["seconds"]
    # Batches of 30 images, three latents and one sample.
    assert 1000 <= by_gradients["gradients"] < 1000 + 3 * 30
    assert by_gradients["seconds"] < by_time["seconds"]
    assert by_time["num_data"] == 4
    # Minus the logarithm of a probability, of the model as it was when the budget was spent.
    setting = head_to_head_training.TrainingSetting(str(tmp_path / "images"), 3.0, 1000.0, 30, 1)
    module, data = head_to_head_training.build("vae", 0, setting)
    data.setup("test")
    images = data.held_out_set.first(4)[0]
    kept = head_to_head_training.Trained.load(tmp_path / "models" / "vae-seed0.pt").kept
    for budget, figures in measured["spent"].items():
        module.model.load_state_dict(kept[budget].parameters)
        estimate = float(prior_sample_estimate(module.model, images).mean())
        assert figures["prior_sample_nll"] == pytest.approx(-estimate, rel=1e-5)
        assert min(figures["prior_sample_nll"], figures["evidence_nll"]) > 0
    assert by_time["prior_sample_nll"] != by_gradients["prior_sample_nll"]

    def never(*arguments: object) -> None:
        raise AssertionError("what is trained already was trained again")

    monkeypatch.setattr(head_to_head, "train", never)
    again = ["--algorithms", "vae", "--num_particles", "2", "--results", str(tmp_path / "again")]
    head_to_head.main([*arguments, *again])
    other = json.loads((tmp_path / "again" / "head_to_head" / "vae-seed0.json").read_text())
    assert other["spent"]["seconds"]["seconds"] == by_time["seconds"]
    assert other["spent"]["seconds"]["evidence_nll"] != by_time["evidence_nll"]
    with pytest.raises(SystemExit, match=r"vae-seed0\.pt' is a run of another setting \(seconds="):
        head_to_head.main([*arguments, *again, "--minutes", "1", "--results", str(tmp_path / "x")])
