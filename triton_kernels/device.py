"""Functions that run inside the kernels: rounding, unpacking, integer contraction, GELU.

Every kernel is launched without contraction of multiply-adds (`launch.OPTIONS`): a code is
``round(round(x * r) + c)``, each rounded to float32, and a fused multiply-add would round once.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROUNDING = tl.constexpr(12582912.0)
"""1.5 * 2**23. Adding it to a float32 in -2**22 .. 2**22 leaves the nearest integer, ties to even, in the low bits."""


@triton.jit
def signed_codes(position: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """``clamp(round_half_even(position), 0, 2**BITS - 1) - 2**(BITS - 1)`` as int8.

    Clamped first, so that infinities and large values saturate. `tl.maximum` returns the operand that is a number:
    NaN becomes code 0. The shift to signed codes rides in the rounding constant, which stays even, so ties still go
    to even codes; the low byte of the sum is the code, no conversion needed.
    """
    top: tl.constexpr = (1 << BITS) - 1.0
    shifted: tl.constexpr = 12582912.0 - (1 << (BITS - 1))
    clamped = tl.minimum(tl.maximum(position, 0.0), top)
    return (clamped + shifted).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def unsigned_codes(position: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """``clamp(round_half_even(position), 0, 2**BITS - 1)`` as uint8; NaN becomes code 0."""
    top: tl.constexpr = (1 << BITS) - 1.0
    clamped = tl.minimum(tl.maximum(position, 0.0), top)
    return (clamped + ROUNDING).to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def standardize(x: tl.tensor, mask: tl.tensor, count: tl.constexpr, eps: float) -> tl.tensor:
    """``(x - mean) / sqrt(var + eps)`` over axis 1, where ``mask`` holds and ``count`` values a row do; float32."""
    mean = tl.sum(tl.where(mask, x, 0.0), 1) / count
    centred = tl.where(mask, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / count
    return centred * tl.rsqrt(variance + eps)[:, None]


@triton.jit
def load_weight(
    codes_ptr: tl.tensor,
    rows: tl.tensor,
    row_mask: tl.tensor,
    first: tl.tensor,
    ROW_BYTES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    MID_RISE: tl.constexpr,
) -> tl.tensor:
    """Unpack `[R, COLUMNS]` weight codes to int8, from column ``first`` (a multiple of 32) of the rows ``rows``.

    Rows are streams of `packing` (2, 3 and 4 bits) or bytes (5 to 8 bits). The result is ``2 * code + 1 - 2**BITS``
    for mid-rise weights of up to 7 bits, else ``code - 2**(BITS - 1)``. What lies beyond a row is arbitrary: the
    activation codes there are zero.
    """
    if BITS == 3:
        bytes_at = first // 8 * 3 + tl.arange(0, COLUMNS // 8) * 3
        mask = row_mask[:, None] & (bytes_at < ROW_BYTES)[None, :]
        at = codes_ptr + rows[:, None] * ROW_BYTES + bytes_at[None, :]
        low = tl.load(at, mask=mask, other=0).to(tl.int32)
        middle = tl.load(at + 1, mask=mask, other=0).to(tl.int32)
        high = tl.load(at + 2, mask=mask, other=0).to(tl.int32)
        codes = _split_words(low | (middle << 8) | (high << 16), 8, 3)
    elif BITS < 5:
        per_word: tl.constexpr = 32 // BITS
        words_at = first // per_word + tl.arange(0, COLUMNS // per_word)
        mask = row_mask[:, None] & (words_at * 4 < ROW_BYTES)[None, :]
        words_ptr = codes_ptr.to(tl.pointer_type(tl.int32))
        words = tl.load(words_ptr + rows[:, None] * (ROW_BYTES // 4) + words_at[None, :], mask=mask, other=0)
        codes = _split_words(words, per_word, BITS)
    else:
        columns = first + tl.arange(0, COLUMNS)
        mask = row_mask[:, None] & (columns < ROW_BYTES)[None, :]
        codes = tl.load(codes_ptr + rows[:, None] * ROW_BYTES + columns[None, :], mask=mask, other=0).to(tl.int32)
    if MID_RISE and BITS < 8:
        effective = codes * 2 + (1 - (1 << BITS))
    else:
        effective = codes - (1 << (BITS - 1))
    return effective.to(tl.int8)


@triton.jit
def _split_words(words: tl.tensor, PER_WORD: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    """`[R, W]` int32 words to `[R, W * PER_WORD]` codes, the lowest bits first."""
    shifts = tl.arange(0, PER_WORD) * BITS
    codes = (words[:, :, None] >> shifts[None, None, :]) & ((1 << BITS) - 1)
    return codes.reshape([words.shape[0], words.shape[1] * PER_WORD])


@triton.jit
def contract(
    left: tl.tensor, weight: tl.tensor, acc: tl.tensor, BITS: tl.constexpr, MID_RISE: tl.constexpr
) -> tl.tensor:
    """``acc + sum_j left[m, j] E[n, j]`` in int32; ``E`` is ``2 w + 1`` for mid-rise weights and ``w`` otherwise.

    Args:
        left: `[M, K]` int8 signed activation codes, K at least 32.
        weight: `[N, K]` int8 from `load_weight`. At 8 bits ``2 w + 1`` does not fit: then it is ``w``, and the rest is
            added from the row sums.
        acc: `[M, N]` int32.
        BITS: Width of a weight code.
        MID_RISE: Whether the weight is mid-rise.
    """
    if MID_RISE and BITS == 8:
        twice = tl.dot(left, tl.trans(weight), out_dtype=tl.int32) * 2
        acc += twice + tl.sum(left.to(tl.int32), 1)[:, None]
    else:
        acc = tl.dot(left, tl.trans(weight), acc, out_dtype=tl.int32)
    return acc


@triton.jit
def gelu(x: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """``KIND`` "erf": exact; "tanh": the tanh form, written with a sigmoid; "none": the identity."""
    if KIND == "erf":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


__all__ = ["contract", "gelu", "load_weight", "signed_codes", "standardize", "unsigned_codes"]
