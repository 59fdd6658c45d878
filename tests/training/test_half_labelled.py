"""Batches of several tensors, from the config to the pictures, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from event_logs import event_logs
from torch import nn

from dcpc import DCPC
from dcpc.errors import DataError
from dcpc.training.command import main
from dcpc.training.observations import check_observed

CONFIG = Path(__file__).parents[2] / "configs" / "digits-semi.json"
SMALL = {
    "trainer.max_epochs": 2,
    "trainer.log_every_n_steps": 1,
    "trainer.limit_train_batches": 2,
    "trainer.limit_val_batches": 1,
    "trainer.limit_test_batches": 1,
    "trainer.limit_predict_batches": 1,
    "model.held_out.num_temperatures": 3,
    "model.held_out.test_temperatures": 3,
    "model.held_out.num_particles": 3,
}


class Pair(nn.Module):
    """Two measurements of one quantity, the second of which may be missing."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(()))

    def forward(self, first: torch.Tensor, second: torch.Tensor, has_second: torch.Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("data", len(first)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(first)), 1.0))
            pyro.sample("first", dist.Normal(z, self.raw.exp()), obs=first)
            with pyro.poutine.mask(mask=has_second):
                pyro.sample("second", dist.Normal(2 * z, self.raw.exp()), obs=second)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("half_labelled")

    def run(subcommand: str, **options: Any) -> Path:
        settings = {**SMALL, "trainer.default_root_dir": folder, **options}
        main([subcommand, "--config", str(CONFIG), *(f"--{k}={v}" for k, v in settings.items())])
        return folder

    return run


@pytest.fixture(scope="module")
def run(command: Callable) -> Path:
    return command("fit")


def test_a_config_trains_and_shows_how_labels_are_predicted(run):
    shown = event_logs(run / "version_0")[-1]
    assert {
        "held_out/error_percent",
        "held_out/expected_calibration_error",
        "held_out/label_log_loss",
    } <= set(shown.Tags()["scalars"])
    assert {"images/calibration", "images/prior_samples"} <= set(shown.Tags()["images"])


def test_measurements_and_predictions_hold_the_posterior_of_labels(run, command, capsys):
    command("test")
    printed = capsys.readouterr().out
    assert "labels that are wrong" in printed
    assert "expected calibration error" in printed
    assert (run / "calibration.png").stat().st_size > 0
    command("predict")
    predictions = torch.load(run / "predictions.pt", weights_only=True)
    probabilities = predictions["class_probabilities"]
    assert probabilities.shape == (297, 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(297))
    assert predictions["originals"].shape == (297, 1, 8, 8)


def test_arrays_reach_a_model_by_the_names_of_its_arguments(tmp_path):
    generator = np.random.default_rng(0)
    z = generator.normal(size=60)
    np.save(tmp_path / "first.npy", z + 0.1 * generator.normal(size=60))
    np.save(tmp_path / "second.npy", 2 * z + 0.1 * generator.normal(size=60))
    np.save(tmp_path / "has_second.npy", np.arange(60) % 3 > 0)
    config = {
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": str(tmp_path / "run"),
            "max_epochs": 20,
            "check_val_every_n_epoch": 20,
            "log_every_n_steps": 1,
        },
        "model": {
            "model": {"class_path": f"{__name__}.Pair"},
            "num_particles": 8,
            "learning_rate": 0.1,
            "held_out": {"num_particles": 16, "num_temperatures": 20, "test_temperatures": 20},
        },
        "data": {
            "class_path": "dcpc.training.data.NamedArrayData",
            "init_args": {
                "folder": str(tmp_path),
                "arguments": ["first", "second", "has_second"],
                "batch_size": 20,
                "num_held_out": 20,
            },
        },
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    main(["fit", "--config", str(path)])
    saved = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert float(saved["state_dict"]["model.raw"].exp()) < 0.4  # of one at first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {
                "model.model": json.dumps(
                    {
                        "class_path": "dcpc.models.DeepLatentGaussian",
                        "init_args": {"latent_sizes": [3], "image_shape": [1, 8, 8]},
                    }
                )
            },
            r"data \['x', 'label', 'seen'\].*\(x.*num_images.*'label'",
        ),
        ({"model.model.num_classes": 8}, r"has the label 9.*classes 0 to 7"),
        ({"model.label_site": "x"}, r"label_site='x'.*\['label_unobserved'\]"),
        ({"model.held_out.completion": "true"}, r"completion=True.*\['x', 'label', 'seen'\]"),
        ({"data.num_labelled": 3}, r"data.num_labelled.*classes, 10"),
    ],
)
def test_bad_configs_are_one_line(command, capsys, tmp_path, options, message):
    with pytest.raises(SystemExit) as ended:
        command("fit", **{**options, "trainer.default_root_dir": tmp_path})
    assert ended.value.code == 2
    (line,) = [
        text for text in capsys.readouterr().err.splitlines() if text.startswith("dcpc: error")
    ]
    assert re.search(message, line)


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (torch.ones(4, dtype=torch.bool), r"site 'label'.*\(4,\).*mask\.bool"),
        (torch.ones(3), r"BoolTensor.*mask\.bool"),
    ],
)
def test_masks_of_a_wrong_shape_or_type_name_the_site(seen, message):
    def model(x, label, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            classes = dist.Categorical(logits=torch.stack([z, -z], -1))
            pyro.sample("label", classes, obs=label, obs_mask=seen)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(DataError, match=message):
        DCPC(model, num_particles=4).bind(torch.zeros(3), torch.zeros(3).long(), seen)


def test_a_datum_without_any_observation_is_named():
    def model(x, has_x, y, has_y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            with pyro.poutine.mask(mask=has_y):
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=has_x)

    has_x = torch.tensor([True, False, False])
    data = {"x": torch.zeros(3), "has_x": has_x, "y": torch.zeros(3)}
    index = torch.tensor([7, 8, 9])
    check_observed(model, data | {"has_y": ~has_x}, index, -1)
    with pytest.raises(DataError, match=r"datum 9 .*no observation.*\['x_observed', 'y'\]"):
        check_observed(model, data | {"has_y": torch.tensor([True, True, False])}, index, -1)
