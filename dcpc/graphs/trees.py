"""Trees of tensors: dictionaries, lists and tuples, nested."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree
from torch import Tensor

__all__ = ["Structure", "flatten", "leaves_of", "mapped", "unflatten"]

Structure = optree.PyTreeSpec
"""A tree without its leaves."""


def flatten(tree: Any) -> tuple[list[Any], Structure]:
    """The leaves of a tree, those of dictionaries in the order of their keys, and its structure."""
    return optree.tree_flatten(tree)


def leaves_of(tree: Any) -> list[Any]:
    """The leaves of a tree, in the order of `flatten`."""
    return optree.tree_leaves(tree)


def unflatten(leaves: Sequence[Any], structure: Structure) -> Any:
    """The tree of a structure with these leaves."""
    return optree.tree_unflatten(structure, leaves)


def mapped(change: Callable[[Tensor], Any], tree: Any) -> Any:
    """A tree with every leaf changed."""
    return optree.tree_map(change, tree)
