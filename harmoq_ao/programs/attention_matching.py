"""Attention in a recorded graph: ``softmax(factor * q k + terms) v``, as one operator or as products of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from harmoq_ao.kernels.ops import map_product, matmul
from harmoq_ao.lowering.attention import float_attention

_aten = torch.ops.aten
_MATMUL, _MAP_PRODUCT = matmul._opoverload, map_product._opoverload
_VIEWS = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.expand.default,
    _aten.clone.default,
    _aten.alias.default,
    _aten.unsqueeze.default,
}
_MOVES = _VIEWS | {_aten.transpose.int, _aten.permute.default}
_FLOAT = {_aten.bmm.default, _aten.matmul.default}


@dataclass
class Match:
    """An attention.

    Attributes:
        values: The node of its result.
        query: Node of the queries, `[..., N, D]`.
        key: Node of the keys, transposed.
        value: Node of the values.
        scores: Arguments of a quantized score product after its operands; None where it is float.
        products: Likewise of the product with the values.
        relative: Whether the map is quantized relative to its rows.
        terms: What is done to the scores, in order: ``("add", "mul" or "div", node or number)``, ``("view", shape)``,
            or ``("fill", (node, number))``: scores become the number where the node is true.
        absorbed: Nodes that nothing else uses.
    """

    values: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    scores: tuple[Any, ...] | None = None
    products: tuple[Any, ...] | None = None
    relative: bool = False
    terms: list[tuple[str, Any]] = field(default_factory=list)
    absorbed: list[fx.Node] = field(default_factory=list)


def match_attention(node: Any) -> Match | None:
    """The attention whose result a node is, or None."""
    if node.target is float_attention._opoverload:
        query, key, value, terms = node.args
        return Match(node, query, key, value, terms=[("add", term) for term in terms])
    if node.target not in (_MATMUL, _MAP_PRODUCT, *_FLOAT):
        return None
    match = Match(node, node, node, node.args[1], relative=node.target is _MAP_PRODUCT)
    if node.target not in _FLOAT:
        match.products = tuple(node.args[2:])
    softmax: Any = _through(node.args[0], match)
    if softmax.target is not _aten._softmax.default or not _is_inner(softmax):
        return None
    if softmax.args[1] not in (-1, len(softmax.meta["shape"]) - 1) or softmax.args[2]:
        return None
    match.absorbed.append(softmax)
    product: Any = _chain(softmax.args[0], match)
    if product is None:
        return None
    if product.meta["shape"][-1] != softmax.meta["shape"][-1]:
        return None
    match.query, match.key = product.args[:2]
    if product.target not in _FLOAT:
        match.scores = tuple(product.args[2:])
    if (match.scores is None) != (match.products is None):
        return None
    match.absorbed.append(product)
    match.absorbed.reverse()
    match.terms.reverse()
    return match


def _is_inner(node: Any) -> bool:
    return isinstance(node, fx.Node) and len(node.users) == 1


def _is_view(node: Any) -> bool:
    """Whether entries keep their order: of axes, only those of length one change places (as for an einsum)."""
    if node.target not in (_aten.permute.default, _aten.transpose.int):
        return node.target in _VIEWS
    source = node.args[0].meta["shape"]
    order = list(range(len(source)))
    if node.target is _aten.permute.default:
        order = [axis % len(source) for axis in node.args[1]]
    else:
        one, other = (axis % len(source) for axis in node.args[1:])
        order[one], order[other] = other, one
    long = [axis for axis in order if source[axis] > 1]
    return long == sorted(long)


def _through(node: Any, match: Match) -> fx.Node:
    """What lies behind a chain of views that nothing else uses."""
    while _is_view(node) and _is_inner(node):
        match.absorbed.append(node)
        node = node.args[0]
    return node


def _chain(node: Any, match: Match) -> fx.Node | None:
    """Walk from the softmax up to the score product, noting what is done to the scores."""
    while _is_inner(node):
        if node.target in (_MATMUL, *_FLOAT):
            return node
        operation = {_aten.add.Tensor: "add", _aten.mul.Tensor: "mul", _aten.div.Tensor: "div"}.get(node.target)
        if _is_view(node):
            match.terms.append(("view", tuple(node.meta["shape"])))
            inner = node.args[0]
        elif node.target is _aten.masked_fill.Scalar and node.args[1].op == "get_attr":
            inner, *fill = node.args
            match.terms.append(("fill", tuple(fill)))
        elif operation is not None and not node.kwargs:
            inner, other = node.args
            if isinstance(inner, fx.Node) and inner.op == "get_attr" and operation != "div":
                inner, other = other, inner
            if isinstance(other, fx.Node) and other.op != "get_attr":
                return None
            match.terms.append((operation, other))
        else:
            return None
        match.absorbed.append(node)
        node = inner
    return None


def scaled(lookup: dict[fx.Node, Any], node: Any) -> tuple[fx.Node, float]:
    """What a number multiplies to give a node that nothing else uses, and the number; else the node and 1."""
    if node.target in (_aten.mul.Tensor, _aten.mul.Scalar) and _is_inner(node):
        source, number = node.args
        constant = constant_of(lookup, number)
        single = not isinstance(constant, Tensor) or constant.numel() == 1
        if isinstance(source, fx.Node) and constant is not None and single:
            return source, float(constant)
    return node, 1.0


@dataclass(frozen=True)
class Normalized:
    """Rows divided by their lengths.

    Attributes:
        source: Node of what is divided, before later moves.
        moves: Nodes of views and transpositions that follow, in order.
        eps: Smallest length.
        axis: The axis of the source along which lengths are taken.
    """

    source: fx.Node
    moves: list[fx.Node]
    eps: float
    axis: int


def match_normalized(node: Any) -> Normalized | None:
    """``F.normalize`` behind a node and its moves, or None."""
    moves: list[fx.Node] = []
    while node.target in _MOVES:
        moves.append(node)
        node = node.args[0]
    if node.target is not _aten.div.Tensor or not isinstance(node.args[1], fx.Node):
        return None
    source, expanded = node.args
    if expanded.target is not _aten.expand.default:
        return None
    clamped = expanded.args[0]
    norm = clamped.args[0] if clamped.target is _aten.clamp_min.default else None
    if norm is None or norm.target is not _aten.linalg_vector_norm.default or norm.args[0] is not source:
        return None
    order, axes, keepdim = (*norm.args[1:], 2, None, False)[:3]
    if order != 2 or not isinstance(axes, (list, tuple)) or len(axes) != 1 or not keepdim:
        return None
    return Normalized(source, moves[::-1], float(clamped.args[1]), axes[0] % len(source.meta["shape"]))


def constant_of(lookup: dict[fx.Node, Any], operand: Any) -> Tensor | float | None:
    """The constant behind an operand: a tensor, a number, or None."""
    found = lookup.get(operand) if isinstance(operand, fx.Node) else operand
    return found if isinstance(found, (Tensor, int, float)) else None


def resolved(lookup: dict[fx.Node, Any], arguments: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """Arguments of a product with the constants themselves; None for None."""
    if arguments is None:
        return None
    return tuple(lookup[a] if isinstance(a, fx.Node) else a for a in arguments)
