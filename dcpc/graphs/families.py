"""Like operators of a graph that work on different values and do not depend on each other."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from dcpc.divide.repeats import key_of
from dcpc.graphs.like import Node

__all__ = ["LEAST", "Families", "arguments_of", "is_row"]

aten = torch.ops.aten

LEAST = 8
"""Number of like operators from which on they are a family."""

PRODUCTS = frozenset((aten.mm.default, aten.addmm.default))
"""Products of matrices."""


class Families:
    """The families of a graph's operators.

    The members of a family are at the same depth, so that none depends on another, and their
    arguments come from the same places: from one family each, or from nodes that are in none.

    Args:
        graph: A graph whose nodes tell in `meta["like"]` what they give.
        kinds: By node, anything; the members of a family agree in it.
        may_join: Whether a node may be in a family.

    Attributes:
        found: By member, its family.
    """

    def __init__(
        self, graph: fx.Graph, kinds: Mapping[Node, Any], may_join: Callable[[Node], bool]
    ) -> None:
        self.found: dict[Node, list[Node]] = {}
        self._rows: dict[Node, int] = {}
        self._kinds = kinds
        levels: dict[int, list[Node]] = defaultdict(list)
        depth: dict[Node, int] = {}
        for node in graph.nodes:
            depth[node] = 1 + max((depth[n] for n in node.all_input_nodes), default=-1)
            if node.op == "call_function" and may_join(node):
                levels[depth[node]].append(node)
        for level in sorted(levels):
            rows = [n for n in levels[level] if is_row(n) and n.args[0] not in self.found]
            for family in _grouped(rows, lambda node: (self._kinds.get(node), *node.args[:2])):
                if len(family) >= LEAST and _are_most_rows(family):
                    self._add(family)
            rest = [node for node in levels[level] if node not in self.found]
            for alike in _grouped(rest, self._key):
                for family in self._parts(alike):
                    if len(family) >= LEAST:
                        self._add(family)

    def _add(self, family: list[Node]) -> None:
        """Adds a family, in the order of the rows that it works on: a backward pass goes back."""
        family.sort(key=lambda node: [self._rows.get(n, 0) for n in node.all_input_nodes])
        self.found |= dict.fromkeys(family, family)
        self._rows |= {node: row for row, node in enumerate(family)}

    def _key(self, node: Node) -> tuple:
        """The key by which nodes are members of one family."""

        def place(argument: fx.Node) -> Any:
            like = argument.meta["like"]
            if argument in self.found:
                return self.found[argument][0], like
            # A matrix that is larger than its product is shared by all members.
            is_large = node.target in PRODUCTS and like.numel > node.meta["like"].numel
            return (argument, like) if is_large else like

        places = fx.map_arg((node.args, tuple(node.kwargs.items())), place)
        return self._kinds.get(node), node.target, key_of(places), node.meta["like"]

    def _parts(self, alike: list[Node]) -> list[list[Node]]:
        """Like nodes in parts of which each takes a row once, if most of these are families.

        What a site sends to itself and what it sends to the next one are alike, but come from the
        same rows.
        """
        columns = [
            column
            for column in zip(*(arguments_of(node) for node in alike), strict=True)
            if column[0] in self._rows and len(set(column)) > 1
        ]
        if all(len(set(column)) == len(column) for column in columns):
            return [alike]
        counts = [Counter[Node]() for _ in columns]
        turns: dict[Node, tuple[int, ...]] = {}
        for node, *arguments in zip(alike, *columns, strict=True):
            turns[node] = tuple(count[n] for count, n in zip(counts, arguments, strict=True))
            for count, argument in zip(counts, arguments, strict=True):
                count[argument] += 1
        parts = _grouped(alike, turns.__getitem__)
        in_families = sum(len(part) for part in parts if len(part) >= LEAST)
        return parts if 2 * in_families >= len(alike) else [alike]


def arguments_of(node: Node) -> list[fx.Node]:
    """The nodes among a node's arguments, in order, each as often as it is there."""
    found = list[fx.Node]()
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def is_row(node: Node) -> bool:
    """Whether a node is a row of another one."""
    return node.target is aten.select.int


def _are_most_rows(family: list[Node]) -> bool:
    """Whether rows are half of those of their tensor at least, which then is worth to be copied."""
    source, dim = family[0].args[:2]
    return 2 * len(family) >= source.meta["like"].shape[dim]


def _grouped(nodes: Iterable[Node], key: Callable[[Node], Any]) -> list[list[Node]]:
    """Nodes by a key, in order."""
    groups: dict[Any, list[Node]] = defaultdict(list)
    for node in nodes:
        groups[key(node)].append(node)
    return list(groups.values())
