"""Attention within windows: qkv, scores, bias, mask, softmax, values and projection.

For each window and head, with the linears of `operands`::

    q, k, v = quantized linear of [LayerNorm] x            "cosine": q, k divided by their lengths
    S = scale q k^T + bias + mask                          P = softmax(S)
    o = P v                                                y = quantized linear of o, all heads [+ residual]

Mode "deploy" keeps q, k, v and P in 16-bit floats with float32 sums. Mode "paper" quantizes them with static bounds:
integer contractions with the accumulators and the epilogue of `reference.matmul_epilogue`. There it matters whether the
queries are scaled before they are rounded ("scaled") or the scores after ("products", "cosine"). Relative maps
(`harmoq_ao/modules/relative_maps.py`) round ``exp(S - max S)`` and divide by the sum of what it was rounded to.

Windows of up to 64 tokens go through one kernel, one program a window. Larger ones, up to 256 tokens, take three: the
qkv linear, attention with one program for each head and 64 queries, which writes codes, and the projection.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from harmoq_ao.common.errors import KernelError
from harmoq_ao.quant import integer_reference as integers
from harmoq_ao.quant.relative_maps import relative_rows, renormalized, row_sums
from harmoq_ao.triton_kernels import lowbit_linear, tuning
from harmoq_ao.triton_kernels.attention_operands import MAX_KEYS, MAX_TOKENS, PackedAttention
from harmoq_ao.triton_kernels.device import contract, load_weight, signed_codes, standardize, unsigned_codes
from harmoq_ao.triton_kernels.launch import OPTIONS, blocks, check_matrix, power_of_two
from harmoq_ao.triton_kernels.mlp import MAX_CHANNELS, first_linear
from harmoq_ao.triton_kernels.operands import PackedLinear
from harmoq_ao.triton_kernels.quantize import launch_quantize

FUSED_TOKENS = 64
COMPUTE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
LOG2E = tl.constexpr(1.4426950408889634)


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
    x = tl.load(x_ptr + rows[:, None] * C + channels[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        x = standardize(x, inside, C, eps)
    reciprocal = tl.load(reciprocal1_ptr + channels, mask=channels < C, other=0.0)
    offset = tl.load(offset1_ptr + channels, mask=channels < C, other=1 << (ACT_BITS1 - 1))
    left = signed_codes(x * reciprocal[None, :] + offset[None, :], ACT_BITS1)
    acc = tl.zeros([BLOCK_M, BLOCK_O], tl.int32)
    acc += tl.load(start2_ptr + outputs, mask=outputs < OUT, other=0)[None, :]
    for head in range(HEADS):
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
            q, k, v, score_scale_ptr, bias_ptr, mask_ptr, factors_ptr, bounds_ptr, head, window % masks, tokens,
            TOKENS, HEAD_DIM, LEFT_BITS, RIGHT_BITS, RELATIVE, SCORES, DTYPE,
        )  # fmt: skip
        acc = _project(
            o, acc, weight2_ptr, reciprocal2_ptr, offset2_ptr, head, outputs,
            OUT, ROW_BYTES2, BITS2, MID_RISE2, ACT_BITS2,
        )  # fmt: skip
    _store(acc, scale2_ptr, constant2_ptr, residual_ptr, out_ptr, rows, tokens < TOKENS, outputs, OUT)


@triton.jit
def attention_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    score_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    reciprocal_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    out_ptr: tl.tensor,
    window_stride: int,
    token_stride: int,
    head_stride: int,
    key_window_stride: int,
    key_token_stride: int,
    key_head_stride: int,
    masks: int,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    LEFT_BITS: tl.constexpr,
    RIGHT_BITS: tl.constexpr,
    RELATIVE: tl.constexpr,
    SCORES: tl.constexpr,
    DTYPE: tl.constexpr,
    OUT_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """``BLOCK_M`` queries of a window and head.

    q is `[windows, TOKENS, HEADS, HEAD_DIM]`, k and v are `[windows, KEYS, HEADS, HEAD_DIM]` of equal strides.

    The output is `[windows, TOKENS, HEADS * HEAD_DIM]`: floats, or codes of ``OUT_BITS`` for the projection.
    """
    window, head = tl.program_id(0).to(tl.int64), tl.program_id(2)
    tokens, lanes = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, PADDED)
    mask = (tokens < TOKENS)[:, None] & (lanes < HEAD_DIM)[None, :]
    base = window * key_window_stride + head * key_head_stride
    at = window * window_stride + head * head_stride + tokens[:, None] * token_stride + lanes[None, :]
    q = tl.load(q_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if LEFT_BITS == 0:
        o = _attend_online(
            q, k_ptr + base, v_ptr + base, key_token_stride, score_scale_ptr, bias_ptr, mask_ptr,
            head, window % masks, tokens, TOKENS, KEYS, HEAD_DIM, SCORES, DTYPE, BLOCK_N,
        )  # fmt: skip
    else:
        o = _attend_twice(
            q, k_ptr + base, v_ptr + base, key_token_stride, score_scale_ptr, bias_ptr, mask_ptr, factors_ptr,
            bounds_ptr, head, window % masks, tokens, TOKENS, KEYS, HEAD_DIM, LEFT_BITS, RIGHT_BITS, RELATIVE, SCORES,
            DTYPE, BLOCK_N,
        )  # fmt: skip
    channels = head * HEAD_DIM + lanes
    out_at = out_ptr + (window * TOKENS + tokens)[:, None] * (HEADS * HEAD_DIM) + channels[None, :]
    if OUT_BITS == 0:
        tl.store(out_at, o.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        reciprocal = tl.load(reciprocal_ptr + channels, mask=lanes < HEAD_DIM, other=0.0)
        offset = tl.load(offset_ptr + channels, mask=lanes < HEAD_DIM, other=0.0)
        tl.store(out_at, unsigned_codes(o * reciprocal[None, :] + offset[None, :], OUT_BITS), mask=mask)


@triton.jit
def _attend_online(
    q: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    token_stride: int,
    score_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    head: tl.tensor,
    mask_index: tl.tensor,
    tokens: tl.tensor,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCORES: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Attention over blocks of keys with a running maximum and total; `[queries, PADDED]` float32."""
    top = tl.full([q.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    acc = tl.zeros(q.shape, tl.float32)
    for first in range(0, KEYS, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        scores = _scores(
            q, _rows(k_ptr, keys, token_stride, KEYS, HEAD_DIM, q.shape[1]), score_scale_ptr, bias_ptr, mask_ptr,
            None, None, head, mask_index, tokens, keys, TOKENS, KEYS, HEAD_DIM, 0, 0, SCORES, DTYPE,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        v = _rows(v_ptr, keys, token_stride, KEYS, HEAD_DIM, q.shape[1])
        acc = tl.dot(weights.to(DTYPE), v.to(DTYPE), acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc / total[:, None]


@triton.jit
def _attend_twice(
    q: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    token_stride: int,
    score_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    head: tl.tensor,
    mask_index: tl.tensor,
    tokens: tl.tensor,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LEFT_BITS: tl.constexpr,
    RIGHT_BITS: tl.constexpr,
    RELATIVE: tl.constexpr,
    SCORES: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Attention with quantized probabilities: they must be final before rounding, so the scores are computed twice."""
    top = tl.full([q.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    for first in range(0, KEYS, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        scores = _scores(
            q, _rows(k_ptr, keys, token_stride, KEYS, HEAD_DIM, q.shape[1]), score_scale_ptr, bias_ptr, mask_ptr,
            factors_ptr, bounds_ptr, head, mask_index, tokens, keys, TOKENS, KEYS, HEAD_DIM, LEFT_BITS, RIGHT_BITS,
            SCORES, DTYPE,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(scores, 1))
        if not RELATIVE:
            total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(scores - new_top[:, None]), 1)
        top = new_top
    acc, rows, columns = tl.zeros(q.shape, tl.int32), tl.zeros([q.shape[0]], tl.int32), tl.zeros([q.shape[1]], tl.int32)
    for first in range(0, KEYS, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        scores = _scores(
            q, _rows(k_ptr, keys, token_stride, KEYS, HEAD_DIM, q.shape[1]), score_scale_ptr, bias_ptr, mask_ptr,
            factors_ptr, bounds_ptr, head, mask_index, tokens, keys, TOKENS, KEYS, HEAD_DIM, LEFT_BITS, RIGHT_BITS,
            SCORES, DTYPE,
        )  # fmt: skip
        weights = tl.exp2(scores - top[:, None])
        if not RELATIVE:
            weights = weights / total[:, None]
        v = _rows(v_ptr, keys, token_stride, KEYS, HEAD_DIM, q.shape[1])
        left, right = _value_codes(weights, v, bounds_ptr, keys, KEYS, LEFT_BITS, RIGHT_BITS)
        acc = tl.dot(left, right, acc, out_dtype=tl.int32)
        rows += tl.sum(left.to(tl.int32), 1)
        columns += tl.sum(right.to(tl.int32), 0)
    return _value_product(acc, rows, columns, bounds_ptr, KEYS, LEFT_BITS, RIGHT_BITS, RELATIVE)


@triton.jit
def _rows(
    ptr: tl.tensor,
    keys: tl.tensor,
    token_stride: int,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
) -> tl.tensor:
    """Rows ``keys`` of a head, `[keys, PADDED]` float32, zeros around it."""
    lanes = tl.arange(0, PADDED)
    mask = (keys < KEYS)[:, None] & (lanes < HEAD_DIM)[None, :]
    return tl.load(ptr + keys[:, None] * token_stride + lanes[None, :], mask=mask, other=0.0).to(tl.float32)


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
    acc = tl.zeros([left.shape[0], PADDED], tl.int32) + tl.load(start_ptr + rows)[None, :]
    acc = contract(left, weight, acc, BITS, MID_RISE)
    return acc.to(tl.float32) * tl.load(scale_ptr + rows)[None, :] + tl.load(constant_ptr + rows)[None, :]


@triton.jit
def _attend(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    score_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    head: tl.tensor,
    mask_index: tl.tensor,
    tokens: tl.tensor,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LEFT_BITS: tl.constexpr,
    RIGHT_BITS: tl.constexpr,
    RELATIVE: tl.constexpr,
    SCORES: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """``softmax(scores) v`` of a head and a whole window, all `[BLOCK_M, PADDED]` float32."""
    scores = _scores(
        q, k, score_scale_ptr, bias_ptr, mask_ptr, factors_ptr, bounds_ptr, head, mask_index, tokens, tokens,
        TOKENS, TOKENS, HEAD_DIM, LEFT_BITS, RIGHT_BITS, SCORES, DTYPE,
    )  # fmt: skip
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    total = tl.sum(weights, 1)[:, None]
    if LEFT_BITS == 0:
        o = tl.dot(weights.to(DTYPE), v.to(DTYPE), input_precision="ieee") / total
    else:
        if not RELATIVE:
            weights = weights / total
        left, right = _value_codes(weights, v, bounds_ptr, tokens, TOKENS, LEFT_BITS, RIGHT_BITS)
        o = _value_product(
            tl.dot(left, right, out_dtype=tl.int32), tl.sum(left.to(tl.int32), 1), tl.sum(right.to(tl.int32), 0),
            bounds_ptr, TOKENS, LEFT_BITS, RIGHT_BITS, RELATIVE,
        )  # fmt: skip
    return o


@triton.jit
def _scores(
    q: tl.tensor,
    k: tl.tensor,
    score_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    head: tl.tensor,
    mask_index: tl.tensor,
    tokens: tl.tensor,
    keys: tl.tensor,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LEFT_BITS: tl.constexpr,
    RIGHT_BITS: tl.constexpr,
    SCORES: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """Scores with bias and mask times log2(e), `[queries, keys]` float32, minus infinity beyond the window.

    ``q`` is `[queries, PADDED]`, ``k`` `[keys, PADDED]`, float32; ``tokens`` and ``keys`` are their places.
    """
    scale = tl.load(score_scale_ptr + head)
    if SCORES == "cosine":
        q = q * tl.rsqrt(tl.maximum(tl.sum(q * q, 1), 1e-24))[:, None]
        k = k * tl.rsqrt(tl.maximum(tl.sum(k * k, 1), 1e-24))[:, None]
    if LEFT_BITS == 0:
        scores = tl.dot(q.to(DTYPE), tl.trans(k.to(DTYPE)), input_precision="ieee") * (scale * LOG2E)
    elif SCORES != "scaled":
        scores = _integer_scores(q, k, factors_ptr, bounds_ptr, HEAD_DIM, LEFT_BITS, RIGHT_BITS) * (scale * LOG2E)
    else:
        scores = _integer_scores(q * scale, k, factors_ptr, bounds_ptr, HEAD_DIM, LEFT_BITS, RIGHT_BITS) * LOG2E
    at = tokens[:, None] * KEYS + keys[None, :]
    inside = (tokens < TOKENS)[:, None] & (keys < KEYS)[None, :]
    if bias_ptr is not None:
        scores += tl.load(bias_ptr + head * TOKENS * KEYS + at, mask=inside, other=0.0).to(tl.float32)
    if mask_ptr is not None:
        extra = tl.load(mask_ptr + mask_index * TOKENS * KEYS + at, mask=inside, other=0.0)
        scores = tl.fma(extra.to(tl.float32), tl.full(scores.shape, LOG2E, tl.float32), scores)
    if tl.constexpr(KEYS) % k.shape[0] != 0:
        scores = tl.where((keys < KEYS)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _integer_scores(
    q: tl.tensor,
    k: tl.tensor,
    factors_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    HEAD_DIM: tl.constexpr,
    LEFT_BITS: tl.constexpr,
    RIGHT_BITS: tl.constexpr,
) -> tl.tensor:
    """Product of the codes of q and k, `[queries, keys]` float32; padding channels have the signed code 0."""
    lanes = tl.arange(0, q.shape[1])
    left_offset = tl.where(lanes < HEAD_DIM, tl.load(bounds_ptr + 1), 1 << (LEFT_BITS - 1))
    right_offset = tl.where(lanes < HEAD_DIM, tl.load(bounds_ptr + 5), 1 << (RIGHT_BITS - 1))
    left = signed_codes(q * tl.load(factors_ptr + lanes)[None, :] + left_offset[None, :], LEFT_BITS)
    right = signed_codes(k * tl.load(factors_ptr + q.shape[1] + lanes)[None, :] + right_offset[None, :], RIGHT_BITS)
    return _product(
        tl.dot(left, tl.trans(right), out_dtype=tl.int32),
        tl.sum(left.to(tl.int32), 1),
        tl.sum(right.to(tl.int32), 1),
        bounds_ptr,
        bounds_ptr + 4,
        HEAD_DIM,
        LEFT_BITS,
        RIGHT_BITS,
    )


@triton.jit
def _value_codes(
    probabilities: tl.tensor,
    v: tl.tensor,
    bounds_ptr: tl.tensor,
    keys: tl.tensor,
    KEYS: tl.constexpr,
    LEFT_BITS: tl.constexpr,
    RIGHT_BITS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Signed codes of the probabilities `[queries, keys]` and of v `[keys, PADDED]`, zero beyond the window."""
    left = signed_codes(probabilities * tl.load(bounds_ptr + 8) + tl.load(bounds_ptr + 9), LEFT_BITS)
    right = signed_codes(v * tl.load(bounds_ptr + 12) + tl.load(bounds_ptr + 13), RIGHT_BITS)
    if tl.constexpr(KEYS) % v.shape[0] != 0:
        left = tl.where((keys < KEYS)[None, :], left, 0)
        right = tl.where((keys < KEYS)[:, None], right, 0)
    return left, right


@triton.jit
def _value_product(
    acc: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    bounds_ptr: tl.tensor,
    KEYS: tl.constexpr,
    LEFT_BITS: tl.constexpr,
    RIGHT_BITS: tl.constexpr,
    RELATIVE: tl.constexpr,
) -> tl.tensor:
    """`_product` of the probabilities and v, over the sums of the rounded rows if those are ``RELATIVE``."""
    o = _product(acc, rows, columns, bounds_ptr + 8, bounds_ptr + 12, KEYS, LEFT_BITS, RIGHT_BITS)
    if RELATIVE:
        codes = (rows + (1 << (LEFT_BITS - 1)) * KEYS).to(tl.float32)
        sums = codes * tl.load(bounds_ptr + 10) + tl.load(bounds_ptr + 11) * KEYS
        o = o / tl.maximum(sums, 1e-30)[:, None]
    return o


@triton.jit
def _product(
    acc: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    left_bounds_ptr: tl.tensor,
    right_bounds_ptr: tl.tensor,
    LENGTH: tl.constexpr,
    LEFT_BITS: tl.constexpr,
    RIGHT_BITS: tl.constexpr,
) -> tl.tensor:
    """`reference.matmul_epilogue` from sums over signed codes, brought to those of unsigned codes first, exactly.

    Args:
        acc: `[M, N]` int32 products of ``LENGTH`` pairs of signed codes.
        rows: `[M]` int32 sums of the left codes.
        columns: `[N]` int32 sums of the right codes.
        left_bounds_ptr: Reciprocal, offset, step and lower bound of the left operand.
        right_bounds_ptr: The same of the right one.
        LENGTH: Real elements of the contraction.
        LEFT_BITS: Width of the left codes.
        RIGHT_BITS: Width of the right codes.
    """
    left_half: tl.constexpr = 1 << (LEFT_BITS - 1)
    right_half: tl.constexpr = 1 << (RIGHT_BITS - 1)
    rows += left_half * LENGTH
    start = columns * left_half
    columns += right_half * LENGTH
    product = (acc + (rows[:, None] * right_half + start[None, :])).to(tl.float32)
    left_step, left_lower = tl.load(left_bounds_ptr + 2), tl.load(left_bounds_ptr + 3)
    right_step, right_lower = tl.load(right_bounds_ptr + 2), tl.load(right_bounds_ptr + 3)
    row_term = (rows.to(tl.float32) * left_step + left_lower * LENGTH) * right_lower
    column_term = columns.to(tl.float32) * right_step * left_lower
    return product * left_step * right_step + row_term[:, None] + column_term[None, :]


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
    """``acc`` plus what a head adds to the projection; heads of 16 channels alternate with zeros, to be 32 long."""
    slots = head * 32 + tl.arange(0, o.shape[1]) * (32 // o.shape[1])
    reciprocal, offset = tl.load(reciprocal_ptr + slots), tl.load(offset_ptr + slots)
    codes = signed_codes(o * reciprocal[None, :] + offset[None, :], ACT_BITS)
    if o.shape[1] == 16:
        codes = tl.interleave(codes, tl.zeros_like(codes))
    weight = load_weight(weight_ptr, outputs, outputs < OUT, head * 32, ROW_BYTES, 32, BITS, MID_RISE)
    return contract(codes, weight, acc, BITS, MID_RISE)


@triton.jit
def _store(
    acc: tl.tensor,
    scale_ptr: tl.tensor,
    constant_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    row_mask: tl.tensor,
    outputs: tl.tensor,
    OUT: tl.constexpr,
) -> None:
    """Epilogue of the projection, residual, and the store."""
    scale = tl.load(scale_ptr + outputs, mask=outputs < OUT, other=0.0)
    y = acc.to(tl.float32) * scale[None, :]
    y += tl.load(constant_ptr + outputs, mask=outputs < OUT, other=0.0)[None, :]
    mask = row_mask[:, None] & (outputs < OUT)[None, :]
    at = rows[:, None] * OUT + outputs[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)


# --- launchers --------------------------------------------------------------------------------------------------------


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
    x = x.contiguous()
    warps = 8 if operands.left_bits else 4
    config = tuning.default("window", num_warps=warps, num_stages=1, **window_tile(qkv.columns, proj.rows))
    window_kernel[(len(x),)](
        x, *_tensors(qkv), operands.score_scale, operands.bias, mask, operands.factors, operands.bounds,
        *_tensors(proj), residual, out, 1 if mask is None else len(mask), eps or 0.0,
        C=qkv.columns, ROW_BYTES1=qkv.row_bytes, BITS1=qkv.weight_bits, MID_RISE1=qkv.mid_rise,
        ACT_BITS1=qkv.act_bits, NORM=eps is not None, OUT=proj.rows, ROW_BYTES2=proj.row_bytes,
        BITS2=proj.weight_bits, MID_RISE2=proj.mid_rise, ACT_BITS2=proj.act_bits,
        **_constants(operands, x.shape[1], compute),
        **config.blocks, num_warps=config.num_warps, num_stages=config.num_stages, **OPTIONS,
    )  # fmt: skip
    return out


def launch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: PackedAttention,
    *,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    compute: torch.dtype = torch.float16,
) -> Tensor:
    """Run `attention_kernel`, and the projection if ``operands`` has one; arguments as in `reference_attention`.

    Raises:
        KernelError: Operands that the kernels do not take.
    """
    _check_heads(q, k, v, operands, mask)
    windows, tokens = q.shape[:2]
    proj, out_dtype = operands.proj, out_dtype or q.dtype
    width = operands.heads * operands.head_dim
    out = torch.empty(windows, tokens, width, dtype=out_dtype if proj is None else torch.uint8, device=q.device)
    warps = 8 if operands.left_bits else 4
    config = tuning.default("attention", num_warps=warps, num_stages=1, **attention_tile(tokens, warps))
    if out.numel():
        attention_kernel[(windows, blocks(tokens, config.blocks["BLOCK_M"]), operands.heads)](
            q, k, v, operands.score_scale, operands.bias, mask, operands.factors, operands.bounds,
            None if proj is None else proj.reciprocal, None if proj is None else proj.offset, out,
            *q.stride()[:3], *k.stride()[:3], 1 if mask is None else len(mask),
            OUT_BITS=0 if proj is None else proj.act_bits, KEYS=k.shape[1], **_constants(operands, tokens, compute),
            **config.blocks, num_warps=config.num_warps, num_stages=config.num_stages, **OPTIONS,
        )  # fmt: skip
    if proj is None:
        return out
    rows = None if residual is None else residual.reshape(-1, proj.rows)
    y = lowbit_linear.launch_lowbit_linear(out.view(-1, width), proj, residual=rows, out_dtype=out_dtype)
    return y.view(windows, tokens, proj.rows)


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
    between = torch.float32 if operands.left_bits else compute
    y = lowbit_linear.launch_lowbit_linear(rows, qkv, out_dtype=between)
    q, k, v = y.view(*x.shape[:2], 3, operands.heads, operands.padded)[..., : operands.head_dim].unbind(2)
    return launch_attention(q, k, v, operands, mask=mask, residual=residual, out_dtype=x.dtype, compute=compute)


def _constants(operands: PackedAttention, tokens: int, compute: torch.dtype) -> dict[str, object]:
    """Constexprs that both kernels have."""
    return {
        "TOKENS": tokens, "HEADS": operands.heads, "HEAD_DIM": operands.head_dim,
        "PADDED": operands.padded, "LEFT_BITS": operands.left_bits, "RIGHT_BITS": operands.right_bits,
        "RELATIVE": operands.relative, "SCORES": operands.scores, "DTYPE": COMPUTE[compute],
    }  # fmt: skip


def _tensors(linear: PackedLinear) -> tuple[Tensor | None, ...]:
    return linear.codes, linear.start, linear.scale, linear.constant, linear.reciprocal, linear.offset


def window_tile(channels: int, outputs: int) -> dict[str, int]:
    """Default block sizes of `window_kernel`."""
    return {
        "BLOCK_M": FUSED_TOKENS,
        "BLOCK_C": power_of_two(channels, 32),
        "BLOCK_O": power_of_two(outputs, 16),
    }


def attention_tile(tokens: int, warps: int) -> dict[str, int]:
    """Default block sizes of `attention_kernel`.

    Codes and sums of quantized operands do not fit into the registers of 4 warps; 8 are worth it for 128 queries.
    """
    return {"BLOCK_M": 128 if warps == 8 and tokens > FUSED_TOKENS else 64, "BLOCK_N": 64}


def _check_windows(x: Tensor, channels: int, operands: PackedAttention, mask: Tensor | None) -> None:
    if x.dim() != 3:
        raise KernelError("The windows do not fit", found=tuple(x.shape), expected=f"[windows, tokens, {channels}]")
    check_matrix(x[0] if len(x) else x.reshape(-1, x.shape[-1]), channels, "The activation", lowbit_linear.FLOATS)
    _check_bias(x.shape[0], x.shape[1], x.shape[1], operands, mask)


def _check_heads(q: Tensor, k: Tensor, v: Tensor, operands: PackedAttention, mask: Tensor | None) -> None:
    expected = (operands.heads, operands.head_dim)
    same = k.shape == v.shape and k.stride() == v.stride() and q.shape[:1] == k.shape[:1]
    fits = all(part.dim() == 4 and part.shape[2:] == expected and part.stride(3) == 1 for part in (q, k, v))
    if not (same and fits):
        raise KernelError(
            "q, k and v do not fit",
            found=[(tuple(part.shape), part.stride()) for part in (q, k, v)],
            expected=f"[windows, tokens, {expected[0]}, {expected[1]}], the last stride one, k and v alike",
        )
    if not 1 <= k.shape[1] <= MAX_KEYS:
        raise KernelError("The window has too many keys", found=k.shape[1], expected=f"1 to {MAX_KEYS}")
    _check_bias(q.shape[0], q.shape[1], k.shape[1], operands, mask)


def _check_bias(windows: int, tokens: int, keys: int, operands: PackedAttention, mask: Tensor | None) -> None:
    if not 1 <= tokens <= MAX_TOKENS:
        raise KernelError("The window has too many tokens", found=tokens, expected=f"1 to {MAX_TOKENS}")
    if operands.bias is not None and operands.bias.shape[1:] != (tokens, keys):
        raise KernelError(
            "The position bias does not fit", found=tuple(operands.bias.shape), expected=(operands.heads, tokens, keys)
        )
    fits = mask is None or (mask.dim() == 3 and mask.shape[1:] == (tokens, keys) and mask.is_contiguous())
    if mask is not None and (not fits or len(mask) == 0 or windows % len(mask)):
        raise KernelError(
            "The mask does not fit", found=tuple(mask.shape), expected=f"[divisor of {windows}, {tokens}, {keys}]"
        )


def _check_residual(residual: Tensor | None, out: Tensor) -> None:
    if residual is not None and (residual.shape != out.shape or not residual.is_contiguous()):
        raise KernelError(
            "The residual does not fit", found=tuple(residual.shape), expected=f"{tuple(out.shape)}, contiguous"
        )


# --- reference --------------------------------------------------------------------------------------------------------


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
        eps: Of a LayerNorm in front, whose affine is folded into qkv's quantizer (`mlp.with_norm`); or None.
        residual: `[windows, N, O]` floats added last, or None.
        compute: Type of q, k, v and the probabilities in the kernels' mode "deploy": float16 (values beyond 65504
            overflow) or bfloat16. The reference computes in float32.

    Returns:
        `[windows, N, O]` in the type of ``x``.
    """
    assert operands.qkv is not None
    y = first_linear(x.reshape(-1, x.shape[-1]), operands.qkv, eps)
    q, k, v = y.view(*x.shape[:2], 3, operands.heads, operands.padded)[..., : operands.head_dim].unbind(2)
    return reference_attention(q, k, v, operands, mask=mask, residual=residual, out_dtype=x.dtype)


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: PackedAttention,
    *,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    compute: torch.dtype = torch.float16,
) -> Tensor:
    """Attention of given q, k and v, and the projection if ``operands`` has one.

    Args:
        q: `[windows, N, heads, D]` floating point, N at most 256.
        k: `[windows, M, heads, D]`, M at most 1024.
        v: `[windows, M, heads, D]`, of the same strides.
        operands: From `attention_operands.pack_attention`; its bias is `[heads, N, M]`.
        mask: As in `reference`; `[nW, N, M]`.
        residual: As in `reference`.
        out_dtype: Of the result; the type of ``q`` by default.
        compute: As in `reference`.

    Returns:
        `[windows, N, O]`, or `[windows, N, heads * D]` without a projection.
    """
    out_dtype = out_dtype or q.dtype
    q, k, v = (part.float().transpose(1, 2) for part in (q, k, v))
    scale = operands.score_scale[:, None, None]
    if operands.cosine:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    if operands.scale_after:
        scores = _reference_scores(q, k, operands) * scale
    else:
        scores = _reference_scores(q * scale, k, operands)
    if operands.bias is not None:
        scores = scores + operands.bias.float() / 1.4426950408889634
    if mask is not None:
        grouped = scores.unflatten(0, (-1, len(mask)))
        scores = (grouped + mask.float()[:, None]).flatten(0, 1)
    o = _reference_values(scores.softmax(-1), v, operands).transpose(1, 2).flatten(2)
    y = o
    if operands.proj is not None:
        y = lowbit_linear.reference(o.flatten(0, 1), operands.proj).view(*o.shape[:2], -1)
    return (y if residual is None else y + residual.float()).to(out_dtype)


def _reference_scores(q: Tensor, k: Tensor, operands: PackedAttention) -> Tensor:
    if operands.factors is None or operands.bounds is None:
        return q @ k.transpose(-1, -2)
    factors = operands.factors[:, : operands.head_dim]
    qa = integers.quantize_codes(q, factors[0], operands.bounds[0, 1], operands.left_bits)
    qb = integers.quantize_codes(k, factors[1], operands.bounds[1, 1], operands.right_bits)
    left, right = _affine(operands, 0, operands.left_bits), _affine(operands, 1, operands.right_bits)
    return integers.matmul(qa, qb.transpose(-1, -2), left, right)


def _reference_values(probabilities: Tensor, v: Tensor, operands: PackedAttention) -> Tensor:
    if operands.bounds is None:
        return probabilities @ v
    bounds, left = operands.bounds, _affine(operands, 2, operands.left_bits)
    rounded = relative_rows(probabilities) if operands.relative else probabilities
    qa = integers.quantize_codes(rounded, bounds[2, 0], bounds[2, 1], operands.left_bits)
    qb = integers.quantize_codes(v, bounds[3, 0], bounds[3, 1], operands.right_bits)
    o = integers.matmul(qa, qb, left, _affine(operands, 3, operands.right_bits))
    return renormalized(o, probabilities, row_sums(qa, left.step, left.lower)) if operands.relative else o


def _affine(operands: PackedAttention, row: int, bits: int) -> integers.Affine:
    assert operands.bounds is not None
    return integers.Affine(operands.bounds[row, 2], operands.bounds[row, 3], bits)


__all__ = [
    "FUSED_TOKENS",
    "attention_kernel",
    "attention_tile",
    "launch_attention",
    "launch_window_attention",
    "reference",
    "reference_attention",
    "window_kernel",
    "window_tile",
]
