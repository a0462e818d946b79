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
from harmoq_ao.triton_kernels import mlp as _mlp
from harmoq_ao.triton_kernels import window_attention as _window
from harmoq_ao.triton_kernels.attention_operands import PackedAttention
from harmoq_ao.triton_kernels.operands import PackedLinear

_TENSORS = ("codes", "start", "scale", "constant", "total", "reciprocal", "offset")
_NUMBERS = ("weight_bits", "columns", "mid_rise", "act_bits")
_LINEARS = ("qkv", "proj", "proj_heads")
_ATTENTION_TENSORS = ("score_scale", "bias", "factors", "bounds")
_ATTENTION_NUMBERS = (
    "heads", "head_dim", "padded", "cosine", "scale_after", "left_bits", "right_bits", "relative",
)  # fmt: skip
_FLAGS = ("mid_rise", "cosine", "scale_after", "relative")

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
    run = _window.launch_window_attention if x.is_cuda else _window.reference
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
    run = _attention.launch_attention if q.is_cuda else _attention.reference
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
    """`attention.reference` without projection, as the operator ``harmoq::attention``."""
    y: Tensor = _attention_core(q, k, v, *flatten_attention(operands), mask, compute)
    return y


__all__ = [
    "attention",
    "flatten_attention",
    "flatten_linear",
    "mlp",
    "restore_attention",
    "restore_linear",
    "window_attention",
]
