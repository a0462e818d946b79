"""The MLP of a transformer block in one kernel: [LayerNorm] + quantize + fc1 + GELU + quantize + fc2 [+ residual].

With ``A`` of `operands` for both linears::

    q = clamp(round_half_even(n(x) r1 + c1), ...)           n: the identity, or (x - mean) / sqrt(var + eps)
    h = gelu(scale1 A1(q) + constant1)                      never leaves the registers
    p = clamp(round_half_even(h r2 + c2), ...)
    y = scale2 A2(p) + constant2 + residual

A program takes one tile of rows; the hidden channels go in blocks, whose weights are unpacked in registers.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from harmoq_ao.common.errors import KernelError
from harmoq_ao.quant import integer_reference as integers
from harmoq_ao.triton_kernels import lowbit_linear, tuning
from harmoq_ao.triton_kernels.device import contract, gelu, load_weight, signed_codes, standardize
from harmoq_ao.triton_kernels.launch import GELU_KINDS, OPTIONS, blocks, check_choice, check_matrix, power_of_two
from harmoq_ao.triton_kernels.operands import PackedLinear
from harmoq_ao.triton_kernels.quantize import fold_norm

MAX_CHANNELS = 256
"""Most input and output channels: one program holds whole rows of both."""


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
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (rows < M)[:, None] & (channels < C)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + channels[None, :], mask=mask, other=0.0).to(tl.float32)
    if NORM:
        x = standardize(x, mask, C, eps)
    # 0 * 0 + half has the signed code 0
    reciprocal1 = tl.load(reciprocal1_ptr + channels, mask=channels < C, other=0.0)
    offset1 = tl.load(offset1_ptr + channels, mask=channels < C, other=1 << (ACT_BITS1 - 1))
    left = signed_codes(x * reciprocal1[None, :] + offset1[None, :], ACT_BITS1)
    start2 = tl.load(start2_ptr + outputs, mask=outputs < OUT, other=0)
    acc2 = tl.zeros([BLOCK_M, BLOCK_O], tl.int32) + start2[None, :]
    for first in range(0, HIDDEN, BLOCK_H):
        units = first + tl.arange(0, BLOCK_H)
        inside = units < HIDDEN
        weight1 = load_weight(weight1_ptr, units, inside, 0, ROW_BYTES1, BLOCK_C, BITS1, MID_RISE1)
        start1 = tl.load(start1_ptr + units, mask=inside, other=0)
        acc1 = contract(left, weight1, tl.zeros([BLOCK_M, BLOCK_H], tl.int32) + start1[None, :], BITS1, MID_RISE1)
        scale1 = tl.load(scale1_ptr + units, mask=inside, other=0.0)
        constant1 = tl.load(constant1_ptr + units, mask=inside, other=0.0)
        h = gelu(acc1.to(tl.float32) * scale1[None, :] + constant1[None, :], GELU)
        reciprocal2 = tl.load(reciprocal2_ptr + units, mask=inside, other=0.0)
        offset2 = tl.load(offset2_ptr + units, mask=inside, other=1 << (ACT_BITS2 - 1))
        codes = signed_codes(h * reciprocal2[None, :] + offset2[None, :], ACT_BITS2)
        weight2 = load_weight(weight2_ptr, outputs, outputs < OUT, first, ROW_BYTES2, BLOCK_H, BITS2, MID_RISE2)
        acc2 = contract(codes, weight2, acc2, BITS2, MID_RISE2)
    scale2 = tl.load(scale2_ptr + outputs, mask=outputs < OUT, other=0.0)
    constant2 = tl.load(constant2_ptr + outputs, mask=outputs < OUT, other=0.0)
    y = acc2.to(tl.float32) * scale2[None, :] + constant2[None, :]
    out_mask = (rows < M)[:, None] & (outputs < OUT)[None, :]
    if residual_ptr is not None:
        residual_at = residual_ptr + rows[:, None] * residual_stride + outputs[None, :]
        y += tl.load(residual_at, mask=out_mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows[:, None] * OUT + outputs[None, :], y.to(out_ptr.dtype.element_ty), mask=out_mask)


def with_norm(linear: PackedLinear, weight: Tensor | None, bias: Tensor | None) -> PackedLinear:
    """The linear with a LayerNorm's affine folded into its quantizer; the kernel then only standardizes.

    Raises:
        KernelError: The linear's bounds are per token.
    """
    if linear.reciprocal is None or linear.offset is None:
        raise KernelError("A LayerNorm folds into static bounds only", found="bounds per token", expected="static")
    reciprocal, offset = fold_norm(weight, bias, linear.reciprocal, linear.offset)
    return replace(linear, reciprocal=reciprocal.contiguous(), offset=offset.contiguous())


def launch_mlp(
    x: Tensor,
    fc1: PackedLinear,
    fc2: PackedLinear,
    *,
    gelu: str = "erf",
    eps: float | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Run `mlp_kernel`; arguments as in `reference`.

    Raises:
        KernelError: Operands that the kernel does not take.
    """
    check_operands(x, fc1, fc2, gelu, residual)
    out = torch.empty(len(x), fc2.rows, dtype=out_dtype or x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    sizes, warps = tile(fc1.columns, fc1.rows, fc2.rows)
    config = tuning.default("mlp", num_warps=warps, num_stages=1, **sizes)
    mlp_kernel[(blocks(len(x), config.blocks["BLOCK_M"]),)](
        x, *_tensors(fc1), *_tensors(fc2), residual, out,
        len(x), x.stride(0), 0 if residual is None else residual.stride(0), eps or 0.0,
        C=fc1.columns, HIDDEN=fc1.rows, OUT=fc2.rows, ROW_BYTES1=fc1.row_bytes, ROW_BYTES2=fc2.row_bytes,
        BITS1=fc1.weight_bits, BITS2=fc2.weight_bits, MID_RISE1=fc1.mid_rise, MID_RISE2=fc2.mid_rise,
        ACT_BITS1=fc1.act_bits, ACT_BITS2=fc2.act_bits, GELU=gelu, NORM=eps is not None,
        **config.blocks, num_warps=config.num_warps, num_stages=config.num_stages, **OPTIONS,
    )  # fmt: skip
    return out


def _tensors(linear: PackedLinear) -> tuple[Tensor | None, ...]:
    return linear.codes, linear.start, linear.scale, linear.constant, linear.reciprocal, linear.offset


def tile(channels: int, hidden: int, outputs: int) -> tuple[dict[str, int], int]:
    """Default block sizes and warps. Wide rows take eight warps, or their accumulators spill."""
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
    check_matrix(x, fc1.columns, "The activation", lowbit_linear.FLOATS)
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
    if residual is not None:
        check_matrix(residual, fc2.rows, "The residual", lowbit_linear.FLOATS)
        if len(residual) != len(x):
            raise KernelError("The residual has another number of rows", found=len(residual), expected=len(x))


def reference(
    x: Tensor,
    fc1: PackedLinear,
    fc2: PackedLinear,
    *,
    gelu: str = "erf",
    eps: float | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Quantized MLP.

    Args:
        x: `[M, C]` float32, float16 or bfloat16.
        fc1: `[H, C]`, static bounds; from `with_norm` if ``eps`` is given.
        fc2: `[O, H]`, static bounds.
        gelu: "none", "erf" or "tanh".
        eps: The LayerNorm's, or None for no LayerNorm.
        residual: `[M, O]` floats added last (the block's input, as a rule), or None.
        out_dtype: Of the result; the type of ``x`` by default.

    Returns:
        `[M, O]`.
    """
    h = lowbit_linear.gelu_reference(first_linear(x, fc1, eps), gelu)
    return lowbit_linear.reference(h, fc2, residual=residual, out_dtype=out_dtype or x.dtype)


def first_linear(x: Tensor, linear: PackedLinear, eps: float | None) -> Tensor:
    """`[M, N]` float32 of a linear behind an optional LayerNorm whose affine is folded into its quantizer."""
    assert linear.reciprocal is not None
    assert linear.offset is not None
    values = x.float()
    if eps is not None:
        values = torch.nn.functional.layer_norm(values, (values.shape[-1],), eps=eps)
    codes = integers.quantize_codes(values, linear.reciprocal, linear.offset, linear.act_bits)
    return lowbit_linear.epilogue(lowbit_linear.reference_accumulate(codes, linear), linear)


__all__ = ["MAX_CHANNELS", "first_linear", "launch_mlp", "mlp_kernel", "reference", "tile", "with_norm"]
