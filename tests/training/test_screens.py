"""What the `dcpc` command shows at once, compared with the parser and with the shipped files."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import time
from argparse import SUPPRESS
from pathlib import Path

import pytest

from dcpc import __version__
from dcpc.presets import PRESETS
from dcpc.training import HeldOut, ParticleModule
from dcpc.training.cli import ConfiguredCLI
from dcpc.training.command import main
from dcpc.training.parser import CONFIGURED
from dcpc.training.screens import OPTIONS, OVERVIEW, SUBCOMMANDS, Option, help_of
from dcpc.training.shipped import describe_configs

CONFIGS = Path(__file__).parents[2] / "configs"

OWNERS = {"model.held_out": (HeldOut,), "model": (ParticleModule,), "data": CONFIGURED["data"]}
"""The classes whose arguments the keys below a key are."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> ConfiguredCLI:
    folder = tmp_path_factory.mktemp("run")
    config = f"--config={CONFIGS / 'digits.json'}"
    return ConfiguredCLI(["fit", config, f"--trainer.default_root_dir={folder}"])


@pytest.mark.parametrize("screen", [OVERVIEW, *map(help_of, SUBCOMMANDS)])
def test_a_help_screen_fits_a_terminal(screen: str) -> None:
    lines = screen.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("subcommand", "option"), [(name, option) for option in OPTIONS for name in option.subcommands]
)
def test_an_option_of_a_help_screen_is_the_parsers_with_its_default(
    subcommand: str, option: Option, built: ConfiguredCLI
) -> None:
    above, _, name = option.key.rpartition(".")
    if above in OWNERS:
        signatures = [inspect.signature(owner).parameters for owner in OWNERS[above]]
        defaults = {known[name].default for known in signatures if name in known}
        assert defaults
        default = defaults.pop() if len(defaults) == 1 else None  # where the classes agree
    else:
        (action,) = [
            a for a in built._subcommand_parsers[subcommand]._actions if a.dest == option.key
        ]
        default = action.default
    has_none = default in (None, inspect.Parameter.empty, SUPPRESS)
    assert option.default == (None if has_none else str(default))


def test_the_algorithms_that_a_help_screen_names_exist() -> None:
    (option,) = [o for o in OPTIONS if o.key == "model.algorithm"]
    named = [name for name in option.words.split(", ") if name != "..."]
    assert {*named, option.default} <= PRESETS.keys()


@pytest.mark.parametrize("subcommand", SUBCOMMANDS)
def test_help_shows_the_options_and_where_the_others_are(
    subcommand: str, capsys: pytest.CaptureFixture
) -> None:
    main([subcommand, "--config=configs/digits.json", "--help"])
    shown = capsys.readouterr().out
    for phrase in ("--config FILE", "--ckpt_path FILE", "--num_threads N", "--help_all"):
        assert phrase in shown
    for phrase in ("--model.help ParticleModule", "--data.help HubImages", "--print_config"):
        assert phrase in shown
    assert ("--init_from FILE" in shown) == (subcommand == "fit")


def test_the_whole_list_of_options_has_those_of_lightning(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--help_all"])
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    for key in ("--trainer.gradient_clip_val", "--trainer.max_epochs", "--init_from"):
        assert key in shown


def test_the_command_alone_lists_every_shipped_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    main([])
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 50
    assert max(map(len, shown.splitlines())) <= 80
    for path in CONFIGS.rglob("*.json"):
        config = json.loads(path.read_text())
        if "class_path" in config.get("data", {}):
            line = rf"configs/{path.relative_to(CONFIGS).as_posix()} +\w+ on \w+"
            assert re.search(line, shown), path
        else:
            assert re.search(rf"[:,]\s+{path.stem}\b", shown), path
    assert re.search("configs/digits.json +DeepLatentGaussian on DigitsData", shown)
    assert re.search("configs/networks/two-moons.json +Perceptron on MoonsData", shown)


@pytest.mark.parametrize("options", [[], ["--trainer.max_epochs=3"], ["--ckpt_path", "last.ckpt"]])
@pytest.mark.parametrize("subcommand", SUBCOMMANDS)
def test_a_command_without_a_config_says_what_to_do(
    subcommand: str, options: list[str], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([subcommand, *options])
    assert exit_info.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("dcpc: error: --config: missing")
    assert f"dcpc {subcommand} --config configs/digits.json\n" in shown
    assert describe_configs() in shown


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["fti"], "must be one of fit, validate, test, predict, got 'fti'; did you mean 'fit'?"),
        (["train"], "got 'train'; `dcpc --help` explains them"),
        (["configs/digits.json"], "got 'configs/digits.json'; dcpc fit --config configs/digits.js"),
        (["fit", "my.json"], "'my.json' stands alone; did you mean --config my.json?"),
        (["fit", "--num_threads", "1", "my.json"], "did you mean --config my.json?"),
        (["fit", "--config", "my.json"], "there is no file 'my.json'; `dcpc` lists the shipped"),
    ],
)
def test_a_slip_in_a_command_is_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    (shown,) = capsys.readouterr().err.splitlines()
    assert shown.startswith("dcpc: error: ")
    assert line in shown


def test_the_version_is_shown(capsys: pytest.CaptureFixture) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"dcpc {__version__}\n"


def test_what_is_only_shown_needs_neither_torch_nor_two_seconds() -> None:
    shown = [[], ["--help"], ["--version"], *([name, "--help"] for name in SUBCOMMANDS)]
    program = f"""
import sys
from dcpc.training.command import main
for arguments in {shown}:
    main(arguments)
assert not {{"torch", "pytorch_lightning", "jsonargparse", "numpy"}} & sys.modules.keys()
"""
    before = time.monotonic()
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert time.monotonic() - before < 2
