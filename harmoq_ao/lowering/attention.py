"""Float attention in one call: scores, bias, mask, softmax and values without the attention map in memory.

Where both products of an attention stay float (the deploy profile), the chain
``q k^T (+ bias) (+ mask) -> softmax -> v`` of a converted island becomes one ``scaled_dot_product_attention``. The map
of a window model is its largest tensor by far; not writing it saves more time than any choice of bits. A chain that
does not match in full is left as it is.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from harmoq_ao.common.tracing import is_recording
from harmoq_ao.graph import Variant
from harmoq_ao.kernels.compiler_view import is_compiled
from harmoq_ao.lowering.attention_matching import (
    Match,
    ask_instead,
    drop_unused,
    erase_attention,
    match_attention,
    product_site,
    score_stand_in,
    widened,
)
from harmoq_ao.lowering.fusing import is_traced
from harmoq_ao.sites.prepared import PreparedMatmul

_BLOCK_BYTES = 1 << 21  # scores of one thread
_VECTOR = 8  # channels that torch's fused attention on GPUs reads at a time


def fused_attention(query: Tensor, key: Tensor, value: Tensor, *terms: Tensor) -> Tensor:
    """``softmax(query @ key + sum of terms) @ value``.

    Args:
        query: `[..., M, E]`, any factor included.
        key: `[..., E, N]`: transposed, as the product takes it.
        value: `[..., N, V]`.
        terms: Each broadcastable to `[..., M, N]`.
    """
    if is_recording():
        return float_attention(query, key, value, list(terms))
    if query.dim() == 4 and key.shape[:2] == value.shape[:2] == query.shape[:2]:
        if query.dtype == torch.bfloat16 and query.device.type == "cpu":
            if is_compiled(query):
                return blocked_attention(query, key, value, list(terms))
            if not is_traced():
                return _in_blocks(query, key, value, terms)
        mask = sum_of([term.to(query.dtype) for term in terms])
        width = value.shape[-1]
        if query.is_cuda:
            query, key, value = whole_vectors(query, key, value)
        mixed = F.scaled_dot_product_attention(query, key.transpose(-2, -1), value, attn_mask=mask, scale=1.0)
        return mixed[..., :width]
    scores = sum_of([query @ key, *terms])
    assert scores is not None
    return torch.softmax(scores, dim=-1) @ value


def whole_vectors(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Operands of :func:`fused_attention` with channels of zeros up to a multiple of 8.

    Of other heads torch's fused attention on GPUs takes none, and writes the map of scores instead.
    """
    if query.shape[-1] % _VECTOR:
        pad = -query.shape[-1] % _VECTOR
        query, key = F.pad(query, (0, pad)), F.pad(key, (0, 0, 0, pad))
    return query, key, F.pad(value, (0, -value.shape[-1] % _VECTOR)) if value.shape[-1] % _VECTOR else value


def sum_of(terms: Sequence[Tensor]) -> Tensor | None:
    """Sum of all terms; None without terms."""
    return functools.reduce(operator.add, terms) if terms else None


def _in_blocks(query: Tensor, key: Tensor, value: Tensor, terms: Sequence[Tensor]) -> Tensor:
    """A few windows at a time, whose scores stay in the cache: in bfloat16 twice as fast as torch's fused attention."""
    shape = (*query.shape[:-1], key.shape[-1])
    block = max(1, _BLOCK_BYTES * torch.get_num_threads() // (2 * max(1, math.prod(shape[1:]))))
    added = [term.to(query.dtype).expand(shape).split(block) for term in terms]
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    parts = zip(query.split(block), key.split(block), value.split(block), out.split(block), *added, strict=True)
    for q, k, v, target, *own in parts:
        scores = q @ k
        for term in own:
            scores += term
        torch.matmul(torch.softmax(scores, dim=-1), v, out=target)
    return out


@torch.library.custom_op("harmoq::blocked_attention", mutates_args=())
def blocked_attention(query: Tensor, key: Tensor, value: Tensor, terms: list[Tensor]) -> Tensor:
    """:func:`fused_attention` in blocks of windows, as an operator that `torch.compile` leaves as it is.

    Args:
        query: `[B, heads, M, E]` bfloat16, as the others.
        key: `[B, heads, E, N]`.
        value: `[B, heads, N, V]`.
        terms: Each broadcastable to `[B, heads, M, N]`.
    """
    return _in_blocks(query, key, value, terms)


@blocked_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, terms: list[Tensor]) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


@torch.library.custom_op("harmoq::float_attention", mutates_args=())
def float_attention(query: Tensor, key: Tensor, value: Tensor, terms: list[Tensor]) -> Tensor:
    """:func:`fused_attention` as one operator, for whoever records what a model computes.

    Args:
        query: `[..., M, E]`.
        key: `[..., E, N]`.
        value: `[..., N, V]`.
        terms: Each broadcastable to `[..., M, N]`.
    """
    return fused_attention(query, key, value, *terms).clone()


@float_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, terms: list[Tensor]) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def fuse_attention(module: nn.Module, variant: Variant) -> Variant:
    """The same graph with every float attention in one call; the very same variant where there is none.

    Args:
        module: The converted island.
        variant: One of its graphs; left as it is.
    """
    graph = variant.copied_graph()
    found = (match_attention(module, node, _is_float_product) for node in graph.nodes)
    matches = [match for match in found if match is not None and _adds_values(match)]
    if not matches:
        return variant
    for match in matches:
        _rewrite(graph, match)
    drop_unused(graph)  # stand-ins exist for questions about shapes, and most graphs ask none
    return variant.with_graph(module, graph)


def _is_float_product(module: nn.Module, node: fx.Node) -> bool:
    site = product_site(module, node)
    return isinstance(site, PreparedMatmul) and not site.quantizers() and site.form.op == "matmul"


def _adds_values(match: Match) -> bool:
    """Whether what is added to the scores are values of the graph, not numbers."""
    sums = (node for node in match.chain if node.op == "call_function")
    return all(isinstance(arg, fx.Node) for node in sums for arg in node.args)


def _rewrite(graph: fx.Graph, match: Match) -> None:
    # Terms may be computed between the products, so the call stands where the second one was; questions about the shape
    # of the scores may be asked earlier, so their stand-in is where the first one was.
    query, key = match.scores.args
    with graph.inserting_before(match.scores):
        stand_in = graph.call_function(score_stand_in, (query, key))
    terms = _terms(graph, match, stand_in)
    with graph.inserting_before(match.product):
        fused = graph.call_function(fused_attention, (query, key, match.product.args[1], *terms))
    match.product.replace_all_uses_with(fused)
    erase_attention(graph, match)


def _terms(graph: fx.Graph, match: Match, stand_in: fx.Node) -> list[fx.Node]:
    """What is added to the scores, in the shape that the softmax sees.

    Views between the additions are applied to each term by itself, widened without memory and in the scores' own type:
    a mask per window and a bias per head need no pass over a map of the whole image before they meet the scores.
    """
    viewed = any(node.op == "call_method" for node in match.chain)
    terms: list[fx.Node] = []
    previous, current = match.scores, stand_in
    ask_instead(previous, current)
    for node in match.chain:
        with graph.inserting_before(node):
            if node.op == "call_method":
                terms = [graph.call_method("reshape", (term, *node.args[1:]), node.kwargs) for term in terms]
                current = graph.call_method("reshape", (current, *node.args[1:]), node.kwargs)
            else:
                term = node.args[1] if node.args[0] is previous else node.args[0]
                assert isinstance(term, fx.Node)
                terms.append(graph.call_function(widened, (term, current)) if viewed else term)
                current = graph.call_function(widened, (current, term))
        ask_instead(node, current)
        previous = node
    return terms
