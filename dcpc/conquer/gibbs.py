"""Exact draws of discrete units from their complete conditionals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dcpc.conquer.lines import AllComponents, Candidates, Component, Line, lines_of
from dcpc.divide import Conditional
from dcpc.divide.discrete_unit import DiscreteGroup
from dcpc.divide.elimination import eliminate, gumbel_like


@dataclass(frozen=True)
class ConditionalDraw:
    """A draw of a group's values from their complete conditionals.

    Attributes:
        value: The values, `(K, *plates, n, d)`.
        before: Log-density before, `(K, *plates, n)`.
        after: Log-density of the draw.
        log_normaliser: Logarithm of the sum of the densities that the (last) draw chose from, so
            that its own log-probability is `after - log_normaliser`.
        probabilities: Conditional probabilities of the values of enumerated latents,
            `(K, *batch, *event, S)` of integers, `(K, *batch, S)` of one-hot vectors.
    """

    value: Tensor
    before: Tensor
    after: Tensor
    log_normaliser: Tensor
    probabilities: Mapping[str, Tensor] = field(default_factory=dict)


def draw_from_conditional(
    unit: Conditional, *, greedy: bool = False, keep_dead: bool = True
) -> ConditionalDraw:
    """Draw discrete units from their complete conditionals (Geman & Geman 1984).

    The prediction errors of a discrete unit are the differences of its log-density between its
    values (Sennesh, Wu & Salvatori 2024, appendix); where all values are compared, an exact draw
    takes no more than these. Units with many values or many components move along lines (`lines`),
    blocks of several latents by variable elimination (`elimination`). Values that are masked out
    stay.

    Args:
        unit: The units.
        greedy: Take the most probable value instead of a draw.
        keep_dead: Whether particles of zero density stay where they are.
    """
    group = unit.group
    assert isinstance(group, DiscreteGroup)
    if group.block is not None:
        return _draw_block(unit, group, greedy, keep_dead)
    value = unit.value
    before: Tensor | None = None
    probabilities: dict[int, Tensor] = {}
    for line in lines_of(group.supports, value):
        candidates = line.through(value)
        table = _table(unit, candidates)
        here = _at(table, candidates.current)
        before = here if before is None else before
        chosen = _choose(table, greedy)
        if keep_dead:
            chosen = torch.where(here == -math.inf, candidates.current, chosen)
        value = _keep_inactive(unit, value, _values_at(candidates.values, chosen))
        after, log_normaliser = _at(table, chosen), table.logsumexp(0)
        _note(probabilities, line, group, table)
    assert before is not None
    return ConditionalDraw(
        value, before, after, log_normaliser, _by_latent(unit, group, probabilities)
    )


def _table(unit: Conditional, candidates: Candidates) -> Tensor:
    """Log-densities `(S, K, *plates, n)` of candidates; minus infinity where they have none."""
    table = unit.log_densities(candidates.values)
    if candidates.feasible is not None:
        table = table.masked_fill(~candidates.feasible, -math.inf)
    return table.masked_fill(~(table.abs() < math.inf), -math.inf)


def _choose(table: Tensor, greedy: bool) -> Tensor:
    """Indices `(K, *plates, n)` drawn in proportion to the exponentials of a table."""
    if not greedy:
        table = table + gumbel_like(table)
    return table.argmax(0)


def _at(table: Tensor, index: Tensor) -> Tensor:
    return table.gather(0, index.unsqueeze(0)).squeeze(0)


def _values_at(values: Tensor, index: Tensor) -> Tensor:
    index = index[None, ..., None].expand(1, *values.shape[1:])
    return values.gather(0, index).squeeze(0)


def _keep_inactive(unit: Conditional, value: Tensor, drawn: Tensor) -> Tensor:
    return drawn if unit.active is None else torch.where(unit.active, drawn, value)


def _note(
    probabilities: dict[int, Tensor], line: Line, group: DiscreteGroup, table: Tensor
) -> None:
    """Keep the conditional probabilities of the components on a line, by component."""
    if not isinstance(line, AllComponents | Component):
        return
    share = table.softmax(0).nan_to_num(nan=0.0).movedim(0, -1)
    if isinstance(line, Component):
        probabilities[group.component_at(line.start)] = share
        return
    joint = share.unflatten(-1, [int(support.num_values) for support in line.supports])
    first = share.dim() - 1
    for index in range(len(line.supports)):
        others = [first + i for i in range(len(line.supports)) if i != index]
        probabilities[index] = joint.sum(others) if others else joint


def _by_latent(
    unit: Conditional, group: DiscreteGroup, probabilities: Mapping[int, Tensor]
) -> dict[str, Tensor]:
    """Probabilities by latent; of values that are masked out and stay, one and zero."""
    if unit.active is None:
        return group.unpack_probabilities(probabilities)
    value, kept, start = unit.value, {}, 0
    for index, support in enumerate(group.supports):
        if index in probabilities:
            share = probabilities[index]
            part = value[..., start : start + support.width]
            stays = torch.nn.functional.one_hot(support.index(part), share.shape[-1]).to(share)
            kept[index] = torch.where(unit.active[..., start, None], share, stays)
        start += support.width
    return group.unpack_probabilities(kept)


def _draw_block(
    unit: Conditional, group: DiscreteGroup, greedy: bool, keep_dead: bool
) -> ConditionalDraw:
    """Draw a block of several latents at once, by variable elimination."""
    block, value = group.block, unit.value
    assert block is not None
    current = block.indices(value)
    tables = block.tables(unit.log_terms(block.assignments(value))[0])
    drawn = eliminate(tables, block.plan, current, greedy=greedy, keep_dead=keep_dead)
    new = _keep_inactive(unit, value, block.value(drawn.indices, value))
    return ConditionalDraw(
        value=new,
        before=drawn.before.unsqueeze(-1),
        after=drawn.after.unsqueeze(-1),
        log_normaliser=drawn.log_normaliser.unsqueeze(-1),
        probabilities=_by_latent(
            unit, group, {i: marginal.unsqueeze(-2) for i, marginal in enumerate(drawn.marginals)}
        ),
    )
