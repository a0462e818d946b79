"""Quantized contractions in plain torch integer arithmetic: the semantics that every other backend reproduces.

Three stages, each a function here: float to codes (`quantize_codes`), codes to integer accumulators
(`linear_accumulate`, `matmul_accumulate`: exact, so every backend gives the same integers bit for bit), accumulators to
float (`linear_epilogue`, `matmul_epilogue`: float32, equal up to rounding). `linear` and `matmul` chain the three.

Algebra of a linear, with activation codes ``q`` (unsigned), weight codes ``w`` (signed, ``code - 2**(b-1)``), ``a`` and
``l`` the step and lower bound of the activation, ``g_i`` and ``z_i`` the step and shift of weight row ``i``::

    x~_j  = a q_j + l             W~_ij = g_i (w_ij + z_i)
    y_i   = a g_i (sum_j q_j w_ij + z_i sum_j q_j) + l sum_j W~_ij + bias_i

The first sum is the canonical accumulator; the last two terms are constant per row when ``l`` is static (`fold_bias`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from harmoq_ao.common.errors import InputError, KernelError
from harmoq_ao.common.tracing import is_traced
from harmoq_ao.quant.quantizer import step_size

INT32_LINEAR_LENGTH = (2**31 - 1) // (255 * 128)  # longest contraction of u8 and s8 codes that int32 always holds
INT32_MATMUL_LENGTH = (2**31 - 1) // (255 * 255)  # the same for two u8 operands
_FLOAT32_LENGTH = 2**24 // (255 * 255)  # products whose sum is exact in float32
_LONG_AXIS = 2048  # reductions along a strided axis fold from here on
_FOLD = 64


@dataclass(frozen=True)
class Affine:
    """Codes to values, ``value = step * code + lower``; scalars, or tensors that broadcast against the contraction.

    Attributes:
        step: Distance between neighbouring values, float32, positive: 0-d, or one per token `[..., 1]` (per column
            `[..., 1, N]` for the right operand of a matmul).
        lower: Value of code 0, float32, shaped like ``step``.
        bits: Width of a code, 2 to 8.
    """

    step: Tensor
    lower: Tensor
    bits: int


@dataclass(frozen=True)
class LinearOperands:
    """Operands of a quantized linear other than its input.

    Attributes:
        weight: `[N, K]` int8 signed codes.
        weight_scale: `[N]` float32 step of each row.
        weight_shift: `[N]` float32 value of the signed code 0 of each row, in steps: one half for mid-rise weights.
        bias: `[N]` float32, or None.
        act_bits: Width of an activation code, 2 to 8.
        act: Static bounds of the activation (0-d), or None for one pair of bounds per token, taken from the token.
        joint_scale: `[K]` float32 that divides the input channel by channel, or None for ones. The weight codes
            already include it (they are codes of ``W * joint_scale``).
        joint_shift: `[K]` float32 that is taken from the input first, or None for zeros; only with static bounds. The
            bias already gives it back.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_shift: Tensor
    bias: Tensor | None
    act_bits: int
    act: Affine | None = None
    joint_scale: Tensor | None = None
    joint_shift: Tensor | None = None

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or self.weight.dtype != torch.int8 or self.weight.numel() == 0:
            raise KernelError(
                "The weight codes of a linear have the wrong type",
                found=f"{self.weight.dtype} {tuple(self.weight.shape)}",
                expected="torch.int8 [N, K], not empty",
            )
        rows, columns = self.weight.shape
        vectors = {"weight_scale": rows, "weight_shift": rows, "bias": rows}
        vectors |= {"joint_scale": columns, "joint_shift": columns}
        for name, length in vectors.items():
            value = getattr(self, name)
            if value is not None and (value.shape != (length,) or value.dtype != torch.float32):
                raise KernelError(
                    f"{name} does not fit the weight codes",
                    found=f"{value.dtype} {tuple(value.shape)}",
                    expected=f"torch.float32 {(length,)}",
                )
        if self.act is not None and self.act.bits != self.act_bits:
            raise KernelError("Two widths for one activation", found=(self.act.bits, self.act_bits), expected="one")
        if self.act is None and self.joint_shift is not None:
            raise KernelError(
                "A joint shift needs static bounds", found="bounds per token", expected="joint_shift=None"
            )


@dataclass(frozen=True)
class MatmulOperand:
    """How one operand of a product of two activations is quantized.

    Attributes:
        bits: Width of a code, 2 to 8.
        act: Static bounds (0-d), or None for bounds from the data: one pair per row of the left operand, per column of
            the right one.
        joint_scale: What divides the operand along the contracted axis, float32: `[K]` for the left operand, `[K, 1]`
            (the reciprocal scale) for the right one; or None.
    """

    bits: int
    act: Affine | None = None
    joint_scale: Tensor | None = None


# --- float to codes ---------------------------------------------------------------------------------------------------


def quantize_codes(x: Tensor, reciprocal: Tensor | float, offset: Tensor | float, bits: int) -> Tensor:
    """``clamp(round_half_even(x * reciprocal + offset), 0, 2**bits - 1)``, multiply and add each rounded to float32.

    Infinities saturate to the end codes. NaN has no code and raises wherever values can be inspected; inside
    `torch.compile` and during CUDA graph capture they cannot, and the code of a NaN is unspecified.

    Args:
        x: Any shape, floating point.
        reciprocal: ``1 / (joint_scale * step)``, float32, broadcasts against ``x``.
        offset: ``-lower / step``, float32, broadcasts against ``x``.
        bits: Width of a code, 2 to 8.

    Returns:
        uint8 codes, shape of ``x``.

    Raises:
        InputError: ``x``, or its product with the scales, holds a NaN.
    """
    position = x.float() * reciprocal
    position = position + offset
    if _can_look(position) and bool(position.isnan().any()):
        raise nan_error()
    return position.round().clamp(0, (1 << bits) - 1).to(torch.uint8)


def _can_look(x: Tensor) -> bool:
    return not is_traced() and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def nan_error() -> InputError:
    """The error for an activation that cannot be quantized."""
    return InputError(
        "An activation to be quantized is not a number",
        found="NaN",
        expected="finite values",
        remedy="check the input image, and run the float parts in bfloat16 or float32 (float16 overflows)",
    )


def static_qparams(
    act: Affine, joint_scale: Tensor | None = None, joint_shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Reciprocal and offset for `quantize_codes`: `[K]` where a joint vector enters, else the shape of ``act.step``."""
    step = act.step if joint_scale is None else act.step * joint_scale
    factor, offset = step.reciprocal(), -act.lower / act.step
    return factor, offset if joint_shift is None else offset - joint_shift * factor


def dynamic_qparams(x: Tensor, axis: int | tuple[int, ...], bits: int) -> tuple[Tensor, Tensor]:
    """Bounds from the data: ``(lower, step)``, float32, the reduced axes kept with length one.

    A constant slice gets the quantizer's smallest step: its code is 0 and its value is kept.

    Args:
        x: Any shape, floating point; already divided by the joint scale, if there is one.
        axis: Axis or axes to take the minimum and maximum over.
        bits: Width of a code, 2 to 8.
    """
    # aminmax takes one axis and is slower than the two vectorised reductions
    lower, upper = _extreme(torch.amin, x, axis).float(), _extreme(torch.amax, x, axis).float()
    return lower, step_size(lower, upper, bits)


def _extreme(reduce: Callable[..., Tensor], x: Tensor, axis: int | tuple[int, ...]) -> Tensor:
    """``reduce(x, axis, keepdim=True)``; a long strided axis goes in two steps, which torch runs fifty times faster."""
    if not isinstance(axis, int) or x.stride(axis) == 1 or x.shape[axis] < _LONG_AXIS or x.numel() == 0:
        return reduce(x, axis, keepdim=True)
    axis = axis % x.dim()
    whole = x.shape[axis] // _FOLD * _FOLD
    folded = reduce(x.narrow(axis, 0, whole).unflatten(axis, (_FOLD, -1)), axis)
    rest = x.narrow(axis, whole, x.shape[axis] - whole)
    return reduce(torch.cat([folded, rest], axis), axis, keepdim=True)


def quantize_dynamic(x: Tensor, axis: int, bits: int, joint_scale: Tensor | None = None) -> tuple[Tensor, Affine]:
    """Codes and bounds of ``x / joint_scale``, one pair of bounds per slice along ``axis``.

    The division is a product with the float32 reciprocal of the scale, so that every backend does the same.
    """
    scaled = x.float() if joint_scale is None else x.float() * joint_scale.reciprocal()
    lower, step = dynamic_qparams(scaled, axis, bits)
    return quantize_codes(scaled, step.reciprocal(), -lower / step, bits), Affine(step, lower, bits)


def quantize_operand(x: Tensor, operand: MatmulOperand, axis: int) -> tuple[Tensor, Affine]:
    """uint8 codes of one operand of a matmul and their bounds; ``axis`` is the contracted one, -1 or -2.

    Raises:
        InputError: ``x`` holds a NaN.
    """
    if operand.act is None:
        return quantize_dynamic(x, axis, operand.bits, operand.joint_scale)
    return quantize_codes(x, *static_qparams(operand.act, operand.joint_scale), operand.bits), operand.act


# --- codes to accumulators --------------------------------------------------------------------------------------------


def linear_accumulate(qx: Tensor, qw: Tensor) -> Tensor:
    """``sum_j qx[m, j] * qw[i, j]``, exact.

    Args:
        qx: `[..., K]` uint8 codes.
        qw: `[N, K]` int8 codes.

    Returns:
        `[..., N]` int32; int64 where ``K > INT32_LINEAR_LENGTH`` and int32 could overflow.

    Raises:
        KernelError: Wrong dtypes or shapes.
    """
    check_linear(qx, qw)
    dtype = torch.int32 if qw.shape[1] <= INT32_LINEAR_LENGTH else torch.int64
    return integer_matmul(qx.flatten(0, -2) if qx.dim() > 1 else qx.unsqueeze(0), qw.t(), dtype).reshape(
        *qx.shape[:-1], qw.shape[0]
    )


def matmul_accumulate(qa: Tensor, qb: Tensor) -> Tensor:
    """``sum_k qa[..., m, k] * qb[..., k, n]``, exact, batch axes broadcast.

    Args:
        qa: `[..., M, K]` uint8 codes.
        qb: `[..., K, N]` uint8 codes.

    Returns:
        `[..., M, N]` int32; int64 where ``K > INT32_MATMUL_LENGTH`` and int32 could overflow.

    Raises:
        KernelError: Wrong dtypes or shapes.
    """
    check_matmul(qa, qb)
    return integer_matmul(qa, qb, matmul_dtype(qa.shape[-1]))


def matmul_dtype(length: int) -> torch.dtype:
    """Integer type of `matmul_accumulate` over ``length`` products."""
    return torch.int32 if length <= INT32_MATMUL_LENGTH else torch.int64


def exact_floats(x: Tensor) -> torch.autocast:
    """Context manager in which float32 products on the device of `x` stay float32 also under autocast.

    Kernels that carry integers in float32 need it: autocast would round them to 8 bits.
    """
    return torch.autocast(x.device.type, enabled=False)


def integer_matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` of integers in ``dtype``, exact as long as that holds the sums; factors are at most 255 in size."""
    if a.device.type == "cpu":
        return a.to(dtype) @ b.to(dtype)
    if a.device.type != "mps":
        # GPUs have no integer matmul in torch; float64 is as exact: 255 * 255 * K stays below 2**53.
        return (a.double() @ b.double()).to(dtype)
    return _float32_matmul(a, b, dtype)


def _float32_matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in float32, in sums of as many products as stay below 2**24."""
    chunks = zip(a.split(_FLOAT32_LENGTH, -1), b.split(_FLOAT32_LENGTH, -2), strict=True)
    return torch.stack([(left.float() @ right.float()).to(dtype) for left, right in chunks]).sum(0, dtype=dtype)


def check_linear(qx: Tensor, qw: Tensor) -> None:
    """Raise KernelError unless `[..., K]` uint8 meets `[N, K]` int8."""
    fits = qx.dim() >= 1 and qw.dim() == 2 and qx.shape[-1] == qw.shape[1]
    if qx.dtype != torch.uint8 or qw.dtype != torch.int8 or not fits:
        raise KernelError(
            "The operands of a quantized linear do not fit",
            found=f"{qx.dtype} {tuple(qx.shape)} and {qw.dtype} {tuple(qw.shape)}",
            expected="torch.uint8 [..., K] and torch.int8 [N, K]",
        )


def check_matmul(qa: Tensor, qb: Tensor) -> None:
    """Raise KernelError unless `[..., M, K]` uint8 meets `[..., K, N]` uint8 with batch axes that broadcast."""
    fits = qa.dim() >= 2 and qb.dim() >= 2 and qa.shape[-1] == qb.shape[-2] and _broadcasts(qa.shape, qb.shape)
    if qa.dtype != torch.uint8 or qb.dtype != torch.uint8 or not fits:
        raise KernelError(
            "The operands of a quantized matmul do not fit",
            found=f"{qa.dtype} {tuple(qa.shape)} and {qb.dtype} {tuple(qb.shape)}",
            expected="torch.uint8 [..., M, K] and [..., K, N]",
        )


def _broadcasts(a: torch.Size, b: torch.Size) -> bool:
    pairs = zip(reversed(a[:-2]), reversed(b[:-2]), strict=False)
    return all(m == n or m == 1 or n == 1 for m, n in pairs)


# --- accumulators to float --------------------------------------------------------------------------------------------


def weight_total(qw: Tensor, weight_scale: Tensor, weight_shift: Tensor) -> Tensor:
    """``sum_j W~_ij``, `[N]` float32: what one unit of the activation's lower bound adds to each output."""
    codes = qw.sum(1, dtype=torch.int64).double()
    return (weight_scale.double() * (codes + weight_shift.double() * qw.shape[1])).float()


def fold_bias(total: Tensor, act_lower: Tensor, bias: Tensor | None) -> Tensor:
    """``act_lower * total + bias``, float32: `[N]` for a static bound, `[..., N]` for bounds per token `[..., 1]`."""
    folded = act_lower * total
    return folded if bias is None else folded + bias


def linear_epilogue(
    acc: Tensor, row_sum: Tensor, act_step: Tensor, weight_scale: Tensor, weight_shift: Tensor, constant: Tensor
) -> Tensor:
    """``act_step * weight_scale * (acc + weight_shift * row_sum) + constant`` in float32.

    Args:
        acc: `[..., N]` integer accumulators of `linear_accumulate`.
        row_sum: `[..., 1]` integer sums of the activation codes of each token.
        act_step: 0-d, or `[..., 1]` per token.
        weight_scale: `[N]`.
        weight_shift: `[N]`.
        constant: `[N]` or `[..., N]` from `fold_bias`.

    Returns:
        `[..., N]` float32.
    """
    contraction = acc.float() + weight_shift * row_sum.float()
    return contraction * weight_scale * act_step + constant


def matmul_epilogue(acc: Tensor, qa: Tensor, qb: Tensor, a: Affine, b: Affine) -> Tensor:
    """``(a.step qa + a.lower) @ (b.step qb + b.lower)`` from the accumulators of the codes, in float32.

    Args:
        acc: `[..., M, N]` from `matmul_accumulate`.
        qa: `[..., M, K]` uint8 codes of the left operand, for its row sums.
        qb: `[..., K, N]` uint8 codes of the right operand, for its column sums.
        a: Bounds of the left operand, 0-d or `[..., M, 1]`.
        b: Bounds of the right operand, 0-d or `[..., 1, N]`.

    Returns:
        `[..., M, N]` float32.
    """
    rows, columns = qa.sum(-1, keepdim=True, dtype=torch.int64), qb.sum(-2, keepdim=True, dtype=torch.int64)
    return product_from_sums(acc, rows, columns, qa.shape[-1], a, b)


def product_from_sums(acc: Tensor, rows: Tensor, columns: Tensor, length: int, a: Affine, b: Affine) -> Tensor:
    """`matmul_epilogue` where the codes are gone and their sums are known.

    Args:
        acc: `[..., M, N]` of products of codes.
        rows: `[..., M, 1]` sums of the left operand's codes.
        columns: `[..., 1, N]` sums of the right operand's codes.
        length: Contracted length.
        a: Bounds of the left operand.
        b: Bounds of the right operand.

    Returns:
        `[..., M, N]` float32.
    """
    left = rows.float() * a.step + a.lower * length
    return acc.float() * a.step * b.step + left * b.lower + columns.float() * b.step * a.lower


# --- whole contractions -----------------------------------------------------------------------------------------------


def linear(x: Tensor, operands: LinearOperands) -> Tensor:
    """Quantized ``F.linear``.

    Args:
        x: `[..., K]` floating point.
        operands: Codes, scales and bounds.

    Returns:
        `[..., N]` in the dtype of ``x``.

    Raises:
        KernelError: ``x`` has the wrong number of channels.
        InputError: ``x`` holds a NaN.
    """
    check_input(x, operands)
    if operands.act is None:
        qx, act = quantize_dynamic(x, -1, operands.act_bits, operands.joint_scale)
    else:
        act = operands.act
        qx = quantize_codes(x, *static_qparams(act, operands.joint_scale, operands.joint_shift), act.bits)
    total = weight_total(operands.weight, operands.weight_scale, operands.weight_shift)
    y = linear_epilogue(
        linear_accumulate(qx, operands.weight),
        qx.sum(-1, keepdim=True, dtype=torch.int64),
        act.step,
        operands.weight_scale,
        operands.weight_shift,
        fold_bias(total, act.lower, operands.bias),
    )
    return y.to(x.dtype)


def check_input(x: Tensor, operands: LinearOperands) -> None:
    """Raise KernelError unless ``x`` is `[..., K]` floating point."""
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != operands.weight.shape[1]:
        raise KernelError(
            "The input does not fit the quantized linear",
            found=f"{x.dtype} {tuple(x.shape)}",
            expected=f"floating point [..., {operands.weight.shape[1]}]",
        )


def matmul(qa: Tensor, qb: Tensor, a: Affine, b: Affine) -> Tensor:
    """Product of two quantized activations, `[..., M, N]` float32; arguments as in `matmul_epilogue`."""
    return matmul_epilogue(matmul_accumulate(qa, qb), qa, qb, a, b)


def quantized_matmul(left: Tensor, right: Tensor, a: MatmulOperand, b: MatmulOperand) -> Tensor:
    """Quantize both operands and multiply them.

    Args:
        left: `[..., M, K]` floating point.
        right: `[..., K, N]` floating point.
        a: Quantizer of the left operand.
        b: Quantizer of the right operand.

    Returns:
        `[..., M, N]` in the dtype of ``left``.

    Raises:
        KernelError: The operands are not floating point or do not fit.
        InputError: An operand holds a NaN.
    """
    check_float_matmul(left, right)
    qa, act_a = quantize_operand(left, a, -1)
    qb, act_b = quantize_operand(right, b, -2)
    return matmul(qa, qb, act_a, act_b).to(left.dtype)


def check_float_matmul(left: Tensor, right: Tensor) -> None:
    """Raise KernelError unless `[..., M, K]` meets `[..., K, N]`, both floating point and not empty along K."""
    fits = left.dim() >= 2 and right.dim() >= 2 and 0 < left.shape[-1] == right.shape[-2]
    floating = left.is_floating_point() and right.is_floating_point()
    if not (fits and floating and _broadcasts(left.shape, right.shape)):
        raise KernelError(
            "The inputs of a quantized matmul do not fit",
            found=f"{left.dtype} {tuple(left.shape)} and {right.dtype} {tuple(right.shape)}",
            expected="floating point [..., M, K] and [..., K, N]",
        )
