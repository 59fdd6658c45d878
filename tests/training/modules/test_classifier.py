"""Networks trained from the command line: two moons, from the config to the decision boundary."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from event_logs import event_logs
from matplotlib import image
from pytorch_lightning import Trainer
from sklearn.datasets import make_moons
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent
from torch import nn

from dcpc.errors import DataError, OptionError
from dcpc.networks import (
    Backpropagation,
    ConditionalGaussian,
    CrossEntropyNode,
    EquilibriumPropagation,
    PredictiveCodingNetwork,
)
from dcpc.training import ClassifierModule, DigitsData, MoonsData
from dcpc.training.callbacks import draw_decision_boundary
from dcpc.training.cli import ConfiguredCLI
from dcpc.training.command import main

CONFIG = str(Path(__file__).parents[3] / "configs" / "networks" / "two-moons.json")
NUM_BATCHES = 32  # 1024 points, 32 at a time
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def command(subcommand: str, folder: Path, *options: str) -> None:
    main([subcommand, "--config", CONFIG, f"--trainer.default_root_dir={folder}", *options])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two epochs."""
    folder = tmp_path_factory.mktemp("moons")
    command("fit", folder, "--trainer.max_epochs=2")
    return folder


@pytest.fixture(scope="module")
def events(run: Path) -> list[EventAccumulator]:
    return event_logs(run / "version_0")


def separator() -> PredictiveCodingNetwork:
    """Class 1 where the first coordinate is positive."""
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
        layer.bias.zero_()
    return PredictiveCodingNetwork(layer, CrossEntropyNode(2))


def accuracies(events: list[EventAccumulator]) -> list[ScalarEvent]:
    """Held-out accuracies of a run; the log of the untrained network has none."""
    tag = "held_out/accuracy"
    return [e for log in events if tag in log.Tags()["scalars"] for e in log.Scalars(tag)]


def test_accuracy_rises_and_has_a_curve(events: list[EventAccumulator]) -> None:
    curve = [e.value for e in accuracies(events)]
    assert len(curve) == 2
    assert 0.8 < curve[-1] <= 1.0


def test_inference_lowers_the_energy(events: list[EventAccumulator]) -> None:
    (log,) = (log for log in events if "train/energy" in log.Tags()["scalars"])
    after, before = (
        [e.value for e in log.Scalars(tag)]
        for tag in ("train/energy", "train/energy_before_inference")
    )
    assert len(after) == 2 * NUM_BATCHES // 8
    assert all(0 < low < high for low, high in zip(after, before, strict=True))


def test_the_decision_boundary_is_logged_and_saved(
    run: Path, events: list[EventAccumulator]
) -> None:
    shown = [e for log in events for e in log.Images("images/decision_boundary")]
    assert [e.step for e in shown] == [0, NUM_BATCHES - 1, 2 * NUM_BATCHES - 1]
    picture = image.imread(run / "decision_boundary.png")[..., :3]
    is_blue = (picture[..., 2] - picture[..., 0]) > 0.1
    is_red = (picture[..., 0] - picture[..., 2]) > 0.1
    assert 0.2 < is_blue.mean() < 0.7
    assert 0.2 < is_red.mean() < 0.7


def test_a_step_is_a_batch_however_often_the_weights_move_in_it(tmp_path: Path) -> None:
    # Z-IL steps the weights once per stage, three times a batch.
    command("fit", tmp_path, "--trainer.max_epochs=1", "--model.rule=ZeroDivergenceLearning")
    logs = event_logs(tmp_path / "version_0")
    shown = [e.step for log in logs for e in log.Images("images/decision_boundary")]
    assert shown == [0, NUM_BATCHES - 1]
    measured = [e.step for e in accuracies(logs)]
    assert measured == [NUM_BATCHES - 1]


def test_a_rule_of_a_config_can_be_overridden_in_part(tmp_path: Path) -> None:
    config = Path(CONFIG).with_name("mnist-equilibrium.json")
    folder = f"--trainer.default_root_dir={tmp_path}"
    rule = ConfiguredCLI(
        ["fit", f"--config={config}", "--model.rule.symmetric=true", folder]
    ).model.rule
    assert rule.symmetric
    assert rule.free_steps == json.loads(config.read_text())["model"]["init_args"]["rule"][
        "init_args"
    ].get("free_steps")


def test_test_prints_the_accuracy_of_the_checkpoint(
    run: Path, capsys: pytest.CaptureFixture, events: list[EventAccumulator]
) -> None:
    command("test", run)
    shown = re.search(
        r"512 held-out data\n +accuracy +(\S+) ± .*\nHigher is better", capsys.readouterr().out
    )
    assert shown is not None
    curve = [e.value for e in accuracies(events)]
    assert float(shown[1]) == pytest.approx(curve[-1], abs=6e-5)


def test_predict_writes_outputs_and_classes(run: Path) -> None:
    command("predict", run)
    predictions = torch.load(run / "predictions.pt", weights_only=True)
    assert predictions["outputs"].shape == (512, 2)
    assert torch.equal(predictions["classes"], predictions["outputs"].argmax(1))
    _, labels = make_moons(512, noise=0.2, random_state=0)
    assert predictions["labels"].tolist() == labels.tolist()
    assert not (run / "predictions.png").exists()


def test_resuming_reaches_the_uninterrupted_run(run: Path, tmp_path: Path) -> None:
    command("fit", tmp_path, "--trainer.max_epochs=1")
    resume = f"--ckpt_path={tmp_path / 'last.ckpt'}"
    command("fit", tmp_path, "--trainer.max_epochs=2", resume)
    whole, parts = (
        torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (run, tmp_path)
    )
    assert whole.keys() == parts.keys()
    assert not any(name.endswith(".value") for name in whole)
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


def test_accuracy_is_the_fraction_of_points_on_the_right_side() -> None:
    data = MoonsData()
    data.setup("fit")
    module = ClassifierModule(separator(), Backpropagation(), num_classes=2)
    module.start_measurements()
    assert data.held_out_set is not None
    for start in (0, 200):
        rows = range(start, min(start + 200, 512))
        module.measure(data.held_out_set.__getitems__(rows), 0, is_test=True)
    points, labels = make_moons(512, noise=0.2, random_state=0)
    expected = ((points[:400, 0] > 0) == labels[:400]).mean()
    assert module.measurements() == {"accuracy": pytest.approx(expected), "num_data": 400.0}


def test_the_picture_shows_the_boundary_where_it_is() -> None:
    data = MoonsData(num_held_out=20)
    data.setup("fit")
    module = ClassifierModule(separator(), Backpropagation(), num_classes=2)
    axes = draw_decision_boundary(module, data).axes[0]
    (picture,) = axes.images
    left, right, _, _ = picture.get_extent()
    across = torch.linspace(left, right, picture.get_array().shape[1])
    expected = (across > 0).long().expand(picture.get_array().shape)
    assert torch.equal(torch.as_tensor(picture.get_array()), expected)
    points, labels = make_moons(20, noise=0.2, random_state=0)
    (scatter,) = axes.collections
    torch.testing.assert_close(
        torch.as_tensor(scatter.get_offsets()), torch.as_tensor(points), atol=1e-6, rtol=0
    )
    right_side = ((points[:, 0] > 0) == labels).mean()
    assert axes.get_title() == f"held-out accuracy {100 * right_side:.1f} %"


def test_a_boundary_of_images_is_refused() -> None:
    data = DigitsData()
    data.setup("fit")
    module = ClassifierModule(separator(), Backpropagation())
    with pytest.raises(OptionError, match=r"points in the plane.*\(1, 8, 8\)"):
        draw_decision_boundary(module, data)


class Labels(MoonsData):
    """Two moons, of which some data have other labels."""

    def __init__(self, part: str, labels: dict[int, int]) -> None:
        super().__init__()
        self.part = part
        self.labels = labels

    def setup(self, stage: str) -> None:
        super().setup(stage)
        labels = getattr(self, f"{self.part}_set").labels
        for index, label in self.labels.items():
            labels[index] = label


@pytest.mark.parametrize(
    ("part", "labels", "message"),
    [
        (
            "training",
            {700: 2, 900: 3},
            "datum 700 of the training set has the label 2, but model.num_classes is 2; "
            "raise it to 4, and the size of the network's output with it",
        ),
        (
            "held_out",
            {5: -1},
            "datum 5 of the held-out set has the label -1, but model.num_classes is 2; "
            "number the classes from 0",
        ),
    ],
)
def test_labels_that_are_no_classes_are_refused_before_anything_is_learned(
    tmp_path: Path, part: str, labels: dict[int, int], message: str
) -> None:
    module = ClassifierModule(separator(), Backpropagation(), num_classes=2)
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, default_root_dir=tmp_path, **QUIET
    )
    for run in (trainer.fit, trainer.validate):
        with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
            run(module, datamodule=Labels(part, labels))
    assert module._num_steps == 0


def test_labels_of_data_without_a_module_of_their_own_are_refused_at_their_batch() -> None:
    module = ClassifierModule(separator(), Backpropagation(), num_classes=2)
    batch = torch.randn(2, 2), torch.tensor([0, 3]), torch.tensor([40, 41])
    with pytest.raises(DataError, match=r"datum 41 of the training set has the label 3, .* to 4"):
        module.learn(batch)


def test_predictions_are_made_in_evaluation_mode() -> None:
    dropped = PredictiveCodingNetwork(nn.Dropout(0.5), *separator().layers)
    module = ClassifierModule(dropped, Backpropagation(), num_classes=2)
    x = torch.randn(20, 2)
    torch.testing.assert_close(module.predict(x), separator()(x))
    assert dropped.training


def test_equilibrium_propagation_logs_the_nudged_energy(tmp_path: Path) -> None:
    network = ConditionalGaussian([2, 8, 2], "tanh")
    rule = EquilibriumPropagation(free_steps=0, nudged_steps=5)
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, default_root_dir=tmp_path, **QUIET
    )
    trainer.fit(ClassifierModule(network, rule, num_classes=2), datamodule=MoonsData(batch_size=32))
    logged = trainer.logged_metrics
    assert 0 < logged["train/nudged_energy"] < logged["train/nudged_energy_before_inference"]
    assert "train/energy" not in logged


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ClassifierModule(separator(), EquilibriumPropagation()),
            "CrossEntropyNode is linear",
        ),
        (lambda: MoonsData(num_training=0), r"data\.num_training must be at least 1, got 0"),
        (lambda: MoonsData(noise=-0.1), r"data\.noise must be at least 0, got -0\.1"),
        (lambda: MoonsData(held_out_seed=42), r"are both 42.*give two"),
        (
            lambda: ClassifierModule(separator(), Backpropagation(), num_classes=1),
            r"model\.num_classes must be at least 2, got 1",
        ),
    ],
)
def test_options_out_of_range_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call()
