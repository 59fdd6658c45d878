"""Joint draws of several discrete variables by variable elimination.

Forward, variables are summed out one after the other; backward, each is drawn given those that were
summed out after it. On a chain this is forward filtering and backward sampling, on a tree its
generalisation (Dechter 1999). Pyro's own contraction draws one sample of a model's enumerated sites
in a run of the model; here, tables of many particles are at hand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor

MAX_EVALUATIONS = 256
"""Evaluations of its factors that a block of discrete latents may take in a sweep."""

MAX_TABLE = 1 << 16
"""Numbers per particle and plate element in the largest table of an elimination."""


@dataclass(frozen=True)
class EliminationPlan:
    """How the variables of a block are summed out.

    Attributes:
        sizes: Number of values of each variable.
        scopes: Variables of each factor, by site, in increasing order.
        order: Order in which variables are summed out.
        colours: Variables of one colour have no factor in common, and are enumerated together.
        table_size: Size of the largest table on the way.
    """

    sizes: tuple[int, ...]
    scopes: Mapping[str, tuple[int, ...]]
    order: tuple[int, ...]
    colours: tuple[int, ...]
    table_size: int

    @property
    def colour_sizes(self) -> list[int]:
        """Values that each colour is enumerated over."""
        return [
            max(size for size, own in zip(self.sizes, self.colours, strict=True) if own == colour)
            for colour in range(max(self.colours) + 1)
        ]

    @property
    def num_evaluations(self) -> int:
        """Evaluations of the factors that the tables take."""
        return math.prod(self.colour_sizes)

    @property
    def is_cheap(self) -> bool:
        """Whether the block may be moved in this way."""
        return self.num_evaluations <= MAX_EVALUATIONS and self.table_size <= MAX_TABLE


def plan_elimination(
    sizes: Sequence[int], scopes: Mapping[str, tuple[int, ...]]
) -> EliminationPlan:
    """A plan that sums the variable with the fewest neighbours out first.

    Args:
        sizes: Number of values of each variable.
        scopes: Variables of each factor.
    """
    graph = nx.Graph()
    graph.add_nodes_from(range(len(sizes)))
    for scope in scopes.values():
        graph.add_edges_from(itertools.combinations(scope, 2))
    colour = nx.greedy_color(graph, strategy="DSATUR")
    order, table_size = [], 1
    rest = graph.copy()
    while rest:
        variable = min(rest, key=lambda v: (rest.degree(v), v))
        neighbours = list(rest.neighbors(variable))
        table_size = max(table_size, math.prod(sizes[v] for v in (variable, *neighbours)))
        rest.add_edges_from(itertools.combinations(neighbours, 2))
        rest.remove_node(variable)
        order.append(variable)
    colours = tuple(colour[variable] for variable in range(len(sizes)))
    return EliminationPlan(tuple(sizes), scopes, tuple(order), colours, table_size)


@dataclass(frozen=True)
class Table:
    """A log-factor as a function of some variables.

    Attributes:
        scope: The variables, in increasing order.
        values: `(*batch, *sizes)`, an axis for each of them.
    """

    scope: tuple[int, ...]
    values: Tensor


@dataclass(frozen=True)
class JointDraw:
    """A draw of all variables.

    Attributes:
        indices: Index of each variable's value, `(*batch)` each.
        before: Log-density at the present values, `(*batch)`.
        after: Log-density of the draw.
        log_normaliser: Logarithm of the sum over all values.
        marginals: Probabilities of each variable's values, `(*batch, S)` each.
    """

    indices: list[Tensor]
    before: Tensor
    after: Tensor
    log_normaliser: Tensor
    marginals: list[Tensor]


def eliminate(
    tables: Mapping[tuple[int, ...], Tensor],
    plan: EliminationPlan,
    current: Sequence[Tensor],
    *,
    greedy: bool = False,
    keep_dead: bool = True,
) -> JointDraw:
    """Draw all variables in proportion to the exponential of the sum of the tables.

    Args:
        tables: Log-factors `(*batch, *sizes)` by scope.
        plan: Order of elimination.
        current: Present values, as indices.
        greedy: Take the most probable values instead of a draw.
        keep_dead: Whether present values of probability zero stay.
    """
    clean = {
        scope: values.masked_fill(~(values.abs() < math.inf), -math.inf)
        for scope, values in tables.items()
    }
    before = _total(clean, current)
    log_normaliser, marginals = _marginals(clean, plan)
    indices = _backward(_forward(clean, plan, greedy)[1], plan, greedy)
    if keep_dead:
        dead = before == -math.inf
        indices = [torch.where(dead, now, new) for now, new in zip(current, indices, strict=True)]
    return JointDraw(indices, before, _total(clean, indices), log_normaliser, marginals)


def gumbel_like(table: Tensor) -> Tensor:
    """Standard Gumbel numbers: the largest entry of a log-table plus these is a draw from it.

    They are finite, so that an entry of probability zero never is the largest.
    """
    uniform = torch.rand_like(table).clamp_(min=torch.finfo(table.dtype).tiny)
    return uniform.log_().neg_().log_().neg_()


def log_normaliser(tables: Mapping[tuple[int, ...], Tensor], plan: EliminationPlan) -> Tensor:
    """Logarithm of the sum over all values, `(*batch)`, with gradients.

    Args:
        tables: Log-factors `(*batch, *sizes)` by scope.
        plan: Order of elimination.
    """
    return _forward(tables, plan)[0]


def _forward(
    tables: Mapping[tuple[int, ...], Tensor], plan: EliminationPlan, greedy: bool = False
) -> tuple[Tensor, list[Table]]:
    """Sum (or maximise) variables out.

    Returns:
        What is left when all are, `(*batch)`, and for each variable in order the table that it was
        summed out of.
    """
    factors = [Table(scope, values) for scope, values in tables.items()]
    summed: list[Table] = []
    rest: list[Table] = []
    for variable in plan.order:
        touching = [factor for factor in factors if variable in factor.scope]
        factors = [factor for factor in factors if variable not in factor.scope]
        joint = _product(touching)
        summed.append(joint)
        axis = joint.scope.index(variable) - len(joint.scope)
        values = joint.values.amax(axis) if greedy else _logsumexp(joint.values, axis)
        message = Table(tuple(v for v in joint.scope if v != variable), values)
        (factors if message.scope else rest).append(message)
    total = rest[0].values
    for message in rest[1:]:
        total = total + message.values
    return total, summed


def _backward(summed: Sequence[Table], plan: EliminationPlan, greedy: bool) -> list[Tensor]:
    """Draw the variables in the reverse of the order in which they were summed out."""
    drawn: dict[int, Tensor] = {}
    for variable, joint in reversed(list(zip(plan.order, summed, strict=True))):
        table = _given(joint, drawn)
        if not greedy:
            table = table + gumbel_like(table)
        drawn[variable] = table.argmax(-1)
    return [drawn[variable] for variable in range(len(drawn))]


def _marginals(
    tables: Mapping[tuple[int, ...], Tensor], plan: EliminationPlan
) -> tuple[Tensor, list[Tensor]]:
    """Log-normaliser, and each variable's probabilities: its derivatives in unary potentials."""
    like = next(iter(tables.values()))
    batch = like.shape[: like.dim() - len(next(iter(tables)))]
    with torch.enable_grad():
        unary = [like.new_zeros((*batch, size), requires_grad=True) for size in plan.sizes]
        potentials = dict(tables)
        for variable, potential in enumerate(unary):
            known = potentials.get((variable,))
            potentials[(variable,)] = potential if known is None else known + potential
        total, _ = _forward(potentials, plan)
        marginals = torch.autograd.grad(total.sum(), unary)
    return total.detach(), [probability.nan_to_num(nan=0.0) for probability in marginals]


def _product(factors: Sequence[Table]) -> Table:
    """Sum of log-factors, as a function of the variables of all of them."""
    scope = tuple(sorted({variable for factor in factors for variable in factor.scope}))
    total: Tensor | None = None
    for factor in factors:
        values = factor.values
        for position, variable in enumerate(scope):
            if variable not in factor.scope:
                to_the_right = sum(other in factor.scope for other in scope[position:])
                values = values.unsqueeze(values.dim() - to_the_right)
        total = values if total is None else total + values
    assert total is not None
    return Table(scope, total)


def _given(table: Table, drawn: Mapping[int, Tensor]) -> Tensor:
    """A table as a function of its one variable that is not drawn yet, `(*batch, S)`."""
    values, scope = table.values, list(table.scope)
    for variable in table.scope:
        if variable in drawn:
            axis = values.dim() - len(scope) + scope.index(variable)
            index = drawn[variable]
            index = index.reshape(*index.shape, *(1,) * len(scope))
            shape = list(values.shape)
            shape[axis] = 1
            values = values.gather(axis, index.expand(shape)).squeeze(axis)
            scope.remove(variable)
    return values


def _total(tables: Mapping[tuple[int, ...], Tensor], indices: Sequence[Tensor]) -> Tensor:
    """Sum of all tables at given values, `(*batch)`."""
    known = dict(enumerate(indices))
    total: Tensor | None = None
    for scope, values in tables.items():
        value = _given(Table(scope, values), known)
        total = value if total is None else total + value
    assert total is not None
    return total


def _logsumexp(values: Tensor, axis: int) -> Tensor:
    """`logsumexp` whose gradient is zero, and not NaN, where all terms are minus infinity."""
    largest = values.detach().amax(axis, keepdim=True)
    largest = torch.where(largest == -math.inf, 0.0, largest)
    total = (values - largest).exp().sum(axis)
    dead = total == 0
    return torch.where(dead, -math.inf, torch.where(dead, 1.0, total).log() + largest.squeeze(axis))
