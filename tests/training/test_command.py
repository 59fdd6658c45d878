from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from event_logs import event_logs
from matplotlib import image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dcpc.training import ParticleModule
from dcpc.training.cli import ConfiguredCLI
from dcpc.training.command import main

MODEL = "dcpc.models.DeepLatentGaussian"
UNITS = ("z1", "z2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def config(folder: Path) -> dict:
    """Thirty digits, a small model, coarse evaluations on a hundred digits."""
    return {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": str(folder / "run"),
            "limit_predict_batches": 1,
            "limit_test_batches": 1,
            "limit_val_batches": 1,
            "log_every_n_steps": 1,
            "max_epochs": 2,
        },
        "model": {
            "model": {
                "class_path": MODEL,
                "init_args": {"latent_sizes": [3, 5], "image_shape": [1, 8, 8]},
            },
            "num_particles": 2,
            "learning_rate": 0.03,
            "held_out": {"num_particles": 3, "num_temperatures": 3, "test_temperatures": 3},
        },
        "data": {
            "class_path": "dcpc.training.data.DigitsData",
            "init_args": {
                "batch_size": 10,
                "evaluation_batch_size": 100,
                "num_held_out": 1767,
            },
        },
    }


@pytest.fixture(scope="module")
def command(config: dict, folder: Path) -> Callable[..., None]:
    path = folder / "config.json"
    path.write_text(json.dumps(config))

    def run(subcommand: str, *options: str) -> None:
        main([subcommand, "--config", str(path), *options])

    return run


@pytest.fixture(scope="module")
def run(command: Callable, folder: Path) -> Path:
    """The folder of a finished run."""
    command("fit")
    return folder / "run"


@pytest.fixture(scope="module")
def events(run: Path) -> list[EventAccumulator]:
    return event_logs(run / "version_0")


@pytest.fixture(scope="module")
def table(run: Path, command: Callable) -> str:
    """What `dcpc test` prints of the last checkpoint."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        command("test")
    return out.getvalue()


def scalars(events: list[EventAccumulator], tag: str) -> list[tuple[int, float]]:
    return [
        (e.step, e.value)
        for log in events
        if tag in log.Tags()["scalars"]
        for e in log.Scalars(tag)
    ]


def error_of(capsys: pytest.CaptureFixture, call: Callable, *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        call(*arguments)
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("dcpc: error: ")
    assert "Traceback" not in message
    return message


def test_fit_leaves_a_checkpoint_a_link_to_it_and_its_config(run: Path) -> None:
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    assert (run / "last.ckpt").samefile(run / "version_0" / "checkpoints" / "last.ckpt")
    assert checkpoint["epoch"] == 1
    assert checkpoint["dcpc"]["particles"]["latents"]["z1"].shape == (30, 2, 3)
    saved = json.loads((run / "version_0" / "config.json").read_text())
    assert saved["model"]["init_args"]["num_particles"] == 2


def test_no_particles_are_left_lying_about_after_a_run(run: Path) -> None:
    assert not list(run.rglob("particles-*"))


def test_tensorboard_has_every_curve(events: list[EventAccumulator]) -> None:
    for tag in (
        "train/loss",
        "train/ess_percent",
        *(f"sweep/{kind}/{unit}" for kind in ("acceptance", "step_size") for unit in UNITS),
    ):
        values = scalars(events, tag)
        assert values, tag
        assert all(0 < value < 1e4 for _, value in values), tag
    for unit in UNITS:
        assert all(value <= 1 for _, value in scalars(events, f"sweep/acceptance/{unit}"))


def test_evidence_is_measured_after_every_evaluated_epoch(events: list[EventAccumulator]) -> None:
    curve = scalars(events, "held_out/evidence_nll")
    assert [step for step, _ in curve] == [2, 5]
    assert curve[-1][1] < curve[0][1]


def test_tensorboard_has_grids_of_images(events: list[EventAccumulator]) -> None:
    for name in ("originals", "reconstructions", "prior_samples"):
        shown = [
            e
            for log in events
            if f"images/{name}" in log.Tags()["images"]
            for e in log.Images(f"images/{name}")
        ]
        assert shown, name
        # 64 digits, eight to a row, with lines between; five times as large, below a caption.
        assert {e.width for e in shown} == {5 * (8 * 9 + 1)}
        assert all(e.width < e.height < 1.2 * e.width for e in shown)


def test_test_prints_every_quantity_under_its_own_name(table: str) -> None:
    assert re.search(r"100 held-out data, 3 particles annealed over 3 temperatures", table)
    assert re.search(r"evidence NLL +-?\d+\.\d+ ± \d+\.\d+ +nats per datum", table)
    assert re.search(r"reconstruction cross-entropy +\d+\.\d+", table)
    assert re.search(r"reconstruction MSE +0\.\d+", table)
    assert re.search(r"ESS % +\d+", table)


def test_test_and_validate_measure_the_same_as_the_end_of_fit(
    run: Path,
    command: Callable,
    table: str,
    capsys: pytest.CaptureFixture,
    events: list[EventAccumulator],
) -> None:
    last = f"{scalars(events, 'held_out/evidence_nll')[-1][1]:.2f}"
    assert last in table
    capsys.readouterr()
    command("validate", "--ckpt_path", str(run / "version_0/checkpoints/last.ckpt"))
    assert last in capsys.readouterr().out


def test_predict_writes_tensors_and_a_picture(run: Path, command: Callable) -> None:
    command("predict")
    written = torch.load(run / "predictions.pt", weights_only=True)
    for name in ("originals", "reconstructions", "prior_samples", "prior_sample_means"):
        assert written[name].shape == (100, 1, 8, 8)
        assert bool(((written[name] >= 0) & (written[name] <= 1)).all())
    assert written["evidence_nll"].shape == written["labels"].shape == (100,)
    # Twenty columns and four rows of 8 x 8 digits with lines between, magnified four times.
    assert image.imread(run / "predictions.png").shape[:2] == (4 * (4 * 9 + 1), 4 * (20 * 9 + 1))


def test_resuming_through_the_command_reaches_the_uninterrupted_run(
    command: Callable, run: Path, tmp_path: Path
) -> None:
    folder = f"--trainer.default_root_dir={tmp_path}"
    command("fit", folder, "--trainer.max_epochs=1")
    command("fit", folder, f"--ckpt_path={tmp_path / 'last.ckpt'}", "--seed_everything=77")
    resumed = torch.load(tmp_path / "last.ckpt", weights_only=True)
    whole = torch.load(run / "last.ckpt", weights_only=True)
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    particles = whole["dcpc"]["particles"]
    for name, value in particles["latents"].items():
        assert torch.equal(value, resumed["dcpc"]["particles"]["latents"][name]), name


def test_an_interrupted_run_is_resumed_where_it_was(
    run: Path, command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = f"--trainer.default_root_dir={tmp_path}"
    step = ParticleModule.training_step

    def interrupted(module: ParticleModule, batch: Any, batch_idx: int) -> Any:
        if module.current_epoch == 1 and batch_idx == 1:
            raise RuntimeError("on purpose")
        return step(module, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(ParticleModule, "training_step", interrupted)
        with pytest.raises(RuntimeError, match="on purpose"):
            command("fit", folder)
    command("fit", folder, f"--ckpt_path={tmp_path / 'last.ckpt'}")
    resumed = torch.load(tmp_path / "last.ckpt", weights_only=True)
    whole = torch.load(run / "last.ckpt", weights_only=True)
    assert resumed["global_step"] == whole["global_step"]
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name


def test_an_optimizer_and_a_schedule_can_be_given(command: Callable, tmp_path: Path) -> None:
    command(
        "fit",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.max_epochs=1",
        "--trainer.limit_val_batches=0",
        "--optimizer=SGD",
        "--optimizer.lr=0.5",
        "--lr_scheduler=ExponentialLR",
        "--lr_scheduler.gamma=0.1",
    )
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (group,) = saved["optimizer_states"][0]["param_groups"]
    assert group["initial_lr"] == 0.5
    assert "momentum" in group


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.num_partcles=3"], "'num_partcles' .* you mean 'model.num_particles'"),
        (["--data.batchsize=3"], "'batchsize' .* you mean 'data.batch_size'"),
        (["--model.held_out.completon=true"], "completon.* you mean 'model.held_out.completion'"),
        (
            ["--model=AmortisedModule", "--model.step_size=0.1"],
            r"'step_size' .* 'model\.step_size' is a key of ParticleModule \(a layer .* last\)",
        ),
        (["--model.model.breadth=3"], "'breadth' is not accepted, only hidden_sizes, image"),
        (
            ["--model.num_particles=three"],
            r"model\.num_particles: expected a whole number, got 'three'\n$",
        ),
        (["--model.model.class_path=experiments.nowhere.Model"], "experiments.nowhere.Model"),
        (["--data=nowhere.Data"], "nowhere.Data"),
        (["--model.num_particles=0"], "num_particles must be at least 1, got 0"),
        (
            ["--model.particle_batch_size=-1"],
            r"model\.particle_batch_size must be at least 1, got -1\n$",
        ),
        (
            ["--model.particle_batch_size=1.5"],
            r"model\.particle_batch_size: expected a whole number or null, got 1\.5\n$",
        ),
        (["--model.algorithm=sgd"], "unknown algorithm 'sgd'"),
        (["--num_threads=0"], "num_threads"),
        (["--data.batch_size=0"], "data.batch_size must be at least 1, got 0"),
        (["--model.model.init_args.latent_sizes=[]"], "latent_sizes must hold at least one"),
        (["--ckpt_path=nowhere.ckpt"], "there is no checkpoint 'nowhere.ckpt'"),
    ],
)
def test_a_bad_option_is_one_clear_error(
    command: Callable, capsys: pytest.CaptureFixture, options: list[str], message: str
) -> None:
    assert re.search(message, error_of(capsys, command, "fit", *options), re.DOTALL)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("modle", {"num_particles": 3}, "modle"),
        ("model", {"num_partcles": 3}, "you mean 'model.num_particles'"),
        ("data", {"init_args": {"batchsize": 3}}, "you mean 'data.batch_size'"),
        ("trainer", {"max_epochs": "many"}, "trainer.max_epochs.*many"),
    ],
)
def test_a_bad_config_is_one_clear_error(
    config: dict, tmp_path: Path, capsys: pytest.CaptureFixture, key: str, value: dict, message: str
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**config, key: {**config.get(key, {}), **value}}))
    assert re.search(message, error_of(capsys, main, ["fit", "--config", str(path)]), re.DOTALL)


def test_a_config_that_is_no_json_or_not_there_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "broken.json"
    path.write_text('{"trainer": ')
    error_of(capsys, main, ["fit", "--config", str(path)])
    assert "missing.json" in error_of(capsys, main, ["fit", "--config", "missing.json"])


def test_testing_before_training_says_to_train_first(
    command: Callable, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    folder = f"--trainer.default_root_dir={tmp_path}"
    assert "train first, with dcpc fit" in error_of(capsys, command, "test", folder)


def test_a_checkpoint_that_is_truncated_or_of_another_model_is_named(
    run: Path, command: Callable, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    path = tmp_path / "cut.ckpt"
    path.write_bytes((run / "last.ckpt").read_bytes()[:5000])
    message = error_of(capsys, command, "test", f"--ckpt_path={path}")
    assert f"'{path}' (5,000 bytes) is truncated" in message
    smaller = "--model.model.init_args.latent_sizes=[3,4]"
    message = error_of(capsys, command, "test", smaller)
    assert "checkpoint of another model: parameter 'model." in message


def test_a_folder_that_cannot_be_written_is_named(
    command: Callable, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    folder = f"--trainer.default_root_dir={tmp_path / 'file' / 'run'}"
    message = error_of(capsys, command, "fit", folder)
    assert "trainer.default_root_dir: cannot write to the folder" in message


def test_help_explains_the_commands(capsys: pytest.CaptureFixture) -> None:
    main(["--help"])
    shown = capsys.readouterr().out
    for phrase in ("dcpc fit", "dcpc test", "dcpc predict", "resume", "tensorboard --logdir runs"):
        assert phrase in shown


def test_shipped_configs_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--config=configs/digits.json", "--print_config"])
    assert exit_info.value.code == 0
    assert "DeepLatentGaussian" in capsys.readouterr().out


@pytest.mark.parametrize(("written", "read"), [("1", 1), ("3", 3), ("1.0", 1.0), ("0.5", 0.5)])
def test_a_count_of_batches_is_no_fraction(written: str, read: float, tmp_path: Path) -> None:
    limits = [f"--trainer.limit_{part}_batches={written}" for part in ("train", "val")]
    folder = f"--trainer.default_root_dir={tmp_path}"
    built = ConfiguredCLI(["fit", "--config=configs/digits.json", folder, *limits])
    options = built.config.fit.trainer
    for limit in (options.limit_train_batches, options.limit_val_batches):
        assert limit == read
        assert type(limit) is type(read)


@pytest.mark.parametrize(
    ("option", "count"),
    [
        ("check_val_every_n_epoch=1", 1 + 2),
        ("check_val_every_n_epoch=2", 1 + 1),
        ("check_val_every_n_epoch=100", 1 + 1),
        ("limit_val_batches=0", 0),
    ],
)
def test_the_untrained_and_the_trained_model_are_always_measured(
    option: str,
    count: int,
    command: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    folder = f"--trainer.default_root_dir={tmp_path}"
    command("fit", f"--trainer.{option}", "--trainer.max_epochs=2", folder)
    out = capsys.readouterr().out
    figures = re.findall(r"^epoch +\d+: held-out evidence NLL (\S+) ±", out, re.MULTILINE)
    assert len(figures) == count
    compared = re.findall(r"evidence NLL (\S+) ± \S+ before training, evidence NLL (\S+) ± ", out)
    assert compared == ([(figures[0], figures[-1])] if count else [])
    epochs = re.findall(r"^epoch +(\d+):", out, re.MULTILINE)
    assert not epochs or (epochs[0], epochs[-1]) == ("0", "2")


def test_a_run_starts_from_weights_alone_with_other_particles_and_another_algorithm(
    run: Path, command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command(
        "fit",
        f"--init_from={run / 'last.ckpt'}",
        f"--trainer.default_root_dir={tmp_path}",
        "--model.num_particles=5",
        "--model.algorithm=pgd",
        "--model.learning_rate=1e-12",
        "--trainer.max_epochs=1",
    )
    told = capsys.readouterr().out
    assert f"weights of model from {run / 'last.ckpt'}" in told
    assert "--model.start.first_sweeps 50 moves those of every datum there first" in told
    first = torch.load(run / "last.ckpt", weights_only=True)
    second = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for name, value in first["state_dict"].items():  # the learning rate moves nothing
        assert torch.allclose(value, second["state_dict"][name], atol=1e-6), name
    assert second["epoch"] == 0
    assert second["dcpc"]["num_steps"] == 3  # of thirty digits, in batches of ten
    assert second["dcpc"]["particles"]["latents"]["z1"].shape == (30, 5, 3)


def test_weights_and_a_run_to_go_on_with_exclude_each_other(
    run: Path, command: Callable, capsys: pytest.CaptureFixture
) -> None:
    path = run / "last.ckpt"
    message = error_of(capsys, command, "fit", f"--init_from={path}", f"--ckpt_path={path}")
    assert "--init_from starts a run from weights, and --ckpt_path goes on with one" in message


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (["--model.algorithm=pgd"], "model.algorithm dcpc, and this run has pgd"),
        (["--model.num_particles=3"], "model.num_particles 2, and this run has 3"),
        (["--model.schedule=sequential"], "model.schedule Coloured, and this run has Sequential"),
        (["--model.correction=weight"], r"model.correction Metropolis\(.*this run has Weight\("),
        (["--model.preconditioner=second_moment"], "model.preconditioner Adapted.*SecondMoment"),
        (
            ["--model.move=dcpc.conquer.Langevin", "--model.move.leapfrog_steps=4"],
            "model.move Langevin.leapfrog_steps=1.*this run has Langevin.leapfrog_steps=4",
        ),
        (["--model=AmortisedModule", "--model.guide=encoder"], "ParticleModule, .* Amortised"),
    ],
)
def test_a_run_with_other_parts_does_not_go_on_with_a_checkpoint(
    run: Path, command: Callable, capsys: pytest.CaptureFixture, options: list[str], changed: str
) -> None:
    message = error_of(capsys, command, "fit", f"--ckpt_path={run / 'last.ckpt'}", *options)
    assert re.search(f"--ckpt_path: the checkpoint was trained with .*{changed}", message)
    assert "--init_from" in message


def test_a_run_goes_on_for_longer_and_is_measured_otherwise(
    run: Path, command: Callable, tmp_path: Path
) -> None:
    command(
        "fit",
        f"--ckpt_path={run / 'last.ckpt'}",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.max_epochs=3",
        "--model.held_out.num_particles=2",
        "--trainer.log_every_n_steps=2",
    )
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 2


def test_callbacks_follow_the_measurements_and_name_one_that_does_not_exist(
    config: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def watching(metric: str) -> list[str]:
        callbacks = [
            {"class_path": "EarlyStopping", "init_args": {"monitor": metric}},
            {"class_path": "ModelCheckpoint", "init_args": {"monitor": metric}},
        ]
        trainer = config["trainer"] | {"callbacks": callbacks, "default_root_dir": str(tmp_path)}
        path = tmp_path / "watching.json"
        path.write_text(json.dumps({**config, "trainer": trainer}))
        return ["fit", f"--config={path}"]

    main(watching("held_out/evidence_nll"))
    assert (tmp_path / "last.ckpt").exists()
    message = error_of(capsys, main, watching("held_out/evidence"))
    assert "trainer.callbacks: Early stopping conditioned on metric" in message


def test_the_beginning_of_a_key_is_not_the_key(
    command: Callable, capsys: pytest.CaptureFixture
) -> None:
    message = error_of(capsys, command, "fit", "--trainer.max_epoch=5")
    assert "did you mean 'trainer.max_epochs'?" in message


def test_a_class_in_a_file_of_another_folder_says_where_to_start(
    command: Callable, capsys: pytest.CaptureFixture
) -> None:
    message = error_of(capsys, command, "fit", "--model.model=gratings_elsewhere.Model")
    assert "start dcpc in the folder of gratings_elsewhere.py" in message


def test_a_run_that_has_ended_says_that_nothing_is_left_to_train(
    run: Path, command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = f"--trainer.default_root_dir={tmp_path}"
    command("fit", f"--ckpt_path={run / 'last.ckpt'}", folder)
    assert "nothing was trained" in capsys.readouterr().out
    command("fit", f"--ckpt_path={run / 'last.ckpt'}", folder, "--trainer.max_epochs=3")
    told = capsys.readouterr().out
    assert "nothing was trained" not in told
    assert "next, with the same --config: dcpc predict" in told
    longer = f"--ckpt_path={tmp_path / 'last.ckpt'}"
    message = error_of(capsys, command, "fit", longer, folder, "--trainer.max_epochs=1")
    assert "trainer.max_epochs: the checkpoint has trained for more than 2 epochs, got 1" in message


def test_a_run_with_another_optimiser_does_not_go_on_with_a_checkpoint(
    run: Path, command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = f"--trainer.default_root_dir={tmp_path}"
    options = ("--optimizer=SGD", "--optimizer.lr=0.1", "--trainer.max_epochs=3", folder)
    message = error_of(capsys, command, "fit", f"--ckpt_path={run / 'last.ckpt'}", *options)
    assert "optimizer: the checkpoint was trained with another one than SGD" in message


def test_an_option_that_lightning_refuses_late_is_one_line(
    command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = (f"--trainer.default_root_dir={tmp_path}", "--trainer.val_check_interval=1000")
    message = error_of(capsys, command, "fit", *options)
    assert "trainer: `val_check_interval` (1000) must be less than or equal to" in message
