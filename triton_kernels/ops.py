"""Fused kernels as torch operators ``harmoq::...``: Triton on GPUs, their plain torch references on CPUs.

Traced graphs (`torch.compile`, `torch.export`) hold one opaque call each. Operators take tensors and numbers only; the
functions named like the kernels take operands' dataclasses and spread them out. All outputs are contiguous. Arguments
are checked by the launchers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from harmoq_ao.triton_kernels import attention as _attention
from harmoq_ao.triton_kernels import lowbit_linear as _linear
from harmoq_ao.triton_kernels import mlp as _mlp
from harmoq_ao.triton_kernels import window_attention as _window
from harmoq_ao.triton_kernels.attention_operands import PackedAttention
from harmoq_ao.triton_kernels.operands import Norm, PackedLinear

_TENSORS = ("codes", "start", "scale", "constant", "total", "reciprocal", "offset")
_NUMBERS = ("columns", "doubled", "mid_rise", "act_bits")
_LINEARS = ("qkv", "qkv_heads", "proj", "proj_heads")
_ATTENTION_TENSORS = ("score_scale", "bias", "factors", "bounds")
_ATTENTION_NUMBERS = (
    "heads", "head_dim", "padded", "cosine", "scale_after", "left_bits", "right_bits", "relative", "apart",
)  # fmt: skip
_FLAGS = ("doubled", "mid_rise", "cosine", "scale_after", "relative")

Flat = tuple[list[Tensor | None], list[int]]


# --- operands as flat lists -------------------------------------------------------------------------------------------


def flatten_linear(linear: PackedLinear | None) -> Flat:
    """Tensors and numbers of a linear, in the order that the operators take; all None and 0 for a missing one."""
    if linear is None:
        return [None] * len(_TENSORS), [0] * len(_NUMBERS)
    return [getattr(linear, name) for name in _TENSORS], [int(getattr(linear, name)) for name in _NUMBERS]


def restore_linear(tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> PackedLinear:
    """Inverse of `flatten_linear` for a linear that is there."""
    return PackedLinear(**_named(_TENSORS, tensors), **_named(_NUMBERS, numbers))


def flatten_attention(attention: PackedAttention) -> Flat:
    """Tensors and numbers of an attention and its linears, in the order that the operators take."""
    tensors: list[Tensor | None] = []
    numbers: list[int] = []
    for name in _LINEARS:
        linear_tensors, linear_numbers = flatten_linear(getattr(attention, name))
        tensors += linear_tensors
        numbers += linear_numbers
    tensors += [getattr(attention, name) for name in _ATTENTION_TENSORS]
    numbers += [int(getattr(attention, name)) for name in _ATTENTION_NUMBERS]
    return tensors, numbers


def restore_attention(tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> PackedAttention:
    """Inverse of `flatten_attention`."""
    linears: dict[str, Any] = {}
    for name in _LINEARS:
        here, tensors = tensors[: len(_TENSORS)], tensors[len(_TENSORS) :]
        counts, numbers = numbers[: len(_NUMBERS)], numbers[len(_NUMBERS) :]
        linears[name] = None if here[0] is None else restore_linear(here, counts)
    return PackedAttention(**linears, **_named(_ATTENTION_TENSORS, tensors), **_named(_ATTENTION_NUMBERS, numbers))


def _named(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """Values by field; flags as bools, because a constexpr 1 would compile the kernel anew beside True."""
    return {name: bool(v) if name in _FLAGS else v for name, v in zip(names, values, strict=True)}


def _rows(tensors: Sequence[Tensor | None]) -> int:
    """Output channels of the first linear in a flat list."""
    codes = tensors[0]
    assert codes is not None
    return codes.shape[0]


def flatten_norm(norm: Norm | None) -> tuple[Tensor | None, Tensor | None, float]:
    """Weight, bias and eps of a LayerNorm behind an operation, or None for each tensor."""
    return (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)


def restore_norm(weight: Tensor | None, bias: Tensor | None, eps: float) -> Norm | None:
    """Inverse of `flatten_norm`."""
    return None if weight is None or bias is None else Norm(weight, bias, eps)


# --- linear and mlp ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("harmoq::fused_linear", mutates_args=())
def _fused_linear(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    gate: Tensor | None,
    eps: float | None,
    gelu: str,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    run = _linear.launch_lowbit_linear if x.is_cuda else _linear.reference
    operands = restore_linear(tensors, numbers)
    return run(x, operands, gate=gate, eps=eps, gelu=gelu, residual=residual, out_dtype=out_dtype)


@_fused_linear.register_fake
def _(x: Tensor, tensors: Sequence[Tensor | None], *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], _rows(tensors), dtype=rest[-1])


def linear(
    x: Tensor,
    operands: PackedLinear,
    *,
    gate: Tensor | None = None,
    eps: float | None = None,
    gelu: str = "none",
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`lowbit_linear.reference` as the operator ``harmoq::fused_linear``; the type of ``x`` by default."""
    flat = flatten_linear(operands)
    y: Tensor = _fused_linear(x, *flat, gate, eps, gelu, residual, out_dtype or x.dtype)
    return y


@torch.library.custom_op("harmoq::mlp", mutates_args=())
def _fused_mlp(
    x: Tensor,
    tensors1: Sequence[Tensor | None],
    numbers1: Sequence[int],
    tensors2: Sequence[Tensor | None],
    numbers2: Sequence[int],
    gelu: str,
    eps: float | None,
    after_weight: Tensor | None,
    after_bias: Tensor | None,
    after_eps: float,
    residual: Tensor | None,
) -> Tensor:
    fc1, fc2 = restore_linear(tensors1, numbers1), restore_linear(tensors2, numbers2)
    run = _mlp.launch_mlp if x.is_cuda else _mlp.reference
    after = restore_norm(after_weight, after_bias, after_eps)
    return run(x, fc1, fc2, gelu=gelu, eps=eps, after=after, residual=residual)


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
    after: Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`mlp.reference` as the operator ``harmoq::mlp``."""
    linears = *flatten_linear(fc1), *flatten_linear(fc2)
    y: Tensor = _fused_mlp(x, *linears, gelu, eps, *flatten_norm(after), residual)
    return y


# --- attention --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("harmoq::window_attention", mutates_args=())
def _window_attention(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    index: Tensor | None,
    regions: Tensor | None,
    eps: float | None,
    after_weight: Tensor | None,
    after_bias: Tensor | None,
    after_eps: float,
    residual: Tensor | None,
    compute: torch.dtype | None,
) -> Tensor:
    run = _window.launch_window_attention if x.is_cuda else _window.reference
    operands, after = restore_attention(tensors, numbers), restore_norm(after_weight, after_bias, after_eps)
    return run(x, operands, index=index, regions=regions, eps=eps, after=after, residual=residual, compute=compute)


@_window_attention.register_fake
def _(x: Tensor, tensors: Sequence[Tensor | None], *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], _rows(tensors[_LINEARS.index("proj") * len(_TENSORS) :]))


def window_attention(
    x: Tensor,
    operands: PackedAttention,
    *,
    index: Tensor | None = None,
    regions: Tensor | None = None,
    eps: float | None = None,
    after: Norm | None = None,
    residual: Tensor | None = None,
    compute: torch.dtype | None = None,
) -> Tensor:
    """`window_attention.reference` as the operator ``harmoq::window_attention``."""
    flat = flatten_attention(operands)
    y: Tensor = _window_attention(x, *flat, index, regions, eps, *flatten_norm(after), residual, compute)
    return y


@torch.library.custom_op("harmoq::attention", mutates_args=())
def _attention_core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    index: Tensor | None,
    key_index: Tensor | None,
    regions: Tensor | None,
    key_regions: Tensor | None,
    compute: torch.dtype | None,
) -> Tensor:
    run = _attention.launch_attention if q.is_cuda else _attention.reference
    return run(
        q, k, v, restore_attention(tensors, numbers),
        index=index, key_index=key_index, regions=regions, key_regions=key_regions, compute=compute,
    )  # fmt: skip


@_attention_core.register_fake
def _(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2] * q.shape[3])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: PackedAttention,
    *,
    index: Tensor | None = None,
    key_index: Tensor | None = None,
    regions: Tensor | None = None,
    key_regions: Tensor | None = None,
    compute: torch.dtype | None = None,
) -> Tensor:
    """`attention.reference` without projection, as the operator ``harmoq::attention``."""
    flat = flatten_attention(operands)
    y: Tensor = _attention_core(q, k, v, *flat, index, key_index, regions, key_regions, compute)
    return y


__all__ = [
    "attention",
    "flatten_attention",
    "flatten_linear",
    "linear",
    "mlp",
    "restore_attention",
    "restore_linear",
    "window_attention",
]
