"""What the kernels compute, in float64 and without any of their code but the operands' layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from harmoq_ao.triton_kernels.attention_operands import LOG2E, PackedAttention
from harmoq_ao.triton_kernels.channel_attention import PackedChannels
from harmoq_ao.triton_kernels.operands import Norm, PackedLinear

_margins: list[float] | None = None
"""While `margins` records: how close the positions of each rounding come to a tie, in steps."""


@contextmanager
def margins() -> Iterator[list[float]]:
    """Context manager that records the distance of each rounding to its nearest tie; float32 may round those apart."""
    global _margins
    _margins = []
    try:
        yield _margins
    finally:
        _margins = None


def linear(
    x: Tensor,
    packed: PackedLinear,
    *,
    eps: float | None = None,
    gate: Tensor | None = None,
    gelu: str = "none",
    after: Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A linear with static bounds and what surrounds it, `[..., K]` to `[..., N]` float64."""
    assert packed.reciprocal is not None
    assert packed.offset is not None
    x = x.double() if eps is None else F.layer_norm(x.double(), x.shape[-1:], eps=eps)
    x = x if gate is None else x * gate.double()
    y = codes(x, packed.reciprocal, packed.offset, packed.act_bits) @ packed.effective_codes().double().t()
    y = y * packed.scale.double() + packed.constant.double()
    if gelu != "none":
        y = F.gelu(y, approximate="tanh" if gelu == "tanh" else "none")
    if after is not None:
        y = F.layer_norm(y, y.shape[-1:], after.weight.double(), after.bias.double(), after.eps)
    return y if residual is None else y + residual.double()


def mlp(
    x: Tensor, fc1: PackedLinear, fc2: PackedLinear, *, gelu: str = "erf", eps: float | None = None,
    after: Norm | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A linear, GELU and another linear."""
    return linear(linear(x, fc1, eps=eps, gelu=gelu), fc2, after=after, residual=residual)


def window_attention(
    x: Tensor, operands: PackedAttention, *, index: Tensor | None = None, regions: Tensor | None = None,
    eps: float | None = None, after: Norm | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """qkv, attention and projection."""
    assert operands.qkv is not None
    assert operands.proj is not None
    q, k, v = linear(x, operands.qkv, eps=eps).unflatten(-1, (3, operands.heads, operands.head_dim)).unbind(2)
    o = attention(q, k, v, operands, index=index, regions=regions)
    return linear(o, operands.proj, after=after, residual=residual)


def attention(
    q: Tensor, k: Tensor, v: Tensor, operands: PackedAttention, *, index: Tensor | None = None,
    key_index: Tensor | None = None, regions: Tensor | None = None, key_regions: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of given q, k and v, `[.., heads * D]` float64, window by window."""
    key_index, key_regions = index if key_index is None else key_index, regions if key_regions is None else key_regions
    count = 1 if index is None else len(index)
    out = torch.full((*q.shape[:2], q.shape[2] * q.shape[3]), float("nan"), dtype=torch.float64)
    for window in range(len(q) * count):
        image, place = divmod(window, count)
        rows = torch.arange(q.shape[1]) if index is None else index[place].long()
        keys = torch.arange(k.shape[1]) if key_index is None else key_index[place].long()
        apart = None
        if regions is not None and key_regions is not None:
            of = window % len(regions)
            apart = regions[of][:, None] != key_regions[of][None, :]
        there = (keys >= 0)[:, None, None]
        out[image, rows] = _window(q[image, rows], k[image, keys] * there, v[image, keys] * there, operands, apart)
    return out


def _window(q: Tensor, k: Tensor, v: Tensor, operands: PackedAttention, apart: Tensor | None) -> Tensor:
    """A window, q `[N, heads, D]`, k and v `[M, heads, D]`, to `[N, heads * D]`."""
    q, k, v = (part.double().transpose(0, 1) for part in (q, k, v))
    scale = operands.score_scale.double()[:, None, None]
    if operands.cosine:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    if operands.factors is not None and operands.bounds is not None:
        factors = operands.factors[:, : operands.head_dim]
        q = rounded(q if operands.scale_after else q * scale, operands.bounds[0], operands.left_bits, factors[0])
        k = rounded(k, operands.bounds[1], operands.right_bits, factors[1])
        scores = q @ k.transpose(1, 2) * (scale if operands.scale_after else 1)
    else:
        scores = q @ k.transpose(1, 2) * scale
    if operands.bias is not None:
        scores = scores + operands.bias.double() / LOG2E
    if apart is not None:
        scores = scores + operands.apart * apart
    weights = scores.softmax(-1)
    if operands.bounds is None:
        return (weights @ v).transpose(0, 1).flatten(1)
    v = rounded(v, operands.bounds[3], operands.right_bits)
    if not operands.relative:
        return (rounded(weights, operands.bounds[2], operands.left_bits) @ v).transpose(0, 1).flatten(1)
    weights = rounded(weights / weights.amax(-1, keepdim=True), operands.bounds[2], operands.left_bits)
    return (weights @ v / weights.sum(-1, keepdim=True).clamp(min=1e-30)).transpose(0, 1).flatten(1)


def channel_attention(q: Tensor, k: Tensor, v: Tensor, operands: PackedChannels, images: int) -> Tensor:
    """Attention among channels, `[images * tokens, heads * D]` float64."""

    def heads(x: Tensor) -> Tensor:
        return x.double().view(images, -1, operands.heads, operands.width).permute(0, 2, 3, 1)

    left, right = (
        heads(x) / heads(x).norm(dim=-1, keepdim=True).clamp_min(eps)
        for x, eps in zip((q, k), operands.eps, strict=True)
    )
    bounds, bits, value = operands.bounds, operands.bits, heads(v)
    if bounds is not None:
        left, right, value = (rounded(x, bounds[at], bits[at]) for x, at in ((left, 0), (right, 1), (value, 3)))
    weights = (left @ right.mT * operands.factor.double()[:, None, None]).softmax(-1)
    if bounds is not None and not operands.relative:
        weights = rounded(weights, bounds[2], bits[2])
    elif bounds is not None:
        weights = rounded(weights / weights.amax(-1, keepdim=True), bounds[2], bits[2])
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
    return (weights @ value).permute(0, 3, 1, 2).reshape(v.shape)


def codes(x: Tensor, reciprocal: Tensor, offset: Tensor, bits: int) -> Tensor:
    """Unsigned codes as float64; the position is rounded to float32, as everywhere."""
    position = (x.float() * reciprocal + offset).clamp(-1, 1 << bits)
    if _margins is not None:
        _margins.append(float(((position - position.floor()) - 0.5).abs().min()))
    return position.round().clamp(0, (1 << bits) - 1).double()


def rounded(x: Tensor, bounds: Tensor, bits: int, reciprocal: Tensor | None = None) -> Tensor:
    """Values of the codes of ``x``; ``bounds`` are reciprocal, offset, step and lower bound."""
    first = bounds[0] if reciprocal is None else reciprocal
    return codes(x, first, bounds[1], bits) * bounds[2].double() + bounds[3].double()
