"""Checkpoints that are damaged, foreign or changed: none continues a run as if it were whole."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from resumable_runs import assert_continues, run
from torch import Tensor

from dcpc.evaluation import FrozenParticles
from dcpc.evaluation.particles.particle_files import FrozenParticlesError
from dcpc.networks import load_weights
from dcpc.networks.weights import WeightsError
from dcpc.training import ParticleModule
from dcpc.training.cli import ConfiguredCLI

MORE = "--trainer.max_epochs=4"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a finished run."""
    folder = tmp_path_factory.mktemp("damage") / "run"
    run(folder, "dcpc")
    return (folder / "last.ckpt").resolve()


@pytest.fixture(scope="module")
def continued(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The checkpoint of the run that went on."""
    return run(tmp_path_factory.mktemp("more") / "run", "dcpc", MORE, f"--ckpt_path={finished}")


def entries(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of everything in nested dictionaries and lists."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from entries(value, (*path, key))


def at(content: Any, path: tuple) -> Any:
    for key in path:
        content = content[key]
    return content


def change(content: dict[str, Any], chance: random.Random) -> str:
    """Damages one entry of a checkpoint, and says which."""
    path = chance.choice(list(entries(content)))
    holder, key, value = at(content, path[:-1]), path[-1], at(content, path)
    how = chance.choice(["remove", "retype", "nan", "shape"])
    if how == "nan" and isinstance(value, Tensor) and value.is_floating_point() and value.numel():
        value.view(-1)[0] = float("nan")
    elif how == "shape" and isinstance(value, Tensor):
        holder[key] = torch.zeros(*value.shape, 2)
    elif how == "retype":
        holder[key] = "nonsense" if not isinstance(value, str) else 7
    elif isinstance(holder, dict):
        del holder[key]
    else:
        holder.pop(key)
    return f"{how} {'.'.join(map(str, path))}"


def spoil(checkpoint: Path, target: Path, chance: random.Random) -> str:
    """Writes a damaged copy, and says how."""
    whole = checkpoint.read_bytes()
    how = chance.choice(["bit", "cut", "foreign", "structure", "structure", "structure"])
    if how == "bit":
        place = chance.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        target.write_bytes(damaged)
        return f"bit {place}"
    if how == "cut":
        target.write_bytes(whole[: chance.randrange(len(whole))])
        return how
    if how == "foreign":
        torch.save(chance.choice([[1, 2], {"state_dict": {}}, {"a": torch.zeros(3)}, 5]), target)
        return how
    content = torch.load(checkpoint, weights_only=True)
    said = change(content, chance)
    torch.save(content, target)
    return said


@pytest.mark.parametrize("count", [15, pytest.param(400, marks=pytest.mark.slow)])
def test_damage_is_one_line_or_does_no_harm(
    count: int,
    finished: Path,
    continued: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    chance = random.Random(count)
    refused = 0
    for number in range(count):
        damaged = tmp_path / "damaged.ckpt"
        said = spoil(finished, damaged, chance)
        try:
            resumed = run(tmp_path / f"{number}", "dcpc", MORE, f"--ckpt_path={damaged}")
        except SystemExit as stopped:
            refused += 1
            lines = capsys.readouterr().err.strip().splitlines()
            told = len(lines) == 1 and lines[0].startswith("dcpc: error: ")
            if not told or stopped.code != 2:
                raise AssertionError(f"{said}: {lines}") from None
        else:
            for entry in ("state_dict", "dcpc"):  # the damage was where nobody looks
                assert_continues_in(entry, continued, resumed, said)
    assert refused > count / 2


def assert_continues_in(entry: str, one: dict, other: dict, said: str) -> None:
    try:
        assert_continues({**one, entry: one[entry]}, {**one, entry: other[entry]})
    except AssertionError as error:
        raise AssertionError(f"{said}: goes on otherwise, {error}") from None


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_nothing_pickled_ever_runs(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    trap = tmp_path / "executed"
    content = torch.load(finished, weights_only=True)
    files = []
    for number, place in enumerate([("epoch",), ("dcpc", "seed"), ("state_dict",), ("loops",)]):
        changed = copy.deepcopy(content)
        at(changed, place[:-1])[place[-1]] = Malicious(trap)
        files.append(tmp_path / f"{number}.ckpt")
        torch.save(changed, files[-1])
    files.append(tmp_path / "plain.ckpt")
    files[-1].write_bytes(pickle.dumps(Malicious(trap)))
    options = ["fit", f"--config={finished.parents[2] / 'config.json'}"]
    built = ConfiguredCLI([*options, f"--trainer.default_root_dir={tmp_path / 'built'}"])
    assert isinstance(built.model, ParticleModule)
    for file in files:
        with pytest.raises(SystemExit):
            run(tmp_path / "run", "dcpc", f"--ckpt_path={file}")
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
        with pytest.raises(FrozenParticlesError):
            FrozenParticles.from_checkpoint(file, built.model.model)
        with pytest.raises(WeightsError):
            load_weights(built.model.model, file)
    assert not trap.exists()
