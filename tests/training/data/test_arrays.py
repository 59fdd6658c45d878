"""Arrays in a folder: what is right is read, whatever its layout; what is wrong is named."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcpc.errors import DataError, DCPCError
from dcpc.training.data import ArrayData

IMAGES = np.random.default_rng(0).random((6, 4, 3))
LABELS = np.arange(6)


def save(folder: Path, images: Any = IMAGES, labels: Any = None) -> None:
    for name, content in (("images", images), ("labels", labels)):
        path = folder / f"{name}.npy"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            np.save(path, content, allow_pickle=True)


def npy(array: np.ndarray = IMAGES) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def error_of(folder: Path) -> str:
    data = ArrayData(str(folder), num_held_out=2)
    with pytest.raises(DCPCError) as info:
        data.setup("fit")
    message = str(info.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "f16", ">f2", ">f4", ">f8", "<f4"])
def test_floats_of_any_width_and_byte_order_are_read(dtype: str, tmp_path: Path) -> None:
    save(tmp_path, IMAGES.astype(dtype))
    images, _ = ArrayData(str(tmp_path)).load()
    np.testing.assert_allclose(images.numpy()[:, 0], IMAGES, atol=1e-3 if "2" in dtype else 1e-7)


@pytest.mark.parametrize("shape", [(6, 4, 3), (6, 3, 4, 2)])
@pytest.mark.parametrize("dtype", ["u1", "f8"])
def test_arrays_in_fortran_order_are_read(
    shape: tuple[int, ...], dtype: str, tmp_path: Path
) -> None:
    images = (np.random.default_rng(1).random(shape) * (255 if dtype == "u1" else 1)).astype(dtype)
    save(tmp_path, np.asfortranarray(images))
    read = ArrayData(str(tmp_path)).load()[0].numpy().reshape(shape)
    np.testing.assert_allclose(read, images / (255 if dtype == "u1" else 1), atol=1e-6)


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", ">i4", ">i8", "u8", "?"])
def test_integer_labels_of_any_width_and_byte_order_are_read(dtype: str, tmp_path: Path) -> None:
    save(tmp_path, labels=LABELS.astype(dtype))
    _, labels = ArrayData(str(tmp_path)).load()
    assert labels.tolist() == LABELS.astype(dtype).astype(int).tolist()


@pytest.mark.parametrize("dtype", ["i1", "i4", ">i4", "u2", "u8", "?", "c8", "U5", "M8[s]", "V4"])
def test_pixels_of_other_types_are_named(dtype: str, tmp_path: Path) -> None:
    save(tmp_path, np.zeros((6, 4, 3), dtype))
    expected = rf"images\.npy' must hold bytes .* got {re.escape(str(np.dtype(dtype)))};"
    assert re.search(expected, error_of(tmp_path))


def test_bytes_of_zeros_and_ones_are_no_levels_of_grey(tmp_path: Path) -> None:
    save(tmp_path, (IMAGES > 0.5).astype(np.uint8))
    assert "holds bytes of 0 and 1" in error_of(tmp_path)
    assert "images.astype(np.float32)" in error_of(tmp_path)
    save(tmp_path, (IMAGES > 0.5).astype(bool))
    assert "ones and zeros by images.astype(np.float32)" in error_of(tmp_path)


@pytest.mark.parametrize(
    "shape", [(), (6,), (6, 4), (6, 1, 1, 4, 3), (0, 4, 3), (6, 0, 3), (6, 4, 0)]
)
def test_images_of_other_dimensions_or_none_are_named(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    save(tmp_path, np.zeros(shape))
    assert f"got an array of shape {shape}" in error_of(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e-3, 1.001, 255.0])
def test_the_first_image_beyond_the_unit_interval_is_named(value: float, tmp_path: Path) -> None:
    images = IMAGES.copy()
    images[3:, 1, 1] = value
    save(tmp_path, images)
    assert f"image 3 has the intensity {value:g}" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("labels", "got"),
    [
        (LABELS.astype("f4"), r"got 0\.0 \(float32\) at index 0"),
        (np.array([0, 1, np.nan, 3, 4, 5]), r"got nan \(float64\) at index 2"),
        (LABELS.astype("U3"), r"got '0' \(<U3\) at index 0"),
        (LABELS.astype("S3"), r"got b'0'"),
        (LABELS.astype("c8"), "complex64"),
        (np.array([0, 1, -1, -3, 4, 5]), "got -1 at index 2"),
        (np.array([0, 1, 2, 3, 2**63, 5], np.uint64), "got 9223372036854775808 at index 4"),
        (LABELS[:5], r"one label per image, 6, got shape \(5,\)"),
        (np.arange(7), r"one label per image, 6, got shape \(7,\)"),
        (LABELS[:, None], r"got shape \(6, 1\)"),
        (np.array(3), r"got shape \(\)"),
        (LABELS[:0], r"got shape \(0,\)"),
        (npy(LABELS)[:-3], "damaged one of"),
        (b"", "damaged one of 0 bytes"),
    ],
)
def test_labels_that_are_no_classes_are_named(labels: Any, got: str, tmp_path: Path) -> None:
    save(tmp_path, labels=labels)
    assert re.search(rf"labels\.npy' .*{got}", error_of(tmp_path))


@pytest.mark.parametrize("length", [0, 1, 5, 6, 9, 10, 60, 127, 128, 129, len(npy()) - 1])
def test_a_truncated_file_is_named(length: int, tmp_path: Path) -> None:
    save(tmp_path, npy()[:length])
    got = rf"images\.npy' is no NumPy array, or a damaged one of {length} bytes"
    assert re.search(got, error_of(tmp_path))


@pytest.mark.parametrize(
    ("there", "instead"),
    [
        (b"(6, 4, 3)", b"(7, 4, 3)"),
        (b"(6, 4, 3)", b"(5, 4, 3)"),
        (b"(6, 4, 3)", b"(6, 4, 4)"),
        (b"(6, 4, 3), ", b"(-6, 4, 3),"),
        (b"(6, 4, 3), }          ", b"(6000000000, 4, 3), } "),
        (b"<f8", b"<f4"),
        (b"<f8", b"<z8"),
        (b"'shape'", b"'shade'"),
        (b"{'descr'", b"import(x"),
        (b"{'descr'", b"\xff\x00\xfe\x01\x02\x03\x04\x05"),
        (b"NUMPY\x01", b"NUMPY\x09"),
    ],
)
def test_a_header_that_lies_is_named(there: bytes, instead: bytes, tmp_path: Path) -> None:
    content = npy().replace(there, instead)
    assert content != npy()
    assert len(content) == len(npy())
    save(tmp_path, content)
    assert "images.npy' " in error_of(tmp_path)


class Pickled:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("part", ["images", "labels"])
@pytest.mark.parametrize("as_array", [True, False])
def test_pickled_objects_are_refused_and_never_run(
    part: str, as_array: bool, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    objects = np.array([Pickled(trace)] * 6, dtype=object)
    save(tmp_path, **{part: objects if as_array else pickle.dumps(Pickled(trace))})
    assert f"{part}.npy' is no NumPy array" in error_of(tmp_path)
    assert not trace.exists()


def archive(folder: Path) -> None:
    with (folder / "images.npy").open("wb") as file:
        np.savez(file, images=IMAGES)


def damaged_archive(folder: Path) -> None:
    with zipfile.ZipFile(folder / "images.npy", "w") as file:
        file.writestr("images.npy", npy())
    content = (folder / "images.npy").read_bytes()
    (folder / "images.npy").write_bytes(content[:-10])


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: (folder / "images.npy").mkdir(),
        lambda folder: (folder / "images.npy").write_text("0.1,0.2"),
        lambda folder: (folder / "images.npy").symlink_to(folder / "nowhere"),
        lambda folder: save(folder, npy() + b"more"),
        archive,
        damaged_archive,
    ],
)
def test_a_file_that_is_something_else_is_named(
    make: Callable[[Path], Any], tmp_path: Path
) -> None:
    make(tmp_path)
    assert "images.npy' " in error_of(tmp_path)


def test_a_folder_may_be_below_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    save(tmp_path / "mine")
    assert len(ArrayData("~/mine").load()[0]) == 6
    with pytest.raises(DataError, match="there is no folder"):
        ArrayData("~/yours").setup("fit")
    with pytest.raises(DCPCError, match=r"data\.folder must be a path of this machine"):
        ArrayData("s3://bucket/mine")
