"""Device functions that the kernels share: loads, LayerNorm, rounding, integer contraction, epilogues.

Every kernel is launched without contraction of multiply-adds (`launch.OPTIONS`): a code of an input is
``round(round(x * r) + c)``, each rounded to float32, and a fused multiply-add would round once. Where values were
computed in the kernel, and where no code depends on the last bit, `tl.fma` is written out.

Names: ``rows`` and ``columns`` are vectors of indices, ``inside`` says which of the columns exist, and ``mask`` is
`[R, C]`. Capitals are compile-time constants.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from harmoq_ao.quant.quantizer import MIN_STEP

ROUNDING = tl.constexpr(12582912.0)
"""1.5 * 2**23. Adding it to a float32 in -2**22 .. 2**22 leaves the nearest integer, ties to even, in the low bits."""

GELU_ERROR = 1.4e-4
"""Largest absolute error of `gelu`, either kind, for any float32 (a test measures it)."""

_SMALLEST_STEP = tl.constexpr(MIN_STEP)


class Linear(NamedTuple):
    """A quantized linear as `operands.PackedLinear` has it; kernels build it in the call, so that constants stay so.

    Attributes:
        weight_ptr: `[N, ROW]` int8.
        start_ptr: `[N]` int32, where accumulators start.
        scale_ptr: `[N]` float32.
        constant_ptr: `[N]` float32.
        reciprocal_ptr: `[K]` float32, or None.
        offset_ptr: `[K]` float32, or None.
        ROW: Bytes of a row of weights; zeros behind K.
        DOUBLED: Whether contractions are doubled and row sums of the codes added (`integers`).
        ACT_BITS: Width of an activation code; 0 where weights and activations stay bfloat16 (`operands.from_floats`).
    """

    weight_ptr: tl.tensor
    start_ptr: tl.tensor
    scale_ptr: tl.tensor
    constant_ptr: tl.tensor
    reciprocal_ptr: tl.tensor
    offset_ptr: tl.tensor
    ROW: tl.constexpr
    DOUBLED: tl.constexpr
    ACT_BITS: tl.constexpr


class Norm(NamedTuple):
    """A LayerNorm behind an operation; ``weight_ptr`` is None where there is none.

    Attributes:
        weight_ptr: `[N]` float32, or None.
        bias_ptr: `[N]` float32.
        eps: Added to the variance.
    """

    weight_ptr: tl.tensor
    bias_ptr: tl.tensor
    eps: float


# --- floats -----------------------------------------------------------------------------------------------------------


@triton.jit
def load_rows(ptr: tl.tensor, rows: tl.tensor, stride: int, columns: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Tile `[R, C]` of a matrix with unit column stride, as float32; zero outside ``mask``."""
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def window_rows(
    index_ptr: tl.tensor, window: tl.tensor, windows: int, length: int, tokens: tl.tensor, TOKENS: tl.constexpr
) -> tl.tensor:
    """Rows of a window's tokens, int64 and negative where there is none.

    With an index, `[windows, TOKENS]` int32 rows within an image of ``length`` tokens; without one, windows lie one
    after the other. Rows times channels of a large image exceed 2**31.
    """
    if index_ptr is None:
        rows = window.to(tl.int64) * TOKENS + tokens
    else:
        at = (window % windows).to(tl.int64) * TOKENS + tokens
        index = tl.load(index_ptr + at, mask=tokens < TOKENS, other=-1).to(tl.int64)
        rows = tl.where(index < 0, index, (window // windows).to(tl.int64) * length + index)
    return rows


@triton.jit
def standardize(x: tl.tensor, mask: tl.tensor, count: tl.constexpr, eps: float) -> tl.tensor:
    """``(x - mean) / sqrt(var + eps)`` over axis 1, where ``mask`` holds and ``count`` values a row do; float32.

    ``x`` is zero where ``mask`` does not hold, and so is the result.
    """
    mean = tl.sum(x, 1) * (1.0 / count)
    # Two passes over registers: E[x^2] - E[x]^2 cancels where the mean is large. Padding must not count as -mean.
    centred = tl.where(mask, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) * (1.0 / count)
    return centred * tl.rsqrt(variance + eps)[:, None]


@triton.jit
def gelu(x: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """GELU of ``KIND`` "erf" or "tanh", to `GELU_ERROR`; "none": the identity.

    ``max(x, 0) - P(a)`` with ``a = min(|x|, A)``. ``P(a)`` is the minimax polynomial of ``a - gelu(a)`` on 0 .. A with
    ``P(0) = P(A) = 0``: eight multiply-adds, where the error function takes thirty instructions.
    """
    if KIND == "erf":
        a = tl.minimum(tl.abs(x), 4.0)
        p = tl.fma(a, 5.37634951e-05, -0.00151399849)
        p = tl.fma(tl.fma(tl.fma(p, a, 0.0156784542), a, -0.0774776563), a, 0.178364724)
        p = tl.fma(tl.fma(tl.fma(p, a, -0.0832789019), a, -0.369858772), a, 0.4965747)
        x = tl.fma(-p, a, tl.maximum(x, 0.0))
    elif KIND == "tanh":
        a = tl.minimum(tl.abs(x), 3.95)
        p = tl.fma(a, 4.38001081e-05, -0.0013490374)
        p = tl.fma(tl.fma(tl.fma(p, a, 0.0145433117), a, -0.073360838), a, 0.170202151)
        p = tl.fma(tl.fma(tl.fma(p, a, -0.0750250891), a, -0.373400867), a, 0.497067273)
        x = tl.fma(-p, a, tl.maximum(x, 0.0))
    return x


@triton.jit
def unary(x: tl.tensor, slope: tl.constexpr, KIND: tl.constexpr) -> tl.tensor:
    """A function of `common.elementwise.Unary`, GELU as :func:`gelu`; -1: the identity."""
    if KIND == 0:
        x = gelu(x, "erf")
    elif KIND == 1:
        x = gelu(x, "tanh")
    elif KIND == 2:
        x = tl.sigmoid(x)
    elif KIND == 3:
        x = tl.maximum(x, 0.0)
    elif KIND == 4:
        x = tl.where(x >= 0, x, x * slope)
    elif KIND == 5:
        x = x * tl.sigmoid(x)
    elif KIND == 6:
        x = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    return x


# --- codes ------------------------------------------------------------------------------------------------------------


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
def float_codes(position: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """`unsigned_codes` as whole float32 numbers: exact in 16-bit floats, and so are their products in float32."""
    top: tl.constexpr = (1 << BITS) - 1.0
    clamped = tl.minimum(tl.maximum(position, 0.0), top)
    return (clamped + ROUNDING) - ROUNDING


@triton.jit
def quantize_columns(
    x: tl.tensor, linear: Linear, columns: tl.tensor, inside: tl.tensor, EXACT: tl.constexpr
) -> tl.tensor:
    """Signed codes of ``x * reciprocal + offset``, `[R, C]` int8, by static qparams of each column; or bfloat16.

    ``EXACT``: product and sum are rounded one by one, as in `integer_reference`; else ``x`` was computed here, and a
    fused multiply-add is closer to the truth.
    """
    reciprocal = tl.load(linear.reciprocal_ptr + columns, mask=inside, other=0.0)
    # Columns of padding get 0 * 0 + half, the signed code 0: they add nothing to a contraction.
    offset = tl.load(linear.offset_ptr + columns, mask=inside, other=(1 << linear.ACT_BITS) // 2)
    if EXACT:
        position = x * reciprocal[None, :] + offset[None, :]
    else:
        position = tl.fma(x, tl.broadcast_to(reciprocal[None, :], x.shape), tl.broadcast_to(offset[None, :], x.shape))
    if linear.ACT_BITS == 0:
        left = position.to(tl.bfloat16)
    else:
        left = signed_codes(position, linear.ACT_BITS)
    return left


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


# --- integers ---------------------------------------------------------------------------------------------------------


@triton.jit
def start_accumulator(linear: Linear, columns: tl.tensor, inside: tl.tensor, ROWS: tl.constexpr) -> tl.tensor:
    """`[ROWS, C]` int32 that begins with ``start`` (see `operands`): unsigned codes from signed ones, at no cost.

    Of floats, zeros.
    """
    if linear.ACT_BITS == 0:
        acc = tl.zeros([ROWS, columns.shape[0]], tl.float32)
    else:
        start = tl.load(linear.start_ptr + columns, mask=inside, other=0)
        acc = tl.zeros([ROWS, columns.shape[0]], tl.int32) + start[None, :]
    return acc


@triton.jit
def contract(
    left: tl.tensor,
    linear: Linear,
    rows: tl.tensor,
    inside: tl.tensor,
    first: tl.tensor,
    acc: tl.tensor,
) -> tl.tensor:
    """``acc + sum_j left[m, j] w[n, first + j]`` in int32 (float32) for the weights' rows ``rows``.

    ``left`` is `[M, K]` int8 (bfloat16), K at least 32; rows of weights are padded to whole blocks of K.
    """
    at = linear.weight_ptr + rows[:, None] * linear.ROW + first + tl.arange(0, left.shape[1])[None, :]
    weight = tl.load(at, mask=inside[:, None], other=0)
    return tl.dot(left, tl.trans(weight), acc, out_dtype=acc.dtype)


@triton.jit
def no_sums(ROWS: tl.constexpr) -> tl.tensor:
    """Row sums that begin at zero, in sixteen equal columns: `[ROWS, 16]` int32."""
    return tl.zeros([ROWS, 16], tl.int32)


@triton.jit
def add_row_sums(left: tl.tensor, sums: tl.tensor, linear: Linear) -> tl.tensor:
    """``sums`` plus the row sums of ``left``, where the linear needs them: a product with ones leaves them in place."""
    if linear.DOUBLED:
        sums = tl.dot(left, tl.full([left.shape[1], 16], 1, tl.int8), sums, out_dtype=tl.int32)
    return sums


@triton.jit
def integers(acc: tl.tensor, sums: tl.tensor, linear: Linear) -> tl.tensor:
    """``A`` of `operands`: ``acc``, or twice that plus the row sums where ``2 w + 1`` does not fit into int8."""
    if linear.DOUBLED:
        acc = acc * 2 + tl.max(sums, 1)[:, None]
    return acc


@triton.jit
def dequantize(acc: tl.tensor, sums: tl.tensor, linear: Linear, columns: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """``A * scale + constant``, `[R, C]` float32, by the scale and constant of each column."""
    scale = tl.load(linear.scale_ptr + columns, mask=inside, other=0.0)
    constant = tl.load(linear.constant_ptr + columns, mask=inside, other=0.0)
    values = integers(acc, sums, linear).to(tl.float32)
    return tl.fma(values, tl.broadcast_to(scale[None, :], acc.shape), tl.broadcast_to(constant[None, :], acc.shape))


# --- what comes last --------------------------------------------------------------------------------------------------


@triton.jit
def store_rows(
    y: tl.tensor,
    norm: Norm,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    mask: tl.tensor,
    COUNT: tl.constexpr,
) -> None:
    """Write rows of ``COUNT`` channels: ``y``, behind a LayerNorm where there is one, plus the residual likewise."""
    if norm.weight_ptr is not None:
        y = standardize(tl.where(mask, y, 0.0), mask, COUNT, norm.eps)
        weight = tl.load(norm.weight_ptr + columns, mask=columns < COUNT, other=0.0)
        y = y * weight[None, :] + tl.load(norm.bias_ptr + columns, mask=columns < COUNT, other=0.0)[None, :]
    if residual_ptr is not None:
        y += load_rows(residual_ptr, rows, COUNT, columns, mask)
    tl.store(out_ptr + rows[:, None] * COUNT + columns[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)
