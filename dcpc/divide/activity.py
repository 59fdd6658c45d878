"""Activity of masked latents: the elements that are part of the target, for given data.

A mask takes the prior of a latent's elements out of the density. Where nothing else looks at such
an element (what `obs_mask` leaves of `y_unobserved`), it is no part of the target: it stays where
it was drawn. Where a factor looks at it, its prior is flat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dcpc.divide.certify import differs
from dcpc.divide.program import Program
from dcpc.divide.sites import Plate, Site
from dcpc.divide.unit import UnitGroup, sum_to_plates


@dataclass(frozen=True)
class Activity:
    """The elements of latents that are a part of the target.

    Attributes:
        latents: Boolean `(*batch, *event)` by latent, in unconstrained coordinates; latents that
            are all active are left out.
        flat: Latents with elements that have no prior and are looked at by other factors.
        groups: By name of a group, boolean `(1, *plates, n, d)`; groups that are all active are
            left out.
    """

    latents: dict[str, Tensor]
    flat: frozenset[str]
    groups: dict[str, Tensor]

    def has_active(self, name: str) -> bool:
        """Whether any element of a latent is a part of the target."""
        return name not in self.latents or bool(self.latents[name].any())


def find_activity(
    program: Program,
    masks: Mapping[str, Tensor],
    plates: Mapping[str, tuple[Plate, ...]],
    groups: Sequence[UnitGroup],
    tensors: Sequence[Tensor],
) -> Activity:
    """Looks at the masks, and moves what they take out to see which factors change.

    Args:
        program: The whole program.
        masks: By masked latent, which batch elements its own density has.
        plates: By latent, the plates whose elements move independently.
        groups: The groups of units.
        tensors: Tensors among the model's arguments.
    """
    active: dict[str, Tensor] = {}
    flat = set()
    for name, mask in masks.items():
        if bool(mask.all()):
            continue
        site = program.sites[name]
        needed = _looked_at(program, site, plates[name], ~mask, tensors) & ~mask
        if bool(needed.any()):
            flat.add(name)
        if not bool((mask | needed).all()):
            active[name] = _like_value(mask | needed, site)
    packed = {}
    for group in groups:
        members = [name for unit in group.units for name in unit.sites]
        if any(name in active for name in members):
            packed[group.name] = group.pack(
                {
                    name: active[name][None]
                    if name in active
                    else torch.ones(
                        (1, *program.sites[name].unconstrained_shape),
                        dtype=torch.bool,
                        device=program.example[name].device,
                    )
                    for name in members
                }
            )
    return Activity(active, frozenset(flat), packed)


def _looked_at(
    program: Program,
    site: Site,
    plates: Sequence[Plate],
    masked_out: Tensor,
    tensors: Sequence[Tensor],
) -> Tensor:
    """Batch elements whose move changes another factor, in the elements of the given plates."""
    others = [name for name in program.sites if name != site.name]
    run = program.select(others)
    u = program.example[site.name]
    start = u if site.discrete else u.roll(1, 0)
    other = site.other(start, torch.full_like(u, 0.7))
    moved = torch.where(_like_value(masked_out, site), other, u)
    with torch.no_grad():
        before = run(program.example, tensors)
        after = run({**program.example, site.name: moved}, tensors)
    changed = torch.zeros((1,) * (1 + len(plates)), device=u.device)
    for name in others:
        change = differs(after[name], before[name])
        if not bool(change.any()):
            continue
        own = program.sites[name].plates
        if all(plate in own for plate in plates):
            changed = changed + sum_to_plates(change.any(0, keepdim=True).float(), plates)
        else:
            changed = changed + 1.0
    sizes = [1] * masked_out.dim()
    where = changed[0] > 0
    by_dim = sorted(range(len(plates)), key=lambda index: plates[index].dim)
    for plate in plates:
        sizes[plate.dim] = where.shape[plates.index(plate)]
    return where.permute(by_dim).reshape(sizes).expand(masked_out.shape)


def _like_value(mask: Tensor, site: Site) -> Tensor:
    """A mask over batch elements, over the unconstrained value's entries."""
    event_dims = len(site.unconstrained_shape) - len(site.batch_shape)
    return mask.reshape(mask.shape + (1,) * event_dims).expand(site.unconstrained_shape)
