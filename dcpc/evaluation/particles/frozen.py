"""Frozen particles: a trained model and saved particles of some data, without any inference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dcpc.coordinates import transported
from dcpc.divide.model import Model, observation_means
from dcpc.divide.program import map_particles
from dcpc.errors import OptionError, require_at_least
from dcpc.evaluation.batches import (
    BATCH_SIZE,
    batches,
    gradients_allowed,
)
from dcpc.evaluation.generation.samples import latent_shapes, matching_site
from dcpc.evaluation.particles.particle_files import (
    FrozenParticlesError,
    SavedParticles,
    load_parameters,
    read,
    write,
)
from dcpc.inference import DCPC
from dcpc.recombine import LogWeights, systematic
from dcpc.reparam import NonCentred
from dcpc.seeding import derived_seed, seeded

__all__ = ["FrozenParticles", "infer_and_freeze"]


@dataclass(frozen=True)
class FrozenParticles:
    """Weighted particles of N data, clamped, and the model that they belong to.

    Attributes:
        model: The Pyro program, a torch module that holds the trained parameters.
        latents: Unconstrained values `(K, N, *event)` by site.
        log_weight: `(K, N)`.
        index: Which data these are, `(N,)`: their indices in the data set that they came from.
        originals: The data themselves, `(N, *shape)`, if they were frozen along.
        labels: Their labels, `(N,)`, if they were frozen along.
        noncentred: Sites whose unconstrained values are standardised errors, as a training that
            keeps those leaves them; of all others they are values.
    """

    model: nn.Module
    latents: Mapping[str, Tensor]
    log_weight: Tensor
    index: Tensor
    originals: Tensor | None = None
    labels: Tensor | None = None
    noncentred: tuple[str, ...] = ()

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, model: nn.Module, index: Tensor | None = None
    ) -> FrozenParticles:
        """Opens a checkpoint of `dcpc fit`, or a small file that `save` wrote.

        A checkpoint holds a training datum's particles as its last visit left them; the
        parameters have moved on since, by at most an epoch's steps.

        Args:
            path: The file.
            model: The Pyro program that it belongs to, which is given the saved parameters.
            index: Indices of the data whose particles are read; None for all there are.

        Raises:
            FrozenParticlesError: There is no such file, it is truncated or something else, belongs
                to another model, or holds no particles of these data.
        """
        saved = read(path)
        load_parameters(model, saved.parameters, path)
        taken = saved.take(index, path)
        dtype = taken.log_weight.dtype
        return cls(
            model=model,
            latents={name: u.to(dtype).transpose(0, 1) for name, u in taken.latents.items()},
            log_weight=taken.log_weight.T,
            index=taken.index,
            originals=taken.originals,
            labels=taken.labels,
            noncentred=tuple(taken.noncentred),
        )

    def save(self, path: str | Path, half_precision: bool = False) -> None:
        """Writes parameters and particles as plain tensors, for `from_checkpoint`.

        Args:
            path: The file; its folder is made.
            half_precision: Whether latents are rounded to half precision, eleven binary digits:
                half the size. Parameters and weights never are.

        Raises:
            OptionError: A latent is not finite, or too large for half precision.
        """
        saved = SavedParticles(
            parameters=self.model.state_dict(),
            latents={name: u.transpose(0, 1) for name, u in self.latents.items()},
            log_weight=self.log_weight.T,
            index=self.index,
            originals=self.originals,
            labels=self.labels,
            noncentred=self.noncentred,
        )
        write(saved, path, half_precision)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def num_particles(self) -> int:
        """K."""
        return len(self.log_weight)

    @property
    def ess(self) -> Tensor:
        """Effective sample size of the weights, `(N,)`, between 1 and K."""
        return LogWeights(self.log_weight).ess()

    @property
    def ess_percent(self) -> Tensor:
        """`100 ess / K`, `(N,)`."""
        return 100.0 * self.ess / self.num_particles

    def means(self) -> dict[str, Tensor]:
        """Posterior mean of every latent's unconstrained value, `(N, *event)`."""
        weights = LogWeights(self.log_weight).normalized()
        return {name: _average(weights, u) for name, u in self.latents.items()}

    def select(self, positions: Tensor) -> FrozenParticles:
        """The particles of some of the data.

        Args:
            positions: Where they stand among these N data (which is not their `index`), integers.
        """
        return replace(
            self,
            latents={name: u[:, positions] for name, u in self.latents.items()},
            log_weight=self.log_weight[:, positions],
            index=self.index[positions],
            originals=None if self.originals is None else self.originals[positions],
            labels=None if self.labels is None else self.labels[positions],
        )

    def resample(self, num_kept: int, seed: int) -> FrozenParticles:
        """Equally weighted particles: systematic resampling, of which some are kept.

        Args:
            num_kept: Particles per datum, at most K.
            seed: The global random state is left as it was.

        Raises:
            OptionError: More than there are, or none.
        """
        if not 1 <= num_kept <= self.num_particles:
            raise OptionError(
                f"num_kept must lie between 1 and the number of particles, {self.num_particles}, "
                f"got {num_kept}"
            )
        weights = LogWeights(self.log_weight).normalized()
        with seeded(seed):
            order = torch.rand_like(weights).argsort(0)  # of each datum's particles by itself
            ancestors = systematic(weights).gather(0, order[:num_kept])
        columns = torch.arange(len(self), device=weights.device)
        return replace(
            self,
            latents={name: u[ancestors, columns] for name, u in self.latents.items()},
            log_weight=torch.zeros_like(self.log_weight[:num_kept]),
        )

    def reconstruct(self, x: Tensor, batch_size: int = BATCH_SIZE) -> Tensor:
        """The decoder's mean, averaged over the particles by their weights.

        Runs the model once per particle and infers nothing.

        Args:
            x: Data to match in shape, type and device, one or more; their values do not matter.
            batch_size: Data decoded at once.

        Returns:
            `(N, *shape)`.

        Raises:
            FrozenParticlesError: The particles are those of another model.
            DataError: No observed site of the model is `x`.
        """
        require_at_least("batch_size", batch_size, 1)
        weights = LogWeights(self.log_weight).normalized()
        model = NonCentred(self.model, self.noncentred) if self.noncentred else self.model
        parts = []
        for rows in torch.arange(len(self)).split(batch_size):
            template = x.new_zeros(len(rows), *x.shape[1:])
            latents = {name: u[:, rows].to(x.device) for name, u in self.latents.items()}
            _check_latents(model, latents, template)
            means = _decoder_means(model, latents, template)
            parts.append(_average(weights[:, rows].to(means), means))
        return torch.cat(parts)


def infer_and_freeze(
    inference: DCPC,
    x: Tensor,
    index: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    num_temperatures: int = 400,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
) -> FrozenParticles:
    """Infers data from scratch by annealing and freezes their particles.

    To ship them: `infer_and_freeze(...).resample(4, seed).save(path)`. The global random state is
    left as it was.

    Args:
        inference: Engine with an exact algorithm, as `held_out_inference` makes it; its model is
            a torch module.
        x: Data, `(N, *shape)`.
        index: Their indices in the data set that they came from, `(N,)`; None to count from zero.
        labels: Their labels, `(N,)`, to keep beside them.
        num_temperatures: Length of the annealing ladder.
        seed: Seed of the annealing.
        batch_size: Data annealed at once.

    Raises:
        EvidenceError: The algorithm is not exact, or a prior is improper.
        OptionError: The model is no torch module, or an index of another length.
    """
    model = inference.model
    if isinstance(model, NonCentred):
        model = model.model
    if not isinstance(model, nn.Module):
        raise OptionError(
            "frozen particles come with the parameters of a torch module, got the model "
            f"{model!r}; make it the forward of a torch.nn.Module"
        )
    index = torch.arange(len(x)) if index is None else index
    for name, value in (("index", index), ("labels", labels)):
        if value is not None and value.shape != x.shape[:1]:
            raise OptionError(f"{name} must have shape ({len(x)},), got {tuple(value.shape)}")
    states = []
    values = DCPC(model, num_particles=inference.num_particles)
    with gradients_allowed():
        for number, part in enumerate(batches(x, batch_size)):
            part_seed = derived_seed(seed, number)
            state = inference.anneal(part, num_temperatures=num_temperatures, seed=part_seed).state
            if model is not inference.model:
                state = transported(state, inference.bind(part), values.bind(part))
            _check_latents(model, state.latents, part)
            states.append(state)
    return FrozenParticles(
        model=model,
        latents={
            name: torch.cat([state.latents[name].detach() for state in states], 1)
            for name in states[0].latents
        },
        log_weight=torch.cat([state.log_weight.log_weight.detach() for state in states], 1),
        index=index,
        originals=x.detach().clone(),
        labels=labels,
    )


def _average(weights: Tensor, values: Tensor) -> Tensor:
    """`sum_k W_k v_k` of weights `(K, N)` and values `(K, N, ...)`."""
    return (weights.reshape(*weights.shape, *[1] * (values.dim() - 2)) * values).sum(0)


def _decoder_means(model: Model, latents: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The decoder's mean at every particle, `(K, *x.shape)`."""

    def mean(particle: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"mean": matching_site(observation_means(model, particle, (x,), {}), x)}

    return map_particles(mean, dict(latents))["mean"]


def _check_latents(model: Model, latents: Mapping[str, Tensor], x: Tensor) -> None:
    """Compares particles `(K, B, *event)` with the latents that the model has for `x`."""
    wanted = latent_shapes(model, x)
    if not set(wanted) <= set(latents):  # those that nothing depends on have no particles
        barren = DCPC(model, num_particles=2).bind(x).division.barren
        wanted = {name: shape for name, shape in wanted.items() if name not in barren}
    for name in {**wanted, **latents}:
        expected = tuple(wanted[name]) if name in wanted else None
        got = tuple(latents[name].shape[1:]) if name in latents else None
        if got is None or got != expected or got[:1] != (len(x),):
            raise FrozenParticlesError(
                f"site '{name}': the particles have shape {got} for {len(x)} data and the model "
                f"has {expected}; frozen particles need all latents of the model in one plate over "
                "the data, and the model that they were inferred with"
            )
