"""Bounds and estimates of the evidence by importance sampling, without any inference."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dcpc.divide.model import Model
from dcpc.errors import EvidenceError, ModelError
from dcpc.evaluation.batches import (
    BATCH_SIZE,
    batches,
    derived_seed,
    gradients_allowed,
    require_positive,
    seeded,
)
from dcpc.inference import DCPC

__all__ = ["elbo", "importance_weighted_bound", "prior_sample_estimate"]

CHUNK_SIZE = 50
"""Samples per datum that are weighed at once."""


def importance_weighted_bound(
    model: Model,
    guide: Model,
    x: Tensor,
    num_samples: int,
    seed: int,
    *,
    chunk_size: int = CHUNK_SIZE,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    """A lower bound of `log p(x)`, in expectation, from a guide's samples.

        log 1/S sum_s p(x, z_s) / q(z_s | x),   z_s ~ q(z | x)

    The more samples, the tighter; exact for any number where the guide is the posterior. Burda,
    Grosse & Salakhutdinov, "Importance weighted autoencoders", ICLR 2016, equation 8.

    Args:
        model: The Pyro program, all of its latents in one plate over the data.
        guide: A Pyro program that draws the same latents from the same arguments.
        x: Data, `(N, *shape)`.
        num_samples: S.
        seed: Of the samples; the global random state is left as it was.
        chunk_size: Samples per datum weighed at once.
        batch_size: Data weighed at once.

    Returns:
        Nats per datum, `(N,)`.

    Raises:
        ModelError: The data are not independent given the parameters, or share latents.
        OptionError: A number below one, or a guide that does not draw all latents.
    """
    return _reduce(_log_mean_exp, model, guide, x, num_samples, seed, chunk_size, batch_size)


def elbo(
    model: Model,
    guide: Model,
    x: Tensor,
    num_samples: int,
    seed: int,
    *,
    chunk_size: int = CHUNK_SIZE,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    """The evidence lower bound of a guide, `E_q[log p(x, z) - log q(z | x)]`.

    The mean over `num_samples` samples: more of them lower its noise, not its gap. Arguments,
    result and errors are those of `importance_weighted_bound`.
    """
    return _reduce(_mean, model, guide, x, num_samples, seed, chunk_size, batch_size)


def prior_sample_estimate(
    model: Model,
    x: Tensor,
    num_samples: int = 5000,
    seed: int = 0,
    *,
    chunk_size: int = CHUNK_SIZE,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    """The log of the mean likelihood over samples of the prior, as MCPC reports it.

        log 1/S sum_s p(x | z_s),   z_s ~ p(z)

    It lies below `log p(x)` in expectation, and far below where the posterior is much narrower than
    the prior: nearly no sample then explains the datum. Oliviers, Bogacz & Meulemans,
    "Learning probability distributions of sensory inputs with Monte Carlo predictive coding", PLoS
    Computational Biology, 2024.

    Args:
        model: The Pyro program, all of its latents in one plate over the data.
        x: Data, `(N, *shape)`.
        num_samples: S, drawn for each datum afresh.
        seed: Of the samples; the global random state is left as it was.
        chunk_size: Samples per datum weighed at once.
        batch_size: Data weighed at once.

    Returns:
        Nats per datum, `(N,)`.

    Raises:
        EvidenceError: A prior is improper.
        ModelError: The data are not independent given the parameters, or share latents.
        OptionError: A number below one.
    """
    return _reduce(_log_mean_exp, model, None, x, num_samples, seed, chunk_size, batch_size)


def _reduce(
    reduction: Callable[[Tensor], Tensor],
    model: Model,
    guide: Model | None,
    x: Tensor,
    num_samples: int,
    seed: int,
    chunk_size: int,
    batch_size: int,
) -> Tensor:
    """Reduces log-weights `(S, B)` over the samples, batch by batch, to `(N,)`."""
    require_positive("num_samples", num_samples)
    require_positive("chunk_size", chunk_size)
    sampler = DCPC(model, guide, num_particles=min(chunk_size, num_samples))
    parts = []
    for number, part in enumerate(batches(x, batch_size)):
        with gradients_allowed(), seeded(derived_seed(seed, number), x):
            parts.append(reduction(_log_weights(sampler, part, num_samples)))
    return torch.cat(parts)


def _log_weights(sampler: DCPC, x: Tensor, num_samples: int) -> Tensor:
    """`log p(x, z_s) - log q(z_s | x)` of a batch, `(S, B)`; `q` is the prior without a guide."""
    division = sampler.division(x)
    _check_division(sampler, x)
    chunks = []
    for _ in range(-(-num_samples // sampler.num_particles)):
        state = sampler.init(x)
        with torch.no_grad():
            chunks.append(division.log_joint(state.latents, (x,)) - state.log_joint)
    # The samples are independent, so that the surplus of the last chunk may go.
    return torch.cat(chunks)[:num_samples]


def _check_division(sampler: DCPC, x: Tensor) -> None:
    division = sampler.division(x)
    flat = [name for name in division.latents if division.sites[name].is_improper]
    if flat and sampler.guide is None:
        raise EvidenceError(
            f"the prior of site(s) {flat} is flat (improper) and cannot be sampled; give them a "
            "proper prior, or a guide with importance_weighted_bound"
        )
    if division.population_shape != (len(x),):
        raise ModelError(
            f"a bound per datum needs the {len(x)} data of a batch to be independent given the "
            "parameters, with all latents in one plate over them; the independent plates around "
            f"every latent of this model have sizes {list(division.population_shape)}. Wrap the "
            "model's body in: with pyro.plate('data', len(x)); and normalise no layer over the "
            "batch"
        )


def _log_mean_exp(log_weights: Tensor) -> Tensor:
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def _mean(log_weights: Tensor) -> Tensor:
    return log_weights.mean(0)
