from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcpc.models import LabelledEmbedding, LatentTransformer
from dcpc.training import AmortisedModule, ClassifierModule, Parameterization
from dcpc.training.checkpoint import read_checkpoint
from dcpc.training.cli import ConfiguredCLI
from dcpc.training.command import main
from dcpc.training.data import HalfLabelledData, PixelSequences
from experiments import head_to_head_report
from experiments.layers import layers

FOLDER = Path(__file__).parents[1] / "configs"
NETWORKS = sorted(FOLDER.glob("networks/*.json"))
DATA_SETS = {
    "digits": ["digits"],
    "mnist": ["mnist"],
    "fashion_mnist": ["mnist", "data/fashion_mnist"],
    "emnist": ["mnist", "data/emnist"],
    "cifar10": ["cifar10"],
    "celeba": ["cifar10", "data/celeba"],
}
"""By data set, its layers."""
ALGORITHMS = {
    path.stem: [f"algorithms/{path.stem}"]
    for path in sorted(FOLDER.glob("algorithms/*.json"))
    if path.stem not in ("headline", "pgd-paper", "warm", "warm-restart", "noncentred")
} | {
    f"{name}-{start}": [f"algorithms/{name}", f"algorithms/{start}"]
    for name in ("dcpc", "pgd")
    for start in ("warm", "warm-restart", "noncentred")
}
"""By algorithm that goes with any data set, its layers."""
GUIDED = ("dcpc-warm", "pgd-warm", "dcpc-warm-restart", "pgd-warm-restart", "lpc", "vae")


def arguments(*layers: str) -> list[str]:
    return [f"--config={FOLDER / layer}.json" for layer in layers]


def load(layer: str) -> dict:
    return json.loads((FOLDER / f"{layer}.json").read_text())


@pytest.mark.parametrize(
    ("data_set", "algorithm"),
    [
        # A third of the pairs: two data sets for every algorithm.
        pytest.param(data_set, algorithm, marks=[pytest.mark.slow] if (i + j) % 3 else [])
        for i, data_set in enumerate(DATA_SETS)
        for j, algorithm in enumerate(ALGORITHMS)
    ],
)
def test_every_algorithm_builds_on_every_data_set(
    data_set: str, algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    layers = [*DATA_SETS[data_set], *ALGORITHMS[algorithm]]
    built = ConfiguredCLI(["fit", *arguments(*layers)])
    names = [Path(layer).stem for layer in layers]
    assert Path(built.trainer.default_root_dir) == Path("runs", *names)
    module, base = built.model, load(DATA_SETS[data_set][0])["model"]
    assert module.held_out.num_particles == base["held_out"]["num_particles"]
    assert module.learning_rate == base["learning_rate"]
    assert (module.guide is not None) == (algorithm in GUIDED)
    if algorithm == "vae":
        assert isinstance(module, AmortisedModule)
        return
    name = Path(ALGORITHMS[algorithm][0]).stem
    written = load(f"algorithms/{name}")["model"]
    kept = "noncentred" if algorithm.endswith("noncentred") else "centred"
    assert module.parameterization == Parameterization(kept, kept, kept)
    assert module.inference.algorithm.name == written["algorithm"]
    assert module.inference.num_particles == written["num_particles"]
    step_sizes = base.get("step_size", {})
    for layer in DATA_SETS[data_set][1:]:
        step_sizes = load(layer).get("model", {}).get("step_size", step_sizes)
    if written["algorithm"] in step_sizes:
        assert module.inference.parts.step_size == step_sizes[written["algorithm"]]
    assert module.restarts == (algorithm == "lpc" or algorithm.endswith("restart"))
    assert module.is_warming_up == ("warm" in algorithm)


@pytest.mark.parametrize("layer", [path.stem for path in (FOLDER / "algorithms").glob("*.json")])
def test_a_layer_of_an_algorithm_leaves_data_model_and_measurements_be(layer: str) -> None:
    written = load(f"algorithms/{layer}")
    model = written["model"]
    model = model.get("init_args", model)
    assert not {"learning_rate", "held_out"} & model.keys()
    if layer not in ("headline", "pgd-paper"):
        # Momentum particle descent has an optimiser of its own.
        assert written.keys() - {"optimizer"} == {"model"}
        assert ("optimizer" in written) == (layer == "mpgd")
        assert "model" not in model


@pytest.mark.parametrize(
    ("layers", "model"),
    [
        (["mnist", "algorithms/headline"], "DeepLatentGaussian"),
        (["cifar10", "algorithms/pgd-paper"], "PGDGenerator"),
    ],
)
def test_the_papers_and_the_headlines_settings_build(
    layers: list[str], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    built = ConfiguredCLI(["fit", *arguments(*layers)])
    assert type(built.model.model).__name__ == model
    if model == "PGDGenerator":
        assert built.model.inference.parts.step_size == load(layers[1])["model"]["step_size"]
    else:
        assert built.datamodule.batch_size == load(layers[1])["data"]["init_args"]["batch_size"]
        (group,) = built.model.configure_optimizers().param_groups
        assert group["weight_decay"] == load(layers[1])["optimizer"]["init_args"]["weight_decay"]


@pytest.mark.parametrize("path", NETWORKS, ids=lambda path: path.stem)
def test_every_classifiers_config_builds_what_it_names(path: Path, tmp_path: Path) -> None:
    folder = f"--trainer.default_root_dir={tmp_path}"
    built = ConfiguredCLI(["fit", "--config", str(path), folder])
    assert isinstance(built.model, ClassifierModule)
    rule = json.loads(path.read_text())["model"]["init_args"]["rule"]
    assert f"dcpc.networks.{type(built.model.rule).__name__}" == rule["class_path"]
    values = [node.value for node in built.model.network.nodes]
    (group,) = built.model.rule.value_optimizer(values).param_groups
    assert group["lr"] == rule["init_args"]["value_optimizer"]["init_args"]["lr"]


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


@pytest.mark.parametrize("algorithm", head_to_head_report.ALGORITHMS)
def test_every_algorithm_fits_from_its_config(
    algorithm: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 4), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    warm_up = ["--model.start.warm_up_epochs=1"] if algorithm.endswith("-warm") else []
    main(
        [
            "fit",
            *layers("mnist", algorithm),
            "--model.model.init_args.latent_sizes=[2,3]",
            "--model.model.init_args.image_shape=[1,4,4]",
            *warm_up,
            "--model.held_out.num_particles=2",
            "--model.held_out.num_temperatures=2",
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
    "name",
    [
        "pgd-paper",
        *(pytest.param(name, marks=pytest.mark.slow) for name in head_to_head_report.ALGORITHMS),
    ],
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
    warm_up = ["--model.start.warm_up_epochs=1"] if name.endswith("-warm") else []
    main(
        [
            "fit",
            *layers("cifar10", name),
            "--model.model.init_args.latent_size=3",
            "--model.model.init_args.image_shape=[3,16,16]",
            *warm_up,
            "--model.held_out.num_particles=2",
            "--model.held_out.num_temperatures=1",
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


@pytest.mark.parametrize(("config", "count"), [("digits-semi", 300), ("mnist-semi", 600)])
def test_configs_of_half_labelled_images_build(
    config: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    built = ConfiguredCLI(["fit", *arguments(config), "--trainer.accelerator=cpu"])
    assert isinstance(built.datamodule, HalfLabelledData)
    assert built.datamodule.num_labelled == count
    assert built.model.label_site == "label"
    assert isinstance(built.model.model, LabelledEmbedding)


def test_the_config_of_the_transformer_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    built = ConfiguredCLI(["fit", *arguments("transformer")])
    model, data = built.model.model, built.datamodule
    assert isinstance(model, LatentTransformer)
    assert isinstance(data, PixelSequences)
    assert model.num_symbols == data.num_levels
    assert model.latent_after == (1, 2, 3, 4)
    assert built.model.start.afresh == "means"
