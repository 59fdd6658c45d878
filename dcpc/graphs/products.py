"""Cheaper products of matrices: with what is added to them, and in the place of solves."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import fx

from dcpc.graphs.like import Node

__all__ = ["add_in_products", "invert_once"]

aten = torch.ops.aten

ROWS_PER_INVERSION = 4
"""Rows to solve for, over the size of a triangular matrix, that make up for its inversion."""


def add_in_products(graph: fx.Graph) -> None:
    """Lets a product of matrices begin with the vector that is added to its rows.

    Args:
        graph: A graph whose nodes tell in `meta["like"]` what they give.
    """
    node: Node
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs:
            continue
        first, second = node.args
        for vector, result in ((first, second), (second, first)):
            product = _product_of(result)
            if product is not None and _is_offset(vector, product, node):
                with graph.inserting_before(node):
                    fused = graph.call_function(aten.addmm.default, (vector, *product.args))
                fused.meta["like"] = product.meta["like"]
                node.target, node.args = aten.view.default, (fused, list(node.meta["like"].shape))
                break
    graph.eliminate_dead_code()


def _product_of(result: Node) -> Node | None:
    """The product that a node is a view of, used here only."""
    if not isinstance(result, fx.Node) or len(result.users) > 1:
        return None
    product: Node = result.args[0] if result.target is aten.view.default else result
    if product.target is not aten.mm.default or len(product.users) > 1:
        return None
    return product if result.meta["like"].shape[-1:] == product.meta["like"].shape[-1:] else None


def _is_offset(vector: Node, product: Node, total: Node) -> bool:
    """Whether a node is a vector of the length of a product's rows."""
    if not isinstance(vector, fx.Node):
        return False
    like, whole = vector.meta["like"], product.meta["like"]
    is_row = like.shape == whole.shape[-1:] and like.dtype == whole.dtype
    return is_row and total.meta["like"].numel == whole.numel


def invert_once(graph: fx.Graph) -> None:
    """Inverts a triangular matrix that is solved with again and again.

    Products with the inverse then take the place of the solves `X A = B` with it or its transpose.

    Args:
        graph: A graph whose nodes tell in `meta["like"]` what they give.
    """
    solves: dict[tuple[Node, bool], list[tuple[Node, bool]]] = defaultdict(list)
    for node in graph.nodes:
        if node.target is aten.linalg_solve_triangular.default and _is_by_row(node):
            matrix, is_transposed = _without_transposes(node.args[0])
            is_upper = node.kwargs["upper"] != is_transposed  # the triangle that is read
            solves[matrix, is_upper].append((node, is_transposed))
    for (matrix, is_upper), found in solves.items():
        size = matrix.meta["like"].shape[0]
        if sum(node.args[1].meta["like"].shape[0] for node, _ in found) < ROWS_PER_INVERSION * size:
            continue
        with graph.inserting_before(found[0][0]):
            inverse = _inverse(graph, matrix, is_upper)
            transposed = graph.call_function(aten.t.default, (inverse,))
        transposed.meta["like"] = inverse.meta["like"].transposed()
        for node, is_transposed in found:
            node.target, node.kwargs = aten.mm.default, {}
            node.args = (node.args[1], transposed if is_transposed else inverse)
            node.meta["like"] = node.meta["like"].reshaped(node.meta["like"].shape)
    graph.eliminate_dead_code()


def _is_by_row(solve: Node) -> bool:
    """Whether a node solves for the rows of a matrix, by one that is not that of a particle."""
    matrix, rows = (n.meta["like"] for n in solve.args[:2])
    is_plain = solve.kwargs.get("left") is False and not solve.kwargs.get("unitriangular")
    return is_plain and len(matrix.shape) == len(rows.shape) == 2


def _without_transposes(node: Node) -> tuple[Node, bool]:
    """The matrix that another one is a copy or a transpose of, and whether it is the latter."""
    is_transposed = False
    while node.target in (aten.clone.default, aten.transpose.int, aten.t.default):
        is_transposed ^= node.target is not aten.clone.default
        node = node.args[0]
    return node, is_transposed


def _inverse(graph: fx.Graph, matrix: Node, is_upper: bool) -> Node:
    like = matrix.meta["like"]
    identity = graph.call_function(
        aten.eye.default, (like.shape[0],), {"dtype": like.dtype, "device": like.device}
    )
    identity.meta["like"] = like.reshaped(like.shape)
    inverse = graph.call_function(
        aten.linalg_solve_triangular.default, (matrix, identity), {"upper": is_upper}
    )
    inverse.meta["like"] = like.reshaped(like.shape).transposed()  # as torch lays it out
    return inverse
