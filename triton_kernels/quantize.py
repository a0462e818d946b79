"""Float activations to codes by static qparams, with or without a LayerNorm in front.

Equations, in float32 with every operation rounded on its own::

    static      q = clamp(round_half_even(x * r + c), 0, 2**bits - 1)
    LayerNorm   q = clamp(round_half_even(n * (w r) + (b r + c)), ...),  n = (x - mean) / sqrt(var + eps)

The first gives the codes of `integer_reference.quantize_codes` bit for bit, infinities included. NaN cannot be refused
from inside a kernel: its code is 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from harmoq_ao.common.errors import KernelError
from harmoq_ao.quant import integer_reference as integers
from harmoq_ao.triton_kernels.device import load_rows, standardize, unsigned_codes
from harmoq_ao.triton_kernels.launch import OPTIONS, blocks, check_bits, check_matrix, check_vector, power_of_two

MAX_ROW = 8192
"""Longest row that LayerNorm takes: one program holds it."""


@triton.jit
def quantize_kernel(
    x_ptr: tl.tensor,
    reciprocal_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    M: int,
    x_stride: int,
    eps: float,
    K: tl.constexpr,
    BITS: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One tile of codes of `[M, K]`; ``NORM`` standardizes rows first and needs ``BLOCK_K >= K``."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = columns < K
    mask = (rows < M)[:, None] & inside[None, :]
    x = load_rows(x_ptr, rows, x_stride, columns, mask)
    if NORM:
        x = standardize(x, mask, K, eps)
    reciprocal = tl.load(reciprocal_ptr + columns, mask=inside, other=0.0)
    offset = tl.load(offset_ptr + columns, mask=inside, other=0.0)
    codes = unsigned_codes(x * reciprocal[None, :] + offset[None, :], BITS)
    tl.store(codes_ptr + rows[:, None] * K + columns[None, :], codes, mask=mask)


def launch_quantize(x: Tensor, reciprocal: Tensor, offset: Tensor, bits: int, eps: float | None = None) -> Tensor:
    """Run `quantize_kernel`; with ``eps`` rows are standardized first. Arguments as in `reference`.

    Raises:
        KernelError: Operands that the kernel does not take.
    """
    columns = x.shape[-1]
    check_matrix(x, columns, "The activation")
    check_bits(bits, "activation")
    check_vector(reciprocal, columns, "reciprocal")
    check_vector(offset, columns, "offset")
    codes = torch.empty(len(x), columns, dtype=torch.uint8, device=x.device)
    block_k = power_of_two(columns, 16) if eps is not None else min(power_of_two(columns, 16), 128)
    block_m = max(1, 4096 // block_k)  # 32 elements for each thread of four warps
    # A mean takes the whole row: one block of columns, so rows are bounded.
    if eps is not None and columns > MAX_ROW:
        raise KernelError("LayerNorm does not take rows this long", found=columns, expected=f"at most {MAX_ROW}")
    if codes.numel():
        quantize_kernel[(blocks(len(x), block_m), blocks(columns, block_k))](
            x, reciprocal, offset, codes, len(x), x.stride(0), eps or 0.0,
            K=columns, BITS=bits, NORM=eps is not None, BLOCK_M=block_m, BLOCK_K=block_k, **OPTIONS,
        )  # fmt: skip
    return codes


def reference(x: Tensor, reciprocal: Tensor, offset: Tensor, bits: int) -> Tensor:
    """Codes of static bounds.

    Args:
        x: `[M, K]` floating point.
        reciprocal: `[K]` float32, ``1 / (joint_scale * step)``.
        offset: `[K]` float32, ``-lower / step`` (less the joint shift, in steps).
        bits: Width of a code, 2 to 8.

    Returns:
        `[M, K]` uint8.
    """
    return integers.quantize_codes(x.nan_to_num(float("-inf"), float("inf"), float("-inf")), reciprocal, offset, bits)


__all__ = ["launch_quantize", "quantize_kernel", "reference"]
