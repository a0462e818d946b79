"""Linear on packed 2 to 8 bit weights and 2 to 8 bit activations, int8 tensor cores, int32 accumulators.

With the names of `operands`::

    A_mi = sum_j q_mj E_ij                                  exact
    y_mi = scale_i A_mi + constant_i + residual_mi          static (per token: step_m and lower_m total_i come in)

The activation comes as uint8 codes of a static range, or as floats, quantized in registers by static qparams or qparams
per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from harmoq_ao.common.errors import KernelError
from harmoq_ao.quant import integer_reference as integers
from harmoq_ao.triton_kernels.device import (
    add_residual,
    bounds_of,
    contract,
    load_rows,
    load_weight,
    quantize_columns,
    row_extremes,
    signed_codes,
    start_accumulator,
    token_position,
)
from harmoq_ao.triton_kernels.launch import FLOATS, OPTIONS, blocks, check_matrix, check_residual, power_of_two
from harmoq_ao.triton_kernels.operands import PackedLinear


@triton.jit
def lowbit_linear_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    start_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    constant_ptr: tl.tensor,
    reciprocal_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    total_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    M: int,
    x_stride: int,
    residual_stride: int,
    K: tl.constexpr,
    N: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    MID_RISE: tl.constexpr,
    ACT_BITS: tl.constexpr,
    INPUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One `[BLOCK_M, BLOCK_N]` tile.

    ``INPUT``: "codes" (uint8), "static" or "token" (floats). An int32 ``out_ptr`` takes the accumulators themselves.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = rows < M, columns < N
    # Harmless values: the compiler drops what no branch below reads.
    lower = tl.zeros([BLOCK_M], tl.float32)
    step = tl.full([BLOCK_M], 1.0, tl.float32)
    if INPUT == "token":
        # A row's range takes all of its channels: one more pass, before the contraction.
        lower, step = _row_bounds(x_ptr, reciprocal_ptr, rows, row_mask, x_stride, K, ACT_BITS, BLOCK_M, BLOCK_K)
    acc = start_accumulator(start_ptr, columns, column_mask, BLOCK_M)
    # The activation is rounded anew in each tile of columns: no codes travel through memory.
    for first in range(0, K, BLOCK_K):
        channels = first + tl.arange(0, BLOCK_K)
        left = _activation(
            x_ptr, reciprocal_ptr, offset_ptr, lower, step, rows, row_mask, channels, x_stride, K, ACT_BITS, INPUT
        )
        weight = load_weight(weight_ptr, columns, column_mask, first, ROW_BYTES, BLOCK_K, BITS, MID_RISE)
        acc = contract(left, weight, acc, BITS, MID_RISE)
    out_at = out_ptr + rows[:, None] * N + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    # Accumulators are for tests: they must equal the reference bit for bit.
    if out_ptr.dtype.element_ty == tl.int32:
        tl.store(out_at, acc, mask=mask)
    else:
        y = acc.to(tl.float32) * tl.load(scale_ptr + columns, mask=column_mask, other=0.0)[None, :]
        if INPUT == "token":
            # x = step q + lower: the lower bound contributes the sum of the weights, which `total` holds.
            total = tl.load(total_ptr + columns, mask=column_mask, other=0.0)
            y = y * step[:, None] + lower[:, None] * total[None, :]
        y += tl.load(constant_ptr + columns, mask=column_mask, other=0.0)[None, :]
        y = add_residual(y, residual_ptr, rows, residual_stride, columns, mask)
        tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _row_bounds(
    x_ptr: tl.tensor,
    reciprocal_ptr: tl.tensor,
    rows: tl.tensor,
    row_mask: tl.tensor,
    x_stride: int,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """``(lower, step)`` of whole rows, `[BLOCK_M]`, in a pass of their own over the row."""
    lower = tl.full([BLOCK_M], float("inf"), tl.float32)
    upper = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for first in range(0, K, BLOCK_K):
        channels = first + tl.arange(0, BLOCK_K)
        mask = row_mask[:, None] & (channels < K)[None, :]
        x = load_rows(x_ptr, rows, x_stride, channels, mask)
        if reciprocal_ptr is not None:
            x = x * tl.load(reciprocal_ptr + channels, mask=channels < K, other=0.0)[None, :]
        least, most = row_extremes(x, mask)
        lower, upper = tl.minimum(lower, least), tl.maximum(upper, most)
    return bounds_of(lower, upper, BITS)


@triton.jit
def _activation(
    x_ptr: tl.tensor,
    reciprocal_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    lower: tl.tensor,
    step: tl.tensor,
    rows: tl.tensor,
    row_mask: tl.tensor,
    channels: tl.tensor,
    x_stride: int,
    K: tl.constexpr,
    BITS: tl.constexpr,
    INPUT: tl.constexpr,
) -> tl.tensor:
    """Signed codes `[BLOCK_M, BLOCK_K]` int8, zero beyond channel K."""
    inside = channels < K
    mask = row_mask[:, None] & inside[None, :]
    if INPUT == "codes":
        half: tl.constexpr = 1 << (BITS - 1)
        at = x_ptr + rows[:, None] * x_stride + channels[None, :]
        # int16 between: an unsigned byte less 128 does not fit into a signed one.
        return (tl.load(at, mask=mask, other=half).to(tl.int16) - half).to(tl.int8)
    x = load_rows(x_ptr, rows, x_stride, channels, mask)
    if INPUT == "static":
        return quantize_columns(x, reciprocal_ptr, offset_ptr, channels, inside, BITS)
    if reciprocal_ptr is not None:
        x = x * tl.load(reciprocal_ptr + channels, mask=inside, other=0.0)[None, :]
    codes = signed_codes(token_position(x, lower, step), BITS)
    # No offset of a column can make padding the code 0 here.
    return tl.where(inside[None, :], codes, 0)


def launch_lowbit_linear(
    x: Tensor,
    weight: PackedLinear,
    *,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Run `lowbit_linear_kernel`; arguments as in `reference`.

    Raises:
        KernelError: Operands that the kernel does not take.
    """
    _check_operands(x, weight, residual, out_dtype)
    return _run(x, weight, residual, out_dtype)


def launch_accumulate(codes: Tensor, weight: PackedLinear) -> Tensor:
    """Accumulators ``A`` of uint8 codes `[M, K]`: `[M, N]` int32.

    Raises:
        KernelError: Operands that the kernel does not take.
    """
    check_matrix(codes, weight.columns, "The activation", (torch.uint8,))
    return _run(codes, weight, None, torch.int32)


def canonical(acc: Tensor, codes: Tensor, weight: PackedLinear) -> Tensor:
    """`reference.linear_accumulate`'s integers ``sum_j q_j w_ij`` from ``A``."""
    return (acc - codes.sum(1, keepdim=True, dtype=torch.int32)) // 2 if weight.mid_rise else acc


def _run(x: Tensor, weight: PackedLinear, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    if x.dtype == torch.uint8:
        mode = "codes"
    else:
        mode = "static" if weight.static else "token"
    sizes = tile(weight.rows, weight.columns)
    out = torch.empty(len(x), weight.rows, dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    lowbit_linear_kernel[(blocks(len(x), sizes["BLOCK_M"]), blocks(weight.rows, sizes["BLOCK_N"]))](
        x, *weight.tensors, weight.total, residual, out,
        len(x), x.stride(0), 0 if residual is None else residual.stride(0),
        K=weight.columns, N=weight.rows, **weight.constants(), INPUT=mode, **sizes,
        num_warps=4, num_stages=2, **OPTIONS,
    )  # fmt: skip
    return out


def tile(rows: int, columns: int) -> dict[str, int]:
    """Block sizes: 64 rows of activations are one wgmma; the contraction goes in steps of up to 128."""
    return {
        "BLOCK_M": 64,
        "BLOCK_N": min(power_of_two(rows, 16), 64),
        "BLOCK_K": min(power_of_two(columns, 32), 64 if columns <= 192 else 128),
    }


def _check_operands(x: Tensor, weight: PackedLinear, residual: Tensor | None, out_dtype: torch.dtype) -> None:
    check_matrix(x, weight.columns, "The activation", (torch.uint8, *FLOATS))
    check_residual(residual, len(x), weight.rows)
    if out_dtype not in FLOATS:
        raise KernelError("The kernel does not write this type", found=out_dtype, expected=FLOATS)
    if x.dtype == torch.uint8 and not weight.static:
        raise KernelError("Codes need a static range", found="a range per token", expected="static, or floats as input")


# --- reference --------------------------------------------------------------------------------------------------------


def reference_accumulate(codes: Tensor, weight: PackedLinear) -> Tensor:
    """``A`` in plain torch: `[M, K]` uint8 codes to `[M, N]` int32."""
    effective = weight.effective_codes()
    if codes.device.type == "cpu":
        return codes.to(torch.int32) @ effective.to(torch.int32).t()
    # No integer product on GPUs; float64 holds these sums exactly.
    return (codes.double() @ effective.double().t()).to(torch.int32)


def reference(
    x: Tensor,
    weight: PackedLinear,
    *,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Quantized linear and residual.

    Args:
        x: `[M, K]` uint8 codes of a static range, or float32, float16 or bfloat16.
        weight: From `operands.from_operands`.
        residual: `[M, N]` floats added last, or None.
        out_dtype: float32, float16 or bfloat16.

    Returns:
        `[M, N]` of ``out_dtype``.
    """
    # Step by step as in the kernel, so that integers can be compared and floats differ by rounding alone.
    codes, act = _codes(x, weight)
    y = reference_accumulate(codes, weight).float() * weight.scale
    if act is not None and weight.total is not None:
        y = y * act.step + act.lower * weight.total
    y = y + weight.constant
    return (y if residual is None else y + residual.float()).to(out_dtype)


def _codes(x: Tensor, weight: PackedLinear) -> tuple[Tensor, integers.Affine | None]:
    """Codes of ``x``, and their qparams where each token has its own."""
    if x.dtype == torch.uint8:
        return x, None
    if weight.reciprocal is not None and weight.offset is not None:
        return integers.quantize_codes(x, weight.reciprocal, weight.offset, weight.act_bits), None
    scaled = x.float() if weight.reciprocal is None else x.float() * weight.reciprocal
    return integers.quantize_dynamic(scaled, -1, weight.act_bits)


def reference_behind_norm(x: Tensor, linear: PackedLinear, eps: float | None) -> Tensor:
    """`[M, N]` float32 of a linear behind a LayerNorm whose affine `operands.with_norm` folded; None for no norm."""
    values = x.float()
    if eps is not None:
        values = F.layer_norm(values, (values.shape[-1],), eps=eps)
    return reference(values, linear)


__all__ = [
    "canonical",
    "launch_accumulate",
    "launch_lowbit_linear",
    "lowbit_linear_kernel",
    "reference",
    "reference_accumulate",
    "reference_behind_norm",
    "tile",
]
