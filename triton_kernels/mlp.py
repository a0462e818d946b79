"""The MLP of a transformer block in one kernel: [LayerNorm] + quantize + fc1 + GELU + quantize + fc2 [+ residual].

With ``A`` of `operands` for both linears::

    q = clamp(round_half_even(n(x) r1 + c1), ...)           n: the identity, or (x - mean) / sqrt(var + eps)
    h = gelu(scale1 A1(q) + constant1)                      never leaves the registers
    p = clamp(round_half_even(h r2 + c2), ...)
    y = scale2 A2(p) + constant2 + residual

A program takes one tile of rows; the hidden channels go in blocks, whose weights are unpacked in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from harmoq_ao.common.errors import KernelError
from harmoq_ao.triton_kernels import lowbit_linear
from harmoq_ao.triton_kernels.device import (
    add_residual,
    contract,
    dequantize,
    gelu,
    load_rows,
    load_weight,
    quantize_columns,
    standardize,
    start_accumulator,
)
from harmoq_ao.triton_kernels.launch import (
    FLOATS,
    GELU_KINDS,
    MAX_CHANNELS,
    OPTIONS,
    blocks,
    check_choice,
    check_matrix,
    check_residual,
    power_of_two,
)
from harmoq_ao.triton_kernels.operands import PackedLinear


@triton.jit
def mlp_kernel(
    x_ptr: tl.tensor,
    weight1_ptr: tl.tensor,
    start1_ptr: tl.tensor,
    scale1_ptr: tl.tensor,
    constant1_ptr: tl.tensor,
    reciprocal1_ptr: tl.tensor,
    offset1_ptr: tl.tensor,
    weight2_ptr: tl.tensor,
    start2_ptr: tl.tensor,
    scale2_ptr: tl.tensor,
    constant2_ptr: tl.tensor,
    reciprocal2_ptr: tl.tensor,
    offset2_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    M: int,
    x_stride: int,
    residual_stride: int,
    eps: float,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    ROW_BYTES1: tl.constexpr,
    ROW_BYTES2: tl.constexpr,
    BITS1: tl.constexpr,
    BITS2: tl.constexpr,
    MID_RISE1: tl.constexpr,
    MID_RISE2: tl.constexpr,
    ACT_BITS1: tl.constexpr,
    ACT_BITS2: tl.constexpr,
    GELU: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
) -> None:
    """One tile, `[BLOCK_M, C]` to `[BLOCK_M, OUT]`."""
    channels, outputs = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_O)
    # Offsets of rows are int64: tokens times channels of a large image exceed 2**31.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (rows < M)[:, None] & (channels < C)[None, :]
    x = load_rows(x_ptr, rows, x_stride, channels, mask)
    if NORM:
        # The affine of the norm is part of the quantizer (`operands.with_norm`).
        x = standardize(x, mask, C, eps)
    left = quantize_columns(x, reciprocal1_ptr, offset1_ptr, channels, channels < C, ACT_BITS1)
    acc2 = start_accumulator(start2_ptr, outputs, outputs < OUT, BLOCK_M)
    for first in range(0, HIDDEN, BLOCK_H):
        # A block of hidden channels is made, rounded and contracted at once, so no row of them is ever whole.
        units = first + tl.arange(0, BLOCK_H)
        inside = units < HIDDEN
        weight1 = load_weight(weight1_ptr, units, inside, 0, ROW_BYTES1, BLOCK_C, BITS1, MID_RISE1)
        acc1 = contract(left, weight1, start_accumulator(start1_ptr, units, inside, BLOCK_M), BITS1, MID_RISE1)
        h = gelu(dequantize(acc1, scale1_ptr, constant1_ptr, units, inside), GELU)
        codes = quantize_columns(h, reciprocal2_ptr, offset2_ptr, units, inside, ACT_BITS2)
        weight2 = load_weight(weight2_ptr, outputs, outputs < OUT, first, ROW_BYTES2, BLOCK_H, BITS2, MID_RISE2)
        acc2 = contract(codes, weight2, acc2, BITS2, MID_RISE2)
    y = dequantize(acc2, scale2_ptr, constant2_ptr, outputs, outputs < OUT)
    out_mask = (rows < M)[:, None] & (outputs < OUT)[None, :]
    y = add_residual(y, residual_ptr, rows, residual_stride, outputs, out_mask)
    tl.store(out_ptr + rows[:, None] * OUT + outputs[None, :], y.to(out_ptr.dtype.element_ty), mask=out_mask)


def launch_mlp(
    x: Tensor,
    fc1: PackedLinear,
    fc2: PackedLinear,
    *,
    gelu: str = "erf",
    eps: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Run `mlp_kernel`; arguments as in `reference`.

    Raises:
        KernelError: Operands that the kernel does not take.
    """
    check_operands(x, fc1, fc2, gelu, residual)
    out = torch.empty(len(x), fc2.rows, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    sizes, warps = tile(fc1.columns, fc1.rows, fc2.rows)
    mlp_kernel[(blocks(len(x), sizes["BLOCK_M"]),)](
        x, *fc1.tensors, *fc2.tensors, residual, out,
        len(x), x.stride(0), 0 if residual is None else residual.stride(0), eps or 0.0,
        C=fc1.columns, HIDDEN=fc1.rows, OUT=fc2.rows, GELU=gelu, NORM=eps is not None,
        **fc1.constants("1"), **fc2.constants("2"), **sizes, num_warps=warps, num_stages=1, **OPTIONS,
    )  # fmt: skip
    return out


def tile(channels: int, hidden: int, outputs: int) -> tuple[dict[str, int], int]:
    """Block sizes and warps. Wide rows take eight warps, or their accumulators spill."""
    # 64 rows are one wgmma.
    wide = max(channels, outputs) > 64
    sizes = {
        "BLOCK_M": 64,
        "BLOCK_C": power_of_two(channels, 32),
        "BLOCK_H": 64 if wide or hidden > 128 else power_of_two(hidden, 32),
        "BLOCK_O": power_of_two(outputs, 16),
    }
    return sizes, 8 if wide else 4


def check_operands(x: Tensor, fc1: PackedLinear, fc2: PackedLinear, gelu: str, residual: Tensor | None) -> None:
    """Raise KernelError where an argument of `launch_mlp` does not fit."""
    check_matrix(x, fc1.columns, "The activation", FLOATS)
    check_choice(gelu, GELU_KINDS, "activation function")
    if fc1.rows != fc2.columns:
        raise KernelError("fc1 and fc2 do not meet", found=f"{fc1.rows} and {fc2.columns} hidden channels")
    if not (fc1.static and fc2.static):
        raise KernelError(
            "The fused MLP takes static bounds",
            found="bounds per token",
            remedy="use two lowbit_linear calls, the hidden row is needed whole",
        )
    if max(fc1.columns, fc2.rows) > MAX_CHANNELS:
        raise KernelError("Too wide for one program", found=(fc1.columns, fc2.rows), expected=f"<= {MAX_CHANNELS}")
    check_residual(residual, len(x), fc2.rows)


def reference(
    x: Tensor,
    fc1: PackedLinear,
    fc2: PackedLinear,
    *,
    gelu: str = "erf",
    eps: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Quantized MLP.

    Args:
        x: `[M, C]` float32, float16 or bfloat16.
        fc1: `[H, C]`, static bounds; from `operands.with_norm` if ``eps`` is given.
        fc2: `[O, H]`, static bounds.
        gelu: "none", "erf" or "tanh".
        eps: The LayerNorm's, or None for no LayerNorm.
        residual: `[M, O]` floats added last (the block's input, as a rule), or None.

    Returns:
        `[M, O]` in the type of ``x``.
    """
    h = lowbit_linear.reference_behind_norm(x, fc1, eps)
    if gelu != "none":
        h = F.gelu(h, approximate="tanh" if gelu == "tanh" else "none")
    return lowbit_linear.reference(h, fc2, residual=residual, out_dtype=x.dtype)


__all__ = ["check_operands", "launch_mlp", "mlp_kernel", "reference", "tile"]
