"""Folders of pictures and tables with something wrong in them: the file or the index is named."""

from __future__ import annotations

import gc
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dcpc.errors import DCPCError
from dcpc.training.data import HubImages

datasets = pytest.importorskip("datasets", reason="needs the extra 'data'")

# Pillow leaves the file of a picture that it cannot decode to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "huggingface")
    datasets.disable_progress_bars()
    yield
    gc.collect()


def png(size: tuple[int, int] = (40, 30), mode: str = "L", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    levels = RANDOM.integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(levels).convert(mode).save(file, kind)
    return file.getvalue()


def changed(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def folder_with(tmp_path: Path, content: bytes, name: str = "03.png") -> Path:
    """Six pictures, of which the fourth is `content`."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(6):
        if index != 3:
            (folder / f"{index:02}.png").write_bytes(png())
    (folder / name).write_bytes(content)
    return folder


def table(tmp_path: Path, pictures: list[Any] | None = None, **columns: Any) -> Path:
    """A parquet file of six pictures, with further columns of values and their feature."""
    folder = tmp_path / "table"
    folder.mkdir()
    found = [{"bytes": png(), "path": None} for _ in range(6)] if pictures is None else pictures
    features = {name: feature for name, (_, feature) in columns.items()}
    datasets.Dataset.from_dict(
        {"image": found} | {name: values for name, (values, _) in columns.items()},
        features=datasets.Features({"image": datasets.Image()} | features),
    ).to_parquet(folder / "train.parquet")
    return folder


def setup(path: Path | str, **options: Any) -> HubImages:
    data = HubImages(str(path), **{"held_out_fraction": 0.3, **options})
    data.setup("fit")
    return data


def error_of(path: Path | str, **options: Any) -> str:
    with pytest.raises(DCPCError) as info:
        setup(path, **options)
    message = str(info.value)
    assert "\n" not in message
    assert " object at 0x" not in message
    return message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no picture",
        png()[:8],
        png()[:40],
        png()[:-500],
        changed(png(), 16, (10**6).to_bytes(4, "big")),
        changed(png(), 60, b"\x00" * 40),
        png(mode="I;16"),
    ],
    ids=["empty", "text", "magic", "header", "truncated", "wrong size", "zeros", "16 bits"],
)
def test_a_picture_that_cannot_be_decoded_is_named(content: bytes, tmp_path: Path) -> None:
    message = error_of(folder_with(tmp_path, content))
    assert re.match(r"image 3 cannot be used: .*; repair or remove it", message)


def test_a_picture_of_another_size_is_named(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, png((41, 30)))
    assert "image 3 has the shape (1, 41, 30)" in error_of(folder)
    assert setup(folder, size=8).training_set.pixels.shape == (6, 1, 8, 8)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("1", "PNG"), ("RGB", "JPEG")],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_every_mode_of_eight_bits_are_converted(
    mode: str, kind: str, channels: int, tmp_path: Path
) -> None:
    folder = folder_with(tmp_path, png(mode=mode, kind=kind))
    assert setup(folder, channels=channels).training_set.pixels.shape == (6, channels, 40, 30)


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        (None, r"it is missing \(null\)"),
        ({"bytes": b"", "path": None}, "cannot identify image file"),
        ({"bytes": png()[:-500], "path": None}, ".*truncated"),
    ],
)
def test_a_row_without_a_picture_is_named(picture: Any, reason: str, tmp_path: Path) -> None:
    pictures = [{"bytes": png(), "path": None} for _ in range(6)]
    pictures[2] = picture
    message = error_of(table(tmp_path, pictures))
    assert re.match(rf"image 2 cannot be used: {reason}; repair", message)


@pytest.mark.parametrize(
    ("values", "feature", "got"),
    [
        ([0, None, 1, 0, 1, 0], datasets.ClassLabel(names=["a", "b"]), "nan .* at index 1"),
        ([0, 1, 1, 0, -1, 0], datasets.ClassLabel(names=["a", "b"]), "-1 at index 4"),
        ([0, 1, 2, None, 4, 5], datasets.Value("int64"), "nan .* at index 3"),
        ([0, 1, 2, -7, 4, 5], datasets.Value("int32"), "-7 at index 3"),
        ([0, 1, 2, 3, 4, 5.5], datasets.Value("float32"), r"0\.0 \(float32\) at index 0"),
        (list("abcdef"), datasets.Value("string"), "'a' .* at index 0"),
        ([[0]] * 6, datasets.Sequence(datasets.Value("int64")), ".* at index 0"),
    ],
)
def test_labels_of_a_column_that_are_no_classes_are_named(
    values: list, feature: Any, got: str, tmp_path: Path
) -> None:
    message = error_of(table(tmp_path, kind=(values, feature)), label_column="kind")
    assert re.search(rf"data\.label_column: the column 'kind' must hold .* got {got}", message)


@pytest.mark.parametrize(
    "damage", [lambda content: b"", lambda content: b"PAR1 PAR1", lambda content: content[:-9]]
)
def test_a_damaged_parquet_file_is_named(
    damage: Callable[[bytes], bytes], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    file = table(tmp_path) / "train.parquet"
    file.write_bytes(damage(file.read_bytes()))
    size = file.stat().st_size
    message = error_of(file.parent)
    assert f"'{file}' is no parquet file, or a damaged one of {size:,} bytes" in message
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"), [("more.json", "{"), ("more.json", '{"a": 1}\n{"b": [}'), ("x.py", "1/0")]
)
def test_a_folder_of_other_files_is_named_and_nothing_in_it_is_run(
    name: str, content: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / name).write_text(content)
    assert str(folder) in error_of(folder)
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "data.path must be a name on the hub or a folder, got ''"),
        ("~/nowhere", "data.path: there is no folder '.*/nowhere'"),
        ("~nobody-here/x", "data.path: '~nobody-here/x' starts at the home folder"),
        ("memory://pictures", "data.path: there is no folder 'memory://pictures'"),
    ],
)
def test_a_path_that_is_none_is_named(path: str, message: str) -> None:
    assert re.match(message, error_of(path))
