"""The pattern of an attention in a graph: a product, what is done to its scores, a softmax, and a second product.

Two passes look for it: float products become one call (`attention`), integer products one kernel (`core_rewriting`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from harmoq_ao.graph.nodes import called_module, is_guard, target_name

ADDITIONS = (operator.add, torch.add)
MULTIPLICATIONS = (operator.mul, torch.mul)
VIEWS = ("view", "reshape")
_METADATA = ("shape", "dtype", "device", "ndim")

Predicate = Callable[[nn.Module, Any], bool]
"""Asks something about a node of a module's graph."""


@dataclass(frozen=True)
class Match:
    """One attention found in a graph.

    Args:
        scores: The score product.
        chain: Additions, views and, if they were asked for, multiplications after it, in order.
        after: The value product, any dropouts, and the softmax: from the last to the first.
    """

    scores: fx.Node
    chain: list[fx.Node]
    after: list[fx.Node]

    @property
    def product(self) -> fx.Node:
        """The value product."""
        return self.after[0]


def match_attention(
    module: nn.Module, node: fx.Node, is_product: Predicate, steps: tuple[Any, ...] = ADDITIONS
) -> Match | None:
    """The attention whose value product is `node`, or None.

    Args:
        module: The converted island.
        node: A node of one of its graphs.
        is_product: Whether a node is a product that may belong to it.
        steps: Functions of two operands that may come between the score product and the softmax, beside views.
    """
    if not is_product(module, node) or not isinstance(node.args[0], fx.Node):
        return None
    current = node.args[0]
    after: list[fx.Node] = [node]
    while _is_dropout(module, current):
        after.append(current)
        current = current.args[0]  # type: ignore[assignment]
    if not is_softmax(module, current):
        return None
    after.append(current)
    chain = _chain(module, current.args[0], is_product, steps)
    if chain is None or not all(_used_within(n, [*chain, *after]) for n in [*chain, *after[1:]]):
        return None
    return Match(chain[0], chain[1:], after)


def _chain(
    module: nn.Module, node: Any, is_product: Predicate, steps: tuple[Any, ...], depth: int = 8
) -> list[fx.Node] | None:
    """Nodes from the score product to `node` through `steps` and views, or None."""
    if not isinstance(node, fx.Node) or depth == 0:
        return None
    if is_product(module, node):
        return [node]
    if node.op == "call_function" and node.target in steps and len(node.args) == 2 and not node.kwargs:
        candidates: tuple[Any, ...] = node.args
    elif node.op == "call_method" and node.target in VIEWS:
        candidates = node.args[:1]
    else:
        return None
    for candidate in candidates:
        found = _chain(module, candidate, is_product, steps, depth - 1)
        if found is not None:
            return [*found, node]
    return None


def _used_within(node: fx.Node, attention: list[fx.Node]) -> bool:
    """Whether nothing but the attention itself, and questions about shape and type, uses a node's value."""
    return all(user in attention or asks_metadata(user) or guards_type(user) for user in node.users)


def guards_type(node: fx.Node) -> bool:
    """Whether a node is a guard that a value is a tensor, which every value of an attention is."""
    return is_guard(node) and str(node.args[1]) == "type"


def asks_metadata(node: fx.Node) -> bool:
    """Whether a node asks for a shape, type or device."""
    if node.op == "call_function" and node.target is getattr:
        return str(node.args[1]) in _METADATA
    return node.op == "call_method" and node.target in ("size", "dim")


def _is_dropout(module: nn.Module, node: Any) -> bool:
    return isinstance(called_module(module, node), (nn.Dropout, nn.Identity))


def is_softmax(module: nn.Module, node: Any) -> bool:
    """A softmax over the last axis that keeps the type."""
    called = called_module(module, node)
    if called is not None:
        return isinstance(called, nn.Softmax) and called.dim == -1
    if not isinstance(node, fx.Node) or target_name(node) != "softmax":
        return False
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    dtype = node.kwargs.get("dtype")
    keeps_type = dtype is None or (isinstance(dtype, fx.Node) and dtype.args[1:] == ("dtype",))
    return bool(dim == -1 and keeps_type and len(node.args) <= 2)


def product_site(module: nn.Module, node: Any) -> nn.Module | None:
    """The module of a node that multiplies two operands and takes nothing else, or None."""
    called = called_module(module, node)
    return called if called is not None and len(node.args) == 2 and not node.kwargs else None


def erase_attention(graph: fx.Graph, match: Match) -> None:
    """Remove an attention that nothing uses any more."""
    for dead in [*match.after, *reversed(match.chain), match.scores]:
        for guard in [u for u in dead.users if guards_type(u)]:
            graph.erase_node(guard)
        if not dead.users:
            graph.erase_node(dead)


def ask_instead(node: fx.Node, other: fx.Node) -> None:
    """Put questions about a value's shape and type to another of the same shape and type."""
    for user in [u for u in node.users if asks_metadata(u)]:
        user.replace_input_with(node, other)


def score_stand_in(query: Tensor, key: Tensor) -> Tensor:
    """Zeros of the shape of ``query @ key``, one number in memory: for what only asks the shape of the scores."""
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    return query.new_zeros(()).expand(*batch, query.shape[-2], key.shape[-1])


def widened(term: Tensor, like: Tensor) -> Tensor:
    """`term` broadcast against `like`, in its type, without memory of its own where the type is the same."""
    return term.to(like.dtype).expand(torch.broadcast_shapes(term.shape, like.shape))


def drop_unused(graph: fx.Graph) -> None:
    """Remove stand-ins and questions that nothing uses."""
    for node in reversed(list(graph.nodes)):
        if node.target in (score_stand_in, widened, getattr, "reshape") and not node.users:
            graph.erase_node(node)
