"""Checks, by numbers, that what moves a unit is its part of the model's joint density.

The joint density is taken from Pyro itself: an ordinary trace with its own `log_prob`s, and the
Jacobians of torch's transforms, as in the potential that Pyro's NUTS moves on. Plates are looked up
by their names in the trace. Neither the captured program nor the packing of units takes part in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from dcpc.divide.doubled import double_precision, doubled
from dcpc.divide.graph import SiteGraph
from dcpc.divide.handlers import TensorObservations, Undetached, running
from dcpc.divide.masking import filled_value
from dcpc.divide.model import Latents, Model
from dcpc.divide.program import Arguments, Program
from dcpc.divide.sites import Plate, Site
from dcpc.divide.supports import transform_of
from dcpc.divide.unit import Unit, UnitGroup
from dcpc.errors import CertificationError

DIFFERENCE_STEP = 1e-2
"""Step of the finite difference that decides where two gradients differ."""

MAX_CONSTRAINED = 6.0
"""Bound of unconstrained values at which densities are compared.

Further out a constrained value rounds to the edge of its support, where only the engine's own
formulas in unconstrained coordinates are exact.
"""


def certify_moves(
    program: Program,
    graph: SiteGraph,
    groups: Sequence[UnitGroup],
    particles: Latents,
    arguments: Arguments,
) -> None:
    """Compares every group's log-densities and scores with Pyro's joint density.

    For a random half of a group's plate elements, then for the other half, the group's latents are
    changed: every element's log-density has to change as the joint does, and those of the elements
    that stay have to stay. The score is compared with autograd of the joint.

    A model in single precision is compared in double precision as well, where it can be run in it,
    so that the wrong term of one datum does not hide in the rounding of a sum over many.

    Args:
        particles: At least two particles from the prior.
        arguments: The model's arguments.

    Raises:
        CertificationError: Naming the unit, the element, both numbers and the usual causes.
    """
    base, other = {}, {}
    for name, u in particles.items():
        site = program.sites[name]
        base[name] = _moderate(u[:1], site)
        start = u[:1] if site.discrete else u[1:2]
        other[name] = _moderate(site.other(start, torch.full_like(start, 0.3)), site)
    reference = _Joint(program, graph, arguments)
    in_double = _in_double(reference, base)
    at_base = reference.terms(base)
    for group in groups:
        device = next(iter(base.values())).device
        half = torch.rand(group.plate_shape, device=device) < 0.5
        for chosen in (half, ~half) if group.plates else (torch.ones_like(half),):
            changed = {**base, **_mixed(group, base, other, chosen, program.sites)}
            got = reference.change(group, base, changed)
            expected = reference.expected_change(group, at_base, reference.terms(changed))
            _compare_changes(group, got, expected, 1e-4 * (1.0 + expected.size.nan_to_num()))
            if in_double is not None:
                in_double.compare_changes(group, changed, expected)
    for group in groups:
        if not group.is_discrete:
            _compare_scores(group, base, reference)


@dataclass(frozen=True)
class _Terms:
    """The terms of the joint density at one particle, by site.

    Attributes:
        log_probs: Pyro's log-densities, batch-shaped, scaled and masked.
        log_dets: Log-Jacobians of the latents, batch-shaped.
        frames: Vectorised plates around each site, as Pyro's own stack has them.
    """

    log_probs: dict[str, Tensor]
    log_dets: dict[str, Tensor]
    frames: dict[str, tuple[Any, ...]]

    def weighted(self, site: Site, scale: float) -> list[tuple[float, Tensor]]:
        """A site's terms, with their weights in the log-density of a unit of some scale."""
        terms = [(1.0 / scale, self.log_probs[site.name].double())]
        if site.name in self.log_dets:
            terms.append((site.scale / scale, self.log_dets[site.name].double()))
        return terms


@dataclass(frozen=True)
class _Change:
    """Change of the joint by element `(*plates, n)`, and the size of the terms in it."""

    change: Tensor
    size: Tensor


@dataclass(frozen=True)
class _Joint:
    """The model's joint density by Pyro's own means, and the groups' for comparison."""

    program: Program
    graph: SiteGraph
    arguments: Arguments

    def terms(self, latents: Latents) -> _Terms:
        """The joint's terms at latents with a particle axis of size one."""
        particle = {name: u[0] for name, u in latents.items()}
        return _plain_terms(self.program.model, particle, self.arguments, self.program.sites)

    def total(self, terms: _Terms, scale: float) -> Tensor:
        """The joint log-density in a unit's scale."""
        weighted = [t for site in self.program.sites.values() for t in terms.weighted(site, scale)]
        return torch.stack([weight * value.sum() for weight, value in weighted]).sum()

    def scale(self, unit: Unit) -> float:
        """Scale of a unit, where its plate subsamples."""
        return self.program.sites[unit.sites[0]].scale

    def change(self, group: UnitGroup, base: Latents, changed: Latents) -> Tensor:
        """Change of the group's log-densities, `(*plates, n)`."""
        tensors, count = self.arguments.tensors, self.program.num_particles
        values = []
        for latents in (base, changed):
            rows = {name: u.expand(count, *u.shape[1:]) for name, u in latents.items()}
            with torch.no_grad():
                values.append(group.log_density(group.pack(rows), rows, tensors)[0].double())
        return values[1] - values[0]

    def expected_change(self, group: UnitGroup, before: _Terms, after: _Terms) -> _Change:
        """Change of the joint by element, and the size of the terms in it."""
        changes, sizes = [], []
        for unit in group.units:
            change = size = torch.zeros(group.plate_shape, dtype=torch.float64, device="cpu")
            for name in self.graph.factors(unit.sites):
                site, frames = self.program.sites[name], before.frames[name]
                scale = self.scale(unit)
                for (weight, old), (_, new) in zip(
                    before.weighted(site, scale), after.weighted(site, scale), strict=True
                ):
                    moved = torch.where(old == new, 0.0, new - old)
                    change = change + weight * _by_plate(moved, frames, group.plates)
                    size = size + weight * _by_plate(old.abs() + new.abs(), frames, group.plates)
            changes.append(change)
            sizes.append(size)
        return _Change(torch.stack(changes, -1), torch.stack(sizes, -1))

    def scores(self, group: UnitGroup, latents: Latents) -> Tensor:
        """Gradient of the joint, packed as the group's score is: `(*plates, n, d)`."""
        names = [name for unit in group.units for name in unit.sites]
        particle = {
            name: u[0].detach().clone().requires_grad_(name in names) for name, u in latents.items()
        }
        leaves = [particle[name] for name in names]
        packed = {}
        with Undetached(), torch.enable_grad():
            terms = self.terms({name: u[None] for name, u in particle.items()})
            for scale in group.scales:
                total = self.total(terms, scale)
                gradients = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
                by_name = {
                    name: (torch.zeros_like(leaf) if grad is None else grad)[None]
                    for name, leaf, grad in zip(names, leaves, gradients, strict=True)
                }
                packed[scale] = group.pack(by_name)[0].unbind(-2)
        scores = [packed[self.scale(unit)][index] for index, unit in enumerate(group.units)]
        return torch.stack(scores, -2)


class _AtUnconstrained(Messenger):
    """Gives latents the images of unconstrained values, and keeps the log-Jacobians."""

    def __init__(self, latents: Latents) -> None:
        super().__init__()
        self.latents = latents
        self.log_dets: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.latents:
            transform = transform_of(msg["fn"])
            msg["value"] = transform(self.latents[name])
            msg["done"] = True
            self.log_dets[name] = transform.log_abs_det_jacobian(self.latents[name], msg["value"])


def _plain_terms(
    model: Model, latents: Latents, arguments: Arguments, sites: Mapping[str, Site]
) -> _Terms:
    """The terms of the joint by an ordinary run of the model, for one particle."""
    args, kwargs = arguments.rebuild(arguments.tensors)
    values = _AtUnconstrained(latents)
    with running(model, args, kwargs):
        traced = pyro.poutine.trace(values(TensorObservations()(model)))
        trace = traced.get_trace(*args, **kwargs)
        nodes: dict[str, Any] = trace.nodes
        for name in sites:
            nodes[name]["value"] = filled_value(nodes[name])
        trace.compute_log_prob(lambda name, _: name in sites)
    log_probs, frames = {}, {}
    for name in sites:
        node = nodes[name]
        log_probs[name] = node["log_prob"]
        frames[name] = tuple(f for f in node["cond_indep_stack"] if f.vectorized)
        if name in values.log_dets:
            log_det, batch_dims = values.log_dets[name], len(sites[name].batch_shape)
            if log_det.dim() > batch_dims:
                log_det = log_det.flatten(batch_dims).sum(-1)
            values.log_dets[name] = log_det
    return _Terms(log_probs, values.log_dets, frames)


def _by_plate(value: Tensor, frames: Sequence[Any], plates: Sequence[Plate]) -> Tensor:
    """Sums a batch-shaped value to the plates, found by name in a site's own stack of frames."""
    dims = [next(frame.dim for frame in frames if frame.name == plate.name) for plate in plates]
    value = value.cpu()
    while value.dim() < max((-dim for dim in dims), default=0):
        value = value.unsqueeze(0)
    axes = [value.dim() + dim for dim in dims]
    rest = [axis for axis in range(value.dim()) if axis not in axes]
    return value.permute(*axes, *rest).flatten(len(axes)).sum(-1) if rest else value.permute(axes)


def _moderate(u: Tensor, site: Site) -> Tensor:
    """An unconstrained value away from the edges of a bounded support."""
    if site.discrete:
        return u
    u = u.nan_to_num(nan=0.1, posinf=MAX_CONSTRAINED, neginf=-MAX_CONSTRAINED)
    return u if site.is_unbounded else u.clamp(-MAX_CONSTRAINED, MAX_CONSTRAINED)


def _mixed(
    group: UnitGroup,
    base: Latents,
    other: Latents,
    chosen: Tensor,
    sites: Mapping[str, Site],
) -> dict[str, Tensor]:
    """The group's latents with other values in the chosen elements `(*plates)`."""
    mixed = {}
    for unit in group.units:
        for name in unit.sites:
            site = sites[name]
            event_dims = len(site.unconstrained_shape) - len(site.batch_shape)
            sizes = [1] * len(site.batch_shape)
            for plate in group.plates:
                sizes[plate.dim] = plate.size
            by_dim = sorted(range(len(group.plates)), key=lambda i: group.plates[i].dim)
            mask = chosen.permute(by_dim).reshape((*sizes, *(1,) * event_dims))
            mixed[name] = torch.where(mask, other[name], base[name])
    return mixed


def _tolerance(value: Tensor) -> float:
    return 1e-3 if value.dtype == torch.float32 else 1e-7


@dataclass(frozen=True)
class _InDouble:
    """The comparison of changes in double precision.

    Attributes:
        reference: The joint, of arguments in double precision.
        base: The particle that is moved.
        at_base: The joint's terms there.
    """

    reference: _Joint
    base: Latents
    at_base: _Terms

    def compare_changes(self, group: UnitGroup, changed: Latents, single: _Change) -> None:
        """Compares a group's changes with the joint's, both in double precision.

        Rounding is what the joint's own change in single precision is off by; a captured program
        may hold as much of it, in numbers that it took out of its data and in clamps to the last
        digit of a precision.
        """
        changed = {name: doubled(u) for name, u in changed.items()}
        try:
            with double_precision():
                got = self.reference.change(group, self.base, changed)
                terms = self.reference.terms(changed)
                expected = self.reference.expected_change(group, self.at_base, terms)
        except Exception:  # an operation that wants single precision: the other comparison stands
            return
        rounding = (single.change - expected.change).abs().nan_to_num(nan=math.inf)
        allowed = 1e-7 * (1.0 + expected.size.nan_to_num()) + 10.0 * rounding
        _compare_changes(group, got, expected, allowed)


def _in_double(reference: _Joint, base: Latents) -> _InDouble | None:
    """The comparison in double precision; None of models that are in it or cannot be run in it."""
    if all(u.dtype == torch.float64 for u in base.values()):
        return None
    base = {name: doubled(u) for name, u in base.items()}
    arguments = reference.arguments
    arguments = arguments.replace(tuple(doubled(t) for t in arguments.tensors))
    reference = replace(reference, arguments=arguments)
    try:
        with double_precision():
            return _InDouble(reference, base, reference.terms(base))
    except Exception:  # an operation that wants single precision
        return None


def _compare_changes(group: UnitGroup, got: Tensor, expected: _Change, allowed: Tensor) -> None:
    change, got = expected.change, got.cpu()
    comparable = change.isfinite() & expected.size.isfinite()
    wrong = comparable & ~((got - change).abs() <= allowed)
    if bool(wrong.any()):
        index = tuple(int(i) for i in wrong.nonzero()[0])
        raise CertificationError(
            f"unit '{group.units[index[-1]].name}', element {index[:-1]} of its plates "
            f"{[plate.name for plate in group.plates]}: its log-density changes by "
            f"{float(got[index]):.6g} where the model's joint density changes by "
            f"{float(change[index]):.6g}, so that its moves would be wrong. Usual causes: elements "
            "of a plate that are not independent, or a model that is random outside its sample "
            "sites; declare the latents one block with blocks=[...], or take the plate away."
        )


def _compare_scores(group: UnitGroup, base: Latents, reference: _Joint) -> None:
    """Compares a group's score with autograd of the joint, and with finite differences if need be.

    Raises:
        CertificationError: They differ, or the score is not finite where the log-density is.
    """
    tensors, count = reference.arguments.tensors, reference.program.num_particles
    rows = {name: u.expand(count, *u.shape[1:]).contiguous() for name, u in base.items()}
    evaluation = group.evaluate(group.pack(rows), rows, tensors)
    score, density = evaluation.score[0], evaluation.log_density[0]
    bad = density.isfinite().unsqueeze(-1) & ~score.isfinite()
    if bool(bad.any()):
        unit = group.units[int(bad.nonzero()[0][-2])]
        raise CertificationError(
            f"unit '{unit.name}': its score (the gradient of its log-density) is NaN or infinite "
            "where the log-density is finite, so that it cannot be moved. Usual causes: a NaN "
            "covariate whose row is masked out (fill it with any number: a mask hides values, not "
            "their gradients), torch.where around an expression that is NaN on the side not "
            "taken, or the derivative of sqrt or norm at zero."
        )
    try:
        expected = reference.scores(group, base).to(score)
    except RuntimeError:  # the model itself turns gradients off, for example
        return
    allowed = _tolerance(score) * (1.0 + expected.abs() + score.abs().amax())
    wrong = expected.isfinite() & ~((score - expected).abs() <= allowed)
    for unit_index, entry in wrong.nonzero()[:4, -2:].tolist():
        index = tuple(wrong[..., unit_index, entry].nonzero()[0].tolist())
        _compare_with_slope(group, rows, (*index, unit_index, entry), score, reference)


def _compare_with_slope(
    group: UnitGroup, rows: Latents, index: tuple[int, ...], score: Tensor, reference: _Joint
) -> None:
    """The last word where autograd and score differ: gradients may be stopped on purpose."""
    unit, got = group.units[index[-2]], float(score[index])
    ends = []
    for step in (-DIFFERENCE_STEP, DIFFERENCE_STEP):
        value = group.pack(rows)
        shift = torch.zeros_like(value[0])
        shift[index] = step
        moved = {name: u[:1] for name, u in {**rows, **group.unpack(value + shift)}.items()}
        with torch.no_grad():
            ends.append(float(reference.total(reference.terms(moved), reference.scale(unit))))
    slope = (ends[1] - ends[0]) / (2 * DIFFERENCE_STEP)
    if abs(slope - got) > 0.1 * (1.0 + abs(slope) + abs(got)):
        raise CertificationError(
            f"unit '{unit.name}': its score is {got:.6g} where the joint density has the slope "
            f"{slope:.6g}, so that its moves would be wrong. Usual causes: a custom autograd "
            "function with a wrong backward pass, or torch.no_grad in the model."
        )
