"""Attention within windows in one kernel: qkv, attention and projection.

For each window and head, with the linears of `operands` and the attention of `attention`::

    q, k, v = quantized linear of [LayerNorm] x
    o = attention(q, k, v)
    y = quantized linear of o, all heads, [LayerNorm] [+ residual]

One program takes a window of up to 64 tokens: q, k, v and the scores never leave the registers. Its tokens are rows of
an image by an index, so that partition, shift and their reverses move nothing. Larger windows, up to 256 tokens, more
than 128 channels and heads of more than 32 take three kernels: the qkv linear, `attention.attention_kernel`, which
writes codes, and the projection. Plain torch: `reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from harmoq_ao.common.errors import KernelError
from harmoq_ao.triton_kernels import attention, lowbit_linear
from harmoq_ao.triton_kernels.attention_device import (
    Attention,
    Regions,
    attend,
    differ,
    load_regions,
    query_operand,
)
from harmoq_ao.triton_kernels.attention_operands import PackedAttention
from harmoq_ao.triton_kernels.device import (
    Linear,
    Norm,
    add_row_sums,
    contract,
    dequantize,
    load_rows,
    no_sums,
    quantize_columns,
    standardize,
    start_accumulator,
    store_rows,
    window_rows,
)
from harmoq_ao.triton_kernels.launch import FLOATS, OPTIONS, check_matrix, on_device, power_of_two
from harmoq_ao.triton_kernels.operands import Norm as PackedNorm
from harmoq_ao.triton_kernels.operands import check_norm

FUSED_TOKENS = 64
"""Largest window that one program holds."""

FUSED_CHANNELS = 128
"""Most channels in and out of one."""


@triton.jit
def window_kernel(
    x_ptr: tl.tensor,
    index_ptr: tl.tensor,
    regions_ptr: tl.tensor,
    weight1_ptr: tl.tensor,
    start1_ptr: tl.tensor,
    scale1_ptr: tl.tensor,
    constant1_ptr: tl.tensor,
    reciprocal1_ptr: tl.tensor,
    offset1_ptr: tl.tensor,
    score_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    weight2_ptr: tl.tensor,
    start2_ptr: tl.tensor,
    scale2_ptr: tl.tensor,
    constant2_ptr: tl.tensor,
    reciprocal2_ptr: tl.tensor,
    offset2_ptr: tl.tensor,
    after_weight_ptr: tl.tensor,
    after_bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    windows: int,
    length: int,
    eps: float,
    after_eps: float,
    C: tl.constexpr,
    OUT: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROW1: tl.constexpr,
    ROW2: tl.constexpr,
    DOUBLED1: tl.constexpr,
    DOUBLED2: tl.constexpr,
    ACT_BITS1: tl.constexpr,
    ACT_BITS2: tl.constexpr,
    LEFT_BITS: tl.constexpr,
    RIGHT_BITS: tl.constexpr,
    RELATIVE: tl.constexpr,
    SCORES: tl.constexpr,
    APART: tl.constexpr,
    NORM: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
) -> None:
    """One window, `[TOKENS, C]` to `[TOKENS, OUT]`; ``BLOCK_M >= TOKENS``."""
    window = tl.program_id(0)
    tokens, channels, outputs = tl.arange(0, BLOCK_M), tl.arange(0, ROW1), tl.arange(0, BLOCK_O)
    rows = window_rows(index_ptr, window, windows, length, tokens, TOKENS)
    mask = (tokens < TOKENS)[:, None] & (channels < C)[None, :]
    x = load_rows(x_ptr, rows, C, channels, mask)
    if NORM:
        # The affine of the norm is part of the quantizer (`operands.with_norm`).
        x = standardize(x, mask, C, eps)
    ids = load_regions(regions_ptr, window, windows, tokens, TOKENS)
    y = _window(
        x, Regions(ids, ids, differ(ids, ids), regions_ptr is not None),
        Linear(
            weight1_ptr, start1_ptr, scale1_ptr, constant1_ptr, reciprocal1_ptr, offset1_ptr,
            ROW1, DOUBLED1, ACT_BITS1,
        ),
        Attention(
            score_scale_ptr, bias_ptr, factors_ptr, bounds_ptr,
            TOKENS, TOKENS, HEAD_DIM, LEFT_BITS, RIGHT_BITS, RELATIVE, SCORES, APART, DTYPE,
        ),
        Linear(
            weight2_ptr, start2_ptr, scale2_ptr, constant2_ptr, reciprocal2_ptr, offset2_ptr,
            ROW2, DOUBLED2, ACT_BITS2,
        ),
        C, OUT, HEADS, PADDED, NORM, BLOCK_O,
    )  # fmt: skip
    out_mask = (tokens < TOKENS)[:, None] & (outputs < OUT)[None, :]
    store_rows(
        y, Norm(after_weight_ptr, after_bias_ptr, after_eps), residual_ptr, out_ptr, rows, outputs, out_mask, OUT
    )


@triton.jit
def _window(
    x: tl.tensor,
    regions: Regions,
    qkv: Linear,
    a: Attention,
    proj: Linear,
    C: tl.constexpr,
    OUT: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_O: tl.constexpr,
) -> tl.tensor:
    """Attention of a window with qkv and projection, `[BLOCK_M, BLOCK_O]` float32."""
    tokens, channels, outputs = tl.arange(0, x.shape[0]), tl.arange(0, x.shape[1]), tl.arange(0, BLOCK_O)
    # Rounded once for all heads and for q, k and v.
    left = quantize_columns(x, qkv, channels, channels < C, not NORM)
    sums1, sums2 = add_row_sums(left, no_sums(x.shape[0]), qkv), no_sums(x.shape[0])
    acc = start_accumulator(proj, outputs, outputs < OUT, x.shape[0])
    for head in range(HEADS):
        # Rows of qkv are ordered [3, HEADS, PADDED].
        q = query_operand(_head(left, sums1, qkv, head, PADDED), head, a)
        k = _head(left, sums1, qkv, HEADS + head, PADDED)
        v = _head(left, sums1, qkv, 2 * HEADS + head, PADDED)
        codes = _head_codes(attend(q, k, v, head, tokens, tokens, regions, a), proj, head)
        # Each head adds its share to the projection: the heads' outputs are never side by side.
        acc = contract(codes, proj, outputs, outputs < OUT, head * 32, acc)
        sums2 = add_row_sums(codes, sums2, proj)
    return dequantize(acc, sums2, proj, outputs, outputs < OUT)


@triton.jit
def _head(left: tl.tensor, sums: tl.tensor, qkv: Linear, head: tl.tensor, PADDED: tl.constexpr) -> tl.tensor:
    """q, k or v of a head, `[BLOCK_M, PADDED]` float32, from the codes of the window; padding channels are 0."""
    rows = head * PADDED + tl.arange(0, PADDED)
    # No row lies outside: the operands are padded to whole heads.
    inside = rows >= 0
    acc = contract(left, qkv, rows, inside, 0, start_accumulator(qkv, rows, inside, left.shape[0]))
    return dequantize(acc, sums, qkv, rows, inside)


@triton.jit
def _head_codes(o: tl.tensor, proj: Linear, head: tl.tensor) -> tl.tensor:
    """Signed codes of a head's output, `[BLOCK_M, 32]` int8; heads of 16 channels alternate with zeros."""
    # Qparams are spread like the codes will be, over 32 slots a head.
    slots = head * 32 + tl.arange(0, o.shape[1]) * (32 // o.shape[1])
    codes = quantize_columns(o, proj, slots, slots >= 0, False)
    if o.shape[1] == 16:
        # int8 contractions are at least 32 long; the weights' columns are spread alike (`PackedAttention.proj_heads`).
        codes = tl.interleave(codes, tl.zeros_like(codes))
    return codes


def launch_window_attention(
    x: Tensor,
    operands: PackedAttention,
    *,
    index: Tensor | None = None,
    regions: Tensor | None = None,
    eps: float | None = None,
    after: PackedNorm | None = None,
    residual: Tensor | None = None,
    compute: torch.dtype | None = None,
) -> Tensor:
    """Run `window_kernel`, or the linear and `attention_kernel` for larger windows and more channels.

    Arguments as in `reference`.

    Raises:
        KernelError: Operands that the kernels do not take.
    """
    if operands.qkv is None or operands.proj is None:
        raise KernelError("A whole attention needs qkv and projection", found="one of them", expected="both")
    windows, tokens = _check_windows(x, operands.qkv.columns, operands, index, regions)
    out = torch.empty(*x.shape[:2], operands.proj.rows, dtype=x.dtype, device=x.device)
    _check_residual(residual, out)
    # They are packed where heads are narrow enough.
    qkv, proj = operands.qkv_heads, operands.proj_heads
    large = tokens > FUSED_TOKENS or max(operands.qkv.columns, operands.proj.rows) > FUSED_CHANNELS
    if large or qkv is None or proj is None:
        return _launch_apart(x, operands, index, regions, eps, after, residual, compute)
    if out.numel() == 0:
        return out
    with on_device(x):
        window_kernel[(windows,)](
            x.contiguous(), index, regions, *qkv.tensors, operands.score_scale, operands.bias, operands.factors,
            operands.bounds, *proj.tensors, *check_norm(after, proj.rows), residual, out,
            attention.windows_of_image(index, regions), x.shape[1], eps or 0.0, 0.0 if after is None else after.eps,
            C=qkv.columns, OUT=proj.rows, NORM=eps is not None, **qkv.constants("1"), **proj.constants("2"),
            **attention.constants(operands, tokens, compute or attention.compute_type(x.dtype)), **tile(proj.rows),
            num_warps=4, num_stages=1, **OPTIONS,
        )  # fmt: skip
    return out


def _launch_apart(
    x: Tensor,
    operands: PackedAttention,
    index: Tensor | None,
    regions: Tensor | None,
    eps: float | None,
    after: PackedNorm | None,
    residual: Tensor | None,
    compute: torch.dtype | None,
) -> Tensor:
    """The qkv linear, attention, projection; in mode "paper" q, k and v pass between them in float32."""
    assert operands.qkv is not None
    # Codes of q, k and v must be those of the unrounded values.
    compute = compute or attention.compute_type(x.dtype)
    between = torch.float32 if operands.left_bits else compute
    rows = x.reshape(-1, x.shape[-1])
    q, k, v = _split_heads(
        lowbit_linear.launch_lowbit_linear(rows, operands.qkv, eps=eps, out_dtype=between), x, operands
    )
    return attention.launch_attention(
        q, k, v, operands,
        index=index, regions=regions, after=after, residual=residual, out_dtype=x.dtype, compute=compute,
    )  # fmt: skip


def _split_heads(y: Tensor, x: Tensor, operands: PackedAttention) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each `[windows or images, N or L, heads, D]`, from the output of the qkv linear."""
    q, k, v = y.view(*x.shape[:2], 3, operands.heads, operands.head_dim).unbind(2)
    return q, k, v


def tile(outputs: int) -> dict[str, int]:
    """Block sizes of `window_kernel`: a whole window, all outputs."""
    return {"BLOCK_M": FUSED_TOKENS, "BLOCK_O": power_of_two(outputs, 16)}


def _check_windows(
    x: Tensor, channels: int, operands: PackedAttention, index: Tensor | None, regions: Tensor | None
) -> tuple[int, int]:
    """Windows of all images, and tokens of each."""
    if x.dim() != 3:
        raise KernelError("The windows do not fit", found=tuple(x.shape), expected=f"[windows, tokens, {channels}]")
    check_matrix(x[0] if len(x) else x.reshape(-1, x.shape[-1]), channels, "The activation", FLOATS)
    windows, tokens = len(x), x.shape[1]
    if index is not None:
        attention.check_table(index, len(index), index.shape[-1], "index", torch.int32)
        windows, tokens = len(x) * len(index), index.shape[1]
        if index.numel() != x.shape[1]:
            raise KernelError(
                "The windows do not cover the image", found=index.numel(), expected=f"{x.shape[1]} tokens"
            )
    attention.check_scores(windows, tokens, tokens, operands, regions, regions)
    return windows, tokens


def _check_residual(residual: Tensor | None, out: Tensor) -> None:
    if residual is not None and (residual.shape != out.shape or not residual.is_contiguous()):
        raise KernelError(
            "The residual does not fit", found=tuple(residual.shape), expected=f"{tuple(out.shape)}, contiguous"
        )


def reference(
    x: Tensor,
    operands: PackedAttention,
    *,
    index: Tensor | None = None,
    regions: Tensor | None = None,
    eps: float | None = None,
    after: PackedNorm | None = None,
    residual: Tensor | None = None,
    compute: torch.dtype | None = None,
) -> Tensor:
    """Window attention with qkv and projection.

    Args:
        x: `[windows, N, C]` float32, float16 or bfloat16, N at most 256; `[images, L, C]` with an index.
        operands: From `attention_operands.pack_attention`.
        index: `[nW, N]` int32, rows of the tokens of each window of an image, each row once; None if ``x`` is windows.
        regions: `[nW, N]` uint8 ids of the tokens' regions, the windows of an image in order: ``operands.apart``
            is added to scores between regions. Or None.
        eps: Of a LayerNorm in front, whose affine is folded into qkv (`attention_operands.with_norm`); or None.
        after: A LayerNorm behind the projection, or None.
        residual: Floats of the shape of the result added last, or None.
        compute: As in `attention.reference`.

    Returns:
        `[windows, N, O]` or `[images, L, O]` in the type of ``x``.
    """
    assert operands.qkv is not None
    y = lowbit_linear.reference(x.reshape(-1, x.shape[-1]), operands.qkv, eps=eps)
    q, k, v = _split_heads(y, x, operands)
    return attention.reference(
        q, k, v, operands, index=index, regions=regions, after=after, residual=residual, out_dtype=x.dtype
    )


__all__ = ["FUSED_CHANNELS", "FUSED_TOKENS", "launch_window_attention", "reference", "tile", "window_kernel"]
