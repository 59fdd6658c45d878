"""Results of `dcpc test` and `dcpc validate`: printed, in the run's log, and in a file."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dcpc
from dcpc.training.command import main

NUM_DATA, NUM_STEPS = 100, 6
CONFIG: dict[str, Any] = {
    "seed_everything": 5,
    "trainer": {
        "accelerator": "cpu",
        "limit_predict_batches": 1,
        "limit_test_batches": 1,
        "limit_val_batches": 1,
        "log_every_n_steps": 1,
        "max_epochs": 2,
    },
    "model": {
        "model": {
            "class_path": "dcpc.models.DeepLatentGaussian",
            "init_args": {"latent_sizes": [3, 5], "image_shape": [1, 8, 8]},
        },
        "num_particles": 2,
        "held_out": {
            "num_particles": 3,
            "num_temperatures": 2,
            "test_temperatures": 4,
            "prior_samples": 1,
        },
    },
    "data": {
        "class_path": "dcpc.training.data.DigitsData",
        "init_args": {"batch_size": 10, "evaluation_batch_size": NUM_DATA, "num_held_out": 1767},
    },
}


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs a subcommand in a folder, and returns what it has printed."""
    path = tmp_path_factory.mktemp("evaluation") / "config.json"
    path.write_text(json.dumps(CONFIG))

    def run(subcommand: str, folder: Path, *options: str) -> str:
        root = f"--trainer.default_root_dir={folder}"
        with contextlib.redirect_stdout(io.StringIO()) as out:
            main([subcommand, f"--config={path}", root, *options])
        return out.getvalue()

    return run


@pytest.fixture(scope="module")
def run(command: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was trained and tested."""
    folder = tmp_path_factory.mktemp("run")
    command("fit", folder)
    printed = command("test", folder)
    (folder / "printed.txt").write_text(printed)
    return folder


@pytest.fixture(scope="module")
def log(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run / "version_0"), {"scalars": 0, "tensors": 0}).Reload()


def strict(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def written(run: Path) -> dict[str, Any]:
    return strict(run / "version_0" / "test.json")


def text(log: EventAccumulator, tag: str) -> str:
    return log.Tensors(tag)[-1].tensor_proto.string_val[0].decode()


def test_the_file_has_means_over_the_data_and_their_standard_errors(
    run: Path, written: dict, command: Callable
) -> None:
    # `dcpc predict` measures the same data in the same way, and keeps every datum's figure.
    command("predict", run)
    told = torch.load(run / "predictions.pt", weights_only=True)
    errors = (told["originals"] - told["reconstructions"]).square().flatten(1).mean(1)
    for name, values in (("evidence_nll", told["evidence_nll"]), ("reconstruction_mse", errors)):
        result = written["results"][name]
        assert result["value"] == pytest.approx(float(values.mean()), rel=1e-4)
        spread = float(values.std()) / math.sqrt(NUM_DATA)
        assert result["standard_error"] == pytest.approx(spread, rel=1e-4)


def test_the_file_says_what_was_measured_and_how(run: Path, written: dict) -> None:
    how = CONFIG["model"]["held_out"]
    assert written["dcpc"] == dcpc.__version__
    assert (run / "version_0" / written["checkpoint"]).samefile(run / "last.ckpt")
    assert (written["seed"], written["step"]) == (CONFIG["seed_everything"], NUM_STEPS - 1)
    assert written["num_data"] == NUM_DATA
    assert written["num_particles"] == how["num_particles"]
    assert written["num_temperatures"] == how["test_temperatures"]
    assert written["prior_samples"] == how["prior_samples"]
    assert all(result["unit"] and result["meaning"] for result in written["results"].values())


def test_all_likelihoods_and_errors_are_losses_and_the_table_says_so(
    run: Path, written: dict
) -> None:
    better = {name: result["better"] for name, result in written["results"].items()}
    assert better.pop("ess_percent") == "higher"
    assert set(better.values()) == {"lower"}
    # By Jensen's inequality, one sample of the prior knows less than annealing.
    results = written["results"]
    assert results["prior_sample_nll"]["value"] > results["evidence_nll"]["value"]
    printed = (run / "printed.txt").read_text()
    assert "Lower is better, except for ESS %" in printed
    assert f"results: {run / 'version_0' / 'test.json'}" in printed
    for result in results.values():
        assert result["label"] in printed


def test_the_log_has_the_results_at_the_step_of_the_checkpoint(
    log: EventAccumulator, written: dict
) -> None:
    for name, result in written["results"].items():
        tag = (
            "sweep/held_out_test_ess_percent" if name == "ess_percent" else f"held_out_test/{name}"
        )
        (point,) = log.Scalars(tag)
        assert point.step == NUM_STEPS - 1
        assert point.value == pytest.approx(result["value"], rel=1e-6)
    table = text(log, "held_out_test")
    nll = written["results"]["evidence_nll"]
    shown = f"{nll['value']:.2f} ± {nll['standard_error']:.2f}"
    assert re.search(rf"^\| evidence NLL +\| +{shown} \| nats", table, re.MULTILINE)
    assert "Lower is better" in table


def test_validate_repeats_the_last_evaluation_of_fit(
    run: Path, log: EventAccumulator, command: Callable
) -> None:
    command("validate", run)
    result = strict(run / "version_0" / "validate.json")["results"]["evidence_nll"]
    last = log.Scalars("held_out/evidence_nll")[-1]
    assert last.step == NUM_STEPS - 1
    assert result["value"] == pytest.approx(last.value, rel=1e-6)


def test_a_checkpoint_without_a_log_has_its_results_in_the_runs_folder(
    run: Path, command: Callable, tmp_path: Path
) -> None:
    shutil.copy(run / "last.ckpt", tmp_path / "copy.ckpt")
    before = sorted((run / "version_0").iterdir())
    command("test", tmp_path / "elsewhere", f"--ckpt_path={tmp_path / 'copy.ckpt'}")
    written = strict(tmp_path / "elsewhere" / "test.json")
    assert written["checkpoint"] == str(Path("..", "copy.ckpt"))
    assert not list((tmp_path / "elsewhere").glob("**/events.*"))
    assert sorted((run / "version_0").iterdir()) == before


def test_a_standard_error_that_is_not_known_is_null(run: Path, command: Callable) -> None:
    command("test", run, "--data.evaluation_batch_size=1")
    result = strict(run / "version_0" / "test.json")["results"]["evidence_nll"]
    assert math.isfinite(result["value"])
    assert result["standard_error"] is None
