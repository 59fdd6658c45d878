"""Modules around a Pyro program of images: held-out evidence, reconstructions, predictions."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import torch
from torch import Tensor, nn

from dcpc.errors import DataError, OptionError, require_at_least
from dcpc.evaluation import (
    PRIOR_SAMPLES,
    Calibration,
    Evaluation,
    Forecast,
    ImportanceSampler,
    bottom_half,
    calibration,
    complete,
    evaluate,
    forecast,
    forward_pass,
    held_out_inference,
    mean_error,
    per_datum,
    prior_samples,
    summarise,
)
from dcpc.observed import (
    Observed,
    call,
    check_signature,
    main_tensor,
    named_tensors,
)
from dcpc.training.data import Batch, LabelledData, LabelledSet
from dcpc.training.modules.base import LearningRateSchedule, MeasuredModule
from dcpc.training.modules.bounds import negative_elbo
from dcpc.training.observations import check_runs

__all__ = ["GenerativeModule", "Guide", "HeldOut"]

Guide = Literal["encoder", "top_down_encoder"] | nn.Module | None
"""A guide; `encoder` is the model's own, `model.encoder()`, or `model.encoder(top_down=True)`."""


@dataclass(frozen=True)
class HeldOut:
    """How held-out data are measured.

    Args:
        num_particles: Particles per datum.
        num_temperatures: Length of the annealing ladder while training.
        test_temperatures: Its length for `test` and `predict`. A short ladder overstates the
            evidence NLL, by Jensen's inequality; lengthen it until the figure stands still.
        bound_samples: Samples of the guide per datum of the importance-weighted NLL.
        prior_samples: Samples of the prior per datum of the prior-sample NLL, by `test`.
        completion: Whether `test` also completes the upper half of images from the lower one,
            which takes as long again.
        parameterization: Whether annealing moves latents by their values, `centred`, or by their
            standardised errors, `noncentred`. Either estimate of the evidence is unbiased, and the
            tighter one tells a lower NLL: by errors for deep generative models that learned by
            errors, by values for chains whose latents have data of their own.
        is_joint: Whether annealing moves all continuous latents as one unit. That costs a pass
            through the model where units cost one each.
        forecast: Number of last frames of sequences `(T, channels, height, width)` that are also
            predicted from the frames before, which takes as long again; 0 for none.

    Raises:
        OptionError: A number out of range.
    """

    num_particles: int = 16
    num_temperatures: int = 100
    test_temperatures: int = 400
    bound_samples: int = 100
    prior_samples: int = PRIOR_SAMPLES
    completion: bool = False
    forecast: int = 0
    parameterization: Literal["centred", "noncentred"] = "centred"
    is_joint: bool = False

    def __post_init__(self) -> None:
        require_at_least("model.held_out.num_particles", self.num_particles, 2)
        require_at_least("model.held_out.num_temperatures", self.num_temperatures, 1)
        require_at_least("model.held_out.test_temperatures", self.test_temperatures, 1)
        require_at_least("model.held_out.bound_samples", self.bound_samples, 1)
        if self.parameterization not in ("centred", "noncentred"):
            raise OptionError(
                "model.held_out.parameterization must be 'centred' or 'noncentred', got "
                f"{self.parameterization!r}"
            )
        require_at_least("model.held_out.forecast", self.forecast, 0)
        require_at_least("model.held_out.prior_samples", self.prior_samples, 1)

    @property
    def coordinates(self) -> dict[str, Any]:
        """Coordinates and units of the annealing, as options of `held_out_inference`."""
        is_noncentred = self.parameterization == "noncentred"
        return {
            "reparam": "noncentred" if is_noncentred else None,
            "blocks": "all" if self.is_joint else (),
        }


class GenerativeModule(MeasuredModule):
    """Base class: a Pyro program of images, and what is measured on data it never saw.

    Held-out data are inferred from scratch, by annealing, whatever the algorithm that trains: the
    evidence is a property of the model alone. Where there is a guide, two bounds of its own are
    measured beside it; `test` adds the prior-sample NLL, which is far too high. All of them are
    minus logarithms, so that lower is better.

    Args:
        model: The Pyro program, a torch module; called with a batch of data, with all latents in
            one plate over the batch.
        guide: A Pyro program, a torch module, that draws the same latents from a batch of data;
            `encoder` for the one that `model.encoder()` makes, `top_down_encoder` for that of
            `model.encoder(top_down=True)`, null for none.
        held_out: How held-out data are measured.
        learning_rate: Adam learning rate; ignored when `--optimizer` is given.
        learning_rate_schedule: `cosine` lowers the rate to zero over the run, by
            `trainer.max_epochs`, `trainer.max_steps` or `trainer.max_time`, whichever is nearest;
            null keeps it.
        particle_batch_size: Particles of a datum that the model is evaluated for at once; null for
            all of them.
        label_site: Site of the model that is a datum's label, as in
            `pyro.sample("label", ..., obs=label, obs_mask=seen)`: predicted for held-out data, and
            compared with their labels. null for none.

    Attributes:
        evaluations: Evaluations of the last round over the held-out data.
        forecasts: Forecasts of the last round, if there are any.
        intensity_range: Intensities of black and of white in the data.
        calibration: Of the last round, how well labels were predicted, if there is a `label_site`.

    Raises:
        OptionError: A number out of range, or a model without an encoder of its own.
    """

    headline = "evidence_nll"

    def __init__(
        self,
        model: nn.Module,
        guide: Guide = None,
        held_out: HeldOut = HeldOut(),
        learning_rate: float = 1e-3,
        learning_rate_schedule: LearningRateSchedule | None = None,
        particle_batch_size: int | None = None,
        label_site: str | None = None,
    ) -> None:
        super().__init__(learning_rate, learning_rate_schedule)
        self.model = model
        self.guide = _own_encoder(model, guide) if isinstance(guide, str) else guide
        self.held_out = held_out
        self.particle_batch_size = particle_batch_size
        self.held_out_inference = held_out_inference(
            model,
            held_out.num_particles,
            particle_batch_size=particle_batch_size,
            **held_out.coordinates,
        )
        self.intensity_range = (0.0, 1.0)
        self.label_site = label_site
        self.evaluations: list[Evaluation] = []
        self.forecasts: list[Forecast] = []
        self._labels: list[Tensor] = []
        self._estimates: dict[str, list[Tensor]] = {}
        self._held_out_set: LabelledSet | None = None
        self._barren: list[str] | None = None
        self._squared_errors: dict[str, list[Tensor]] = {}
        self._prior_sampler = ImportanceSampler(model)
        self._guide_sampler = None if guide is None else ImportanceSampler(model, self.guide)

    @property
    def charts(self) -> dict[str, str]:
        told = {"held-out evidence NLL": "held_out/evidence_nll$"}
        if self.label_site is not None:
            told["held-out labels that are wrong, in percent"] = "held_out/error_percent$"
        told |= super().charts
        return told | {"held-out reconstruction MSE": "held_out/reconstruction_mse$"}

    def negative_elbo(
        self,
        x: Observed,
        num_samples: int = 1,
        kl_weight: float = 1.0,
    ) -> Tensor:
        """Minus the evidence lower bound of a batch per datum, in nats, by Pyro's `Trace_ELBO`.

        Latents that nothing depends on (labels that are not seen) are no part of it: a guide need
        not draw them, and their factors would only add noise.

        Args:
            x: The model's arguments, `(B, *shape)`.
            num_samples: Samples of the guide per datum.
            kl_weight: Share by which the divergence of guide and prior counts.
        """
        if self._barren is None:
            self._barren = call(self.held_out_inference.division, x).barren
        program = pyro.poutine.block(self.model, hide=self._barren)
        assert self.guide is not None
        return negative_elbo(program, self.guide, x, num_samples, kl_weight)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        self.intensity_range = getattr(data, "intensity_range", self.intensity_range)
        if isinstance(data, LabelledData) and data.held_out_set is not None:
            self._held_out_set = data.held_out_set
            first = data.held_out_set.first(1)[0]
            check_signature(self.model, first)
            if self.held_out.completion:
                images_alone("completion=True", first)
            shape = tuple(main_tensor(first).shape[1:])
            for name in ("image_shape", "frames_shape"):
                check_image_shape(shape, getattr(self.model, name, shape), name)
            check_runs(self.model, data.held_out_set.first(2)[0])
            if self.held_out.forecast:
                images_alone(f"forecast={self.held_out.forecast}", first)
                check_forecast(self.held_out.forecast, shape)

    # -- held-out data -----------------------------------------------------------------------

    def start_measurements(self) -> None:
        self.evaluations, self.forecasts, self._labels = [], [], []
        self._estimates, self._squared_errors = {}, {}

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Reconstructions of a batch, and as many samples of the model's prior."""
        x, labels, index = batch
        truth = self._truth(index)
        measured = self._evaluate(x, batch_idx, self.held_out.test_temperatures, truth)
        samples, means = prior_samples(self.model, x, seed=batch_idx)
        told = measured.class_probabilities
        found = {} if told is None else {"class_probabilities": told}
        if self.held_out.forecast:
            found["forecasts"] = self._forecast(x, batch_idx, is_test=True).frames
        for name, mean in measured.site_means.items():
            found |= {name: mean, f"true_{name}": truth[name]}
        return found | {
            "index": index,
            "labels": labels,
            "originals": main_tensor(x),
            "reconstructions": measured.reconstructions,
            "evidence_nll": measured.evidence_nll,
            "prior_samples": samples,
            "prior_sample_means": means,
        }

    def measure(self, batch: Batch, batch_idx: int, is_test: bool) -> None:
        x, labels, index = batch
        truth = self._truth(index)
        measured = self._evaluate(x, batch_idx, self._ladder(is_test), truth)
        self.evaluations.append(measured)
        self._labels.append(labels)
        for name, mean in measured.site_means.items():
            squares = squared_distance(mean, truth[name].to(mean))
            self._squared_errors.setdefault(name, []).append(squares)
        estimates = self._estimate(x, batch_idx, is_test)
        for name, values in (estimates | self._in_bits(x, measured, estimates)).items():
            self._estimates.setdefault(name, []).append(values)

    def measurements(self) -> dict[str, float]:
        means = {name: float(torch.cat(parts).mean()) for name, parts in self._estimates.items()}
        errors = {
            f"{name}_rmse": float(torch.cat(parts).mean().sqrt())
            for name, parts in self._squared_errors.items()
        }
        return summarise(self.evaluations) | means | errors | self._label_measurements()

    @property
    def calibration(self) -> Calibration | None:
        found = [e.class_probabilities for e in self.evaluations]
        probabilities = [p for p in found if p is not None]
        return (
            calibration(torch.cat(probabilities), torch.cat(self._labels))
            if probabilities
            else None
        )

    def standard_errors(self) -> dict[str, float]:
        values = per_datum(self.evaluations)
        values |= {name: torch.cat(parts) for name, parts in self._estimates.items()}
        errors = {name: mean_error(of_data) for name, of_data in values.items()}
        for name, parts in self._squared_errors.items():
            squares = torch.cat(parts)
            # Of a root, by its slope 1 / (2 root).
            slope = 0.5 / squares.mean().sqrt()
            errors[f"{name}_rmse"] = float(slope) * mean_error(squares)
        told = self.calibration
        if told is not None:
            errors["error_percent"] = 100.0 * told.error_rate_se
            errors["label_log_loss"] = told.log_loss_se
        return errors

    def conditions(self, is_test: bool) -> dict[str, int]:
        how = self.held_out
        told = {
            "num_data": sum(len(e.evidence_nll) for e in self.evaluations),
            "num_particles": how.num_particles,
            "num_temperatures": self._ladder(is_test),
        }
        if self._guide_sampler is not None:
            told["bound_samples"] = how.bound_samples
        return told | ({"prior_samples": how.prior_samples} if is_test else {})

    def _label_measurements(self) -> dict[str, float]:
        told = self.calibration
        if told is None:
            return {}
        return {
            "error_percent": 100.0 * told.error_rate,
            "expected_calibration_error": told.expected_error,
            "label_log_loss": told.log_loss,
        }

    def describe(self, measurements: Mapping[str, float]) -> str:
        nll, error = measurements["evidence_nll"], measurements["evidence_nll_se"]
        told = f"evidence NLL {nll:.2f} ± {error:.2f}"
        if "error_percent" in measurements:
            told += f", {measurements['error_percent']:.2f} % of the labels wrong"
        if "bits_per_symbol" in measurements:
            told += f", {measurements['bits_per_symbol']:.3f} bits per symbol"
        return told

    def _estimate(self, x: Observed, batch_idx: int, is_test: bool) -> dict[str, Tensor]:
        """Measurements beside the evidence, `(B,)` by name; none for data that are tied."""
        if not call(self.held_out_inference.division, x).population:
            return {}
        found = {}
        if self._guide_sampler is not None:
            bounds = self._guide_sampler.bounds(x, self.held_out.bound_samples, seed=batch_idx)
            found["negative_elbo"] = -bounds.elbo
            found["importance_weighted_nll"] = -bounds.importance_weighted
        if is_test:
            weighed = self._prior_sampler.bounds(x, self.held_out.prior_samples, seed=batch_idx)
            found["prior_sample_nll"] = -weighed.importance_weighted
        if is_test and self.held_out.completion:
            completed = complete(
                self.model,
                images_alone("completion=True", x),
                bottom_half(main_tensor(x).shape[1:]),
                num_particles=self.held_out.num_particles,
                num_temperatures=self.held_out.test_temperatures,
                particle_batch_size=self.particle_batch_size,
                seed=batch_idx,
                intensity_range=self.intensity_range,
            )
            found["completion_cross_entropy"] = completed.hidden_cross_entropy
            found["completion_mse"] = completed.hidden_mse
        if self.held_out.forecast:
            foreseen = self._forecast(x, batch_idx, is_test)
            self.forecasts.append(foreseen)
            found["forecast_mse"] = foreseen.mse
            found["repeated_frame_mse"] = foreseen.repeated_frame_mse
        return found

    def _forecast(self, x: Observed, batch_idx: int, is_test: bool) -> Forecast:
        return forecast(
            self.model,
            images_alone(f"forecast={self.held_out.forecast}", x),
            self.held_out.forecast,
            num_particles=self.held_out.num_particles,
            num_temperatures=self._ladder(is_test),
            particle_batch_size=self.particle_batch_size,
            seed=batch_idx,
            intensity_range=self.intensity_range,
        )

    def _truth(self, index: Tensor) -> Mapping[str, Tensor]:
        """True values of held-out data by site, where they are known."""
        return {} if self._held_out_set is None else self._held_out_set.truth(index.cpu())

    def _in_bits(
        self, x: Observed, evaluation: Evaluation, estimates: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Measurements of symbols in bits per symbol, `(B,)` by name; none of other data."""
        if not isinstance(x, Tensor) or x.is_floating_point():
            return {}
        in_bits = 1.0 / (x[0].numel() * math.log(2.0))
        found = {"bits_per_symbol": in_bits * evaluation.evidence_nll}
        if "prior_sample_nll" in estimates:
            nll = estimates["prior_sample_nll"]
            found["prior_sample_bits_per_symbol"] = in_bits * nll
        if call(self.held_out_inference.division, x).population:
            found["forward_pass_bits_per_symbol"] = -in_bits * forward_pass(
                self.held_out_inference, x
            )
        return found

    def _ladder(self, is_test: bool) -> int:
        how = self.held_out
        return how.test_temperatures if is_test else how.num_temperatures

    def _evaluate(
        self, x: Observed, batch_idx: int, num_temperatures: int, sites: Iterable[str]
    ) -> Evaluation:
        # The same seed at every evaluation: differences come from the parameters.
        return evaluate(
            self.held_out_inference,
            x,
            num_temperatures,
            batch_idx,
            self.intensity_range,
            self.label_site,
            tuple(sites),
        )


def squared_distance(mean: Tensor, truth: Tensor) -> Tensor:
    """Squared Euclidean distances, `(B,)`: over the last axis of `(B, *, d)`, means over others."""
    squares = (mean - truth).square()
    return (squares if squares.dim() == 1 else squares.sum(-1)).reshape(len(mean), -1).mean(1)


def images_alone(option: str, x: Observed) -> Tensor:
    """The data, if they are one tensor.

    Args:
        option: What needs it, below `model.held_out`.
        x: The data.

    Raises:
        OptionError: They are several.
    """
    if not isinstance(x, Tensor):
        names = [name for name, _ in named_tensors(x)]
        raise OptionError(
            f"model.held_out.{option} needs data that are images alone, got {names}; leave it out"
        )
    return x


def check_forecast(num_predicted: int, shape: Sequence[int]) -> None:
    """Checks that data are sequences of more frames than are to be predicted.

    Args:
        num_predicted: Their number.
        shape: Of one datum.

    Raises:
        OptionError: They are not.
    """
    if len(shape) != 4 or shape[0] <= num_predicted:
        raise OptionError(
            f"model.held_out.forecast={num_predicted} needs sequences of at least "
            f"{num_predicted + 1} frames, (frames, channels, height, width), got data of shape "
            f"{list(shape)}; set it to 0, or to fewer frames"
        )


def check_image_shape(
    shape: Sequence[int], expected: Sequence[int], name: str = "image_shape"
) -> None:
    """Compares the shape of the data with that of the model's images or sequences.

    Args:
        shape: `(channels, height, width)` of the data, with `frames` before them in sequences.
        expected: The model's; `(pixels,)` where it has no channels and no rows.
        name: The model's argument that sets it.

    Raises:
        DataError: They differ.
    """
    is_flat = len(expected) == 1 and math.prod(shape) == expected[0]
    if is_flat or tuple(shape) == tuple(expected):
        return
    kind, axes = ("sequences", "frames, ") if len(shape) == 4 else ("images", "")
    raise DataError(
        f"the data have {kind} of shape {list(shape)} ({axes}channels, height, width), but "
        f"model.model.{name} is {list(expected)}; set it to {list(shape)}, or choose other "
        "data, as by data.size and data.channels of HubImages"
    )


def _own_encoder(model: nn.Module, which: str) -> nn.Module:
    encoder = getattr(model, "encoder", None)
    options = {"top_down": True} if which == "top_down_encoder" else {}
    if not callable(encoder) or not options.keys() <= inspect.signature(encoder).parameters.keys():
        raise OptionError(
            f"model.guide={which!r} needs a model that makes one, and {type(model).__name__} has "
            f"no method encoder({', '.join(f'{o}=...' for o in options)}); give model.guide as a "
            "class_path with init_args"
        )
    return encoder(**options)
