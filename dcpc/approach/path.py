"""Gaussians along paths of ascent, from several starts at once.

As in Pathfinder (Zhang, Carpenter, Gelman & Vehtari 2022), an optimiser climbs the log-density, the
curvature at every point of its path makes a Gaussian, and the one with the largest evidence lower
bound is kept: a mode alone would be a bad guide where the density has a funnel or an edge. The
particles evaluate everything at once, so that second derivatives by differences of scores cost a
few evaluations, and steps can be Newton's, with the absolute values of the curvature's eigenvalues
(Dauphin et al. 2014): they take bad scaling and flat priors in their stride.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dcpc.divide import Conditional, Density
from dcpc.divide.joint_reference import StudentMixture
from dcpc.recombine import zero_density

NUM_STARTS = 20
"""Paths, where there are twenty particles for each; so many find all of a few modes."""

MAX_STEPS = 40
"""Steps of a path."""

MIN_GAIN = 0.01
"""Rise of the log-density below which a step counts as none; two of them end a path."""

LENGTHS = (5.0, -20.0, 40)
"""Lengths that are tried of every step: powers of two from, to, and their number at most."""

MIN_CURVATURE = 1e-3
"""Smallest eigenvalue of the curvature, in units of its diagonal."""

MAX_CURVATURE = 1e6
"""Largest entry of the curvature in these units that is believed."""

NUM_NEARBY = 16
MAX_DIFFERENCE, MAX_RESOLUTIONS = 1.0, 64.0
"""Values that differ in their last digits, and the largest difference of their log-densities where
these are believed: in nats, and in units of what a number of that size resolves."""

DEGREES = 5.0
"""Degrees of freedom of the Student-t distributions that are made of the Gaussians."""


@dataclass(frozen=True)
class _Gaussians:
    """The best Gaussians so far, by start and cell.

    Attributes:
        bound: Evidence lower bounds, `(S, *plates)`.
        loc: Centres, `(S, *plates, d)`.
        factor: Lower triangular factors of the covariances, `(S, *plates, d, d)`.
    """

    bound: Tensor
    loc: Tensor
    factor: Tensor

    def or_better(self, other: _Gaussians) -> _Gaussians:
        better = other.bound > self.bound
        return _Gaussians(
            torch.where(better, other.bound, self.bound),
            torch.where(better.unsqueeze(-1), other.loc, self.loc),
            torch.where(better[..., None, None], other.factor, self.factor),
        )

    def found(self) -> _Gaussians:
        """The best of a cell in the place of those whose paths have led nowhere."""
        top = self.bound.argmax(0, keepdim=True)
        others = _Gaussians(
            self.bound.gather(0, top).expand_as(self.bound),
            self.loc.take_along_dim(top.unsqueeze(-1), 0).expand_as(self.loc),
            self.factor.take_along_dim(top[..., None, None], 0).expand_as(self.factor),
        )
        lost = self.bound.isneginf()
        return self.or_better(replace(others, bound=torch.where(lost, others.bound, -math.inf)))


class Paths:
    """Paths up the log-density of the unit that holds all latents.

    Args:
        density: The density; its division has one unit.
        num_particles: K; there are about as many draws and steps at once.
    """

    def __init__(self, density: Density, num_particles: int) -> None:
        (self._group,) = density.division.groups
        self._density = density
        self._num_particles = num_particles
        # Of its own: checks leave the run's numbers as they are.
        self._generator = torch.Generator("cpu").manual_seed(0)

    def follow(self, value: Tensor) -> StudentMixture:
        """The Gaussians with the largest bounds, one of each start, with heavier tails.

        Args:
            value: Starts `(S, *plates, d)`.
        """
        log_density, score = self._evaluate(value)
        width = 1.0 + value.abs()
        step = _cube_root_of_precision(value) * width
        best = _Gaussians(
            torch.full_like(log_density, -math.inf),
            value,
            torch.diag_embed(1e-3 * width),
        )
        quiet = torch.zeros_like(log_density)
        rising = log_density.isfinite()
        for _ in range(MAX_STEPS):
            if not bool(rising.any()):
                break
            curvature = self._curvature(value, step)
            scale, factor = _inverse_factor(curvature, value)
            direction = _multiply(factor, _multiply(factor.mT, score))
            best = best.or_better(self._gaussians(value + direction, factor, rising))
            reached, at = self._search(value, direction)
            gain = torch.where(rising, at - log_density, 0.0)
            moved = gain > 0
            value = torch.where(moved.unsqueeze(-1), reached, value)
            log_density, score = self._evaluate(value)
            quiet = torch.where(gain < MIN_GAIN, quiet + 1, 0.0)
            rising = moved & (quiet < 2)
            width = 1.0 + value.abs()
            root = _cube_root_of_precision(value)
            step = torch.minimum(root * width, 0.05 * scale).clamp(min=1e-3 * root * width)
        best = best.found()
        return StudentMixture(best.loc, best.factor, DEGREES)

    def log_density(self, value: Tensor) -> Tensor:
        """Log-densities `(m, *plates)` of any number of values `(m, *plates, d)`."""
        conditional, filled = self._conditional(value)
        return zero_density(conditional.log_density(filled)[: len(value), ..., 0])[0]

    def _evaluate(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Log-densities and scores of any number of values."""
        conditional, filled = self._conditional(value)
        scored = conditional.evaluate(filled)
        log_density = zero_density(scored.log_density[: len(value), ..., 0])[0]
        return log_density, scored.score[: len(value), ..., 0, :]

    def _conditional(self, value: Tensor) -> tuple[Conditional, Tensor]:
        """The unit's conditional and its packed values, as many as a program takes at least."""
        missing = self._density.division.program.num_particles - len(value)
        if missing > 0:
            value = torch.cat([value, value[-1:].expand(missing, *value.shape[1:])])
        packed = value.unsqueeze(-2)
        return self._density.conditional(self._group, self._group.unpack(packed)), packed

    def _curvature(self, value: Tensor, step: Tensor) -> Tensor:
        """Minus the second derivatives `(S, *plates, d, d)`, by central differences of scores."""
        size = value.shape[-1]
        moved = torch.diag_embed(step).movedim(-2, 0)  # (d, S, *plates, d)
        ends = torch.stack([value + moved, value - moved])
        scores = self._evaluate(ends.flatten(0, 2))[1].unflatten(0, (2, size, len(value)))
        derivative = (scores[0] - scores[1]) / (2 * step).movedim(-1, 0).unsqueeze(-1)
        curvature = -derivative.movedim(0, -2).nan_to_num(0.0, 0.0, 0.0)
        return 0.5 * (curvature + curvature.mT)

    def _gaussians(self, loc: Tensor, factor: Tensor, wanted: Tensor) -> _Gaussians:
        """Gaussians with their bounds, `E_q[log p - log q]`, by a few draws of each."""
        cholesky, failed = torch.linalg.cholesky_ex(factor @ factor.mT)
        wanted = wanted & (failed == 0) & self._is_credible(loc)
        identity = torch.eye(loc.shape[-1], dtype=loc.dtype, device=loc.device)
        cholesky = torch.where(wanted[..., None, None], cholesky, identity)
        count = max(4, self._num_particles // len(loc))
        noise = torch.randn(count, *loc.shape, dtype=loc.dtype, device=loc.device)
        draws = loc + _multiply(cholesky, noise)
        log_density = self.log_density(draws.flatten(0, 1)).unflatten(0, draws.shape[:2])
        entropy = 0.5 * noise.square().sum(-1) + cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * loc.shape[-1] * math.log(2 * math.pi)
        bound = (log_density + entropy).mean(0) + constant
        return _Gaussians(torch.where(wanted, bound, -math.inf), loc, cholesky)

    def _is_credible(self, value: Tensor) -> Tensor:
        """Whether the log-density at values `(S, *plates, d)` does not hang on their last digits.

        A path climbs, and finds the places where arithmetic breaks down: there the log-density may
        be large, and is another number wherever its argument is rounded otherwise.
        """
        shape, generator = (NUM_NEARBY, *value.shape), self._generator
        noise = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        nearby = value * (1.0 + 4.0 * torch.finfo(value.dtype).eps * noise).to(value)
        density = self.log_density(nearby.flatten(0, 1)).unflatten(0, nearby.shape[:2])
        resolution = MAX_RESOLUTIONS * torch.finfo(value.dtype).eps * density.abs().amax(0)
        # NaN, the difference of infinities, is not smaller.
        return density.amax(0) - density.amin(0) < MAX_DIFFERENCE + resolution

    def _search(self, value: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """The best of many lengths of a step, and the log-density there."""
        first, last, most = LENGTHS
        count = max(4, min(most, self._num_particles // len(value)))
        powers = torch.linspace(first, last, count, dtype=value.dtype, device=value.device)
        powers[powers.abs().argmin()] = 0.0  # Newton's own length
        lengths = powers.exp2().reshape(-1, *(1,) * value.dim())
        tried = value + lengths * direction
        log_density = self.log_density(tried.flatten(0, 1)).unflatten(0, tried.shape[:2])
        at, which = log_density.max(0)
        index = which.unsqueeze(0).unsqueeze(-1).expand(1, *value.shape)
        return tried.gather(0, index).squeeze(0), at


def choose_starts(paths: Paths, prior: Tensor, *, is_improper: bool) -> Tensor:
    """Starts of paths, `(S, *plates, d)`: the densest of groups of draws.

    Half of them from the prior, half from a standard normal in unconstrained space, where a prior
    may be so wide that nothing can be computed.

    Args:
        paths: The paths.
        prior: Draws from the prior, `(K, *plates, d)`.
        is_improper: Whether these are of no distribution.
    """
    count = max(2, min(NUM_STARTS, len(prior) // 20))
    near = torch.randn_like(prior)
    sources = [(near, count)] if is_improper else [(prior, count // 2), (near, count - count // 2)]
    return torch.cat([_densest(paths, draws, wanted) for draws, wanted in sources])


def _densest(paths: Paths, draws: Tensor, count: int) -> Tensor:
    """The densest draw of each of several groups, `(count, *plates, d)`."""
    size = len(draws) // count
    groups = draws[: count * size].unflatten(0, (count, size))
    density = paths.log_density(groups.flatten(0, 1)).unflatten(0, (count, size))
    which = density.argmax(1, keepdim=True).unsqueeze(-1)
    return groups.gather(1, which.expand(-1, -1, *draws.shape[1:])).squeeze(1)


def _inverse_factor(curvature: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Conditional scales, and `F` with `F F^T` the inverse of the curvature's absolute value."""
    diagonal = curvature.diagonal(dim1=-2, dim2=-1).abs()
    tiny = torch.finfo(diagonal.dtype).tiny ** 0.5
    scale = torch.where(diagonal > tiny, diagonal.clamp(min=tiny).rsqrt(), 1.0 + value.abs())
    relative = curvature * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    # Differences far from the posterior may be of any size, and single precision then fails.
    bounded = relative.double().nan_to_num(0.0).clamp(-MAX_CURVATURE, MAX_CURVATURE)
    eigenvalues, vectors = (part.to(curvature.dtype) for part in torch.linalg.eigh(bounded))
    root = eigenvalues.abs().clamp(min=MIN_CURVATURE).rsqrt()
    return scale, scale.unsqueeze(-1) * vectors * root.unsqueeze(-2)


def _multiply(matrix: Tensor, vectors: Tensor) -> Tensor:
    return (matrix @ vectors.unsqueeze(-1)).squeeze(-1)


def _cube_root_of_precision(value: Tensor) -> float:
    """Relative step of differences at which truncation and rounding are alike."""
    return torch.finfo(value.dtype).eps ** (1.0 / 3.0)
