"""Training on sequences: true values that are known, forecasts, film strips, one-line errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import image
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from dcpc.io import read_tensors
from dcpc.training import HeldOut, ParticleModule
from dcpc.training.callbacks import ImageGrids, PredictionWriter
from dcpc.training.callbacks.grids import MAGNIFICATION, film_strips
from dcpc.training.command import main
from dcpc.training.data import LabelledData, TensorSet

NOISE, NUM_FRAMES, COUNT = 0.5, 3, 6


class Still(nn.Module):
    """Two intensities z ~ N(0, I) that every frame shows with noise: a site for each frame."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, frames: Tensor) -> None:
        with pyro.plate("sequences", len(frames)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(frames), 2), 1.0).to_event(1))
            where = pyro.deterministic("where", 2 * z.unsqueeze(-2), event_dim=2)
            for t in range(NUM_FRAMES):
                mean = self.shift + where[..., 0, :] / 2
                frame = dist.Normal(mean[..., None, None, :], NOISE).to_event(3)
                pyro.sample(f"x_{t}", frame, obs=frames[:, t])


class KnownSet(TensorSet):
    """Sequences of which `where` is known, and a site that the model does not have."""

    def __init__(self, frames: Tensor, where: Tensor) -> None:
        super().__init__(frames, torch.zeros(len(frames), dtype=torch.int64))
        self.where = where

    def truth(self, index: Tensor) -> Mapping[str, Tensor]:
        return {"where": self.where[index], "elsewhere": self.where[index]}


class KnownData(LabelledData):
    def __init__(self) -> None:
        super().__init__(batch_size=3, evaluation_batch_size=4, seed=0)

    def setup(self, stage: str) -> None:
        z = torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(5))
        noise = torch.randn(COUNT, NUM_FRAMES, 2, generator=torch.Generator().manual_seed(6))
        frames = (z.unsqueeze(1) + NOISE * noise).reshape(COUNT, NUM_FRAMES, 1, 1, 2)
        self.training_set = self.held_out_set = KnownSet(frames, 2 * z.unsqueeze(1))


@pytest.fixture
def module() -> ParticleModule:
    return ParticleModule(Still(), num_particles=2, held_out=HeldOut(200, 8, 8, forecast=1))


def posterior_mean(frames: Tensor) -> Tensor:
    """E[z | frames] of a conjugate normal mean, `(N, 2)`."""
    return frames.sum(1).flatten(1) / (frames.shape[1] + NOISE**2)


def test_true_values_are_compared_with_posterior_means_and_forecasts_with_frames(
    module: ParticleModule, trainer: Callable
) -> None:
    data = KnownData()
    (measured,) = trainer().test(module, datamodule=data, verbose=False)
    frames = data.held_out_set.data
    errors = 2 * posterior_mean(frames) - data.held_out_set.where.squeeze(1)
    expected = float(errors.square().sum(-1).mean().sqrt())
    spread = 2 * (NOISE**2 / (NUM_FRAMES + NOISE**2) * 2 / 200) ** 0.5  # of a posterior's mean
    assert measured["held_out/where_rmse"] == pytest.approx(expected, abs=4 * spread)
    assert "held_out/elsewhere_rmse" not in measured
    foreseen = (posterior_mean(frames[:, :-1]) - frames[:, -1].flatten(1)).square().mean()
    assert measured["held_out/forecast_mse"] == pytest.approx(float(foreseen), abs=8 * spread)
    repeated = (frames[:, -2] - frames[:, -1]).square().mean()
    assert measured["held_out/repeated_frame_mse"] == pytest.approx(float(repeated), rel=1e-5)
    rows = module.table(is_test=True)
    for name in ("where RMSE", "forecast MSE", "repeated frame MSE"):
        assert name in rows


def test_predictions_hold_sites_with_their_truth_and_a_picture_of_film_strips(
    module: ParticleModule, trainer: Callable, tmp_path: Path
) -> None:
    data = KnownData()
    writer = PredictionWriter(str(tmp_path), num_images=2)
    trainer(callbacks=[writer]).predict(module, datamodule=data, return_predictions=False)
    told = read_tensors(tmp_path / "predictions.pt")
    where = data.held_out_set.where
    assert torch.equal(told["true_where"], where)
    assert float((told["where"] - where).norm()) < float(where.norm())
    assert "elsewhere" not in told
    for name in ("originals", "reconstructions", "forecasts", "prior_sample_means"):
        assert told[name].shape == (COUNT, NUM_FRAMES, 1, 1, 2), name
    assert torch.equal(told["forecasts"][:, :-1], told["originals"][:, :-1])
    kinds = ("originals", "reconstructions", "forecasts", "prior_sample_means")
    expected = film_strips([told[name][:2] for name in kinds])
    shown = torch.from_numpy(image.imread(tmp_path / "predictions.png")[..., :1]).permute(2, 0, 1)
    shown = shown[:, ::MAGNIFICATION, ::MAGNIFICATION]
    torch.testing.assert_close(shown, expected, atol=1 / 255, rtol=0)


def test_film_strips_are_in_tensorboard(
    module: ParticleModule, trainer: Callable, tmp_path: Path
) -> None:
    logger = TensorBoardLogger(tmp_path, name="")
    trainer(limit_val_batches=1.0, logger=logger, callbacks=[ImageGrids()]).validate(
        module, datamodule=KnownData(), verbose=False
    )
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir, {"images": 0, "scalars": 0}).Reload()
    assert set(events.Tags()["images"]) == {"images/film_strips", "images/prior_samples"}
    (strips,) = events.Images("images/film_strips")
    # Four sequences in the first batch, of originals, reconstructions and forecasts.
    height, width = 4 * (3 * 2 + 1) + 3 * 3, NUM_FRAMES * 3 + 1
    factor = strips.width // width
    assert strips.width == factor * width
    assert strips.height > factor * height  # below a caption
    assert "held_out/where_rmse" in events.Tags()["scalars"]


@pytest.mark.parametrize(
    ("config", "option", "expected"),
    [
        (
            "bouncing-digits",
            "data.num_frames=7",
            r"\[7, 1, 16, 16\] \(frames, .* is \[8, 1,",
        ),
        ("memory", "data.num_frames=9", r"\[9, 1, 8, 8\] .*model\.model\.frames_shape is \[10,"),
        (
            "bouncing-digits",
            "model.held_out.forecast=8",
            "forecast=8 needs sequences of at least",
        ),
        ("bouncing-digits", "data.canvas_size=8", "data.canvas_size must be larger .* got 8"),
        ("digits", "model.held_out.forecast=1", r"forecast=1 needs sequences .* \[1, 8, 8\]"),
        ("digits-semi", "model.held_out.forecast=1", r"forecast=1 .*\['x', 'label', 'seen'\]"),
    ],
)
def test_frames_of_another_number_or_shape_are_one_line(
    config: str, option: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    capsys.readouterr()
    folder = f"--trainer.default_root_dir={tmp_path}"
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", f"--config=configs/{config}.json", f"--{option}", folder])
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(expected, line), line
