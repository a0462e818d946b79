"""Device functions that the kernels share: loads, rounding, unpacking, integer contraction, epilogues.

Every kernel is launched without contraction of multiply-adds (`launch.OPTIONS`): a code is
``round(round(x * r) + c)``, each rounded to float32, and a fused multiply-add would round once.

Names: ``rows`` and ``columns`` are vectors of indices, ``inside`` says which of the columns exist, and ``mask`` is
`[R, C]`. Capitals are compile-time constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

from harmoq_ao.quant.quantizer import MIN_STEP

ROUNDING = tl.constexpr(12582912.0)
"""1.5 * 2**23. Adding it to a float32 in -2**22 .. 2**22 leaves the nearest integer, ties to even, in the low bits."""

_SMALLEST_STEP = tl.constexpr(MIN_STEP)


@triton.jit
def load_rows(ptr: tl.tensor, rows: tl.tensor, stride: int, columns: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Tile `[R, C]` of a matrix with unit column stride, as float32; zero outside ``mask``."""
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def signed_codes(position: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """``clamp(round_half_even(position), 0, 2**BITS - 1) - 2**(BITS - 1)`` as int8.

    Clamped first, so that infinities and large values saturate. `tl.maximum` returns the operand that is a number:
    NaN becomes code 0. The shift to signed codes rides in the rounding constant, which stays even, so ties still go
    to even codes; the low byte of the sum is the code, no conversion needed.
    """
    # The clamp comes first: beyond 2**22 the rounding constant would leave no integer in the low bits.
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
def quantize_columns(
    x: tl.tensor,
    reciprocal_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    columns: tl.tensor,
    inside: tl.tensor,
    BITS: tl.constexpr,
) -> tl.tensor:
    """Signed codes of ``x * reciprocal + offset``, `[R, C]` int8, by static qparams of each column."""
    reciprocal = tl.load(reciprocal_ptr + columns, mask=inside, other=0.0)
    # Columns of padding get 0 * 0 + half, the signed code 0: they add nothing to a contraction.
    offset = tl.load(offset_ptr + columns, mask=inside, other=1 << (BITS - 1))
    return signed_codes(x * reciprocal[None, :] + offset[None, :], BITS)


@triton.jit
def row_extremes(x: tl.tensor, mask: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Least and largest value of each row where ``mask`` holds; infinities where it never does."""
    lower = tl.min(tl.where(mask, x, float("inf")), 1)
    upper = tl.max(tl.where(mask, x, float("-inf")), 1)
    return lower, upper


@triton.jit
def bounds_of(lower: tl.tensor, upper: tl.tensor, BITS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """``(lower, step)`` from extremes; rows beyond the matrix have infinite ones and get 0 and a harmless step."""
    top: tl.constexpr = (1 << BITS) - 1.0
    lower = tl.where(lower == float("inf"), 0.0, lower)
    # Correctly rounded: the fast division may be off by one unit in the last place, and with it a code.
    step = tl.maximum(tl.div_rn(upper - lower, tl.full(upper.shape, top, tl.float32)), _SMALLEST_STEP)
    return lower, step


@triton.jit
def token_position(x: tl.tensor, lower: tl.tensor, step: tl.tensor) -> tl.tensor:
    """Unrounded codes ``x / step - lower / step`` by the bounds of each row, with the roundings of the reference."""
    return x * tl.div_rn(1.0, step)[:, None] + tl.div_rn(-lower, step)[:, None]


@triton.jit
def standardize(x: tl.tensor, mask: tl.tensor, count: tl.constexpr, eps: float) -> tl.tensor:
    """``(x - mean) / sqrt(var + eps)`` over axis 1, where ``mask`` holds and ``count`` values a row do; float32."""
    mean = tl.sum(tl.where(mask, x, 0.0), 1) / count
    # Two passes over registers: E[x^2] - E[x]^2 cancels where the mean is large. Padding must not count as -mean.
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
        # Eight codes are three bytes, which no word holds: three byte loads each.
        bytes_at = first // 8 * 3 + tl.arange(0, COLUMNS // 8) * 3
        mask = row_mask[:, None] & (bytes_at < ROW_BYTES)[None, :]
        at = codes_ptr + rows[:, None] * ROW_BYTES + bytes_at[None, :]
        low = tl.load(at, mask=mask, other=0).to(tl.int32)
        middle = tl.load(at + 1, mask=mask, other=0).to(tl.int32)
        high = tl.load(at + 2, mask=mask, other=0).to(tl.int32)
        codes = _split_words(low | (middle << 8) | (high << 16), 8, 3)
    elif BITS < 5:
        # Rows are padded to whole words, so one 32-bit load brings 8 or 16 codes.
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
        # Odd integers carry the half step of mid-rise weights; at 8 bits they exceed int8, see `contract`.
        effective = codes * 2 + (1 - (1 << BITS))
    else:
        effective = codes - (1 << (BITS - 1))
    return effective.to(tl.int8)


@triton.jit
def _split_words(words: tl.tensor, PER_WORD: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    """`[R, W]` int32 words to `[R, W * PER_WORD]` codes, the lowest bits first."""
    # A sign bit that the shift drags in falls to the mask, so int32 serves as well as unsigned.
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
        # sum_j s (2 w + 1) = 2 sum_j s w + sum_j s
        twice = tl.dot(left, tl.trans(weight), out_dtype=tl.int32) * 2
        acc += twice + tl.sum(left.to(tl.int32), 1)[:, None]
    else:
        acc = tl.dot(left, tl.trans(weight), acc, out_dtype=tl.int32)
    return acc


@triton.jit
def start_accumulator(start_ptr: tl.tensor, columns: tl.tensor, inside: tl.tensor, ROWS: tl.constexpr) -> tl.tensor:
    """`[ROWS, C]` int32 that begins with ``start`` (see `operands`): unsigned codes from signed ones, at no cost."""
    start = tl.load(start_ptr + columns, mask=inside, other=0)
    return tl.zeros([ROWS, columns.shape[0]], tl.int32) + start[None, :]


@triton.jit
def dequantize(
    acc: tl.tensor, scale_ptr: tl.tensor, constant_ptr: tl.tensor, columns: tl.tensor, inside: tl.tensor
) -> tl.tensor:
    """``acc * scale + constant``, `[R, C]` float32, by the scale and constant of each column."""
    scale = tl.load(scale_ptr + columns, mask=inside, other=0.0)
    constant = tl.load(constant_ptr + columns, mask=inside, other=0.0)
    return acc.to(tl.float32) * scale[None, :] + constant[None, :]


@triton.jit
def add_residual(
    y: tl.tensor, residual_ptr: tl.tensor, rows: tl.tensor, stride: int, columns: tl.tensor, mask: tl.tensor
) -> tl.tensor:
    """``y`` plus the same tile of the residual; ``y`` where there is none."""
    if residual_ptr is not None:
        y += load_rows(residual_ptr, rows, stride, columns, mask)
    return y


@triton.jit
def gelu(x: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """``KIND`` "erf": exact; "tanh": the tanh form, written with a sigmoid; "none": the identity."""
    if KIND == "erf":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "tanh":
        # 0.5 (1 + tanh(u)) = sigmoid(2 u): one exponential, and no overflow.
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


__all__ = [
    "add_residual",
    "bounds_of",
    "contract",
    "dequantize",
    "gelu",
    "load_rows",
    "load_weight",
    "quantize_columns",
    "row_extremes",
    "signed_codes",
    "standardize",
    "start_accumulator",
    "token_position",
    "unsigned_codes",
]
