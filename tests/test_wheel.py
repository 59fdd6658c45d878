"""The wheel: what it holds, and that it trains where there is nothing else of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml

from dcpc import __version__

ROOT = Path(__file__).parents[1]
COMMAND = """
from importlib.metadata import entry_points

(command,) = entry_points(group="console_scripts", name="dcpc")
command.load()()
"""
"""What the script does that pip makes of a wheel."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build leaves files in its source and packs those of the last."""
    source = tmp_path_factory.mktemp("source")
    for name in ("configs", "dcpc", "experiments", "tests"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    run(source, "-m", "pip", "wheel", *options, "--wheel-dir=wheels", ".")
    (path,) = (source / "wheels").iterdir()
    return path


def run(folder: Path, *arguments: str, **environment: str) -> str:
    """The output of this interpreter in a folder, or a failure that shows it."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def files(folder: str, pattern: str) -> set[str]:
    """The files of a folder of the repository, by their paths within it."""
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)}


def test_the_wheel_holds_the_package_with_its_configs_and_nothing_else(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    information = {name for name in packed if name.split("/")[0].endswith(".dist-info")}
    assert len({name.split("/")[0] for name in information}) == 1
    configs = {f"dcpc/{name}" for name in files("configs", "*.json")}
    assert packed - information == files("dcpc", "*.py") | configs | {"dcpc/py.typed"}


def test_the_page_of_the_package_index_has_absolute_links_to_files_that_exist(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    page = message_from_bytes(archive.read(metadata))
    assert page["Version"] == __version__
    text = re.sub(r"```.*?```", "", page.get_payload(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)]+)\)", text)
    pictures = [link for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)]
    assert pictures
    assert all("/raw.githubusercontent.com/" in picture for picture in pictures)
    assert all(link.startswith("https://") for link in links)
    ours = [link.partition(f"/v{__version__}/")[2] for link in links if "/dcpc/dcpc/" in link]
    assert len(ours) > len(pictures)
    assert all((ROOT / path.partition("#")[0]).exists() for path in ours)


def test_the_version_and_the_licence_are_those_of_the_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (__version__, project["license"])
    assert [author["name"] for author in citation["authors"]] == ["dcpc contributors"]


def test_the_command_trains_beside_a_users_own_experiments(wheel: Path, tmp_path: Path) -> None:
    site, project = tmp_path / "site", tmp_path / "project"
    zipfile.ZipFile(wheel).extractall(site)
    (project / "experiments").mkdir(parents=True)
    (project / "experiments" / "mine.py").write_text("import dcpc; print(dcpc.__file__)")
    alone = {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    mine = run(project, "-m", "experiments.mine", **alone)
    assert mine.strip() == str(site / "dcpc" / "__init__.py")

    limits = ["max_epochs=1", "limit_train_batches=2", "limit_val_batches=0", "log_every_n_steps=1"]
    config = ["fit", "--config", "configs/digits.json"]
    run(project, "-P", "-c", COMMAND, *config, *(f"--trainer.{limit}" for limit in limits), **alone)
    assert (project / "runs" / "digits" / "last.ckpt").is_file()
