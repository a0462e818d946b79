"""The kernels as torch operators ``harmoq::...``: Triton on GPUs, their plain torch references on CPUs.

Traced graphs (`torch.compile`, `torch.export`) hold one opaque call each. Operators take tensors and numbers only; the
functions named like the kernels take operands' dataclasses and spread them out. All outputs are contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from harmoq_ao.triton_kernels import lowbit_linear as _linear
from harmoq_ao.triton_kernels import mlp as _mlp
from harmoq_ao.triton_kernels import quantize as _quantize
from harmoq_ao.triton_kernels import window_attention as _attention
from harmoq_ao.triton_kernels.attention_operands import PackedAttention
from harmoq_ao.triton_kernels.operands import PackedLinear

_TENSORS = ("codes", "start", "scale", "constant", "total", "reciprocal", "offset")
_NUMBERS = ("weight_bits", "columns", "mid_rise", "act_bits")


# --- operands as flat lists -------------------------------------------------------------------------------------------


def flatten_linear(linear: PackedLinear) -> tuple[list[Tensor | None], list[int]]:
    """Tensors and numbers of a linear, in the order that the operators take."""
    return [getattr(linear, name) for name in _TENSORS], [int(getattr(linear, name)) for name in _NUMBERS]


def restore_linear(tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> PackedLinear:
    """Inverse of `flatten_linear`."""
    values: dict[str, object] = dict(zip(_TENSORS, tensors, strict=True))
    values |= dict(zip(_NUMBERS, numbers, strict=True))
    values["mid_rise"] = bool(values["mid_rise"])
    return PackedLinear(**values)  # type: ignore[arg-type]


_LINEARS = ("qkv", "proj", "proj_heads")


def flatten_attention(attention: PackedAttention) -> tuple[list[Tensor | None], list[int]]:
    """Tensors and numbers of an attention, in the order that the operators take; a missing linear is all None and 0."""
    tensors: list[Tensor | None] = []
    numbers: list[int] = []
    for name in _LINEARS:
        linear = getattr(attention, name)
        parts = ([None] * len(_TENSORS), [0] * len(_NUMBERS)) if linear is None else flatten_linear(linear)
        tensors += parts[0]
        numbers += parts[1]
    for field in fields(attention):
        value = getattr(attention, field.name)
        if field.name in _LINEARS:
            continue
        if value is None or isinstance(value, Tensor):
            tensors.append(value)
        else:
            numbers.append(int(value))
    return tensors, numbers


def restore_attention(tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> PackedAttention:
    """Inverse of `flatten_attention`."""
    count, width = len(_TENSORS), len(_NUMBERS)
    qkv, proj, proj_heads = (
        None if tensors[i * count] is None
        else restore_linear(tensors[i * count : (i + 1) * count], numbers[i * width : (i + 1) * width])
        for i in range(len(_LINEARS))
    )  # fmt: skip
    score_scale, bias, factors, bounds = tensors[len(_LINEARS) * count :]
    heads, head_dim, padded, cosine, scale_after, left_bits, right_bits, relative = numbers[len(_LINEARS) * width :]
    assert score_scale is not None
    return PackedAttention(
        qkv, proj, proj_heads, heads, head_dim, padded, score_scale, bool(cosine), bool(scale_after), bias, factors,
        bounds, left_bits, right_bits, bool(relative),
    )  # fmt: skip


# --- quantize ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("harmoq::quantize", mutates_args=())
def quantize(x: Tensor, reciprocal: Tensor, offset: Tensor, bits: int, packed: bool = False) -> Tensor:
    """`quantize.reference`."""
    run = _quantize.launch_quantize if x.is_cuda else _quantize.reference
    return run(x, reciprocal, offset, bits, packed)


@quantize.register_fake
def _(x: Tensor, reciprocal: Tensor, offset: Tensor, bits: int, packed: bool = False) -> Tensor:
    return x.new_empty(x.shape[0], (x.shape[1] * bits + 7) // 8 if packed else x.shape[1], dtype=torch.uint8)


@torch.library.custom_op("harmoq::layernorm_quantize", mutates_args=())
def layernorm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    reciprocal: Tensor,
    offset: Tensor,
    bits: int,
    eps: float = 1e-5,
    packed: bool = False,
) -> Tensor:
    """`quantize.reference_layernorm`."""
    if not x.is_cuda:
        return _quantize.reference_layernorm(x, weight, bias, reciprocal, offset, bits, eps, packed)
    factor, shift = _quantize.fold_norm(weight, bias, reciprocal, offset)
    return _quantize.launch_quantize(x, factor, shift, bits, packed=packed, eps=eps)


@layernorm_quantize.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    reciprocal: Tensor,
    offset: Tensor,
    bits: int,
    eps: float = 1e-5,
    packed: bool = False,
) -> Tensor:
    return x.new_empty(x.shape[0], (x.shape[1] * bits + 7) // 8 if packed else x.shape[1], dtype=torch.uint8)


@torch.library.custom_op("harmoq::quantize_tokens", mutates_args=())
def quantize_tokens(x: Tensor, bits: int, joint_scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize.reference_tokens`."""
    run = _quantize.launch_quantize_tokens if x.is_cuda else _quantize.reference_tokens
    return run(x, bits, joint_scale)


@quantize_tokens.register_fake
def _(x: Tensor, bits: int, joint_scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    bound = x.new_empty(x.shape[0], 1, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.uint8), bound, torch.empty_like(bound)


# --- linear -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("harmoq::lowbit_linear", mutates_args=())
def _lowbit_linear(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    gelu: str,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    linear = restore_linear(tensors, numbers)
    run = _linear.launch_lowbit_linear if x.is_cuda else _linear.reference
    return run(x, linear, gelu=gelu, residual=residual, out_dtype=out_dtype)


@_lowbit_linear.register_fake
def _(x: Tensor, tensors: Sequence[Tensor | None], *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], _rows(tensors), dtype=rest[-1])


def lowbit_linear(
    x: Tensor,
    weight: PackedLinear,
    *,
    gelu: str = "none",
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`lowbit_linear.reference` of floats or of codes with static bounds, as the operator ``harmoq::lowbit_linear``."""
    y: Tensor = _lowbit_linear(x, *flatten_linear(weight), gelu, residual, out_dtype)
    return y


# --- mlp --------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("harmoq::mlp", mutates_args=())
def _fused_mlp(
    x: Tensor,
    tensors1: Sequence[Tensor | None],
    numbers1: Sequence[int],
    tensors2: Sequence[Tensor | None],
    numbers2: Sequence[int],
    gelu: str,
    eps: float | None,
    residual: Tensor | None,
) -> Tensor:
    fc1, fc2 = restore_linear(tensors1, numbers1), restore_linear(tensors2, numbers2)
    run = _mlp.launch_mlp if x.is_cuda else _mlp.reference
    return run(x, fc1, fc2, gelu=gelu, eps=eps, residual=residual)


@_fused_mlp.register_fake
def _(x: Tensor, tensors1: Any, numbers1: Any, tensors2: Sequence[Tensor | None], *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], _rows(tensors2))


def mlp(
    x: Tensor,
    fc1: PackedLinear,
    fc2: PackedLinear,
    *,
    gelu: str = "erf",
    eps: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`mlp.reference` as the operator ``harmoq::mlp``."""
    y: Tensor = _fused_mlp(x, *flatten_linear(fc1), *flatten_linear(fc2), gelu, eps, residual)
    return y


# --- attention --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("harmoq::window_attention", mutates_args=())
def _window_attention(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    mask: Tensor | None,
    eps: float | None,
    residual: Tensor | None,
    compute: torch.dtype,
) -> Tensor:
    run = _attention.launch_window_attention if x.is_cuda else _attention.reference
    operands = restore_attention(tensors, numbers)
    return run(x, operands, mask=mask, eps=eps, residual=residual, compute=compute)


@_window_attention.register_fake
def _(x: Tensor, tensors: Sequence[Tensor | None], *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], _rows(tensors[len(_TENSORS) :]))


def window_attention(
    x: Tensor,
    operands: PackedAttention,
    *,
    mask: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
    compute: torch.dtype = torch.float16,
) -> Tensor:
    """`window_attention.reference` as the operator ``harmoq::window_attention``."""
    y: Tensor = _window_attention(x, *flatten_attention(operands), mask, eps, residual, compute)
    return y


@torch.library.custom_op("harmoq::attention", mutates_args=())
def _attention_core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    mask: Tensor | None,
    compute: torch.dtype,
) -> Tensor:
    run = _attention.launch_attention if q.is_cuda else _attention.reference_attention
    return run(q, k, v, restore_attention(tensors, numbers), mask=mask, compute=compute)


@_attention_core.register_fake
def _(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2] * q.shape[3])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: PackedAttention,
    *,
    mask: Tensor | None = None,
    compute: torch.dtype = torch.float16,
) -> Tensor:
    """`window_attention.reference_attention` without projection, as the operator ``harmoq::attention``."""
    y: Tensor = _attention_core(q, k, v, *flatten_attention(operands), mask, compute)
    return y


def _rows(tensors: Sequence[Tensor | None]) -> int:
    codes = tensors[0]
    assert codes is not None
    return codes.shape[0]


__all__ = [
    "attention",
    "flatten_attention",
    "flatten_linear",
    "layernorm_quantize",
    "lowbit_linear",
    "mlp",
    "quantize",
    "quantize_tokens",
    "restore_attention",
    "restore_linear",
    "window_attention",
]
