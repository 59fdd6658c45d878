"""Weights alone, and runs that may not go on from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dcpc.evaluation import FrozenParticles
from dcpc.io import write_tensors
from dcpc.training.checkpoint import CheckpointError, load_initial_weights


class Parts(nn.Module):
    """A module with a model, and perhaps a guide."""

    def __init__(self, size: int = 3, guide_size: int | None = None, part: str = "model") -> None:
        super().__init__()
        self.add_module(part, nn.Linear(size, 2))
        if guide_size is not None:
            self.guide = nn.Linear(guide_size, 2)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[nn.Module], Path]:
    def save(module: nn.Module) -> Path:
        path = tmp_path / "last.ckpt"
        write_tensors({"state_dict": module.state_dict(), "epoch": 7}, path)
        return path

    return save


def copied(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_the_weights_of_a_checkpoint_are_taken(saved: Callable) -> None:
    first, second = Parts(guide_size=4), Parts(guide_size=4)
    assert load_initial_weights(saved(first), second) == ["model", "guide"]
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


@pytest.mark.parametrize(("there", "here"), [(4, None), (None, 4)])
def test_a_guide_that_only_one_of_both_has_stays_out(
    there: int | None, here: int | None, saved: Callable
) -> None:
    first, second = Parts(guide_size=there), Parts(guide_size=here)
    before = copied(second)
    assert load_initial_weights(saved(first), second) == ["model"]
    for name, value in second.state_dict().items():
        kept = before if name.startswith("guide") else first.state_dict()
        assert torch.equal(value, kept[name]), name


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            Parts(3),
            Parts(4),
            r"'model\.weight' has shape \(2, 3\) there and \(2, 4\) in this model",
        ),
        (Parts(3, 4), Parts(3, 5), r"'guide\.weight' has shape \(2, 4\) there and \(2, 5\) in "),
        (Parts(part="network"), Parts(), r"has weights of \['network'\], but Parts of \['model'\]"),
    ],
)
def test_weights_of_another_model_are_refused_and_change_nothing(
    first: Parts, second: Parts, message: str, saved: Callable
) -> None:
    before = copied(second)
    with pytest.raises(CheckpointError, match=rf"^--init_from: .*{message}"):
        load_initial_weights(saved(first), second)
    for name, value in second.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_parameter_that_one_of_both_lacks_is_named(saved: Callable) -> None:
    first, second = Parts(), Parts()
    second.model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(CheckpointError, match=r"'model\.scale' of this model is not in the file"):
        load_initial_weights(saved(first), second)
    with pytest.raises(CheckpointError, match=r"'model\.scale' is in the file, but not in this"):
        load_initial_weights(saved(second), first)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_file_that_is_no_checkpoint_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    if content is None:
        torch.save({"weights": torch.ones(2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"^--init_from: '.*other\.ckpt' .* not a checkpoint"):
        load_initial_weights(path, Parts())
    with pytest.raises(CheckpointError, match=r"^--init_from: there is no checkpoint 'nowhere'"):
        load_initial_weights("nowhere", Parts())


def test_the_small_files_of_particles_have_weights_too(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    particles = FrozenParticles(
        model=model,
        latents={"z": torch.zeros(1, 4, 2)},
        log_weight=torch.zeros(1, 4),
        index=torch.arange(4),
    )
    particles.save(tmp_path / "small.pt")
    module = Parts(3)
    assert load_initial_weights(tmp_path / "small.pt", module) == ["model"]
    assert torch.equal(module.model.weight, model.weight)
