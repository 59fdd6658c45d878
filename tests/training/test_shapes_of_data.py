"""Data that do not fit the model are an error of one line, before anything is trained."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from dcpc.errors import DataError
from dcpc.training.command import main
from dcpc.training.modules.generative import check_image_shape


def error_of(
    capsys: pytest.CaptureFixture, folder: Path, config: str, shape: tuple[int, ...], top: int = 9
) -> str:
    np.save(folder / "images.npy", np.random.default_rng(0).random(shape))
    np.save(folder / "labels.npy", np.arange(shape[0]) % (top + 1))
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main(
            [
                "fit",
                f"--config=configs/{config}.json",
                "--data=ArrayData",
                f"--data.folder={folder}",
                "--data.num_held_out=12",
                "--data.batch_size=12",
                f"--trainer.default_root_dir={folder / 'run'}",
                "--trainer.max_epochs=1",
                "--trainer.log_every_n_steps=1",
                "--num_threads=1",
            ]
        )
    assert exit_info.value.code == 2
    written = capsys.readouterr()
    (line,) = written.err.splitlines()
    assert "epoch" not in written.out  # not even the untrained model was measured
    return line


@pytest.mark.parametrize(
    ("config", "shape", "expected"),
    [
        ("digits", (24, 9, 8), r"\[1, 9, 8\] .* model\.model\.image_shape is \[1, 8, 8\]"),
        ("digits", (24, 3, 8, 8), r"\[3, 8, 8\] .* model\.model\.image_shape is \[1, 8, 8\]"),
        ("digits", (24, 64, 1), r"\[1, 64, 1\] .* model\.model\.image_shape is \[1, 8, 8\]"),
        ("networks/digits", (24, 9, 8), r"\[72\] .* model\.network\.sizes to 72"),
        ("networks/mnist-equilibrium", (24, 8, 8), r"\[64\] .* model\.network\.sizes to 64"),
        ("networks/mnist-hopfield", (24, 8, 8), r"\[64\] .* model\.network\.sizes to 64"),
    ],
)
def test_data_of_another_shape_than_the_models_are_named(
    config: str,
    shape: tuple[int, ...],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    assert re.search(expected, error_of(capsys, tmp_path, config, shape))


def test_labels_beyond_the_number_of_classes_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    np.save(tmp_path / "images.npy", np.zeros((24, 8, 8)))
    line = error_of(capsys, tmp_path, "networks/digits", (24, 8, 8), top=23)
    assert re.search(r"label \d\d, but model\.num_classes is 10; raise it to", line)


def test_a_model_of_rows_of_pixels_takes_images_of_as_many_pixels() -> None:
    check_image_shape((1, 8, 8), (64,))
    check_image_shape((3, 8, 8), [3, 8, 8])
    with pytest.raises(DataError, match=r"image_shape is \[63\]"):
        check_image_shape((1, 8, 8), (63,))
