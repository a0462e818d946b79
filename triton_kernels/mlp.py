"""The MLP of a block in one kernel: [LayerNorm] quantize, fc1, GELU, quantize, fc2 [LayerNorm] [+ residual].

With ``A`` of `operands` for both linears::

    q = clamp(round_half_even(n(x) r1 + c1), ...)           n: the identity, or (x - mean) / sqrt(var + eps)
    h = gelu(scale1 A1(q) + constant1)                      never leaves the registers
    p = clamp(round_half_even(h r2 + c2), ...)
    y = [n'](scale2 A2(p) + constant2) + residual

A program takes one tile of rows; the hidden channels go in blocks of 64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from harmoq_ao.common.errors import KernelError
from harmoq_ao.triton_kernels import lowbit_linear
from harmoq_ao.triton_kernels.device import (
    Linear,
    Norm,
    add_row_sums,
    contract,
    dequantize,
    gelu,
    load_rows,
    no_sums,
    quantize_columns,
    standardize,
    start_accumulator,
    store_rows,
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
    on_device,
    power_of_two,
)
from harmoq_ao.triton_kernels.operands import Norm as PackedNorm
from harmoq_ao.triton_kernels.operands import PackedLinear, check_norm


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
    after_weight_ptr: tl.tensor,
    after_bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    M: int,
    eps: float,
    after_eps: float,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    ROW1: tl.constexpr,
    ROW2: tl.constexpr,
    DOUBLED1: tl.constexpr,
    DOUBLED2: tl.constexpr,
    ACT_BITS1: tl.constexpr,
    ACT_BITS2: tl.constexpr,
    GELU: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
) -> None:
    """One tile, `[BLOCK_M, C]` to `[BLOCK_M, OUT]`; rows lie one after the other."""
    # The tile's offset is int64, as tokens times channels of a large image exceed 2**31; within the tile int32 will do.
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    x_ptr, out_ptr = x_ptr + first * C, out_ptr + first * OUT
    if residual_ptr is not None:
        residual_ptr += first * OUT
    rows = tl.arange(0, BLOCK_M)
    channels, outputs = tl.arange(0, ROW1), tl.arange(0, BLOCK_O)
    mask = (rows < M - first)[:, None] & (channels < C)[None, :]
    x = load_rows(x_ptr, rows, C, channels, mask)
    if NORM:
        # The affine of the norm is part of the quantizer (`operands.with_norm`).
        x = standardize(x, mask, C, eps)
    y = _mlp(
        x,
        Linear(
            weight1_ptr, start1_ptr, scale1_ptr, constant1_ptr, reciprocal1_ptr, offset1_ptr,
            ROW1, DOUBLED1, ACT_BITS1,
        ),
        Linear(
            weight2_ptr, start2_ptr, scale2_ptr, constant2_ptr, reciprocal2_ptr, offset2_ptr,
            ROW2, DOUBLED2, ACT_BITS2,
        ),
        C, HIDDEN, OUT, GELU, NORM, BLOCK_H, BLOCK_O,
    )  # fmt: skip
    out_mask = (rows < M - first)[:, None] & (outputs < OUT)[None, :]
    store_rows(
        y, Norm(after_weight_ptr, after_bias_ptr, after_eps), residual_ptr, out_ptr, rows, outputs, out_mask, OUT
    )


@triton.jit
def _mlp(
    x: tl.tensor,
    fc1: Linear,
    fc2: Linear,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    GELU: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
) -> tl.tensor:
    """``fc2(gelu(fc1(x)))`` of a tile, `[BLOCK_M, BLOCK_O]` float32."""
    channels, outputs = tl.arange(0, x.shape[1]), tl.arange(0, BLOCK_O)
    left = quantize_columns(x, fc1, channels, channels < C, not NORM)
    sums1, sums2 = add_row_sums(left, no_sums(x.shape[0]), fc1), no_sums(x.shape[0])
    acc = start_accumulator(fc2, outputs, outputs < OUT, x.shape[0])
    for first in range(0, HIDDEN, BLOCK_H):
        # A block of hidden channels is made, rounded and contracted at once, so no row of them is ever whole.
        units = first + tl.arange(0, BLOCK_H)
        inside = units < HIDDEN
        hidden = contract(left, fc1, units, inside, 0, start_accumulator(fc1, units, inside, x.shape[0]))
        h = gelu(dequantize(hidden, sums1, fc1, units, inside), GELU)
        codes = quantize_columns(h, fc2, units, inside, False)
        acc, sums2 = contract(codes, fc2, outputs, outputs < OUT, first, acc), add_row_sums(codes, sums2, fc2)
    return dequantize(acc, sums2, fc2, outputs, outputs < OUT)


def launch_mlp(
    x: Tensor,
    fc1: PackedLinear,
    fc2: PackedLinear,
    *,
    gelu: str = "erf",
    eps: float | None = None,
    after: PackedNorm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Run `mlp_kernel`; arguments as in `reference`.

    Raises:
        KernelError: Operands that the kernel does not take.
    """
    check_operands(x, fc1, fc2, gelu, residual, after)
    out = torch.empty(len(x), fc2.rows, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    sizes, warps = tile(fc1.columns, fc1.rows, fc2.rows, floats=fc1.act_bits == 0)
    with on_device(x):
        mlp_kernel[(blocks(len(x), sizes["BLOCK_M"]),)](
            x.contiguous(), *fc1.tensors, *fc2.tensors, *check_norm(after, fc2.rows),
            None if residual is None else residual.contiguous(), out,
            len(x), eps or 0.0, 0.0 if after is None else after.eps,
            C=fc1.columns, HIDDEN=fc1.rows, OUT=fc2.rows, GELU=gelu, NORM=eps is not None,
            **fc1.constants("1"), **fc2.constants("2"), **sizes, num_warps=warps, num_stages=1, **OPTIONS,
        )  # fmt: skip
    return out


def tile(channels: int, hidden: int, outputs: int, floats: bool = False) -> tuple[dict[str, int], int]:
    """Block sizes and warps. Wide rows take eight warps and few hidden channels at once, or their operands spill.

    So do bfloat16 weights and activations (``floats``) of few hidden channels at once.
    """
    # 64 rows are one wgmma.
    wide = max(channels, outputs) > 64
    most = 32 if wide or floats else 64
    sizes = {"BLOCK_M": 64, "BLOCK_H": min(most, power_of_two(hidden, 32)), "BLOCK_O": power_of_two(outputs, 16)}
    return sizes, 8 if wide else 4


def check_operands(
    x: Tensor,
    fc1: PackedLinear,
    fc2: PackedLinear,
    gelu: str,
    residual: Tensor | None,
    after: PackedNorm | None = None,
) -> None:
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
    check_norm(after, fc2.rows)


def reference(
    x: Tensor,
    fc1: PackedLinear,
    fc2: PackedLinear,
    *,
    gelu: str = "erf",
    eps: float | None = None,
    after: PackedNorm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Quantized MLP.

    Args:
        x: `[M, C]` float32, float16 or bfloat16.
        fc1: `[H, C]`, static bounds; from `operands.with_norm` if ``eps`` is given.
        fc2: `[O, H]`, static bounds.
        gelu: "none", "erf" or "tanh"; the kernel's is `device.GELU_ERROR` away at most.
        eps: The LayerNorm's in front, or None for no LayerNorm.
        after: A LayerNorm behind fc2, or None.
        residual: `[M, O]` floats added last (the block's input, as a rule), or None.

    Returns:
        `[M, O]` in the type of ``x``.
    """
    h = lowbit_linear.reference(x, fc1, eps=eps, gelu=gelu)
    return lowbit_linear.finished(lowbit_linear.reference(h, fc2), after, residual).to(x.dtype)


__all__ = ["check_operands", "launch_mlp", "mlp_kernel", "reference", "tile"]
