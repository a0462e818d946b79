"""Float activations to codes: static qparams, qparams per token, LayerNorm + static qparams.

Equations, in float32 with every operation rounded on its own::

    static      q = clamp(round_half_even(x * r + c), 0, 2**bits - 1)
    per token   l = min_k(x r), a = max((max_k(x r) - l) / (2**bits - 1), MIN_STEP), then r' = 1 / a, c' = -l / a
    LayerNorm   q = clamp(round_half_even(n * (w r) + (b r + c)), ...),  n = (x - mean) / sqrt(var + eps)

The first two give the codes of `reference.quantize_codes` bit for bit, infinities included. NaN cannot be refused from
inside a kernel: its code is 0, and in a row quantized per token it does not take part in the bounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from harmoq_ao.common.errors import KernelError
from harmoq_ao.quant import integer_reference as integers
from harmoq_ao.quant.packing import pack, packed_length
from harmoq_ao.triton_kernels.device import load_rows, standardize, token_bounds, token_position, unsigned_codes
from harmoq_ao.triton_kernels.launch import OPTIONS, blocks, check_bits, check_matrix, check_vector, power_of_two

PACKED_BITS = (2, 3, 4, 8)
MAX_ROW = 8192
"""Longest row that bounds per token and LayerNorm take: one program holds it."""


@triton.jit
def quantize_kernel(
    x_ptr: tl.tensor,
    reciprocal_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    M: int,
    x_stride: int,
    reciprocal_stride: int,
    offset_stride: int,
    eps: float,
    K: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    PACKED: tl.constexpr,
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
    reciprocal = tl.load(reciprocal_ptr + columns * reciprocal_stride, mask=inside, other=0.0)
    offset = tl.load(offset_ptr + columns * offset_stride, mask=inside, other=0.0)
    codes = unsigned_codes(x * reciprocal[None, :] + offset[None, :], BITS)
    if PACKED:
        # r = c = 0 beyond the row: the unused bits of its last byte are zero
        _store_packed(codes, codes_ptr, rows, rows < M, tl.program_id(1) * BLOCK_K, ROW_BYTES, BITS)
    else:
        tl.store(codes_ptr + rows[:, None] * K + columns[None, :], codes, mask=mask)


@triton.jit
def _store_packed(
    codes: tl.tensor,
    codes_ptr: tl.tensor,
    rows: tl.tensor,
    row_mask: tl.tensor,
    first: tl.tensor,
    ROW_BYTES: tl.constexpr,
    BITS: tl.constexpr,
) -> None:
    """Store `[R, C]` uint8 codes from column ``first`` (a multiple of 8) on as streams: 8 codes make BITS bytes."""
    groups: tl.constexpr = codes.shape[1] // 8
    # Eight codes fill whole bytes at every width, and at most 32 bits: a word each, of which BITS bytes are stored.
    split = codes.to(tl.int32).reshape([codes.shape[0], groups, 8])
    words = tl.sum(split << (tl.arange(0, 8) * BITS)[None, None, :], 2)
    # Ranges of Triton are powers of two: four bytes each, the ones from BITS on masked.
    place = tl.arange(0, 4)
    octets = ((words[:, :, None] >> (place * 8)[None, None, :]) & 255).to(tl.uint8)
    at = (first // 8 + tl.arange(0, groups))[:, None] * BITS + place[None, :]
    mask = row_mask[:, None, None] & ((place < BITS)[None, :] & (at < ROW_BYTES))[None, :, :]
    tl.store(codes_ptr + rows[:, None, None] * ROW_BYTES + at[None, :, :], octets, mask=mask)


@triton.jit
def quantize_tokens_kernel(
    x_ptr: tl.tensor,
    reciprocal_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    lower_ptr: tl.tensor,
    step_ptr: tl.tensor,
    M: int,
    x_stride: int,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Codes, lower bounds and steps of whole rows; ``reciprocal_ptr`` is None without a joint scale."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K)
    mask = (rows < M)[:, None] & (columns < K)[None, :]
    x = load_rows(x_ptr, rows, x_stride, columns, mask)
    if reciprocal_ptr is not None:
        x = x * tl.load(reciprocal_ptr + columns, mask=columns < K, other=0.0)[None, :]
    # The row is in registers as a whole, so its range and its codes take one load.
    lower, step = token_bounds(x, mask, BITS)
    codes = unsigned_codes(token_position(x, lower, step), BITS)
    tl.store(codes_ptr + rows[:, None] * K + columns[None, :], codes, mask=mask)
    tl.store(lower_ptr + rows, lower, mask=rows < M)
    tl.store(step_ptr + rows, step, mask=rows < M)


def launch_quantize(
    x: Tensor, reciprocal: Tensor, offset: Tensor, bits: int, packed: bool = False, eps: float | None = None
) -> Tensor:
    """Run `quantize_kernel`; with ``eps`` rows are standardized first. Arguments as in `reference`.

    Raises:
        KernelError: Operands that the kernel does not take.
    """
    columns = _check(x, bits, packed)
    _check_qparams(reciprocal, offset, columns)
    length = packed_length(columns, bits) if packed else columns
    packing = packed and bits < 8  # at 8 bits the stream is the codes
    codes = torch.empty(len(x), length, dtype=torch.uint8, device=x.device)
    block_k = power_of_two(columns, 16) if eps is not None else min(power_of_two(columns, 16), 128)
    block_m = _tile_rows(block_k)
    # A mean takes the whole row: one block of columns, so rows are bounded.
    if eps is not None and columns > MAX_ROW:
        raise KernelError("LayerNorm does not take rows this long", found=columns, expected=f"at most {MAX_ROW}")
    if codes.numel():
        quantize_kernel[(blocks(len(x), block_m), blocks(columns, block_k))](
            x, reciprocal, offset, codes, len(x), x.stride(0), _stride(reciprocal), _stride(offset), eps or 0.0,
            K=columns, ROW_BYTES=length, BITS=bits, PACKED=packing, NORM=eps is not None,
            BLOCK_M=block_m, BLOCK_K=block_k, **OPTIONS,
        )  # fmt: skip
    return codes


def launch_quantize_tokens(x: Tensor, bits: int, joint_scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Run `quantize_tokens_kernel`; arguments as in `reference_tokens`.

    Raises:
        KernelError: Operands that the kernel does not take.
    """
    columns = _check(x, bits, packed=False)
    check_vector(joint_scale, columns, "joint_scale")
    if columns > MAX_ROW:
        raise KernelError("Bounds per token do not take rows this long", found=columns, expected=f"<= {MAX_ROW}")
    codes = torch.empty(len(x), columns, dtype=torch.uint8, device=x.device)
    lower, step = (torch.empty(len(x), 1, dtype=torch.float32, device=x.device) for _ in range(2))
    block_k = power_of_two(columns, 16)
    block_m = _tile_rows(block_k)
    if codes.numel():
        quantize_tokens_kernel[(blocks(len(x), block_m),)](
            x, None if joint_scale is None else joint_scale.reciprocal(), codes, lower, step, len(x), x.stride(0),
            K=columns, BITS=bits, BLOCK_M=block_m, BLOCK_K=block_k, **OPTIONS,
        )  # fmt: skip
    return codes, lower, step


def reference(x: Tensor, reciprocal: Tensor, offset: Tensor, bits: int, packed: bool = False) -> Tensor:
    """Codes of static bounds.

    Args:
        x: `[M, K]` floating point.
        reciprocal: `[K]` or 0-d float32, ``1 / (joint_scale * step)``.
        offset: `[K]` or 0-d float32, ``-lower / step`` (less the joint shift, in steps).
        bits: Width of a code, 2 to 8.
        packed: Store the codes as `packing` does (2, 3, 4 and 8 bits).

    Returns:
        `[M, K]` uint8, or `[M, packed_length(K, bits)]`.
    """
    codes = integers.quantize_codes(x.nan_to_num(float("-inf"), float("inf"), float("-inf")), reciprocal, offset, bits)
    return pack(codes, bits) if packed else codes


def reference_tokens(x: Tensor, bits: int, joint_scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of bounds per token.

    Args:
        x: `[M, K]` floating point.
        bits: Width of a code, 2 to 8.
        joint_scale: `[K]` float32 that divides ``x``, or None.

    Returns:
        `[M, K]` uint8 codes, `[M, 1]` float32 lower bounds and steps.
    """
    codes, act = integers.quantize_dynamic(x, -1, bits, joint_scale)
    return codes, act.lower, act.step


def _tile_rows(columns: int) -> int:
    """Rows of a tile of 4096 elements: 32 for each thread of four warps."""
    return max(1, 4096 // columns)


def _stride(value: Tensor) -> int:
    return 0 if value.numel() == 1 else 1


def _check(x: Tensor, bits: int, packed: bool) -> int:
    check_matrix(x, x.shape[-1] if x.dim() else 0, "The activation")
    check_bits(bits, "packed activation" if packed else "activation", PACKED_BITS if packed else tuple(range(2, 9)))
    return x.shape[1]


def _check_qparams(reciprocal: Tensor, offset: Tensor, columns: int) -> None:
    for name, value in (("reciprocal", reciprocal), ("offset", offset)):
        check_vector(value.reshape(-1), 1 if value.numel() == 1 else columns, name)


__all__ = [
    "launch_quantize",
    "launch_quantize_tokens",
    "quantize_kernel",
    "quantize_tokens_kernel",
    "reference",
    "reference_tokens",
]
