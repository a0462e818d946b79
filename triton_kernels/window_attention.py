"""Attention within windows in one kernel: qkv, attention and projection.

For each window and head, with the linears of `operands` and the attention of `attention`::

    q, k, v = quantized linear of [LayerNorm] x
    o = attention(q, k, v)
    y = quantized linear of o, all heads [+ residual]

One program takes a window of up to 64 tokens: q, k, v and the scores never leave the registers. Larger windows, up to
256 tokens, take three kernels: the qkv linear, `attention.attention_kernel`, which writes codes, and the projection.
Plain torch: `reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from harmoq_ao.common.errors import KernelError
from harmoq_ao.triton_kernels import attention, lowbit_linear
from harmoq_ao.triton_kernels.attention_device import Attention, attention_scores, value_codes, value_product
from harmoq_ao.triton_kernels.attention_operands import PackedAttention
from harmoq_ao.triton_kernels.device import (
    add_residual,
    contract,
    dequantize,
    load_rows,
    load_weight,
    quantize_columns,
    signed_codes,
    standardize,
    start_accumulator,
)
from harmoq_ao.triton_kernels.launch import FLOATS, MAX_CHANNELS, OPTIONS, check_matrix, power_of_two
from harmoq_ao.triton_kernels.operands import PackedLinear
from harmoq_ao.triton_kernels.quantize import launch_quantize

FUSED_TOKENS = 64
"""Largest window that one program holds."""


@triton.jit
def window_kernel(
    x_ptr: tl.tensor,
    weight1_ptr: tl.tensor,
    start1_ptr: tl.tensor,
    scale1_ptr: tl.tensor,
    constant1_ptr: tl.tensor,
    reciprocal1_ptr: tl.tensor,
    offset1_ptr: tl.tensor,
    score_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    weight2_ptr: tl.tensor,
    start2_ptr: tl.tensor,
    scale2_ptr: tl.tensor,
    constant2_ptr: tl.tensor,
    reciprocal2_ptr: tl.tensor,
    offset2_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    masks: int,
    eps: float,
    C: tl.constexpr,
    OUT: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROW_BYTES1: tl.constexpr,
    ROW_BYTES2: tl.constexpr,
    BITS1: tl.constexpr,
    BITS2: tl.constexpr,
    MID_RISE1: tl.constexpr,
    MID_RISE2: tl.constexpr,
    ACT_BITS1: tl.constexpr,
    ACT_BITS2: tl.constexpr,
    LEFT_BITS: tl.constexpr,
    RIGHT_BITS: tl.constexpr,
    RELATIVE: tl.constexpr,
    SCORES: tl.constexpr,
    NORM: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
) -> None:
    """One window, `[TOKENS, C]` to `[TOKENS, OUT]`; ``BLOCK_M >= TOKENS``."""
    window = tl.program_id(0)
    tokens, channels, outputs = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_O)
    rows = window.to(tl.int64) * TOKENS + tokens
    inside = (tokens < TOKENS)[:, None] & (channels < C)[None, :]
    x = load_rows(x_ptr, rows, C, channels, inside)
    if NORM:
        # The affine of the norm is part of the quantizer (`operands.with_norm`).
        x = standardize(x, inside, C, eps)
    # Rounded once for all heads and for q, k and v.
    left = quantize_columns(x, reciprocal1_ptr, offset1_ptr, channels, channels < C, ACT_BITS1)
    acc = start_accumulator(start2_ptr, outputs, outputs < OUT, BLOCK_M)
    for head in range(HEADS):
        # Rows of qkv are ordered [3, HEADS, PADDED].
        q = _head(
            left, weight1_ptr, start1_ptr, scale1_ptr, constant1_ptr, head * PADDED,
            PADDED, ROW_BYTES1, BITS1, MID_RISE1,
        )  # fmt: skip
        k = _head(
            left, weight1_ptr, start1_ptr, scale1_ptr, constant1_ptr, (HEADS + head) * PADDED,
            PADDED, ROW_BYTES1, BITS1, MID_RISE1,
        )  # fmt: skip
        v = _head(
            left, weight1_ptr, start1_ptr, scale1_ptr, constant1_ptr, (2 * HEADS + head) * PADDED,
            PADDED, ROW_BYTES1, BITS1, MID_RISE1,
        )  # fmt: skip
        o = _attend(
            q, k, v, tokens,
            Attention(
                score_scale_ptr, bias_ptr, mask_ptr, factors_ptr, bounds_ptr, head, window % masks,
                TOKENS, TOKENS, HEAD_DIM, LEFT_BITS, RIGHT_BITS, RELATIVE, SCORES, DTYPE,
            ),
        )  # fmt: skip
        # Each head adds its share to the projection: the heads' outputs are never side by side.
        acc = _project(
            o, acc, weight2_ptr, reciprocal2_ptr, offset2_ptr, head, outputs,
            OUT, ROW_BYTES2, BITS2, MID_RISE2, ACT_BITS2,
        )  # fmt: skip
    y = dequantize(acc, scale2_ptr, constant2_ptr, outputs, outputs < OUT)
    out_mask = (tokens < TOKENS)[:, None] & (outputs < OUT)[None, :]
    y = add_residual(y, residual_ptr, rows, OUT, outputs, out_mask)
    tl.store(out_ptr + rows[:, None] * OUT + outputs[None, :], y.to(out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def _head(
    left: tl.tensor,
    weight_ptr: tl.tensor,
    start_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    constant_ptr: tl.tensor,
    first: tl.tensor,
    PADDED: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    MID_RISE: tl.constexpr,
) -> tl.tensor:
    """q, k or v of a head, `[BLOCK_M, PADDED]` float32, from the signed codes of the window; padding channels are 0."""
    rows = first + tl.arange(0, PADDED)
    weight = load_weight(weight_ptr, rows, rows >= 0, 0, ROW_BYTES, left.shape[1], BITS, MID_RISE)
    # No row lies outside: the operands are padded to whole heads.
    acc = tl.zeros([left.shape[0], PADDED], tl.int32) + tl.load(start_ptr + rows)[None, :]
    acc = contract(left, weight, acc, BITS, MID_RISE)
    return acc.to(tl.float32) * tl.load(scale_ptr + rows)[None, :] + tl.load(constant_ptr + rows)[None, :]


@triton.jit
def _attend(q: tl.tensor, k: tl.tensor, v: tl.tensor, tokens: tl.tensor, a: Attention) -> tl.tensor:
    """``softmax(scores) v`` of a head and a whole window, all `[BLOCK_M, PADDED]` float32."""
    scores = attention_scores(q, k, tokens, tokens, a)
    # The window is whole, so the softmax needs no running maximum.
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    total = tl.sum(weights, 1)[:, None]
    if a.LEFT_BITS == 0:
        # Divided after the product: PADDED columns instead of TOKENS.
        o = tl.dot(weights.to(a.DTYPE), v.to(a.DTYPE), input_precision="ieee") / total
    else:
        if not a.RELATIVE:
            weights = weights / total
        left, right = value_codes(weights, v, tokens, a)
        acc = tl.dot(left, right, out_dtype=tl.int32)
        o = value_product(acc, tl.sum(left.to(tl.int32), 1), tl.sum(right.to(tl.int32), 0), a)
    return o


@triton.jit
def _project(
    o: tl.tensor,
    acc: tl.tensor,
    weight_ptr: tl.tensor,
    reciprocal_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    head: tl.tensor,
    outputs: tl.tensor,
    OUT: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    MID_RISE: tl.constexpr,
    ACT_BITS: tl.constexpr,
) -> tl.tensor:
    """``acc`` plus what a head adds to the projection; heads of 16 channels alternate with zeros."""
    # Qparams are spread like the codes will be, over 32 slots a head.
    slots = head * 32 + tl.arange(0, o.shape[1]) * (32 // o.shape[1])
    reciprocal, offset = tl.load(reciprocal_ptr + slots), tl.load(offset_ptr + slots)
    codes = signed_codes(o * reciprocal[None, :] + offset[None, :], ACT_BITS)
    if o.shape[1] == 16:
        # int8 contractions are at least 32 long; the weights' columns are spread alike (`PackedAttention.proj_heads`).
        codes = tl.interleave(codes, tl.zeros_like(codes))
    weight = load_weight(weight_ptr, outputs, outputs < OUT, head * 32, ROW_BYTES, 32, BITS, MID_RISE)
    return contract(codes, weight, acc, BITS, MID_RISE)


def launch_window_attention(
    x: Tensor,
    operands: PackedAttention,
    *,
    mask: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
    compute: torch.dtype = torch.float16,
) -> Tensor:
    """Run `window_kernel`, or the linear and `attention_kernel` for windows of more than 64 tokens.

    Arguments as in `reference`.

    Raises:
        KernelError: Operands that the kernels do not take.
    """
    qkv, proj = operands.qkv, operands.proj_heads
    if qkv is None or proj is None:
        raise KernelError("A whole attention needs qkv and projection", found="one of them", expected="both")
    _check_windows(x, qkv.columns, operands, mask)
    if x.shape[1] > FUSED_TOKENS or max(qkv.columns, proj.rows) > MAX_CHANNELS:
        return _launch_apart(x, operands, qkv, mask, eps, residual, compute)
    out = torch.empty(*x.shape[:2], proj.rows, dtype=x.dtype, device=x.device)
    _check_residual(residual, out)
    if out.numel() == 0:
        return out
    window_kernel[(len(x),)](
        x.contiguous(), *qkv.tensors, operands.score_scale, operands.bias, mask, operands.factors, operands.bounds,
        *proj.tensors, residual, out, 1 if mask is None else len(mask), eps or 0.0,
        C=qkv.columns, OUT=proj.rows, NORM=eps is not None, **qkv.constants("1"), **proj.constants("2"),
        **attention.constants(operands, x.shape[1], compute), **tile(qkv.columns, proj.rows),
        num_warps=operands.warps, num_stages=1, **OPTIONS,
    )  # fmt: skip
    return out


def _launch_apart(
    x: Tensor,
    operands: PackedAttention,
    qkv: PackedLinear,
    mask: Tensor | None,
    eps: float | None,
    residual: Tensor | None,
    compute: torch.dtype,
) -> Tensor:
    """The qkv linear, attention, projection; in mode "paper" q, k and v pass between them in float32."""
    rows = x.reshape(-1, x.shape[-1])
    if eps is not None:
        assert qkv.reciprocal is not None
        assert qkv.offset is not None
        rows = launch_quantize(rows, qkv.reciprocal, qkv.offset, qkv.act_bits, eps=eps)
    # Codes of q, k and v must be those of the unrounded values.
    between = torch.float32 if operands.left_bits else compute
    y = lowbit_linear.launch_lowbit_linear(rows, qkv, out_dtype=between)
    q, k, v = _split_heads(y, x, operands)
    return attention.launch_attention(
        q, k, v, operands, mask=mask, residual=residual, out_dtype=x.dtype, compute=compute
    )


def _split_heads(y: Tensor, x: Tensor, operands: PackedAttention) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each `[windows, N, heads, D]`, from the output of the padded qkv linear."""
    q, k, v = y.view(*x.shape[:2], 3, operands.heads, operands.padded)[..., : operands.head_dim].unbind(2)
    return q, k, v


def tile(channels: int, outputs: int) -> dict[str, int]:
    """Block sizes of `window_kernel`: a whole window, all channels, all outputs."""
    return {
        "BLOCK_M": FUSED_TOKENS,
        "BLOCK_C": power_of_two(channels, 32),
        "BLOCK_O": power_of_two(outputs, 16),
    }


def _check_windows(x: Tensor, channels: int, operands: PackedAttention, mask: Tensor | None) -> None:
    if x.dim() != 3:
        raise KernelError("The windows do not fit", found=tuple(x.shape), expected=f"[windows, tokens, {channels}]")
    check_matrix(x[0] if len(x) else x.reshape(-1, x.shape[-1]), channels, "The activation", FLOATS)
    attention.check_scores(x.shape[0], x.shape[1], x.shape[1], operands, mask)


def _check_residual(residual: Tensor | None, out: Tensor) -> None:
    if residual is not None and (residual.shape != out.shape or not residual.is_contiguous()):
        raise KernelError(
            "The residual does not fit", found=tuple(residual.shape), expected=f"{tuple(out.shape)}, contiguous"
        )


def reference(
    x: Tensor,
    operands: PackedAttention,
    *,
    mask: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
    compute: torch.dtype = torch.float16,
) -> Tensor:
    """Window attention with qkv and projection.

    Args:
        x: `[windows, N, C]` float32, float16 or bfloat16; N at most 256.
        operands: From `attention_operands.pack_attention`.
        mask: `[nW, N, N]` added to the scores, the windows of an image in order; ``windows`` is a multiple of nW.
        eps: Of a LayerNorm in front, whose affine is folded into qkv's quantizer (`operands.with_norm`); or None.
        residual: `[windows, N, O]` floats added last, or None.
        compute: As in `attention.reference`.

    Returns:
        `[windows, N, O]` in the type of ``x``.
    """
    assert operands.qkv is not None
    y = lowbit_linear.reference_behind_norm(x.reshape(-1, x.shape[-1]), operands.qkv, eps)
    q, k, v = _split_heads(y, x, operands)
    return attention.reference(q, k, v, operands, mask=mask, residual=residual, out_dtype=x.dtype)


__all__ = ["FUSED_TOKENS", "launch_window_attention", "reference", "tile", "window_kernel"]
