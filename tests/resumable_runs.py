"""Small runs of `dcpc fit` whose checkpoints are compared, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcpc.training.command import main

NUM_STEPS = 5
"""Batches per epoch, the last one short."""

SETTINGS: dict[str, dict[str, Any]] = {
    "dcpc": {"num_particles": 3, "move": "underdamped"},
    "lpc": {
        "algorithm": "lpc",
        "num_particles": 2,
        "step_size": 0.1,
        "guide": "encoder",
        "start": {"warm_up_epochs": 1},
    },
    "ipc": {"algorithm": "ipc", "num_particles": 1, "sweeps_per_step": 2, "step_size": 0.05},
}
SCHEDULER = ["--optimizer=Adam", "--lr_scheduler=StepLR", "--lr_scheduler.step_size=1"]


def run(folder: Path, name: str, *options: str) -> dict[str, Any]:
    """Runs `dcpc fit` in a folder, and returns its checkpoint."""
    config = {
        "seed_everything": 3,
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": str(folder),
            "log_every_n_steps": 1,
            "max_epochs": 3,
            "limit_val_batches": 2,
        },
        "model": {
            "model": {
                "class_path": "dcpc.models.DeepLatentGaussian",
                "init_args": {"latent_sizes": [2, 3], "image_shape": [1, 8, 8]},
            },
            "held_out": {"num_particles": 2, "num_temperatures": 2},
            **SETTINGS[name],
        },
        "data": {
            "class_path": "dcpc.training.data.DigitsData",
            "init_args": {
                "batch_size": 10,
                "evaluation_batch_size": 5,
                "num_held_out": 1797 - 10 * NUM_STEPS + 3,
            },
        },
    }
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    main(["fit", f"--config={path}", *options])
    return torch.load(folder / "last.ckpt", weights_only=True)


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Equality, bit for bit, of nested dicts, lists, tensors and numbers."""
    if isinstance(one, Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for position, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{position}]")
    else:
        assert one == other, where


def assert_continues(whole: dict[str, Any], resumed: dict[str, Any]) -> None:
    for entry in (
        "state_dict",
        "optimizer_states",
        "lr_schedulers",
        "dcpc",
        "epoch",
        "global_step",
    ):
        assert_same(whole[entry], resumed[entry], entry)
