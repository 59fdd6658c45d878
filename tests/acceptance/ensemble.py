"""Posteriors by many Hamiltonian chains side by side, of log-densities that are written out.

Independent of the package: torch's transforms, `torch.func`, leapfrog steps, dual averaging of one
step size, and a diagonal mass matrix from the warm-up. All in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint

from tests.acceptance.case import Reference

NUM_CHAINS = 200
NUM_WARMUP = 300
NUM_KEPT = 200
NUM_LEAPFROG = 7

Values = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[tuple[int, ...], Constraint]]


@dataclass(frozen=True)
class Flat:
    """Constrained values by name as one unconstrained vector.

    Attributes:
        sites: By name, the shape of the constrained value, and its support.
        sizes: By name, numbers of the unconstrained value.
    """

    sites: Shapes
    sizes: Mapping[str, torch.Size]

    @classmethod
    def of(cls, sites: Shapes) -> Flat:
        """The layout of some sites."""
        sizes = {
            name: torch.Size(biject_to(support).inverse_shape(torch.Size(shape)))
            for name, (shape, support) in sites.items()
        }
        return cls(sites, sizes)

    def unflatten(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Constrained values of one vector, and the log-Jacobian."""
        parts = u.split([max(size.numel(), 1) for size in self.sizes.values()])
        values, log_det = {}, u.new_zeros(())
        for (name, (_, support)), part in zip(self.sites.items(), parts, strict=True):
            transform, part = biject_to(support), part.reshape(self.sizes[name])
            values[name] = transform(part)
            log_det = log_det + transform.log_abs_det_jacobian(part, values[name]).sum()
        return values, log_det

    @property
    def dim(self) -> int:
        return sum(max(size.numel(), 1) for size in self.sizes.values())


def hamiltonian(log_density: Callable[[Tensor], Tensor], start: Tensor, seed: int) -> Tensor:
    """Draws `(kept, chains, dim)` of a density of vectors, by Hamiltonian Monte Carlo.

    Args:
        log_density: Of one vector.
        start: Where the chains start, `(chains, dim)`.
        seed: Seeds the draws.
    """
    gen = torch.Generator().manual_seed(seed)
    both = torch.func.vmap(torch.func.grad_and_value(log_density))
    u, scale, log_step, drift = start, torch.ones(start.shape[1]).double(), math.log(0.1), 0.0
    gradient, value = both(u)
    kept, warm = [], []
    for iteration in range(NUM_WARMUP + NUM_KEPT):
        step = math.exp(log_step) * scale
        length = int(torch.randint(NUM_LEAPFROG // 2, NUM_LEAPFROG * 2, (), generator=gen))
        momentum = torch.randn(u.shape, generator=gen, dtype=u.dtype)
        new, new_gradient, moving = u, gradient, momentum
        for _ in range(length):
            moving = moving + 0.5 * step * new_gradient
            new = new + step * moving
            new_gradient, new_value = both(new)
            moving = moving + 0.5 * step * new_gradient
        log_ratio = new_value - value + 0.5 * (momentum**2 - moving**2).sum(1)
        log_ratio = log_ratio.nan_to_num(nan=-math.inf)
        accept = torch.rand(len(u), generator=gen).double().log() < log_ratio
        u = torch.where(accept[:, None], new, u)
        gradient = torch.where(accept[:, None], new_gradient, gradient)
        value = torch.where(accept, new_value, value)
        if iteration < NUM_WARMUP:
            drift = float(log_ratio.clamp(max=0).exp().mean()) - 0.8
            log_step += drift * 2 / math.sqrt(iteration + 1)
            warm.append(u)
            if iteration in (NUM_WARMUP // 4, NUM_WARMUP // 2):
                fresh = torch.cat(warm[iteration // 2 :]).std(0)
                log_step += float((scale / fresh).log().mean())
                scale = fresh
        else:
            kept.append(u)
    return torch.stack(kept)


def ensemble_posterior(
    log_density: Callable[[Values], Tensor],
    sites: Shapes,
    quantities: Callable[[Values], Values] | None = None,
    marginals: Callable[[Values], Values] | None = None,
    seed: int = 0,
) -> Reference:
    """Moments of a posterior.

    Args:
        log_density: From one constrained value of every latent, the log-joint density.
        sites: By latent, its shape and support.
        quantities: From one value of every latent, what is compared; by default all of them.
        marginals: From the same, conditional probabilities of the discrete latents.
        seed: Seeds the draws.
    """
    flat = Flat.of(sites)

    def of_vector(u: Tensor) -> Tensor:
        values, log_det = flat.unflatten(u)
        return log_density(values) + log_det

    gen = torch.Generator().manual_seed(seed + 1)
    start = torch.randn((NUM_CHAINS, flat.dim), generator=gen, dtype=torch.float64) * 0.5
    draws = hamiltonian(of_vector, start, seed)

    def described(u: Tensor) -> dict[str, Tensor]:
        values, _ = flat.unflatten(u)
        found = dict(values if quantities is None else quantities(values))
        extra = {} if marginals is None else marginals(values)
        return found | {f"p({name})": p for name, p in extra.items()}

    values = torch.func.vmap(described)(draws.flatten(0, 1))
    by_chain = {name: v.unflatten(0, draws.shape[:2]) for name, v in values.items()}
    names = [name for name in values if not name.startswith("p(")]
    return Reference(
        mean={name: values[name].mean(0) for name in names},
        std={name: values[name].std(0) for name in names},
        error={name: by_chain[name].mean(0).std(0) / NUM_CHAINS**0.5 for name in names},
        probabilities={
            name[2:-1]: v.mean(0) for name, v in values.items() if name.startswith("p(")
        },
    )
