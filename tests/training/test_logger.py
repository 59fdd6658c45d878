"""The log of a run: one curve across resumes, and what it tells of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from resumable_runs import NUM_STEPS, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dcpc.training import ParticleModule
from dcpc.training.logger import RunLogger, hyperparameters

NUM_EPOCHS = 3


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that broke off two batches after its first checkpoint, and went on."""
    folder = tmp_path_factory.mktemp("resumed")
    step = ParticleModule.training_step

    def broken(module: ParticleModule, batch: Any, batch_idx: int) -> Any:
        if module.current_epoch == 1 and batch_idx == 2:
            raise RuntimeError("on purpose")
        return step(module, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ParticleModule, "training_step", broken)
        with pytest.raises(RuntimeError, match="on purpose"):
            run(folder, "dcpc")
    assert [event.step for event in log(folder / "version_0").Scalars("train/loss")] == list(
        range(NUM_STEPS + 2)
    )
    run(folder, "dcpc", f"--ckpt_path={folder / 'last.ckpt'}")
    return folder


def log(folder: Path) -> EventAccumulator:
    """All that TensorBoard would show of a folder."""
    everything = dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0)
    return EventAccumulator(str(folder), everything).Reload()


def test_a_resumed_run_goes_on_in_its_log_and_draws_no_step_twice(resumed: Path) -> None:
    assert [path.name for path in resumed.glob("version_*")] == ["version_0"]
    shown = log(resumed / "version_0")
    steps = list(range(NUM_EPOCHS * NUM_STEPS))
    for tag in ("train/loss", "sweep/step_size/z1"):
        assert [event.step for event in shown.Scalars(tag)] == steps, tag
    assert [e.step for e in shown.Histograms("sweep/latents/z1")] == steps
    evaluated = [NUM_STEPS * epoch - 1 for epoch in range(1, NUM_EPOCHS + 1)]
    assert [event.step for event in shown.Scalars("held_out/evidence_nll")] == evaluated
    assert [e.step for e in shown.Images("images/originals")] == [0, *evaluated]


def test_a_run_from_scratch_in_the_same_folder_has_a_log_of_its_own(
    resumed: Path, tmp_path: Path
) -> None:
    first = run(tmp_path, "dcpc", "--trainer.max_epochs=1")
    assert first["epoch"] == 0
    run(tmp_path, "dcpc", "--trainer.max_epochs=1")
    names = [f"version_{number}" for number in range(2)]
    assert sorted(path.name for path in tmp_path.glob("version_*")) == names
    for name in names:
        steps = [event.step for event in log(tmp_path / name).Scalars("train/loss")]
        assert steps == list(range(NUM_STEPS))
    assert (tmp_path / "last.ckpt").samefile(tmp_path / "version_1" / "checkpoints" / "last.ckpt")
    # Resumed in another folder, it starts a log there and leaves the first one be.
    run(tmp_path / "other", "dcpc", "--trainer.max_epochs=2", f"--ckpt_path={tmp_path}/last.ckpt")
    steps = [e.step for e in log(tmp_path / "other" / "version_0").Scalars("train/loss")]
    assert steps == list(range(NUM_STEPS, 2 * NUM_STEPS))
    left = [e.step for e in log(tmp_path / "version_1").Scalars("train/loss")]
    assert left == list(range(NUM_STEPS))


def test_a_log_shows_neither_the_epoch_nor_a_placeholder_of_a_metric(resumed: Path) -> None:
    tags = log(resumed / "version_0").Tags()["scalars"]
    assert {tag.partition("/")[0] for tag in tags} == {"held_out", "sweep", "train"}
    assert min(tags) == "held_out/evidence_nll"  # TensorBoard's first chart
    assert not (resumed / "version_0" / "hparams.yaml").exists()


def test_a_log_holds_the_config_as_a_block_of_json(resumed: Path) -> None:
    (*_, entry) = log(resumed / "version_0").Tensors("run/config")
    shown = entry.tensor_proto.string_val[0].decode()
    assert shown.startswith("```json\n")
    assert shown.endswith("\n```")
    config = json.loads(shown.removeprefix("```json").removesuffix("```"))
    assert config == json.loads((resumed / "version_0" / "config.json").read_text())


def test_hyperparameters_have_the_names_of_options_and_leave_out_what_changes_nothing() -> None:
    config = {
        "seed_everything": 7,
        "num_threads": 1,
        "trainer": {"max_epochs": 5, "max_steps": -1, "devices": 2, "logger": None},
        "model": {
            "class_path": "dcpc.training.ParticleModule",
            "init_args": {
                "model": {
                    "class_path": "dcpc.models.DeepLatentGaussian",
                    "init_args": {"latent_sizes": [10, 32], "likelihood": "bernoulli"},
                },
                "guide": None,
                "num_particles": 4,
                "learning_rate": 0.001,
                "compile": "auto",
                "step_size": {"pgd": 0.3},
                "start": {"restart": True},
                "held_out": {"num_particles": 16},
            },
        },
        "data": {"class_path": "mine.Images", "init_args": {"batch_size": 100}},
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}},
        "ckpt_path": None,
    }
    assert hyperparameters(config) == {
        "module": "ParticleModule",
        "model": "DeepLatentGaussian",
        "model.latent_sizes": "[10, 32]",
        "model.likelihood": "bernoulli",
        "num_particles": 4,
        "step_size.pgd": 0.3,
        "start.restart": "true",
        "data": "Images",
        "data.batch_size": 100,
        "optimizer": "SGD",
        "optimizer.lr": 0.5,
        "seed": 7,
        "max_epochs": 5,
    }


def test_a_checkpoint_beside_no_log_starts_one(tmp_path: Path) -> None:
    (tmp_path / "version_3").mkdir()
    logger = RunLogger(tmp_path, tmp_path / "version_3" / "checkpoints" / "last.ckpt", 9)
    assert Path(logger.log_dir) == tmp_path / "version_4"
