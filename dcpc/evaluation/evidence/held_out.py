"""Evidence and reconstructions of held-out data."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dcpc.conquer import Langevin
from dcpc.divide.model import Model
from dcpc.evaluation.batches import gradients_allowed
from dcpc.evaluation.classes import class_probabilities
from dcpc.evaluation.generation.samples import matching_site
from dcpc.evaluation.intensities import IntensityRange, cross_entropy, to_unit
from dcpc.inference import DCPC
from dcpc.observed import Observed, call, main_tensor, mapped
from dcpc.problem import Problem
from dcpc.sweep import SweepState
from dcpc.tables import table

__all__ = ["Evaluation", "evaluate", "format_table", "held_out_inference", "summarise"]

LEAPFROG_STEPS = 4
"""Of every move while annealing: single steps wander too slowly for the ladder."""

LABELS = {
    "evidence_nll": "evidence NLL",
    "reconstruction_cross_entropy": "reconstruction cross-entropy",
    "reconstruction_mse": "reconstruction MSE",
    "ess_percent": "ESS %",
}
OPTIONAL = {
    "elbo": ("ELBO", "nats per datum, of the encoder: a lower bound of log p(x), in expectation"),
    "importance_weighted_bound": (
        "importance-weighted bound",
        "nats per datum, of the encoder: a lower bound of log p(x), in expectation",
    ),
    "prior_sample_estimate": (
        "prior-sample estimate",
        "nats per datum, of samples of the prior: a lower bound of log p(x), far below it",
    ),
    "bits_per_symbol": (
        "bits per symbol",
        "the evidence NLL of discrete data, by symbol and to the base of 2",
    ),
    "prior_sample_bits_per_symbol": (
        "prior-sample bits per symbol",
        "the prior-sample estimate likewise: more than that of the evidence, in expectation",
    ),
    "forward_pass_bits_per_symbol": (
        "forward-pass bits per symbol",
        "of the network without noise, every latent at its mean: another model",
    ),
    "completion_cross_entropy": (
        "completion cross-entropy",
        "nats per datum, of the upper half of an image given its lower half",
    ),
    "completion_mse": ("completion MSE", "per pixel, of the same"),
    "forecast_mse": ("forecast MSE", "per pixel, of the last frames given those before"),
    "repeated_frame_mse": ("repeated frame MSE", "of the last frame seen, in their place"),
    "error_percent": ("labels that are wrong", "percent, of the most probable classes"),
    "expected_calibration_error": (
        "expected calibration error",
        "of the most probable class's probability, against the share that is right",
    ),
    "label_log_loss": ("log loss of labels", "nats per datum, minus their log-probability"),
}
"""What a table has besides, where it was measured: labels and explanations."""

RMSE = "_rmse"
"""Ends the name of the root mean square error of a site whose true values are known."""

FOUR_PLACES = (
    "bits_per_symbol",
    "prior_sample_bits_per_symbol",
    "forward_pass_bits_per_symbol",
    "completion_mse",
    "forecast_mse",
    "repeated_frame_mse",
    "expected_calibration_error",
    "label_log_loss",
)
"""Measurements that are shown with four decimal places, not with two."""


@dataclass(frozen=True)
class Evaluation:
    """A batch of held-out data, measured.

    Attributes:
        evidence_nll: Minus the annealed `log p(x)` in nats, `(B,)`.
        reconstruction_cross_entropy: `- sum_i x_i log m_i + (1 - x_i) log(1 - m_i)` over the
            pixels `i`, with `m` the reconstruction, both scaled to [0, 1], `(B,)`. Not a
            likelihood of unseen data: `m` has seen `x`.
        reconstruction_mse: Mean over the pixels of `(x_i - m_i)^2`, both scaled to [0, 1], `(B,)`.
        ess_percent: Effective sample size of the particles' weights, in percent of K, `(B,)`.
        data: The model's arguments.
        originals: The first of them, `x`, `(B, *shape)`, in the data's own intensities.
        reconstructions: `m`, the decoder's mean averaged over the particles after inference on
            that datum, `(B, *shape)`, in the data's own intensities.
        class_probabilities: Posterior of the label, `(B, C)`, if it is a latent that was asked for.
        site_means: By name, posterior means of the sites that were asked for, `(B, *event)`.
    """

    evidence_nll: Tensor
    reconstruction_cross_entropy: Tensor
    reconstruction_mse: Tensor
    ess_percent: Tensor
    data: Observed
    originals: Tensor
    reconstructions: Tensor
    class_probabilities: Tensor | None = None
    site_means: Mapping[str, Tensor] = field(default_factory=dict)


def held_out_inference(model: Model, num_particles: int, **options: Any) -> DCPC:
    """Engine that infers held-out data from scratch: exact, whichever algorithm trained the model.

    Its moves are of `LEAPFROG_STEPS` leapfrog steps, which make the same ladder far tighter than
    single Langevin steps do.

    Args:
        model: The Pyro program.
        num_particles: K, particles per datum.
        **options: Further ones of `DCPC`.
    """
    move = Langevin(leapfrog_steps=LEAPFROG_STEPS)
    return DCPC(model, num_particles=num_particles, **{"move": move, **options})


def evaluate(
    inference: DCPC,
    x: Observed,
    num_temperatures: int,
    seed: int,
    intensity_range: IntensityRange = (0.0, 1.0),
    label_site: str | None = None,
    sites: Sequence[str] = (),
) -> Evaluation:
    """Infers data from scratch by annealing, and measures.

    Costs `2 num_temperatures` sweeps: a pilot adapts the proposals, the second run is measured.
    The global random state is left as it was. Data that a model ties to each other, as batch
    normalisation does, have one evidence and one ESS: each is given an equal share of the former.

    Args:
        inference: Engine with an exact algorithm, as `held_out_inference` makes it.
        x: Data, `(B, *shape)`: the model's arguments, of which the first is reconstructed.
        num_temperatures: Length of the annealing ladder.
        seed: Seed of the annealing.
        intensity_range: The data's intensities of black and of white. Reconstructions are compared
            with the data in intensities from 0 to 1, so that figures of different models compare.
        label_site: Discrete latent that is a datum's label, to be predicted.
        sites: Latents and deterministic sites whose posterior means are wanted; those that the
            model does not have are left out.

    Raises:
        EvidenceError: The algorithm is not exact, or a prior is improper.
        DataError: No observed site of the model is `x`.
        OptionError: An impossible range.
    """
    with gradients_allowed():
        x = mapped(torch.clone, x)
        annealed = call(inference.anneal, x, num_temperatures=num_temperatures, seed=seed)
        problem = call(inference.bind, x)
        means = problem.observation_means(annealed.state)
        classes = None
        if label_site is not None:
            classes = class_probabilities(problem, annealed.state, label_site, seed)
        found = site_means(problem, annealed.state, sites) if sites else {}
    originals = main_tensor(x)
    mean = matching_site(means, x).detach()
    pixels, predicted = (to_unit(v, intensity_range).reshape(len(v), -1) for v in (originals, mean))
    log_evidence, ess = annealed.log_evidence, annealed.state.log_weight.ess()
    if log_evidence.dim() == 0:
        log_evidence, ess = (log_evidence / len(mean)).expand(len(mean)), ess.expand(len(mean))
    return Evaluation(
        evidence_nll=-log_evidence,
        reconstruction_cross_entropy=cross_entropy(pixels, predicted).sum(1),
        reconstruction_mse=(pixels - predicted).square().mean(1),
        ess_percent=100.0 * ess / inference.num_particles,
        data=x,
        originals=originals,
        reconstructions=mean,
        class_probabilities=classes,
        site_means=found,
    )


def site_means(problem: Problem, state: SweepState, sites: Sequence[str]) -> dict[str, Tensor]:
    """Posterior means of latents, constrained, and of deterministic sites.

    Args:
        problem: A model bound to its data.
        state: Particles of the posterior, with their weights.
        sites: Their names; those that the model does not have are left out.

    Returns:
        By name, `(*population, ...)`.
    """
    values = problem.constrain(state.latents)
    weights = state.log_weight.normalized()
    means = {}
    for name in (name for name in sites if name in values):
        value = values[name].detach()
        shape = (*weights.shape, *[1] * (value.dim() - weights.dim()))
        means[name] = (weights.reshape(shape).to(value) * value).sum(0)
    return means


def summarise(evaluations: Sequence[Evaluation]) -> dict[str, float]:
    """Means over all held-out data, and the standard error of the evidence NLL's mean."""
    summary = {
        name: float(torch.cat([getattr(e, name) for e in evaluations]).mean()) for name in LABELS
    }
    nll = torch.cat([e.evidence_nll for e in evaluations])
    # The noise of annealing is independent between data, so that their spread contains it.
    error = float(nll.std()) / math.sqrt(len(nll)) if len(nll) > 1 else math.nan
    return {**summary, "evidence_nll_se": error, "num_data": float(len(nll))}


def format_table(summary: Mapping[str, float], num_particles: int, num_temperatures: int) -> str:
    """The table that `dcpc test` prints; with `OPTIONAL` rows where they were measured."""
    nll, error = summary["evidence_nll"], summary["evidence_nll_se"]
    rows = [
        ("evidence_nll", f"{nll:.2f} ± {error:.2f}", "nats per datum ± standard error"),
        (
            "reconstruction_cross_entropy",
            f"{summary['reconstruction_cross_entropy']:.2f}",
            "nats per datum, of the particle-averaged decoder mean",
        ),
        (
            "reconstruction_mse",
            f"{summary['reconstruction_mse']:.4f}",
            "per pixel, of the same, in intensities from 0 to 1",
        ),
        ("ess_percent", f"{summary['ess_percent']:.0f}", "of the particles, after annealing"),
    ]
    rows += [
        (name, f"{summary[name]:.{4 if name in FOUR_PLACES else 2}f}", what)
        for name, (_, what) in OPTIONAL.items()
        if name in summary
    ]
    errors = {name: f"{name.removesuffix(RMSE)} RMSE" for name in summary if name.endswith(RMSE)}
    rows += [
        (name, f"{summary[name]:.3f}", "of the posterior mean, against the truth")
        for name in errors
    ]
    labels = LABELS | {name: label for name, (label, _) in OPTIONAL.items()} | errors
    heading = (
        f"{summary['num_data']:.0f} held-out data, {num_particles} particles annealed over "
        f"{num_temperatures} temperatures"
    )
    lines = table((), [(labels[name], value, what) for name, value, what in rows], "plain", [1])
    return f"{heading}\n{textwrap.indent(lines, '  ')}"
