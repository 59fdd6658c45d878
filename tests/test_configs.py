from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcpc.training import ClassifierModule, LabelledData, MeasuredModule, ParticleModule
from dcpc.training.checkpoint import read_checkpoint
from dcpc.training.command import ConfiguredCLI, main
from experiments.head_to_head_report import ALGORITHMS

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("**/*.json"))
DATA_SETS = ("mnist", "fashion_mnist", "emnist", "cifar10", "celeba")
WARM = ("dcpc-warm", "pgd-warm")
GUIDED = (*WARM, "lpc", "vae")
SHARED = (
    "learning_rate",
    "learning_rate_schedule",
    "evaluation_particles",
    "num_temperatures",
    "test_temperatures",
)
"""Keys of the model that are no part of an algorithm."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_shipped_config_builds_what_it_names(path: Path, tmp_path: Path) -> None:
    folder = f"--trainer.default_root_dir={tmp_path}"
    built = ConfiguredCLI(["fit", "--config", str(path), folder])
    assert isinstance(built.model, MeasuredModule)
    assert isinstance(built.datamodule, LabelledData)
    written = json.loads(path.read_text())
    assert built.trainer.max_epochs == written["trainer"]["max_epochs"]
    if isinstance(built.model, ParticleModule):
        assert built.model.inference.num_particles == written["model"]["num_particles"]
        assert built.model.inference.algorithm.name == written["model"].get("algorithm", "dcpc")
    elif isinstance(built.model, ClassifierModule):
        rule = written["model"]["init_args"]["rule"]
        assert f"dcpc.networks.{type(built.model.rule).__name__}" == rule["class_path"]
        values = [node.value for node in built.model.network.nodes]
        (group,) = built.model.rule.value_optimizer(values).param_groups
        assert group["lr"] == rule["init_args"]["value_optimizer"]["init_args"]["lr"]
    else:
        assert path.stem == "vae"


@pytest.mark.parametrize("data_set", DATA_SETS)
def test_every_algorithm_trains_the_same_model_on_the_same_data(data_set: str) -> None:
    configs = {
        name: json.loads((FOLDER / data_set / f"{name}.json").read_text()) for name in ALGORITHMS
    }
    assert {config["trainer"]["default_root_dir"] for config in configs.values()} == {
        f"runs/{data_set}/{name}" for name in ALGORITHMS
    }
    for name, config in configs.items():
        options = config["model"].get("init_args", config["model"])
        model = options["model"]
        if name == "dcpc-paper":  # the paper's likelihood
            assert model["init_args"].pop("likelihood") in ("continuous_bernoulli", "normal")
            model["init_args"]["likelihood"] = (
                "bernoulli" if "sizes" in str(model) else "discretized_normal"
            )
        assert model == configs["dcpc"]["model"]["model"]
        assert config["data"] == configs["dcpc"]["data"]
        assert options.get("algorithm", "vae") == name.removesuffix("-warm")
        assert options.get("warm_up_epochs", 0) < config["trainer"]["max_epochs"]
        assert ("warm_up_epochs" in options) == (name in WARM)
        assert [options[key] for key in SHARED] == [configs["dcpc"]["model"][key] for key in SHARED]
        assert config["seed_everything"] == configs["dcpc"]["seed_everything"]
        folder = {"default_root_dir": f"runs/{data_set}/{name}"}
        assert config["trainer"] == {**configs["dcpc"]["trainer"], **folder}


@pytest.mark.parametrize("name", ["digits", "mnist", "mnist-equilibrium", "mnist-hopfield"])
def test_every_classifier_of_images_fits_from_its_config(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    random, size = np.random.default_rng(0), 8 if name == "digits" else 28
    np.save(tmp_path / "images.npy", random.integers(0, 256, (10, size, size), dtype=np.uint8))
    np.save(tmp_path / "labels.npy", np.arange(10))
    main(
        [
            "fit",
            f"--config=configs/networks/{name}.json",
            "--data=ArrayData",
            f"--data.folder={tmp_path}",
            "--data.num_held_out=2",
            "--data.batch_size=4",
            "--trainer.max_epochs=1",
            "--trainer.log_every_n_steps=1",
            f"--trainer.default_root_dir={tmp_path / 'run'}",
            "--num_threads=1",
        ]
    )
    assert "after" in capsys.readouterr().out
    assert (tmp_path / "run" / "last.ckpt").is_file()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_fits_from_its_config(
    algorithm: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 4), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    model = "model.init_args" if algorithm == "vae" else "model"
    sizes = ["--{}.{}.init_args.latent_sizes=[2,3]", "--{}.{}.init_args.image_shape=[1,4,4]"]
    parts = ["model", "guide"] if algorithm in GUIDED else ["model"]
    warm_up = ["--model.warm_up_epochs=1"] if algorithm in WARM else []
    main(
        [
            "fit",
            f"--config=configs/mnist/{algorithm}.json",
            *(option.format(model, part) for option in sizes for part in parts),
            *warm_up,
            f"--{model}.evaluation_particles=2",
            f"--{model}.num_temperatures=2",
            "--data=ArrayData",
            f"--data.folder={tmp_path}",
            "--data.num_held_out=2",
            "--data.batch_size=4",
            "--trainer.max_epochs=2",
            "--trainer.log_every_n_steps=1",
            "--trainer.check_val_every_n_epoch=1",
            f"--trainer.default_root_dir={tmp_path / 'run'}",
            "--num_threads=1",
        ]
    )
    assert "after" in capsys.readouterr().out
    saved = read_checkpoint(tmp_path / "run" / "last.ckpt")["dcpc"]
    assert (algorithm == "vae") or saved["particles"]["visited"].all()


@pytest.mark.parametrize(
    "name", ["pgd-paper", *(pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS)]
)
def test_every_colour_generator_fits_from_its_config(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(20):
        pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    model = "model.init_args" if name == "vae" else "model"
    parts = ["model", "guide"] if name in GUIDED else ["model"]
    warm_up = ["--model.warm_up_epochs=1"] if name in WARM else []
    small = [
        f"--{model}.{part}.init_args.{size}"
        for part in parts
        for size in ("latent_size=3", "image_shape=[3,16,16]")
    ]
    main(
        [
            "fit",
            f"--config=configs/cifar10/{name}.json",
            *small,
            *warm_up,
            f"--{model}.evaluation_particles=2",
            f"--{model}.num_temperatures=1",
            f"--data.path={tmp_path / 'images'}",
            "--data.num_held_out=2",
            "--data.batch_size=4",
            "--trainer.max_epochs=2",
            "--trainer.log_every_n_steps=1",
            "--trainer.check_val_every_n_epoch=1",
            f"--trainer.default_root_dir={tmp_path / 'run'}",
            "--num_threads=1",
        ]
    )
    assert "after" in capsys.readouterr().out
    assert (tmp_path / "run" / "last.ckpt").is_file()
