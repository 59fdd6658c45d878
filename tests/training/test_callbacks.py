from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from dcpc.training import HeldOut, ImageData, ParticleModule
from dcpc.training.callbacks import (
    EvaluationTable,
    ImageGrids,
    PredictionWriter,
    RunReport,
    SweepMonitor,
)
from dcpc.training.callbacks.grids import MAGNIFICATION, film_strips, image_grid
from dcpc.training.data import LabelledSet
from dcpc.training.modules import GenerativeModule


class ColourImages(ImageData):
    """Twelve 3 x 2 x 2 images in [-1, 1], from a generator of their own."""

    intensity_range = (-1.0, 1.0)

    def __init__(self) -> None:
        super().__init__(batch_size=4, num_held_out=4)

    def load(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(8)
        images = torch.rand(12, 3, 2, 2, generator=generator)
        return images, torch.zeros(12, dtype=torch.long)

    def image_set(self, images: Tensor, labels: Tensor, rows: Tensor) -> LabelledSet:
        return super().image_set(2 * images - 1, labels, rows)


@pytest.fixture
def colour_module(shifted_gaussian: type) -> ParticleModule:
    return ParticleModule(shifted_gaussian(12), held_out=HeldOut(2, 2, 2))


def logged(folder: Path) -> EventAccumulator:
    """What TensorBoard would read, all of it."""
    everything = {"images": 0, "histograms": 0, "scalars": 0}
    return EventAccumulator(str(folder), everything).Reload()


def decoded(events: EventAccumulator, tag: str, size: int) -> Tensor:
    """The last square image of a tag below its caption, `(channels, size, size)` in [0, 1]."""
    png = events.Images(tag)[-1].encoded_image_string
    shown = torch.from_numpy(image.imread(io.BytesIO(png), format="png")).permute(2, 0, 1)
    factor = shown.shape[2] // size
    return shown[:, -factor * size :: factor, ::factor]


def test_a_grid_has_its_pictures_in_rows_with_grey_lines_between() -> None:
    images = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 3, 2, 4) / 4
    grid = image_grid(images, columns=3)
    assert grid.shape == (3, 2 * 3 + 1, 3 * 5 + 1)
    for index, intensity in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        top, left = 1 + 3 * (index // 3), 1 + 5 * (index % 3)
        assert (grid[:, top : top + 2, left : left + 4] == intensity).all()
    assert (grid[:, ::3] == 0.5).all()
    assert (grid[:, :, ::5] == 0.5).all()
    assert (grid[:, 4:, 11:] == 0.5).all()  # no sixth picture


def test_a_grid_maps_the_range_to_the_unit_interval_and_clamps_what_is_beyond() -> None:
    images = torch.tensor([-1.5, -1.0, -0.5, 0.0, 1.0, 3.0]).reshape(1, 1, 1, 6)
    grid = image_grid(images, 1, (-1.0, 1.0))
    assert grid[0, 1, 1:-1].tolist() == [0.0, 0.0, 0.25, 0.5, 1.0, 1.0]
    assert image_grid(images, 1)[0, 1, 1:-1].tolist() == [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]


def test_film_strips_have_a_row_of_frames_of_each_kind_for_every_sequence() -> None:
    # Two sequences of three frames of 2 x 4 pixels, in two kinds; every frame has its own grey.
    greys = torch.arange(12.0).reshape(2, 2, 3, 1, 1, 1) / 11
    strips = greys.expand(2, 2, 3, 3, 2, 4)  # (kind, sequence, frame, channels, height, width)
    picture = film_strips(list(strips))
    height = 2 * (2 + 1) + 1
    assert picture.shape == (3, 2 * height + 3, 3 * (4 + 1) + 1)
    expected = torch.full_like(picture, 0.5)
    for kind in range(2):
        for sequence in range(2):
            for frame in range(3):
                top, left = sequence * (height + 3) + 1 + 3 * kind, 1 + 5 * frame
                expected[:, top : top + 2, left : left + 4] = greys[kind, sequence, frame]
    assert torch.equal(picture, expected)


def test_film_strips_map_the_range_to_the_unit_interval() -> None:
    picture = film_strips([torch.tensor([-1.0, 0.0, 3.0]).reshape(1, 3, 1, 1, 1)], (-1.0, 1.0))
    assert picture[0, 1, [1, 3, 5]].tolist() == [0.0, 0.5, 1.0]


def test_grids_of_colour_images_in_minus_one_to_one_have_their_colours(
    colour_module: ParticleModule, trainer: Callable, tmp_path: Path
) -> None:
    logger = TensorBoardLogger(tmp_path, name="")
    data = ColourImages()
    trainer(limit_val_batches=1.0, logger=logger, callbacks=[ImageGrids()]).validate(
        colour_module, datamodule=data, verbose=False
    )
    logger.finalize("success")
    grid = decoded(logged(Path(logger.log_dir)), "images/originals", size=7)
    assert grid.shape == (3, 7, 7)  # four images of 2 x 2 in two rows
    held_out = (data.held_out_set.data + 1) / 2
    for index, original in enumerate(held_out):
        top, left = 1 + 3 * (index // 2), 1 + 3 * (index % 2)
        shown = grid[:, top : top + 2, left : left + 2]
        torch.testing.assert_close(shown, original, atol=1 / 255, rtol=0)


def test_predictions_of_colour_images_in_minus_one_to_one_make_a_picture(
    colour_module: ParticleModule, trainer: Callable, tmp_path: Path
) -> None:
    data = ColourImages()
    trainer(callbacks=[PredictionWriter(str(tmp_path), num_images=3)]).predict(
        colour_module, datamodule=data, return_predictions=False
    )
    picture = image.imread(tmp_path / "predictions.png")[..., :3]
    assert picture.shape[:2] == (MAGNIFICATION * (4 * 3 + 1), MAGNIFICATION * (3 * 3 + 1))
    small = torch.from_numpy(picture[::MAGNIFICATION, ::MAGNIFICATION]).permute(2, 0, 1)
    for index, original in enumerate(data.held_out_set.data[:3]):
        shown = small[:, 1:3, 1 + 3 * index : 3 + 3 * index]
        torch.testing.assert_close(shown, (original + 1) / 2, atol=1 / 255, rtol=0)


@pytest.mark.parametrize(
    ("algorithm", "units"),
    [("dcpc", ["z1", "z2"]), ("dcpc-smc", ["z1", "z2"]), ("ipc", ["z1+z2"])],
)
def test_the_monitor_logs_every_few_batches_whatever_the_algorithm(
    algorithm: str,
    units: list[str],
    deep_module: Callable,
    images: type,
    trainer: Callable,
    tmp_path: Path,
) -> None:
    logger = TensorBoardLogger(tmp_path, name="")
    num_particles = 1 if algorithm == "ipc" else 3
    module = deep_module(algorithm=algorithm, num_particles=num_particles, sweeps_per_step=3)
    # Twenty images in five batches per epoch; `ipc` steps its optimiser three times per batch.
    trainer(
        max_epochs=4, logger=logger, callbacks=[SweepMonitor(every_n_steps=4)], log_every_n_steps=4
    ).fit(module, datamodule=images(batch_size=4))
    logger.finalize("success")
    events = logged(Path(logger.log_dir))
    tags = events.Tags()
    for tag in (*(f"sweep/step_size/{unit}" for unit in units), "sweep/num_bad"):
        assert [event.step for event in events.Scalars(tag)] == [3, 7, 11, 15, 19], tag
    assert ("sweep/acceptance/z1" in tags["scalars"]) == (algorithm != "ipc")
    counts = {"sweep/ess_percent": 4, "sweep/log_weight": 4 * num_particles}
    counts |= {f"sweep/latents/{z}": 4 * num_particles * n for z, n in (("z1", 2), ("z2", 3))}
    assert set(tags["histograms"]) == set(counts)
    for tag, count in counts.items():
        shown = events.Histograms(tag)
        assert [event.step for event in shown] == [3, 7, 11, 15, 19]
        assert all(event.histogram_value.num == count for event in shown)


def test_histograms_skip_numbers_that_are_not_finite(
    deep_module: Callable, images: type, trainer: Callable, tmp_path: Path
) -> None:
    logger = TensorBoardLogger(tmp_path, name="")

    class Spoil(SweepMonitor):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            latents, log_weight = pl_module.store.particles(batch[2])
            log_weight[:, 0] = -np.inf
            spoiled = {**latents, "z1": torch.full_like(latents["z1"], np.nan)}, log_weight
            pl_module.store.particles = lambda index: spoiled
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    trainer(logger=logger, callbacks=[Spoil(every_n_steps=1)], log_every_n_steps=1).fit(
        deep_module(num_particles=3), datamodule=images(batch_size=4)
    )
    logger.finalize("success")
    events = logged(Path(logger.log_dir))
    assert "sweep/latents/z1" not in events.Tags()["histograms"]
    assert events.Histograms("sweep/log_weight")[0].histogram_value.num == 4 * 2


def test_the_monitor_needs_no_tensorboard(
    deep_module: Callable, images: type, trainer: Callable
) -> None:
    run = trainer(callbacks=[SweepMonitor(every_n_steps=1)])
    run.fit(deep_module(), datamodule=images())
    assert "sweep/step_size/z1" in run.callback_metrics


class Regression(GenerativeModule):
    """Learns without particles: the shift is the data's mean."""

    def learn(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return (batch[0].flatten(1) - self.model.shift).square().mean()


def test_a_module_without_particles_has_grids_and_a_report_but_no_sweeps(
    shifted_gaussian: type, images: type, trainer: Callable, tmp_path: Path, capsys
) -> None:
    logger = TensorBoardLogger(tmp_path, name="")
    report = RunReport()
    run = trainer(
        limit_val_batches=1.0,
        logger=logger,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        callbacks=[SweepMonitor(every_n_steps=1), ImageGrids(), EvaluationTable(), report],
    )
    module = Regression(shifted_gaussian(), held_out=HeldOut(2, 2, 2))
    run.fit(module, datamodule=images())
    logger.finalize("success")
    tags = logged(Path(logger.log_dir)).Tags()
    names = ("originals", "prior_samples", "reconstructions")
    assert sorted(tags["images"]) == [f"images/{name}" for name in names]
    assert not tags["histograms"]
    swept = [tag for tag in tags["scalars"] if tag.startswith("sweep/")]
    assert swept == ["sweep/held_out_ess_percent"]
    measured = module.measurements()
    nll, error = measured["evidence_nll"], measured["evidence_nll_se"]
    assert report.after == f"evidence NLL {nll:.2f} ± {error:.2f}"
    assert "4 held-out data, 2 particles" in capsys.readouterr().out
