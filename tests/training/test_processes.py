"""Two processes that train together, against one that does what both would."""

from __future__ import annotations

import functools
import itertools
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forks import child, skip_without_autograd, wait
from pytorch_lightning.strategies import DDPStrategy
from resumable_runs import assert_same, run

from dcpc.errors import OptionError
from dcpc.parts import Adaptation
from dcpc.training import ClassifierModule, DigitsData, ParticleModule, ParticleStore
from dcpc.training.cli import ConfiguredCLI
from dcpc.training.data import EpochBatches
from dcpc.training.processes import check_strategy

ROOT = Path(__file__).parents[2]
NUM_DATA = 47
BATCH_SIZE = 10
NUM_BATCHES = 3
"""Of 24 data in one process and 23 in the other."""

PROGRAM = """
import sys
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, {tests!r})
from resumable_runs import run
if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], *sys.argv[3:])
"""


class Program:
    """A program that trains, since Lightning starts that again for every further process.

    The first process is forked from this one, which has imported everything.
    """

    def __init__(self, folder: Path, *options: str, name: str = "dcpc") -> None:
        folder.mkdir(exist_ok=True)
        program = folder / "program.py"
        program.write_text(PROGRAM.format(tests=str(ROOT / "tests")))
        self.out, self.err = folder / "out", folder / "err"
        skip_without_autograd()
        arguments = [str(folder), name, "--trainer.limit_val_batches=0", *options]

        def begin() -> None:
            os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            main = sys.modules["__main__"]
            main.__spec__, main.__file__ = None, str(program)
            sys.argv = [str(program), *arguments]
            runpy.run_path(str(program), run_name="__main__")

        self.pid = child(begin, self.out, self.err)

    def poll(self) -> int | None:
        """The exit status if the program has ended."""
        number, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if number else None

    def communicate(self) -> tuple[int, str, str]:
        """The exit status, and what was said."""
        status = wait(self.pid)
        return status, self.out.read_text(), self.err.read_text()


def train(folder: Path, *options: str, name: str = "dcpc") -> dict[str, Any]:
    """The checkpoint of such a training."""
    status, out, err = Program(folder, *options, name=name).communicate()
    assert status == 0, out[-2000:] + err[-2000:]
    assert out.count("checkpoint: ") == 1  # one of the processes speaks
    return torch.load(folder / "last.ckpt", weights_only=True)


def two(strategy: str) -> tuple[str, str]:
    return "--trainer.devices=2", f"--trainer.strategy={strategy}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Folder and checkpoint of two processes that train to the end, by strategy."""

    def of(strategy: str) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp(strategy)
        return folder, train(folder, *two(strategy))

    return functools.cache(of)


def alone(folder: Path, num_epochs: int, monkeypatch: pytest.MonkeyPatch) -> ParticleModule:
    """What two processes learn, learned by one: their batches, streams and averages in turn."""
    config = folder / "config.json"
    built = ConfiguredCLI(
        ["fit", f"--config={config}", f"--trainer.default_root_dir={folder / 'alone'}"]
    )
    module, data = built.model, built.datamodule
    assert isinstance(module, ParticleModule)
    assert isinstance(data, DigitsData)
    data.setup("fit")
    module._seed = 3
    module.store = ParticleStore(folder / "alone", NUM_DATA)
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    rank = 0
    monkeypatch.setattr(ParticleModule, "global_rank", property(lambda _: rank))
    batches = [EpochBatches(NUM_DATA, BATCH_SIZE, 0, None, rank, 2) for rank in (0, 1)]
    optimizer = module.configure_optimizers()
    for epoch in range(num_epochs):
        for part in batches:
            part.set_epoch(epoch)
        for indices in zip(*batches, strict=True):
            before, learned, losses = module.adaptation, [], []
            shares = [2 * len(index) / sum(map(len, indices)) for index in indices]
            for rank, index in enumerate(indices):
                module.adaptation = before
                with module.stream(module._num_steps):
                    loss = module.learn(data.training_set.__getitems__(index))
                losses.append(shares[rank] * loss / 2)
                learned.append(module.adaptation)
            module.adaptation = {
                name: Adaptation(
                    *(
                        {
                            key: sum(
                                share * getattr(own[name], kind)[key] / 2
                                for share, own in zip(shares, learned, strict=True)
                            )
                            for key in getattr(learned[0][name], kind)
                        }
                        for kind in ("preconditioner", "step_size")
                    )
                )
                for name in learned[0]
            }
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
            module._num_steps += 1
    return module


@pytest.mark.parametrize(
    "strategy",
    [
        "ddp",
        pytest.param("ddp_fork", marks=pytest.mark.slow),
        pytest.param("ddp_spawn", marks=pytest.mark.slow),
    ],
)
def test_two_processes_learn_what_one_would(
    strategy: str, whole: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, saved = whole(strategy)
    assert saved["global_step"] == 3 * NUM_BATCHES
    module = alone(folder, 3, monkeypatch)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(saved["state_dict"][name], value, rtol=1e-5, atol=1e-6)
    particles, expected = saved["dcpc"]["particles"], module.store.state_dict()
    assert particles["visited"].all()
    for name, value in expected["latents"].items():
        torch.testing.assert_close(particles["latents"][name], value, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(particles["log_joint"], expected["log_joint"], rtol=1e-3, atol=1e-3)


def test_data_belong_to_one_process_in_every_epoch() -> None:
    for size, batch_size, num_processes in ((47, 10, 2), (11, 1, 3), (12, 4, 5), (9, 100, 2)):
        parts = [
            EpochBatches(size, batch_size, 0, None, rank, num_processes)
            for rank in range(num_processes)
        ]
        owned = []
        for epoch in (0, 1):
            for part in parts:
                part.set_epoch(epoch)
            visited = [[i for batch in part for i in batch] for part in parts]
            assert sorted(itertools.chain(*visited)) == list(range(size))
            owned.append([set(own) for own in visited])
            lengths = {len(list(part)) for part in parts}
            assert lengths == {len(parts[0])}
            assert all(batch for part in parts for batch in part)
            for part in parts:
                assert sorted(part.sizes.elements()) == sorted(len(batch) for batch in part)
        assert owned[0] == owned[1]


def test_a_run_of_two_processes_goes_on_with_one_and_with_two(
    whole: Callable, tmp_path: Path
) -> None:
    """However they were started."""
    _, expected = whole("ddp")
    first = train(tmp_path / "first", *two("ddp_fork"), "--trainer.max_epochs=2")
    link = f"--ckpt_path={tmp_path / 'first' / 'last.ckpt'}"
    assert_same(train(tmp_path / "second", *two("ddp_fork"), link)["dcpc"], expected["dcpc"])
    resumed = run(tmp_path / "alone", "dcpc", "--trainer.limit_val_batches=0", link)
    assert resumed["dcpc"]["num_steps"] == first["dcpc"]["num_steps"] + 5


@pytest.mark.slow
def test_one_of_two_processes_that_is_killed_ends_the_run(tmp_path: Path) -> None:
    process = Program(tmp_path, *two("ddp"), "--trainer.max_epochs=100000")
    while not (tmp_path / "last.ckpt").exists():
        time.sleep(0.2)
        assert process.poll() is None
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "program.py"], capture_output=True, text=True
    )
    os.kill(int(children.stdout.split()[0]), signal.SIGKILL)
    status, _, err = process.communicate()
    assert status != 0
    assert "dcpc: error: " in err
    link = tmp_path / "last.ckpt"
    done = torch.load(link, weights_only=True)
    more = f"--trainer.max_epochs={done['epoch'] + 2}"
    resumed = run(tmp_path / "again", "dcpc", more, f"--ckpt_path={link.resolve()}")
    assert resumed["epoch"] == done["epoch"] + 1


@pytest.mark.parametrize(
    "strategy",
    [
        "ddp",
        pytest.param("ddp_fork", marks=pytest.mark.slow),
        pytest.param("ddp_spawn", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--model.guide=encoder"], "trainer.strategy: with model.guide, some steps leave .*"),
        (["--model.store_folder=/dev/null/x"], "the particle store cannot write to .*"),
    ],
    ids=["by all", "by the first"],
)
def test_a_refusal_is_one_line_of_one_process(
    strategy: str, options: list[str], line: str, tmp_path: Path
) -> None:
    status, _, err = Program(tmp_path, *two(strategy), *options).communicate()
    assert status == 2
    errors = re.findall(r"^dcpc: error: (.*)$", err, re.MULTILINE)
    assert len(errors) == 1
    assert re.fullmatch(line, errors[0])
    assert strategy != "ddp" or "Traceback" not in err


def test_processes_have_random_numbers_of_their_own(
    deep_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, rank = deep_module(), 0
    module._seed = 3
    monkeypatch.setattr(ParticleModule, "global_rank", property(lambda _: rank))
    drawn = set()
    for rank in range(3):  # noqa: B007 (the property looks at it)
        for key in ((0,), (1,), (0, 1)):
            with module.stream(*key):
                drawn.add(float(torch.rand(())))
    assert len(drawn) == 9


@pytest.mark.parametrize(
    ("options", "nodes", "message"),
    [
        (
            {"has_guide": False, "averages_gradients": False},
            1,
            r"trainer\.devices=2: learning rules",
        ),
        ({"has_guide": False}, 3, r"trainer\.num_nodes=3"),
        ({"has_guide": True}, 1, "use 'ddp_find_unused_parameters_true'"),
        ({"has_guide": False}, 1, "not shared out"),
    ],
)
def test_what_processes_cannot_share_is_refused(options: dict, nodes: int, message: str) -> None:
    trainer = SimpleNamespace(
        strategy=DDPStrategy(), world_size=2, num_nodes=nodes, train_dataloader=None
    )
    with pytest.raises(OptionError, match=message):
        check_strategy(trainer, **options)


def test_learning_rules_say_that_they_step_the_weights_themselves() -> None:
    assert not ClassifierModule.averages_gradients
    assert ParticleModule.averages_gradients
