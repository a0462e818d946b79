"""Attention of given queries, keys and values with quantized products, and the kernel that runs it on GPUs.

Where qkv or the projection belongs to another module (DAT, RGT, CRAFT, ATD), no whole attention can be fused. What is
between, ``q k^T (x factor) (+ bias) (+ mask) -> softmax -> v`` on integers, still is one kernel instead of two integer
products with the attention map in memory. A chain is found in the graph; its shapes are judged at each call, and a call
that the kernel does not take runs the graph as it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from harmoq_ao.errors import KernelError
from harmoq_ao.lowering.attention import (
    ADDITIONS,
    MULTIPLICATIONS,
    Match,
    asks_metadata,
    drop_unused,
    erase_attention,
    is_softmax,
    match_attention,
    score_stand_in,
)
from harmoq_ao.lowering.fusing import Misfit, is_recognising, runs_triton
from harmoq_ao.modules.quantized import QuantizedMatmul
from harmoq_ao.tracing.island import original_class
from harmoq_ao.tracing.tracer import Variant, compile_graph

_LOG2E = 1.4426950408889634  # the kernel's exponentials are powers of two
_KEY = "_harmoq_attention_core"
_numbers = itertools.count()


def lower_cores(module: nn.Module, variant: Variant) -> Variant:
    """The same variant, which runs the attention kernel in place of quantized products that choose Triton.

    Args:
        module: The converted island.
        variant: One of its graphs, in its final form.
    """
    if not any(_is_quantized_product(module, node) for node in variant.graph.nodes):
        return variant
    graph = fx.Graph()
    graph.output(graph.graph_copy(variant.graph, {}))
    sites: list[str] = []
    reason = "between its scores and its softmax lies more than a factor, additions and a mask"
    if not any(is_softmax(module, node) for node in graph.nodes):
        reason = "its products are no attention with a softmax over the keys"
    for node in list(graph.nodes):
        match = match_attention(module, node, _is_quantized_product, (*ADDITIONS, *MULTIPLICATIONS))
        if match is None:
            continue
        try:
            _rewrite(graph, match)
        except Misfit as misfit:
            reason = str(misfit)
            continue
        sites += [str(match.scores.target), str(match.product.target)]
    if any(node.meta.get("writes") or node.meta.get("random") for node in graph.nodes):
        sites, reason = [], "its graph writes or draws, and a call that is given up half-way runs again"
    drop_unused(graph)
    run = None if not sites else compile_graph(graph, original_class(module))
    return replace(variant, run=LoweredCores(variant, run, tuple(sites), reason))


def _is_quantized_product(module: nn.Module, node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 2 or node.kwargs:
        return False
    site = module.get_submodule(str(node.target))
    return isinstance(site, QuantizedMatmul) and site.form.op == "matmul"


# --- the graph --------------------------------------------------------------------------------------------------------


@dataclass
class _Chain:
    """What lies between the scores and the softmax, as nodes or numbers.

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


def _rewrite(graph: fx.Graph, match: Match) -> None:
    """Put one call of :func:`attention_core` where the value product is."""
    chain = _parse(match)
    query, key = match.scores.args
    with graph.inserting_before(match.scores):
        frame = whole = graph.call_function(score_stand_in, (query, key))
    with graph.inserting_before(match.product):
        if chain.view is not None and chain.back is not None:
            frame = graph.call_method(str(chain.view.target), (whole, *chain.view.args[1:]), chain.view.kwargs)
            back = graph.call_method(str(chain.back.target), (frame, *chain.back.args[1:]), chain.back.kwargs)
        else:
            back = whole
        for node in [match.scores, *match.chain, *match.after[1:]]:
            seen_through = frame if node in match.chain[-3:-1] and chain.view is not None else whole
            for user in [u for u in node.users if asks_metadata(u)]:
                user.replace_input_with(node, seen_through)
        sites = [graph.get_attr(str(n.target)) for n in (match.scores, match.product)]
        operands = (query, key, match.product.args[1], chain.factor, tuple(chain.terms), chain.mask, frame, back)
        core = graph.call_function(attention_core, (*sites, *operands))
        if any(user.op == "call_method" and user.target == "view" for user in match.product.users):
            core = graph.call_method("contiguous", (core,))
    match.product.replace_all_uses_with(core)
    erase_attention(graph, match)


# --- one attention ----------------------------------------------------------------------------------------------------


def attention_core(
    scores: QuantizedMatmul,
    values: QuantizedMatmul,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factor: Tensor | float | None,
    terms: tuple[Tensor | float, ...],
    mask: Tensor | None,
    frame: Tensor,
    back: Tensor,
) -> Tensor:
    """``softmax(factor * query @ key + terms + mask) @ value`` with both products on integers, by the kernel.

    Args:
        scores: Site of the first product.
        values: Site of the second one.
        query: `[windows, heads, N, D]`.
        key: `[windows, heads, D, N]`.
        value: `[windows, heads, N, D]`.
        factor: `[heads, 1, 1]`, a number, or None.
        terms: Each `[heads, N, N]` or a number; axes in front of length one.
        mask: `[1, nW, 1, N, N]`, added to the scores in the view of `frame`; or None.
        frame: Stands for the scores in the mask's view.
        back: Stands for them in the view after that.

    Returns:
        `[windows, heads, N, D]` in the type of `query`.

    Raises:
        Misfit: The kernel does not take it; says why.
    """
    from harmoq_ao.triton_kernels import ops, window_attention

    _, heads, tokens, head_dim = _check_shapes(query, key, value, back)
    scale = _spread(1.0 if factor is None else factor, (heads, 1, 1), query, "The factor of its scores")
    table = [_spread(term, (heads, tokens, tokens), query, "What is added to its scores") for term in terms]
    windows = None if mask is None else _check_mask(mask, frame, query)
    packed = replace(
        _packed(scores, values, heads, head_dim),
        score_scale=scale.float().reshape(heads).contiguous(),
        bias=torch.stack([t.float() for t in table]).sum(0) * _LOG2E if table else None,
    )
    if is_recognising():
        return value.new_zeros(len(query), tokens, heads, head_dim).transpose(1, 2)
    parts = query.transpose(1, 2), key.permute(0, 3, 1, 2), value.transpose(1, 2)
    if any(part.stride() != parts[0].stride() or part.stride(-1) != 1 for part in parts):
        parts = tuple(part.contiguous() for part in parts)  # type: ignore[assignment]
    launch = ops.attention if torch.compiler.is_compiling() else window_attention.launch_attention
    return launch(*parts, packed, mask=windows).unflatten(-1, (heads, head_dim)).transpose(1, 2)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, back: Tensor) -> tuple[int, ...]:
    if query.dim() != 4 or query.shape != key.transpose(-2, -1).shape or query.shape != value.shape:
        found = [tuple(part.shape) for part in (query, key, value)]
        raise Misfit(f"its operands {found} are not [windows, heads, N, D], [.., D, N] and [.., N, D]")
    windows, heads, tokens, head_dim = query.shape
    if back.shape != (windows, heads, tokens, tokens):
        raise Misfit(f"its softmax is of scores {tuple(back.shape)}, not [windows, heads, N, N]")
    if tokens > _limits().MAX_TOKENS:
        raise Misfit(f"{tokens} tokens, where the kernel takes {_limits().MAX_TOKENS}")
    return windows, heads, tokens, head_dim


def _check_mask(mask: Tensor, frame: Tensor, query: Tensor) -> Tensor:
    """The mask as `[nW, N, N]`."""
    tokens = query.shape[2]
    if frame.dim() != 5 or frame.shape[2:] != (query.shape[1], tokens, tokens):
        raise Misfit(f"its mask is added to scores {tuple(frame.shape)}, not [B, nW, heads, N, N]")
    spread = _spread(mask, (frame.shape[1], 1, tokens, tokens), query, "Its mask")
    return spread[:, 0].to(query.dtype).contiguous()


def _spread(value: Tensor | float, shape: tuple[int, ...], like: Tensor, name: str) -> Tensor:
    """`value` of that shape, without axes of length one in front."""
    if not isinstance(value, Tensor):
        return torch.full(shape, value, dtype=torch.float32, device=like.device)
    while value.dim() > len(shape) and value.shape[0] == 1:
        value = value[0]
    fits = value.dim() <= len(shape) and all(
        n in (1, m) for n, m in zip(reversed(value.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise Misfit(f"{name} has the shape {tuple(value.shape)}, not {shape}")
    return value.expand(shape)


def _limits() -> Any:
    from harmoq_ao.triton_kernels import attention_operands

    return attention_operands


def _packed(scores: QuantizedMatmul, values: QuantizedMatmul, heads: int, head_dim: int) -> Any:
    """The kernel's operands but for factor and bias, made once."""
    operands = scores.operands(), values.operands()
    key = (*map(id, operands), heads, head_dim)  # the operands are held by their sites, or by what is kept here
    known = values._derived.get("attention")
    if known is not None and known[0] == key:
        return known[2]
    kernels = _limits()
    try:
        matmuls = kernels.MatmulQuantizers(*operands[0], *operands[1])
        device = next(b.device for b in scores.buffers())
        packed = kernels.pack_attention(
            None, None, heads, head_dim, torch.ones(heads, device=device), scale_after=True, matmuls=matmuls
        )
    except KernelError as error:
        raise Misfit(str(error)) from error
    values._derived["attention"] = (key, operands, packed)
    return packed


# --- running it -------------------------------------------------------------------------------------------------------


@dataclass
class _State:
    """What one island knows of the cores of one of its graphs.

    Attributes:
        taken: Whether the kernel took a call.
        refused: Shapes of calls that it did not take.
        reason: Why.
    """

    taken: bool = False
    refused: set[Any] = field(default_factory=set)
    reason: str | None = None


class LoweredCores:
    """Runs a graph, or the same with attention kernels. What it finds is kept with the island, and copied with it.

    Args:
        variant: The graph.
        run: The graph with kernels, compiled; None if there is nothing that they could compute.
        names: Names of the sites that they compute.
        reason: Why there is nothing.
    """

    def __init__(self, variant: Variant, run: Callable[..., Any] | None, names: tuple[str, ...], reason: str) -> None:
        self.variant, self.run, self.names, self.reason = variant, run, names, reason
        self.number = next(_numbers)

    def __call__(self, module: nn.Module, *leaves: Any) -> Any:
        """The graph's result for these leaves."""
        trying = is_recognising()
        asked = self.run is not None and (trying or runs_triton(module.get_submodule(self.names[0]), leaves))
        state = self.state(module)
        if torch.compiler.is_compiling():  # no trial: what eager calls found
            asked = asked and state.taken and not state.refused
        shapes = tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        if self.run is None or not asked or shapes in state.refused:
            return self.variant.run(module, *leaves)
        try:
            result = self.run(module, *leaves)
        except Misfit as misfit:
            state.refused.add(shapes)
            state.reason = str(misfit)
            return self.variant.run(module, *leaves)
        state.taken = True
        return self.variant.run(module, *leaves) if trying else result

    def state(self, module: nn.Module) -> _State:
        """What an island knows of this graph."""
        known: dict[int, _State] = module.__dict__.setdefault(_KEY, {})
        return known.setdefault(self.number, _State())

    def sites(self, module: nn.Module) -> tuple[str, ...]:
        """Names of the sites that kernels compute, within the island; none where they do not take it."""
        return self.names if self.state(module).taken else ()

    def miss(self, module: nn.Module) -> str | None:
        """Why kernels do not take it; None if they do, or if that was not tried."""
        state = self.state(module)
        return None if state.taken else state.reason or self.reason
