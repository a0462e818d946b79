"""Attention of given queries, keys and values with quantized products, by one kernel on GPUs.

Where qkv or the projection belongs to another module (DAT, RGT, CRAFT, ATD), no whole attention can be fused. What is
between, ``q k^T (x factor) (+ bias) (+ mask) -> softmax -> v`` on integers, still is one kernel instead of two integer
products with the attention map in memory. Shapes are judged at each call, and a call that the kernel does not take runs
the graph as it was. How it comes into a graph: `core_rewriting.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from harmoq_ao.common.errors import KernelError
from harmoq_ao.graph.tracer import Variant
from harmoq_ao.lowering.fusing import Misfit, is_recognising, runs_triton
from harmoq_ao.sites.quantized import QuantizedMatmul

_LOG2E = 1.4426950408889634  # the kernel's exponentials are powers of two
_MEMO_SIZE = 256  # shapes of calls; images come in every size
_KEY = "_harmoq_attention_core"
_numbers = itertools.count()


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
        query: `[windows, heads, N, D]`; the windows may have several axes, the heads none.
        key: `[windows, heads, D, M]`.
        value: `[windows, heads, M, D]`.
        factor: `[heads, 1, 1]`, a number, or None.
        terms: Each `[heads, N, M]` or a number; axes in front of length one.
        mask: `[1, nW, 1, N, M]`, added to the scores in the view of `frame`; or None.
        frame: Stands for the scores in the mask's view.
        back: Stands for them in the view after that.

    Returns:
        `[windows, heads, N, D]` in the type of `query`.

    Raises:
        Misfit: The kernel does not take it; says why.
    """
    from harmoq_ao.triton_kernels import ops, window_attention

    _check_shapes(query, key, value, back)
    shape = query.shape
    query, key, value = (_four_axes(part) for part in (query, key, value))
    heads, tokens, head_dim = query.shape[1:]
    keys = value.shape[2]
    scale = _spread(1.0 if factor is None else factor, (heads, 1, 1), query, "The factor of its scores")
    table = [_spread(term, (heads, tokens, keys), query, "What is added to its scores") for term in terms]
    windows = None if mask is None else _check_mask(mask, frame, (heads, tokens, keys))
    packed = replace(
        _packed(scores, values, heads, head_dim),
        score_scale=scale.float().reshape(heads).contiguous(),
        bias=torch.stack([t.float() for t in table]).sum(0) * _LOG2E if table else None,
    )
    if is_recognising():
        return value.new_zeros(len(query), tokens, heads, head_dim).transpose(1, 2).reshape(shape)
    parts = query.transpose(1, 2), key.permute(0, 3, 1, 2), value.transpose(1, 2)
    if parts[1].stride() != parts[2].stride() or any(part.stride(-1) != 1 for part in parts):
        parts = tuple(part.contiguous() for part in parts)  # type: ignore[assignment]
    launch = ops.attention if torch.compiler.is_compiling() else window_attention.launch_attention
    return launch(*parts, packed, mask=windows).unflatten(-1, (heads, head_dim)).transpose(1, 2).reshape(shape)


def _four_axes(part: Tensor) -> Tensor:
    return part.unsqueeze(1) if part.dim() == 3 else part.flatten(0, -4)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, back: Tensor) -> None:
    transposed = (*key.shape[:-2], key.shape[-1], key.shape[-2])
    as_query = (*query.shape[:-2], value.shape[-2], query.shape[-1])
    if query.dim() < 3 or transposed != as_query or value.shape != as_query:
        found = ", ".join(str(tuple(part.shape)) for part in (query, key, value))
        raise Misfit(f"its operands {found} are not [windows, heads, N, D], [.., D, M] and [.., M, D]")
    scores = (*query.shape[:-1], value.shape[-2])
    if back.shape != scores:
        raise Misfit(f"its softmax is of scores {tuple(back.shape)}, not {scores}")
    kernels = _limits()
    if query.shape[-2] > kernels.MAX_TOKENS or value.shape[-2] > kernels.MAX_KEYS:
        most = f"{kernels.MAX_TOKENS} and {kernels.MAX_KEYS}"
        raise Misfit(f"{query.shape[-2]} queries and {value.shape[-2]} keys, where the kernel takes {most}")


def _check_mask(mask: Tensor, frame: Tensor, scores: tuple[int, ...]) -> Tensor:
    """The mask as `[nW, N, M]`."""
    if frame.dim() != 5 or frame.shape[2:] != scores:
        raise Misfit(f"its mask is added to scores {tuple(frame.shape)}, not [B, nW, heads, N, M]")
    spread = _spread(mask, (frame.shape[1], 1, *scores[1:]), mask, "Its mask")
    return spread[:, 0].contiguous()


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


def product_quantizers(scores: QuantizedMatmul, values: QuantizedMatmul) -> Any:
    """Quantizers of both products of an attention, as the kernels take them.

    Raises:
        KernelError: The kernels do not compute what the sites do.
    """
    return _limits().MatmulQuantizers(*scores.operands(), *values.operands(), values.relative)


def _packed(scores: QuantizedMatmul, values: QuantizedMatmul, heads: int, head_dim: int) -> Any:
    """The kernel's operands but for factor and bias, made once."""
    if scores.joint_scale is not None and len(scores.joint_scale) != head_dim:
        raise Misfit(f"heads of {head_dim} channels, where calibration saw {len(scores.joint_scale)}")
    operands = scores.operands(), values.operands()
    key = (*map(id, operands), heads, head_dim)  # the operands are held by their sites, or by what is kept here
    known = values._derived.attention
    if known is not None and known[0] == key:
        return known[2]
    kernels = _limits()
    try:
        matmuls = product_quantizers(scores, values)
        device = next(b.device for b in scores.buffers())
        packed = kernels.pack_attention(
            None, None, heads, head_dim, torch.ones(heads, device=device), scale_after=True, matmuls=matmuls
        )
    except KernelError as error:
        raise Misfit(str(error)) from error
    values._derived.attention = (key, operands, packed)
    return packed


# --- running it -------------------------------------------------------------------------------------------------------


@dataclass
class _State:
    """What one island knows of the cores of one of its graphs.

    Attributes:
        taken: Shapes of calls that the kernel took.
        refused: Shapes of calls that it did not take.
        reason: Why not, once that was asked.
    """

    taken: set[Any] = field(default_factory=set)
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
        trying, state = is_recognising(), self.state(module)
        if self.run is None:
            state.reason = self.reason
            return self.variant.run(module, *leaves)
        if not (trying or runs_triton(module.get_submodule(self.names[0]), leaves)):
            return self.variant.run(module, *leaves)
        shapes = tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        if torch.compiler.is_compiling():  # no trial: what eager calls found
            run = self.run if any(shapes == known for known in state.taken) else self.variant.run
            return run(module, *leaves)
        if shapes in state.refused:
            return self.variant.run(module, *leaves)
        try:
            result = self.run(module, *leaves)
        except Misfit as misfit:
            state.reason = str(misfit)
            _remember(state.refused, shapes)
            return self.variant.run(module, *leaves)
        _remember(state.taken, shapes)
        return self.variant.run(module, *leaves) if trying else result

    def state(self, module: nn.Module) -> _State:
        """What an island knows of this graph."""
        known: dict[int, _State] = module.__dict__.setdefault(_KEY, {})
        return known.setdefault(self.number, _State())

    def sites(self, module: nn.Module) -> tuple[str, ...]:
        """Names of the sites that kernels compute, within the island; none where they do not take it."""
        return self.names if self.state(module).taken else ()

    def miss(self, module: nn.Module) -> str | None:
        """Why kernels do not take it; None if they do, or if that was not asked."""
        state = self.state(module)
        return None if state.taken else state.reason


def _remember(shapes: set[Any], new: Any) -> None:
    if len(shapes) >= _MEMO_SIZE:
        shapes.clear()
    shapes.add(new)
