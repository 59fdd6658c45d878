"""Labels that a model predicts: their posterior, its error and its calibration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dcpc.errors import DataError, ModelError
from dcpc.evaluation.quantities import mean_error
from dcpc.problem import Problem
from dcpc.seeding import seeded
from dcpc.sweep import SweepState, mean_over_particles

__all__ = ["Calibration", "calibration", "class_probabilities", "label_latent"]

NUM_SWEEPS = 20
"""Sweeps over which conditional probabilities are averaged."""


def label_latent(problem: Problem, name: str) -> str:
    """The discrete latent of a site whose values are not observed, or some of which are not.

    Pyro calls the unobserved part of `pyro.sample("label", ..., obs_mask=seen)` `label_unobserved`.

    Raises:
        ModelError: There is none, or it is continuous.
    """
    discrete = list(problem.division.discrete)
    found = next((n for n in (name, f"{name}_unobserved") if n in discrete), None)
    if found is None:
        raise ModelError(
            f"model.label_site={name!r} must be a discrete latent of the model, one label per "
            f"datum; its discrete latents are {discrete}"
        )
    return found


def class_probabilities(problem: Problem, state: SweepState, name: str, seed: int) -> Tensor:
    """Posterior probabilities of a label per datum, `(B, C)`.

    The mean, over particles and sweeps, of the conditional probabilities that the label is drawn
    from (Gelfand & Smith 1990).

    Args:
        problem: A model bound to its data.
        state: Particles of the posterior, with their weights.
        name: The site, as `label_latent` takes it.
        seed: Seed of the sweeps; the global random state is left as it was.

    Raises:
        ModelError: No such latent.
    """
    latent = label_latent(problem, name)
    if latent in problem.division.summed_out:
        probability = problem.completed(state.latents)[1][latent].detach()
        return mean_over_particles(probability, latent, state.log_weight, problem.division)
    total: Tensor | None = None
    with seeded(seed):
        for _ in range(NUM_SWEEPS):
            state, info = problem.sweep(state, adapt=False, retargets=False)
            found = info.probabilities[latent].detach()
            total = found if total is None else total + found
    assert total is not None
    return total / NUM_SWEEPS


@dataclass(frozen=True)
class Calibration:
    """How often predictions of some confidence are right, in bins of confidence.

    Attributes:
        confidence: Mean confidence in each bin that holds predictions, `(bins,)`.
        accuracy: Share of these that are right.
        count: Their number.
        error_rate: Share of all predictions that are wrong.
        log_loss: Mean of minus the log-probability of the label, in nats.
        error_rate_se: Standard error of the error rate.
        log_loss_se: Standard error of the log loss.
    """

    confidence: Tensor
    accuracy: Tensor
    count: Tensor
    error_rate: float
    log_loss: float
    error_rate_se: float
    log_loss_se: float

    @property
    def expected_error(self) -> float:
        """Expected calibration error: `sum_b n_b / N |accuracy_b - confidence_b|`."""
        share = self.count / self.count.sum()
        return float((share * (self.accuracy - self.confidence).abs()).sum())


def calibration(probabilities: Tensor, labels: Tensor, num_bins: int = 15) -> Calibration:
    """Compares the most probable classes with the labels, by confidence.

    Guo, Pleiss, Sun & Weinberger, "On calibration of modern neural networks", ICML 2017.

    Args:
        probabilities: `(N, C)`.
        labels: `(N,)`.
        num_bins: Bins of equal width in [0, 1].

    Raises:
        DataError: A label is no class.
    """
    wrong = (labels < 0) | (labels >= probabilities.shape[1])
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise DataError(
            f"datum {first} has the label {int(labels[first])}, but the model has the classes 0 "
            f"to {probabilities.shape[1] - 1}; number the labels so, or give the model more classes"
        )
    confidence, predicted = probabilities.max(1)
    right = (predicted == labels).to(probabilities.dtype)
    index = (confidence * num_bins).long().clamp(max=num_bins - 1)
    count = torch.bincount(index, minlength=num_bins)
    used = count > 0
    sums = (torch.bincount(index, values, num_bins)[used] for values in (confidence, right))
    mean_confidence, accuracy = (total / count[used] for total in sums)
    of_label = probabilities.gather(1, labels.unsqueeze(1))
    tiny = torch.finfo(probabilities.dtype).tiny
    log_losses = -of_label.clamp(min=tiny).log().squeeze(1)
    return Calibration(
        confidence=mean_confidence,
        accuracy=accuracy,
        count=count[used],
        error_rate=float(1.0 - right.mean()),
        log_loss=float(log_losses.mean()),
        error_rate_se=mean_error(right),
        log_loss_se=mean_error(log_losses),
    )
