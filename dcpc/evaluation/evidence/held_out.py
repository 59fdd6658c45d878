"""Evidence and reconstructions of held-out data."""

from __future__ import annotations

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
from dcpc.evaluation.quantities import format_results, mean_error, results
from dcpc.inference import DCPC
from dcpc.observed import Observed, call, main_tensor, mapped
from dcpc.problem import Problem
from dcpc.sweep import SweepState

__all__ = [
    "Evaluation",
    "evaluate",
    "format_table",
    "held_out_inference",
    "per_datum",
    "summarise",
]

LEAPFROG_STEPS = 4
"""Of every move while annealing: single steps wander too slowly for the ladder."""

AVERAGED = (
    "evidence_nll",
    "reconstruction_cross_entropy",
    "reconstruction_mse",
    "ess_percent",
)
"""Measurements of an `Evaluation` that `summarise` averages."""


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
    single Langevin steps do. `reparam="noncentred"` makes it tighter still for deep generative
    models that learned by errors.

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
    summary = {name: float(values.mean()) for name, values in per_datum(evaluations).items()}
    nll = torch.cat([e.evidence_nll for e in evaluations])
    # The noise of annealing is independent between data, so that their spread contains it.
    return {**summary, "evidence_nll_se": mean_error(nll), "num_data": float(len(nll))}


def per_datum(evaluations: Sequence[Evaluation]) -> dict[str, Tensor]:
    """By name, the measurements of all held-out data that `summarise` averages, `(N,)`."""
    return {name: torch.cat([getattr(e, name) for e in evaluations]) for name in AVERAGED}


def format_table(summary: Mapping[str, float], num_particles: int, num_temperatures: int) -> str:
    """The table that `dcpc test` prints of the measurements in a summary."""
    conditions = {
        "num_data": summary["num_data"],
        "num_particles": num_particles,
        "num_temperatures": num_temperatures,
    }
    errors = {"evidence_nll": summary["evidence_nll_se"]}
    return format_results(results(summary, errors), conditions)
