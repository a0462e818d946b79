"""Device functions of an attention, of floats or of codes.

Shared by `window_attention` (a window of its own qkv) and `attention` (given q, k and v). Scores are kept times
log2(e), so that the softmax takes ``exp2``, one instruction, where ``exp`` takes two.

Codes are unsigned and go into the same contractions of 16-bit floats as floats do: up to 255 they are exact in
float16 and bfloat16, their products are exact in float32, and sums of up to 256 products are whole numbers below 2**24,
so exact too.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from harmoq_ao.triton_kernels.attention_operands import LOG2E
from harmoq_ao.triton_kernels.device import float_codes

_LOG2E = tl.constexpr(LOG2E)


class Attention(NamedTuple):
    """What every step of an attention needs; kernels build it in the call, so that constants stay constants.

    Attributes:
        score_scale_ptr: `[HEADS]` float32.
        bias_ptr: `[HEADS, TOKENS, KEYS]` position bias times log2(e), or None.
        factors_ptr: `[2, PADDED]` reciprocals of q and k by channel; None in mode "deploy".
        bounds_ptr: `[4, 4]` of q, k, probabilities and v: reciprocal, offset, step, lower bound; None in "deploy".
        TOKENS: Queries of a window.
        KEYS: Keys of a window.
        HEAD_DIM: Real channels of a head.
        LEFT_BITS: Width of the codes of q and the probabilities; 0 in mode "deploy".
        RIGHT_BITS: Width of the codes of k and v.
        RELATIVE: Whether probabilities are rounded relative to the largest one of their row.
        SCORES: "scaled", "products" or "cosine".
        APART: What is added to scores between regions.
        DTYPE: Type of the operands of contractions.
    """

    score_scale_ptr: tl.tensor
    bias_ptr: tl.tensor
    factors_ptr: tl.tensor
    bounds_ptr: tl.tensor
    TOKENS: tl.constexpr
    KEYS: tl.constexpr
    HEAD_DIM: tl.constexpr
    LEFT_BITS: tl.constexpr
    RIGHT_BITS: tl.constexpr
    RELATIVE: tl.constexpr
    SCORES: tl.constexpr
    APART: tl.constexpr
    DTYPE: tl.constexpr


class Regions(NamedTuple):
    """Which tokens of a window attend to each other: those with the same id.

    Attributes:
        queries: `[queries]` int32 ids.
        keys: `[keys]` int32 ids.
        mixed: Whether any of them differ; tokens of a window that they do not are not compared.
        GIVEN: Whether there are regions at all.
    """

    queries: tl.tensor
    keys: tl.tensor
    mixed: tl.tensor
    GIVEN: tl.constexpr


@triton.jit
def load_regions(
    regions_ptr: tl.tensor, window: tl.tensor, windows: int, tokens: tl.tensor, TOKENS: tl.constexpr
) -> tl.tensor:
    """Ids of a window's tokens from `[windows, TOKENS]` uint8, as int32; zeros where ``regions_ptr`` is None."""
    ids = tokens * 0
    if regions_ptr is not None:
        # Rows of padding take the id of the last token: they make no window mixed.
        at = (window % windows).to(tl.int64) * TOKENS + tl.minimum(tokens, TOKENS - 1)
        ids = tl.load(regions_ptr + at).to(tl.int32)
    return ids


@triton.jit
def differ(queries: tl.tensor, keys: tl.tensor) -> tl.tensor:
    """Whether not all ids of both are the same."""
    least = tl.minimum(tl.min(queries, 0), tl.min(keys, 0))
    return least != tl.maximum(tl.max(queries, 0), tl.max(keys, 0))


# --- scores -----------------------------------------------------------------------------------------------------------


@triton.jit
def query_operand(q: tl.tensor, head: tl.tensor, a: Attention) -> tl.tensor:
    """Left operand of the scores from q, `[queries, PADDED]` float32: floats that hold the scale, or codes."""
    if a.SCORES == "cosine":
        q = _normalized(q)
    scale = tl.load(a.score_scale_ptr + head)
    if a.LEFT_BITS == 0:
        q = q * (scale * _LOG2E)
    else:
        if a.SCORES == "scaled":
            # Authors who scale the queries calibrated q's quantization range on the scaled ones.
            q = q * scale
        q = _channel_codes(q, a.factors_ptr, a.bounds_ptr + 1, a.LEFT_BITS, a)
    return q.to(a.DTYPE)


@triton.jit
def key_operand(k: tl.tensor, a: Attention) -> tl.tensor:
    """Right operand of the scores from k, `[keys, PADDED]` float32: floats, or codes."""
    if a.SCORES == "cosine":
        k = _normalized(k)
    if a.LEFT_BITS != 0:
        k = _channel_codes(k, a.factors_ptr + k.shape[1], a.bounds_ptr + 5, a.RIGHT_BITS, a)
    return k.to(a.DTYPE)


@triton.jit
def _normalized(x: tl.tensor) -> tl.tensor:
    # The bound keeps rows of padding, all zero, from becoming NaN.
    return x * tl.rsqrt(tl.maximum(tl.sum(x * x, 1), 1e-24))[:, None]


@triton.jit
def _channel_codes(
    x: tl.tensor, factors_ptr: tl.tensor, offset_ptr: tl.tensor, BITS: tl.constexpr, a: Attention
) -> tl.tensor:
    """Codes by a factor of each channel and one offset; 0 beyond the head, where factors are 0."""
    lanes = tl.arange(0, x.shape[1])
    offset = tl.where(lanes < a.HEAD_DIM, tl.load(offset_ptr), 0.0)
    return float_codes(x * tl.load(factors_ptr + lanes)[None, :] + offset[None, :], BITS)


@triton.jit
def attention_scores(
    left: tl.tensor,
    right: tl.tensor,
    head: tl.tensor,
    tokens: tl.tensor,
    keys: tl.tensor,
    regions: Regions,
    a: Attention,
) -> tl.tensor:
    """Scores with bias and mask times log2(e), `[queries, keys]` float32, minus infinity beyond the keys.

    ``left`` and ``right`` are from `query_operand` and `key_operand`; ``tokens`` and ``keys`` are their places.
    """
    start = tl.where(keys < a.KEYS, 0.0, float("-inf"))[None, :]
    if a.LEFT_BITS != 0:
        start += _key_term(right, head, a)[None, :]
    start = tl.broadcast_to(start, [left.shape[0], right.shape[0]])
    if a.bias_ptr is not None:
        inside = (tokens < a.TOKENS)[:, None] & (keys < a.KEYS)[None, :]
        at = head * a.TOKENS * a.KEYS + tokens[:, None] * a.KEYS + keys[None, :]
        start += tl.load(a.bias_ptr + at, mask=inside, other=0.0)
    if a.LEFT_BITS == 0:
        # The contraction begins at the bias: no scale and no sum of their own.
        scores = tl.dot(left, tl.trans(right), start, input_precision="ieee")
    else:
        product = tl.dot(left, tl.trans(right), input_precision="ieee")
        factor = tl.load(a.bounds_ptr + 2) * tl.load(a.bounds_ptr + 6) * _score_factor(head, a)
        scores = tl.fma(product, tl.broadcast_to(factor, product.shape), start)
    # Few windows have several regions; the others skip the comparison.
    if regions.GIVEN:  # noqa: SIM102 - one is known to the compiler, the other one is not
        if regions.mixed:
            scores += tl.where(regions.queries[:, None] == regions.keys[None, :], 0.0, a.APART * _LOG2E)
    return scores


@triton.jit
def _score_factor(head: tl.tensor, a: Attention) -> tl.tensor:
    """What scores are multiplied by: log2(e), and the scale unless the queries hold it."""
    factor = 1.0 * _LOG2E
    if a.SCORES != "scaled":
        factor = tl.load(a.score_scale_ptr + head) * _LOG2E
    return factor


@triton.jit
def _key_term(right: tl.tensor, head: tl.tensor, a: Attention) -> tl.tensor:
    """What the lower bound of q adds to the scores of each key, `[keys]`.

    Of ``(sq q + lq) (sk k + lk)``, summed over channels, ``sq sk sum q k`` is the contraction and ``lq sk sum k`` is
    this; the rest is the same for all keys of a query, and the softmax does not see it.
    """
    sums = tl.sum(right.to(tl.float32), 1)
    return sums * (tl.load(a.bounds_ptr + 3) * tl.load(a.bounds_ptr + 6) * _score_factor(head, a))


# --- values -----------------------------------------------------------------------------------------------------------


@triton.jit
def probability_codes(weights: tl.tensor, total: tl.tensor, keys: tl.tensor, a: Attention) -> tl.tensor:
    """Codes of ``weights / total`` (of ``weights`` where maps are relative), `[queries, keys]`; 0 beyond the keys."""
    if not a.RELATIVE:
        weights = weights * (1.0 / total)[:, None]
    codes = float_codes(weights * tl.load(a.bounds_ptr + 8) + tl.load(a.bounds_ptr + 9), a.LEFT_BITS)
    # `tl.constexpr`: in the interpreter KEYS is a plain int, which has no remainder by a constexpr.
    if tl.constexpr(a.KEYS) % weights.shape[1] != 0:
        # A probability of 0 has a code of its own.
        codes = tl.where((keys < a.KEYS)[None, :], codes, 0.0)
    return codes


@triton.jit
def value_codes(v: tl.tensor, keys: tl.tensor, a: Attention) -> tl.tensor:
    """Codes of v, `[keys, PADDED]`, 0 beyond the keys."""
    codes = float_codes(v * tl.load(a.bounds_ptr + 12) + tl.load(a.bounds_ptr + 13), a.RIGHT_BITS)
    if tl.constexpr(a.KEYS) % v.shape[0] != 0:
        codes = tl.where((keys < a.KEYS)[:, None], codes, 0.0)
    return codes


@triton.jit
def value_product(acc: tl.tensor, rows: tl.tensor, columns: tl.tensor, a: Attention) -> tl.tensor:
    """Attention's output, `[queries, PADDED]` float32, of codes.

    Args:
        acc: Their products, `[queries, PADDED]` float32 of whole numbers.
        rows: Sums of the probabilities' codes, `[queries]`.
        columns: Sums of the values' codes, `[PADDED]`.
        a: The attention. Relative maps are divided by the sum of what the probabilities were rounded to.
    """
    left_step, left_lower = tl.load(a.bounds_ptr + 10), tl.load(a.bounds_ptr + 11)
    right_step, right_lower = tl.load(a.bounds_ptr + 14), tl.load(a.bounds_ptr + 15)
    # The sum of a row of rounded probabilities.
    sums = rows * left_step + left_lower * a.KEYS
    o = (acc * left_step + (columns * left_lower)[None, :]) * right_step
    if a.RELATIVE:
        o = o * (1.0 / tl.maximum(sums, 1e-30))[:, None] + right_lower
    else:
        o += (sums * right_lower)[:, None]
    return o


@triton.jit
def attend(
    left: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    head: tl.tensor,
    tokens: tl.tensor,
    keys: tl.tensor,
    regions: Regions,
    a: Attention,
) -> tl.tensor:
    """``softmax(scores) v`` of all keys of a window in one block, `[queries, PADDED]` float32."""
    scores = attention_scores(left, key_operand(k, a), head, tokens, keys, regions, a)
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    if a.LEFT_BITS == 0:
        # Divided after the product: PADDED columns instead of KEYS.
        o = tl.dot(weights.to(a.DTYPE), v.to(a.DTYPE), input_precision="ieee") * (1.0 / tl.sum(weights, 1))[:, None]
    else:
        codes, values = probability_codes(weights, tl.sum(weights, 1), keys, a), value_codes(v, keys, a)
        acc = tl.dot(codes.to(a.DTYPE), values.to(a.DTYPE), input_precision="ieee")
        o = value_product(acc, tl.sum(codes, 1), tl.sum(values, 0), a)
    return o


__all__ = [
    "Attention",
    "Regions",
    "attend",
    "attention_scores",
    "differ",
    "key_operand",
    "load_regions",
    "probability_codes",
    "query_operand",
    "value_codes",
    "value_product",
]
