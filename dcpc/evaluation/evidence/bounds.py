"""Bounds and estimates of the evidence by importance sampling, without any inference."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from dcpc.divide import Division
from dcpc.divide.model import Model
from dcpc.divide.unit import sum_to_plates
from dcpc.errors import EvidenceError, ModelError, OptionError, require_at_least
from dcpc.evaluation.batches import (
    BATCH_SIZE,
    batches,
    gradients_allowed,
)
from dcpc.inference import DCPC
from dcpc.observed import Observed, call, num_data
from dcpc.recombine import LogWeights
from dcpc.seeding import derived_seed, seeded
from dcpc.start import place_at_means

__all__ = [
    "PRIOR_SAMPLES",
    "Bounds",
    "ImportanceSampler",
    "forward_pass",
    "guide_bounds",
    "prior_sample_estimate",
]

CHUNK_SIZE = 10
"""Samples per datum that are weighed at once."""

PRIOR_SAMPLES = 5000
"""Per datum, of the prior-sample estimate."""


class Bounds(NamedTuple):
    """Lower bounds of `log p(x)` in expectation, from the same samples, in nats, `(N,)` each."""

    elbo: Tensor
    importance_weighted: Tensor


class ImportanceSampler:
    """Weighs samples of a guide, or of the prior, against the joint density of model and data.

    Keep one for all the batches of a data set: the model is divided at the first of them.

    Args:
        model: The Pyro program, all of its latents in one plate over the data.
        guide: A Pyro program that draws the same latents from the same arguments; None for the
            prior.
        chunk_size: Samples per datum weighed at once in a whole batch. A smaller one takes more,
            in the same memory, so that what a seed draws depends on the number of data.
        batch_size: Data weighed at once.

    Raises:
        OptionError: A number below one.
    """

    def __init__(
        self,
        model: Model,
        guide: Model | None = None,
        *,
        chunk_size: int = CHUNK_SIZE,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        require_at_least("chunk_size", chunk_size, 1)
        self._engine = functools.partial(DCPC, model, guide)
        self._engines = {chunk_size: self._engine(num_particles=chunk_size)}
        self._chunk_size = chunk_size
        self._batch_size = batch_size

    def bounds(self, x: Observed, num_samples: int, seed: int) -> Bounds:
        """ELBO and importance-weighted bound from the same samples; see `log_weights`."""
        log_weights = self.log_weights(x, num_samples, seed)
        return Bounds(log_weights.mean(0), LogWeights(log_weights).log_mean())

    def log_weights(self, x: Observed, num_samples: int, seed: int) -> Tensor:
        """`log p(x, z_s) - log q(z_s | x)`, `(S, N)`: with the prior as `q`, `log p(x | z_s)`.

        Args:
            x: Data, `(N, *shape)`: the model's arguments.
            num_samples: S.
            seed: Seed of the samples; the global random state is left as it was.

        Raises:
            ModelError: The data are not independent given the parameters, or share latents.
            EvidenceError: A prior is improper and there is no guide.
            OptionError: A number below one, or a guide that does not draw all latents.
        """
        require_at_least("num_samples", num_samples, 1)
        parts = []
        for number, part in enumerate(batches(x, self._batch_size)):
            with gradients_allowed(), seeded(derived_seed(seed, number)):
                parts.append(self._weigh(part, num_samples))
        return torch.cat(parts, 1)

    def _weigh(self, x: Observed, num_samples: int) -> Tensor:
        problem = call(self._engine_for(num_data(x), num_samples).bind, x)
        self._check(problem.division, num_data(x), problem.guide is not None)
        if problem.guide is not None and (why := problem.guide_refusal()):
            raise OptionError(f"{why}: there is no bound by its weights")
        chunks = []
        for _ in range(-(-num_samples // problem.num_particles)):
            state = problem.init()
            chunks.append(problem.density.log_joint(state.latents) - state.log_joint)
        # The samples are independent, so that the surplus of the last chunk may go.
        return torch.cat(chunks)[:num_samples]

    def _engine_for(self, num_data: int, num_samples: int) -> DCPC:
        """One that weighs as many samples at once as a whole batch of data has memory for."""
        in_memory = self._chunk_size * self._batch_size // num_data
        num_chunks = -(-num_samples // in_memory)
        size = max(self._chunk_size, -(-num_samples // num_chunks))
        if size not in self._engines:
            self._engines[size] = self._engine(num_particles=size)
        return self._engines[size]

    def _check(self, division: Division, num_data: int, has_guide: bool) -> None:
        flat = [name for name in division.latents if division.sites[name].is_improper]
        if flat and not has_guide:
            raise EvidenceError(
                f"the prior of site(s) {flat} is flat (improper) and cannot be sampled; give them "
                "a proper prior, or a guide with guide_bounds"
            )
        if division.population_shape != (num_data,):
            raise ModelError(
                f"a bound per datum needs the {num_data} data of a batch to be independent given "
                "the parameters, with all latents in one plate over them; the independent plates "
                f"around every latent of this model have sizes {list(division.population_shape)}. "
                "Wrap the model's body in: with pyro.plate('data', len(x)); and normalise no layer "
                "over the batch"
            )


def forward_pass(inference: DCPC, x: Observed) -> Tensor:
    """`log p(x | z)` at the latents' conditional means, top down: the model run without noise.

    The log-likelihood of the deterministic network that a model becomes when every latent is
    replaced by its mean; of this other model, and no bound of the evidence.

    Args:
        inference: Engine of the model, all of its latents in one plate over the data.
        x: Data, `(N, *shape)`: the model's arguments.

    Returns:
        Nats per datum, `(N,)`.

    Raises:
        ModelError: A latent cannot take the mean of its conditional distribution.
    """
    problem = call(inference.bind, x)
    division = problem.division
    # What was captured takes as many particles as the engine has; all are alike.
    state = place_at_means(division, problem.arguments, problem.num_particles)
    with torch.no_grad():
        factors = problem.density.log_factors(state.latents)
    observed = [f for name, f in factors.items() if name not in division.latents]
    terms = [sum_to_plates(f, division.population)[0] for f in observed]
    return torch.stack(torch.broadcast_tensors(*terms)).sum(0)


def guide_bounds(
    model: Model,
    guide: Model,
    x: Observed,
    num_samples: int,
    seed: int,
    *,
    chunk_size: int = CHUNK_SIZE,
    batch_size: int = BATCH_SIZE,
) -> Bounds:
    """Two lower bounds of `log p(x)`, in expectation, from the same samples of a guide.

        elbo = 1/S sum_s log w_s,   importance_weighted = log 1/S sum_s w_s,
        w_s = p(x, z_s) / q(z_s | x),   z_s ~ q(z | x)

    More samples lower the noise of the first, not its gap, and tighten the second; both are exact
    for any number where the guide is the posterior. Burda, Grosse & Salakhutdinov, "Importance
    weighted autoencoders", ICLR 2016, equation 8.

    Args:
        model: The Pyro program, all of its latents in one plate over the data.
        guide: A Pyro program that draws the same latents from the same arguments.
        x: Data, `(N, *shape)`: the model's arguments.
        num_samples: S.
        seed: Seed of the samples; the global random state is left as it was.
        chunk_size: Samples per datum weighed at once in a whole batch. A smaller one takes more,
            in the same memory, so that what a seed draws depends on the number of data.
        batch_size: Data weighed at once.

    Raises:
        ModelError: The data are not independent given the parameters, or share latents.
        OptionError: A number below one, or a guide that does not draw all latents.
    """
    sampler = ImportanceSampler(model, guide, chunk_size=chunk_size, batch_size=batch_size)
    return sampler.bounds(x, num_samples, seed)


def prior_sample_estimate(
    model: Model,
    x: Observed,
    num_samples: int = PRIOR_SAMPLES,
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
        x: Data, `(N, *shape)`: the model's arguments.
        num_samples: S, drawn for each datum afresh.
        seed: Seed of the samples; the global random state is left as it was.
        chunk_size: Samples per datum weighed at once in a whole batch. A smaller one takes more,
            in the same memory, so that what a seed draws depends on the number of data.
        batch_size: Data weighed at once.

    Returns:
        Nats per datum, `(N,)`.

    Raises:
        EvidenceError: A prior is improper.
        ModelError: The data are not independent given the parameters, or share latents.
        OptionError: A number below one.
    """
    sampler = ImportanceSampler(model, chunk_size=chunk_size, batch_size=batch_size)
    return LogWeights(sampler.log_weights(x, num_samples, seed)).log_mean()
