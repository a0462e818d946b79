"""Attention with quantized products in a graph: one call of the kernel is put in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from harmoq_ao.graph import Variant, einsum_form
from harmoq_ao.graph.calls import leaf_shapes
from harmoq_ao.graph.exchange import Finding, original_class
from harmoq_ao.graph.nodes import SELF, called_module, target_name, writes_arguments
from harmoq_ao.graph.variant import DECLINED
from harmoq_ao.lowering.attention_core import attention_core
from harmoq_ao.lowering.attention_matching import (
    ADDITIONS,
    MULTIPLICATIONS,
    VIEWS,
    Match,
    ask_instead,
    drop_unused,
    erase_attention,
    is_softmax,
    match_attention,
    product_site,
    score_stand_in,
)
from harmoq_ao.lowering.fusing import Misfit, is_recognising, runs_triton
from harmoq_ao.sites.quantized import QuantizedMatmul

_MEMO_SIZE = 256  # shapes of calls; images come in every size


@dataclass
class LoweredCores:
    """A graph with attention kernels, to be run in place of the one without.

    Args:
        run: The graph with kernels, compiled; None if there is nothing that they could compute.
        names: Names of the sites that they compute.
        blocked: Why there is nothing.

    Attributes:
        taken: Shapes of calls that the kernels took.
        refused: Shapes of calls that they did not take.
        reason: Why not, once that was asked.
    """

    run: Callable[..., Any] | None
    names: tuple[str, ...]
    blocked: str
    taken: set[Any] = field(default_factory=set)
    refused: set[Any] = field(default_factory=set)
    reason: str | None = None

    def attempt(self, variant: Variant, module: nn.Module, leaves: tuple[Any, ...]) -> Any:
        """The result of a call if the kernels take its shapes, which a first call tries."""
        if self.run is None:
            self.reason = self.blocked
            return DECLINED
        trying = is_recognising()
        if not (trying or runs_triton(module.get_submodule(self.names[0]), leaves)):
            return DECLINED
        shapes = leaf_shapes(leaves)
        if torch.compiler.is_compiling():  # no trial: what eager calls found
            known = any(shapes == taken for taken in self.taken)
            return self.run(module, *leaves) if known else DECLINED
        if shapes in self.refused:
            return DECLINED
        try:
            result = self.run(module, *leaves)
        except Misfit as misfit:
            self.reason = str(misfit)
            _remember(self.refused, shapes)
            return DECLINED
        _remember(self.taken, shapes)
        return DECLINED if trying else result

    def finding(self, module: nn.Module) -> Finding | None:
        """The sites that the kernels compute once they took a call; every quantized product if they refused it."""
        if self.taken:
            return Finding("triton attention", [module.get_submodule(name) for name in self.names], None)
        if self.reason is None:
            return None
        return Finding("triton attention", [m for m in module.modules() if isinstance(m, QuantizedMatmul)], self.reason)


def _remember(shapes: set[Any], new: Any) -> None:
    if len(shapes) >= _MEMO_SIZE:
        shapes.clear()
    shapes.add(new)


def lower_cores(module: nn.Module, variant: Variant) -> Variant:
    """The same variant, which runs the attention kernel in place of quantized products that choose Triton.

    Args:
        module: The converted island.
        variant: One of its graphs, in its final form.
    """
    if not any(_is_quantized_product(module, node) for node in variant.graph.nodes):
        return variant
    graph = variant.copied_graph()
    sites: list[str] = []
    reason = _blocking(module, graph)
    for node in list(graph.nodes):
        match = match_attention(module, node, _is_quantized_product, (*ADDITIONS, *MULTIPLICATIONS))
        if match is None:
            continue
        try:
            _rewrite(module, graph, match)
        except Misfit as misfit:
            reason = str(misfit)
            continue
        sites += [str(match.scores.target), str(match.product.target)]
    # The kernel may refuse a call in the middle of the graph, which then runs again from the start: nothing may have
    # changed outside of it.
    if any(node.meta.get("random") for node in graph.nodes) or writes_arguments(variant.graph):
        sites, reason = [], "its graph draws or writes into arguments, and a call that is given up half-way runs again"
    drop_unused(graph)
    run = variant.with_graph(module, graph).run if sites else None
    return replace(variant, lowered=(*variant.lowered, LoweredCores(run, tuple(sites), reason)))


def _is_quantized_product(module: nn.Module, node: Any) -> bool:
    site = product_site(module, node)
    if not isinstance(site, QuantizedMatmul):
        return False
    return site.form.op in ("matmul", "bmm") or _right_is_transposed(site) is not None


def _right_is_transposed(site: QuantizedMatmul) -> bool | None:
    """Whether the right operand of an einsum is `[..., N, K]`; None if it is no plain product of the last two axes."""
    form = None if site.form.equation is None else einsum_form(site.form.equation)
    if form is None or len(form.rows + form.columns + form.contracted) != 3:
        return None
    batch, rows, columns, contracted = form.batch, form.rows, form.columns, form.contracted
    if form.left != batch + rows + contracted or form.output != batch + rows + columns:
        return None
    return {batch + columns + contracted: True, batch + contracted + columns: False}.get(form.right)


def _blocking(module: nn.Module, graph: fx.Graph) -> str:
    """Why no attention of a graph with quantized products was found."""
    maps = [node for node in graph.nodes if is_softmax(module, node)]
    if not maps:
        return "its products are no attention with a softmax over the keys"
    current = maps[0].args[0]
    while isinstance(current, fx.Node) and not _is_quantized_product(module, current):
        if current.target not in (*ADDITIONS, *MULTIPLICATIONS, *VIEWS):
            return f"its scores pass through {_called(module, current)} before the softmax"
        current = next((a for a in current.args if isinstance(a, fx.Node) and a.op != "get_attr"), None)
    return "its attention map is used elsewhere too, or not as it is"


def _called(module: nn.Module, node: fx.Node) -> str:
    called = called_module(module, node)
    return original_class(called).__name__ if called is not None else target_name(node) or str(node.target)


@dataclass
class _Chain:
    """The operations between the scores and the softmax, as nodes or numbers.

    Attributes:
        factor: What the scores are multiplied with, or None.
        terms: What is added to them then.
        view: The view in which a mask is added then, or None.
        mask: The mask.
        back: The view after that.
    """

    factor: Any = None
    terms: list[Any] = field(default_factory=list)
    view: fx.Node | None = None
    mask: Any = None
    back: fx.Node | None = None


def _parse(match: Match) -> _Chain:
    """The chain of a match in the kernel's order: factor, additions, and a mask in a view per window.

    Raises:
        Misfit: The operations come in another order.
    """
    found = _Chain()
    previous, rest = match.scores, list(match.chain)

    def other() -> Any:
        nonlocal previous
        node = rest.pop(0)
        operands = [a for a in node.args if a is not previous]
        if len(operands) != 1:
            raise Misfit("its scores meet themselves")
        previous = node
        return operands[0]

    if rest and rest[0].target in MULTIPLICATIONS:
        found.factor = other()
    while rest and rest[0].target in ADDITIONS:
        found.terms.append(other())
    if not rest:
        return found
    if len(rest) != 3 or rest[1].target not in ADDITIONS or {rest[0].op, rest[2].op} != {"call_method"}:
        raise Misfit("its scores are scaled or viewed in another order than the kernel's")
    found.view, previous = rest.pop(0), match.chain[-3]
    found.mask = other()
    found.back = rest.pop(0)
    return found


def _rewrite(module: nn.Module, graph: fx.Graph, match: Match) -> None:
    """Put one call of :func:`attention_core` where the value product is."""
    chain = _parse(match)
    query, key = match.scores.args
    value = match.product.args[1]
    with graph.inserting_before(match.scores):
        if _right_is_transposed(module.get_submodule(str(match.scores.target))):  # type: ignore[arg-type]
            key = graph.call_method("transpose", (key, -2, -1))
        frame = whole = graph.call_function(score_stand_in, (query, key))
    with graph.inserting_before(match.product):
        if _right_is_transposed(module.get_submodule(str(match.product.target))):  # type: ignore[arg-type]
            value = graph.call_method("transpose", (value, -2, -1))
        if chain.view is not None and chain.back is not None:
            frame = graph.call_method(str(chain.view.target), (whole, *chain.view.args[1:]), chain.view.kwargs)
            back = graph.call_method(str(chain.back.target), (frame, *chain.back.args[1:]), chain.back.kwargs)
        else:
            back = whole
        for node in [match.scores, *match.chain, *match.after[1:]]:
            seen_through = frame if node in match.chain[-3:-1] and chain.view is not None else whole
            ask_instead(node, seen_through)
        sites = (graph.get_attr(SELF), str(match.scores.target), str(match.product.target))
        operands = (query, key, value, chain.factor, tuple(chain.terms), chain.mask, frame, back)
        core = graph.call_function(attention_core, (*sites, *operands))
        # The kernel's result is a transposed view, which `view` refuses where the product's own memory was fit for it.
        if any(user.op == "call_method" and user.target == "view" for user in match.product.users):
            core = graph.call_method("contiguous", (core,))
    match.product.replace_all_uses_with(core)
    erase_attention(graph, match)
