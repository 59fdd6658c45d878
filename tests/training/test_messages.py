from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
from fuzz_configs import STACKS, run, sample
from jsonargparse.typing import PositiveInt
from torch import nn

from dcpc.training import cli
from dcpc.training.cli import ConfiguredCLI
from dcpc.training.command import main
from dcpc.training.data import LabelledData
from dcpc.training.type_words import describe_type, find_misfit

CONFIGS = Path(__file__).parents[2] / "configs"

Build = Callable[..., str]


@pytest.fixture
def error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Build:
    """The error line of a run with a layer and options on top of a shipped config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "TrainingCLI", ConfiguredCLI)  # a mistake must not start a run

    def build(
        layer: Any = None, *options: str, base: str = "digits", subcommand: str = "fit"
    ) -> str:
        layers = [str(CONFIGS / f"{base}.json")]
        if layer is not None:
            layers.append(str(tmp_path / "layer.json"))
            text = layer if isinstance(layer, str | bytes) else json.dumps(layer)
            Path(layers[-1]).write_bytes(text if isinstance(text, bytes) else text.encode())
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main([subcommand, *(f"--config={path}" for path in layers), *options])
        assert exit_info.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert len(line) < 500
        assert not re.search(r"Namespace\(|<class|Traceback| object at 0x", line)
        return line.removeprefix("dcpc: error: ")

    return build


def below(path: str, value: Any) -> Any:
    """A layer that sets one key."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


@pytest.mark.parametrize("mistake", sample(40, seed=0), ids=lambda mistake: mistake.description)
def test_a_mistake_in_a_shipped_config_is_one_line_that_names_the_key(
    mistake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome, text = run(mistake, tmp_path)
    assert outcome != "FAILED", text


def test_the_mistakes_cover_every_shipped_config() -> None:
    shipped = {str(p.relative_to(CONFIGS).with_suffix("")) for p in CONFIGS.rglob("*.json")}
    assert {name for stack in STACKS for name in stack} == shipped
    assert {mistake.stack[mistake.layer] for mistake in sample(len(shipped), seed=1)} == shipped


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (
            "model.guide",
            "encodr",
            "model.guide: expected 'encoder' or 'top_down_encoder', a class_path of type Module or "
            "null, got 'encodr'",
        ),
        (
            "model.held_out.num_particles",
            "three",
            "model.held_out.num_particles: expected a whole number, got 'three'",
        ),
        ("model.held_out", None, "model.held_out: expected an object of keys, got null"),
        (
            "model.num_particles",
            None,
            "model.num_particles: expected a whole number, got null",
        ),
        ("model.start", 3, "model.start: expected an object of keys, got 3"),
        (
            "model.model.init_args.latent_sizes",
            [3, "x"],
            "model.model.latent_sizes: expected a list, each element a whole number, got an "
            "element 'x'",
        ),
        (
            "model.model.init_args",
            7,
            "model.model.init_args: expected an object of keys, got a number",
        ),
        (
            "model.step_size",
            {"pgd": "x"},
            "model.step_size.pgd: expected a number, got 'x'",
        ),
        ("model.step_size", {"pgd": -1}, "model.step_size.pgd: .* positive number, got -1.0"),
        ("model.class_path", "dcpc.training.DigitsData", "model: .* of another kind.*"),
        ("data.class_path", "dcpc.training.LabelledData", "data: .* abstract.*"),
        (
            "model.class_path",
            "dcpc.training.modules.GenerativeModule",
            "model: expected .*, got 'dcpc.training.modules.GenerativeModule' "
            r"\(an abstract class; name one that derives from it\)",
        ),
        ("model.class_path", "dcpc.training.modules.MeasuredModule", "model: .* abstract class.*"),
        ("model.model.class_path", "dcpc.nowhere.Model", "model.model: .*'dcpc.nowhere.Model'.*"),
        ("model.model.class_path", "torch.optim.Adam", "model.model: .* of another kind.*"),
        ("data", "nowhere.Data", "data: expected a class_path .*'nowhere.Data'.*"),
        ("data", None, "data: missing or null.*"),
        ("model", None, "model: missing or null.*"),
        ("trainer", None, "trainer: expected an object of keys, got null"),
        ("trainer", [], "trainer: expected an object of keys, got []"),
        (
            "trainer.max_epochs",
            "many",
            "trainer.max_epochs: expected a whole number or null, got 'many'",
        ),
        ("trainer.max_epochs", -5, "trainer.max_epochs: .*-5.*"),
        ("trainer.max_steps", None, "trainer.max_steps: expected a whole number, got null"),
        ("trainer.accelerator", "tpuu", "trainer.accelerator: .*'tpuu'.*"),
        ("trainer.devices", 0, "trainer.devices: .*0.*"),
        ("trainer.barebones", True, "trainer.barebones: expected false, got true: it refuses .*"),
        ("trainer.max_time", "soon", "trainer.max_time: .*'soon'.*"),
        ("trainer.limit_val_batches", -1, "trainer.limit_val_batches: .*-1.*"),
        (
            "trainer.check_val_every_n_epoch",
            0,
            "trainer.check_val_every_n_epoch: expected a whole number >0 or null, got 0",
        ),
        ("trainer.log_every_n_steps", -1, "trainer.log_every_n_steps: expected .*, got -1"),
        ("trainer.accumulate_grad_batches", 0, "trainer.accumulate_grad_batches: .* >0, got 0"),
        ("trainer.gradient_clip_val", -1, "trainer.gradient_clip_val: expected .*, got -1"),
        ("trainer.default_root_dir", "memory://run", "trainer.default_root_dir .*'memory://run'"),
        ("trainer.default_root_dir", "~nobody-here/run", "trainer.default_root_dir: '~nobody.*"),
        ("trainer.callbacks", ["dcpc.training.Nothing"], "trainer.callbacks: .*Nothing.*"),
        ("model.store_folder", "s3://particles", "model.store_folder .*'s3://particles'"),
        ("seed_everything", -1, "seed_everything: expected .* 0 to 2.32 - 1, got -1"),
        ("seed_everything", None, "seed_everything: expected .*, got null"),
        ("num_threads", -1, "num_threads: expected .*, got -1"),
        ("data.init_args.seed", -1, "data.seed must be .*, got -1"),
        ("data.init_args.num_workers", -1, "data.num_workers must be at least 0, got -1"),
    ],
)
def test_a_wrong_value_of_a_layer_is_one_line(
    error: Build, path: str, value: Any, line: str
) -> None:
    written = error(below(path, value))
    assert written == line or re.fullmatch(line, written), written


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ["--model.step_size.pgd=fast"],
            "model.step_size.pgd: expected a number, got 'fast'",
        ),
        (
            ["--model.model.latent_sizes=10,32"],
            "model.model.latent_sizes: expected a list, each element a whole number, got '10,32'",
        ),
        (["--model.num_particles=2.5"], "model.num_particles: expected a whole number, got 2.5"),
        (
            ["--optimizer=SGD", "--optimizer.lr=x"],
            "optimizer.lr: expected a number or a class_path of type Tensor, got 'x'",
        ),
        (["--optimizer=SGD", "--optimizer.lr=-1"], "optimizer.lr: .*-1.0"),
        (["--optimizer=SGD", "--optimizer.momentu=1"], ".*did you mean 'optimizer.momentum'.*"),
        (["--trainer.max_epocs=3"], "trainer.max_epocs: .*did you mean 'trainer.max_epochs'.*"),
        (["--model=GenerativeModule"], "model: .*, got 'GenerativeModule' .an abstract class; .*"),
        (["--config="], "--config: there is no file ''; `dcpc` lists .*"),
        (["--ckpt_path=s3://runs/last.ckpt"], "--ckpt_path .*'s3://runs/last.ckpt'"),
    ],
)
def test_a_wrong_option_is_one_line(error: Build, options: list[str], line: str) -> None:
    written = error(None, *options)
    assert written == line or re.fullmatch(line, written), written


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("network.init_args.sizes", [64, 0], "model.network.sizes must hold .*, got [64, 0]"),
        ("network.class_path", "torch.nn.Linear", "model.network: .*'torch.nn.Linear'.*"),
        ("network.init_args.activation", "relux", "model.network.activation must .*'relux'"),
        ("rule.init_args.num_steps", -1, "model.rule.num_steps must be at least 0, got -1"),
        ("rule.init_args.num_steps", "x", "model.rule.num_steps: expected a whole number, got 'x'"),
        (
            "rule.init_args.value_optimizer",
            {"class_path": "torch.optim.SGD", "init_args": {"lr": "x"}},
            "model.rule.value_optimizer.lr: expected .*, got 'x'",
        ),
        (
            "rule.init_args.value_optimizer",
            {"class_path": "torch.optim.SGD", "init_args": {"lr": -0.5}},
            "model.rule.value_optimizer.lr: .*-0.5.*",
        ),
        ("num_classes", 1, "model.num_classes must be at least 2, got 1"),
    ],
)
def test_a_wrong_value_of_a_classifier_is_one_line(
    error: Build, path: str, value: Any, line: str
) -> None:
    written = error(below(f"model.init_args.{path}", value), base="networks/digits")
    assert written == line or re.fullmatch(line.replace("[", r"\["), written), written


class Own(nn.Module):
    """A model whose constructor says what is wrong, in two lines, because of another error."""

    def __init__(self, image_shape: list[int], kind: str = "plain") -> None:
        super().__init__()
        try:
            self.scale = {"plain": 1.0}[kind]
        except KeyError as error:
            raise ValueError(f"there is no such kind,\n{kind}") from error


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("fancy", "model.model.kind: there is no such kind, fancy"),
        (3, "model.model.kind: expected a text, got 3"),
        ([1, 2], "model.model.kind: expected a text, got [1, 2]"),
    ],
)
def test_an_error_of_a_users_own_class_keeps_its_words(error: Build, kind: Any, line: str) -> None:
    config = {"class_path": f"{__name__}.Own", "init_args": {"image_shape": [1], "kind": kind}}
    assert error(below("model.model", config)) == line


class OwnData(LabelledData):
    """Data of a user, of which no number is held out."""

    def __init__(self, batch_size: int = 10, noise: float = 0.1) -> None:
        super().__init__(batch_size, batch_size, 0)

    def setup(self, stage: str) -> None:
        """Nothing is set up before the error."""


def test_a_key_that_a_users_own_data_lack_is_told_from_those_that_they_have(error: Build) -> None:
    written = error(None, f"--data={__name__}.OwnData", "--data.num_held_out=3")
    assert written.startswith(
        "data.num_held_out: the key 'num_held_out' is not accepted, only batch_size, noise"
    )


@pytest.mark.parametrize("package", ["wandb", "mlflow", "comet"])
def test_a_package_that_a_logger_needs_is_named(error: Build, package: str) -> None:
    if find_spec(package) or find_spec(f"{package}_ml"):
        pytest.skip(f"{package} is installed")
    name = {"wandb": "WandbLogger", "mlflow": "MLFlowLogger", "comet": "CometLogger"}[package]
    written = error(None, f"--trainer.logger={name}")
    assert re.match(rf"trainer\.logger: {name} needs the package {package}\S+, which is", written)


def test_a_value_of_several_lines_is_shown_in_one(error: Build) -> None:
    written = error(below("model.learning_rate", "a\nb"))
    assert re.fullmatch(r"model\.learning_rate: expected a number, got 'a\W+n?b'", written)


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("model.num_particles", "x", "model.num_particles: expected a whole number, got 'x'"),
        ("trainer", None, "trainer: expected an object of keys, got null"),
        ("seed_everything", -1, "seed_everything: .*, got -1"),
        ("trainer.default_root_dir", "memory://", "trainer.default_root_dir .*"),
    ],
)
def test_the_other_commands_err_alike(
    error: Build, subcommand: str, path: str, value: Any, line: str
) -> None:
    written = error(below(path, value), subcommand=subcommand)
    assert written == line or re.fullmatch(line, written), written


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"trainer": ', "--config: the file 'layer.json' is no JSON .*line 1 column 13.*"),
        ("", "--config: the file 'layer.json' is no JSON .*"),
        (b"\xff{}", "--config: the file '.*layer.json' is no text in UTF-8 .*"),
        ("[1, 2]", "--config: the file 'layer.json' must hold a JSON object, got [1, 2]"),
    ],
)
def test_a_layer_that_is_no_object_is_one_line(error: Build, content: str, line: str) -> None:
    written = error(content)
    assert written == line or re.fullmatch(line, written), written


def test_the_home_folder_may_be_written_as_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = f"--config={CONFIGS / 'digits.json'}"
    built = ConfiguredCLI(["fit", config, "--trainer.default_root_dir=~/run"])
    assert built.trainer.default_root_dir == str(tmp_path / "run")


@pytest.mark.parametrize(
    "option", ["--trainer.logger=false", "--trainer.enable_checkpointing=false"]
)
def test_logs_or_checkpoints_may_be_switched_off_twice_in_a_folder(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for _ in range(2):
        main(
            [
                "fit",
                f"--config={CONFIGS / 'digits.json'}",
                f"--trainer.default_root_dir={tmp_path}",
                "--trainer.max_epochs=1",
                "--trainer.limit_train_batches=1",
                "--trainer.log_every_n_steps=1",
                "--model.held_out.num_particles=2",
                "--model.held_out.num_temperatures=1",
                "--data.evaluation_batch_size=20",
                "--trainer.limit_val_batches=1",
                option,
            ]
        )
    assert "after" in capsys.readouterr().out
    assert (tmp_path / "last.ckpt").exists() == ("logger" in option)
    assert bool(list(tmp_path.rglob("events.out.*"))) == ("logger" not in option)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "a whole number"),
        (float | None, "a number or null"),
        (Literal["a", 3], "'a' or 3"),
        (Sequence[int], "a list, each element a whole number"),
        (tuple[float, float], "a list of 2, each a number"),
        (dict[str, float], "an object, each value a number"),
        (Literal["own"] | nn.Module | None, "'own', a class_path of type Module or null"),
        (PositiveInt, "a whole number >0"),
    ],
)
def test_types_are_described_in_plain_words(hint: Any, words: str) -> None:
    assert describe_type(hint) == words


@pytest.mark.parametrize(
    ("value", "hint", "place"),
    [
        ([1, 2, "x"], list[int], "[2]"),
        ([[1], [2, None]], list[list[int]], "[1][1]"),
        ({"a": 1.0, "b": "x"}, float | dict[str, float] | None, ".b"),
        ("x", float | dict[str, float] | None, ""),
        ([0.0, 1.0, 2.0], tuple[float, float], ""),
        ([True], list[int], "[0]"),
    ],
)
def test_the_misfitting_part_of_a_value_is_found(value: Any, hint: Any, place: str) -> None:
    assert find_misfit(value, hint)[0] == place
