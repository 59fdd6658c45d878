"""TensorBoard monitors of a run: scalars, histograms and images."""

from __future__ import annotations

import math
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dcpc.evaluation import prior_samples
from dcpc.observed import call, mapped
from dcpc.sweep import SweepInfo
from dcpc.training.callbacks.board import add_grid, tensorboard
from dcpc.training.callbacks.grids import film_strips, image_grid
from dcpc.training.modules import GenerativeModule, ParticleModule

__all__ = ["ImageGrids", "SweepMonitor"]

SAMPLES = "prior_samples"
CAPTIONS = {
    "originals": "held-out data",
    "reconstructions": "their reconstructions: decoder means after inference",
    SAMPLES: "samples of the prior: decoder means",
}

SHOWN_SEQUENCES = 4
"""Sequences in TensorBoard, where pictures are small."""


class SweepMonitor(Callback):
    """Logs what the sweeps of a training step did; idle for modules that do not sweep.

    As scalars, by unit: acceptance (or conditional ESS, see `SweepInfo.statistic`) and step size;
    and the number of bad log-densities. As histograms over the batch's data, in TensorBoard:
    every latent's unconstrained values, the particles' log-weights (of mean weight one), and the
    ESS in percent before resampling.

    Args:
        every_n_steps: Every so many batches; the trainer's `log_every_n_steps`, since it drops
            what is logged in between.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not isinstance(pl_module, ParticleModule):
            return
        step = pl_module.last_step
        if (step + 1) % self.every_n_steps:
            return
        info = pl_module.last_sweep
        if info is None:  # the encoder is still warming up
            return
        division = call(pl_module.inference.division, batch[0])
        for kind, values in (("acceptance", info.statistic), ("step_size", info.step_size)):
            for unit, value in division.by_unit(values).items():
                pl_module.log(f"sweep/{kind}/{unit}", value, batch_size=1)
        pl_module.log("sweep/num_bad", float(info.num_bad), batch_size=1)
        writer = tensorboard(trainer)
        if writer is not None:
            for tag, numbers in _histograms(pl_module, info, batch[2]).items():
                writer.add_histogram(tag, numbers, step)


class ImageGrids(Callback):
    """Logs grids of held-out originals, their reconstructions, and samples of the prior.

    Of sequences `(T, channels, height, width)` it logs film strips: a row of originals, one of
    reconstructions and, where there are forecasts, one of these.

    Args:
        num_images: Images per grid; a square number fills it.
    """

    def __init__(self, num_images: int = 64) -> None:
        self.num_images = num_images

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        writer = tensorboard(trainer)
        if (
            writer is None
            or not isinstance(pl_module, GenerativeModule)
            or not pl_module.evaluations
        ):
            return
        first = pl_module.evaluations[0]
        originals = first.originals[: self.num_images]
        if originals.dim() == 5:
            self._add_film_strips(writer, pl_module)
        if originals.dim() != 4:
            return
        shown = mapped(lambda values: values[: self.num_images], first.data)
        drawn = prior_samples(pl_module.model, shown, seed=0)
        # Symbols are shown as such: their means are those of one symbol given the drawn ones.
        has_symbols = not originals.is_floating_point()
        generated = drawn.samples if has_symbols else drawn.means
        columns = math.isqrt(max(len(originals) - 1, 0)) + 1
        for name, pictures in (
            ("originals", originals),
            ("reconstructions", first.reconstructions[: self.num_images]),
            (SAMPLES, generated),
        ):
            grid = image_grid(pictures, columns, pl_module.intensity_range)
            caption = "samples of the prior" if name == SAMPLES and has_symbols else CAPTIONS[name]
            add_grid(writer, f"images/{name}", grid, pl_module.last_step, caption)

    def _add_film_strips(self, writer: SummaryWriter, module: GenerativeModule) -> None:
        first = module.evaluations[0]
        rows = {"originals": first.originals, "reconstructions": first.reconstructions}
        if module.forecasts:
            rows["forecasts"] = module.forecasts[0].frames
        shown = mapped(lambda values: values[:SHOWN_SEQUENCES], first.data)
        _, means = prior_samples(module.model, shown, seed=0)
        caption = f"held-out sequences; of each, from the top: {', '.join(rows)}"
        for name, strips, told in (
            ("film_strips", [frames[:SHOWN_SEQUENCES] for frames in rows.values()], caption),
            (SAMPLES, [means], CAPTIONS[SAMPLES]),
        ):
            picture = film_strips(strips, module.intensity_range)
            add_grid(writer, f"images/{name}", picture, module.last_step, told)


def _histograms(module: ParticleModule, info: SweepInfo, index: Tensor) -> dict[str, Tensor]:
    """By tag, the numbers of a batch's data that are finite."""
    assert module.store is not None
    assert module.last_state is not None
    if module.start.afresh is None:
        latents, log_weight = module.store.particles(index)
    else:
        latents = module.last_state.latents
        log_weight = module.last_state.log_weight.normalized().log() + math.log(
            module.inference.num_particles
        )
    numbers = {f"sweep/latents/{name}": u for name, u in latents.items()}
    numbers["sweep/log_weight"] = log_weight
    numbers["sweep/ess_percent"] = 100.0 * info.ess / module.inference.num_particles
    finite = {tag: values[values.isfinite()] for tag, values in numbers.items()}
    return {tag: values for tag, values in finite.items() if values.numel()}
