"""Device functions of an attention: scores, and the product of quantized probabilities with the values.

Shared by `window_attention` (a whole window in one block) and `attention` (blocks of keys). Scores are kept times
log2(e), so that the softmax takes ``exp2``, one instruction, where ``exp`` takes two.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from harmoq_ao.triton_kernels.attention_operands import LOG2E
from harmoq_ao.triton_kernels.device import signed_codes

_LOG2E = tl.constexpr(LOG2E)


class Attention(NamedTuple):
    """What every step of an attention needs; kernels build it in the call, so that constants stay constants.

    Attributes:
        score_scale_ptr: `[HEADS]` float32.
        bias_ptr: `[HEADS, TOKENS, KEYS]` position bias times log2(e), or None.
        mask_ptr: `[masks, TOKENS, KEYS]`, or None.
        factors_ptr: `[2, PADDED]` reciprocals of q and k by channel; None in mode "deploy".
        bounds_ptr: `[4, 4]` of q, k, probabilities and v: reciprocal, offset, step, lower bound; None in "deploy".
        head: Index of the head.
        mask_index: Index of the window's mask.
        TOKENS: Queries of a window.
        KEYS: Keys of a window.
        HEAD_DIM: Real channels of a head.
        LEFT_BITS: Width of the codes of q and the probabilities; 0 in mode "deploy".
        RIGHT_BITS: Width of the codes of k and v.
        RELATIVE: Whether probabilities are rounded relative to the largest one of their row.
        SCORES: "scaled", "products" or "cosine".
        DTYPE: Type of the operands of float contractions.
    """

    score_scale_ptr: tl.tensor
    bias_ptr: tl.tensor
    mask_ptr: tl.tensor
    factors_ptr: tl.tensor
    bounds_ptr: tl.tensor
    head: tl.tensor
    mask_index: tl.tensor
    TOKENS: tl.constexpr
    KEYS: tl.constexpr
    HEAD_DIM: tl.constexpr
    LEFT_BITS: tl.constexpr
    RIGHT_BITS: tl.constexpr
    RELATIVE: tl.constexpr
    SCORES: tl.constexpr
    DTYPE: tl.constexpr


@triton.jit
def attention_scores(q: tl.tensor, k: tl.tensor, tokens: tl.tensor, keys: tl.tensor, a: Attention) -> tl.tensor:
    """Scores with bias and mask times log2(e), `[queries, keys]` float32, minus infinity beyond the window.

    ``q`` is `[queries, PADDED]`, ``k`` `[keys, PADDED]`, float32; ``tokens`` and ``keys`` are their places.
    """
    scale = tl.load(a.score_scale_ptr + a.head)
    if a.SCORES == "cosine":
        # The bound keeps rows of padding, all zero, from becoming NaN.
        q = q * tl.rsqrt(tl.maximum(tl.sum(q * q, 1), 1e-24))[:, None]
        k = k * tl.rsqrt(tl.maximum(tl.sum(k * k, 1), 1e-24))[:, None]
    if a.LEFT_BITS == 0:
        scores = tl.dot(q.to(a.DTYPE), tl.trans(k.to(a.DTYPE)), input_precision="ieee") * (scale * _LOG2E)
    elif a.SCORES != "scaled":
        scores = _integer_scores(q, k, a) * (scale * _LOG2E)
    else:
        # Authors who scale the queries calibrated q's quantization range on the scaled ones.
        scores = _integer_scores(q * scale, k, a) * _LOG2E
    at = tokens[:, None] * a.KEYS + keys[None, :]
    inside = (tokens < a.TOKENS)[:, None] & (keys < a.KEYS)[None, :]
    if a.bias_ptr is not None:
        scores += tl.load(a.bias_ptr + a.head * a.TOKENS * a.KEYS + at, mask=inside, other=0.0).to(tl.float32)
    if a.mask_ptr is not None:
        extra = tl.load(a.mask_ptr + a.mask_index * a.TOKENS * a.KEYS + at, mask=inside, other=0.0)
        # Fused explicitly: contraction is off, and no code depends on this sum's last bit.
        scores = tl.fma(extra.to(tl.float32), tl.full(scores.shape, _LOG2E, tl.float32), scores)
    # `tl.constexpr`: in the interpreter KEYS is a plain int, which has no remainder by a constexpr.
    if tl.constexpr(a.KEYS) % k.shape[0] != 0:
        scores = tl.where((keys < a.KEYS)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _integer_scores(q: tl.tensor, k: tl.tensor, a: Attention) -> tl.tensor:
    """Product of the codes of q and k, `[queries, keys]` float32; padding channels have the signed code 0."""
    lanes = tl.arange(0, q.shape[1])
    # The factors are zero beyond the head, and half a range is the signed code 0.
    left_offset = tl.where(lanes < a.HEAD_DIM, tl.load(a.bounds_ptr + 1), 1 << (a.LEFT_BITS - 1))
    right_offset = tl.where(lanes < a.HEAD_DIM, tl.load(a.bounds_ptr + 5), 1 << (a.RIGHT_BITS - 1))
    left = signed_codes(q * tl.load(a.factors_ptr + lanes)[None, :] + left_offset[None, :], a.LEFT_BITS)
    right = signed_codes(k * tl.load(a.factors_ptr + q.shape[1] + lanes)[None, :] + right_offset[None, :], a.RIGHT_BITS)
    return _affine_product(
        tl.dot(left, tl.trans(right), out_dtype=tl.int32), tl.sum(left.to(tl.int32), 1), tl.sum(right.to(tl.int32), 1),
        a.bounds_ptr, a.bounds_ptr + 4, a.HEAD_DIM, a.LEFT_BITS, a.RIGHT_BITS,
    )  # fmt: skip


@triton.jit
def value_codes(weights: tl.tensor, v: tl.tensor, keys: tl.tensor, a: Attention) -> tuple[tl.tensor, tl.tensor]:
    """Signed codes of the probabilities `[queries, keys]` and of v `[keys, PADDED]`, zero beyond the window."""
    left = signed_codes(weights * tl.load(a.bounds_ptr + 8) + tl.load(a.bounds_ptr + 9), a.LEFT_BITS)
    right = signed_codes(v * tl.load(a.bounds_ptr + 12) + tl.load(a.bounds_ptr + 13), a.RIGHT_BITS)
    if tl.constexpr(a.KEYS) % v.shape[0] != 0:
        # A probability of 0 has a code of its own, which would count in the sums of the epilogue.
        left = tl.where((keys < a.KEYS)[None, :], left, 0)
        right = tl.where((keys < a.KEYS)[:, None], right, 0)
    return left, right


@triton.jit
def value_product(acc: tl.tensor, rows: tl.tensor, columns: tl.tensor, a: Attention) -> tl.tensor:
    """Attention's output, `[queries, PADDED]` float32, from the sums over `value_codes`.

    Relative maps are divided by the sum of what the probabilities were rounded to, which the codes give.
    """
    o = _affine_product(acc, rows, columns, a.bounds_ptr + 8, a.bounds_ptr + 12, a.KEYS, a.LEFT_BITS, a.RIGHT_BITS)
    if a.RELATIVE:
        codes = (rows + (1 << (a.LEFT_BITS - 1)) * a.KEYS).to(tl.float32)
        sums = codes * tl.load(a.bounds_ptr + 10) + tl.load(a.bounds_ptr + 11) * a.KEYS
        o = o / tl.maximum(sums, 1e-30)[:, None]
    return o


@triton.jit
def _affine_product(
    acc: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    left_bounds_ptr: tl.tensor,
    right_bounds_ptr: tl.tensor,
    LENGTH: tl.constexpr,
    LEFT_BITS: tl.constexpr,
    RIGHT_BITS: tl.constexpr,
) -> tl.tensor:
    """`integer_reference.matmul_epilogue` from sums over signed codes.

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
    # First to the sums of unsigned codes, exactly in int32: then the floats are rounded as in the reference.
    rows += left_half * LENGTH
    start = columns * left_half
    columns += right_half * LENGTH
    product = (acc + (rows[:, None] * right_half + start[None, :])).to(tl.float32)
    left_step, left_lower = tl.load(left_bounds_ptr + 2), tl.load(left_bounds_ptr + 3)
    right_step, right_lower = tl.load(right_bounds_ptr + 2), tl.load(right_bounds_ptr + 3)
    row_term = (rows.to(tl.float32) * left_step + left_lower * LENGTH) * right_lower
    column_term = columns.to(tl.float32) * right_step * left_lower
    return product * left_step * right_step + row_term[:, None] + column_term[None, :]


__all__ = ["Attention", "attention_scores", "value_codes", "value_product"]
