"""Linear on int8 weights of 2 to 8 bits and 2 to 8 bit activations, int8 tensor cores, int32 accumulators.

With the names of `operands`::

    A_mi = sum_j q_mj E_ij                                                exact
    y_mi = gelu(scale_i A_mi + constant_i) + residual_mi                  static (per token: step_m and lower_m total_i)

The activation comes as uint8 codes of a static range, or as floats, quantized in registers by static qparams or qparams
per token; before static ones a LayerNorm and a gate (another factor) may come.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from harmoq_ao.common.errors import KernelError
from harmoq_ao.quant import integer_reference as reference_integers
from harmoq_ao.triton_kernels.device import (
    Linear,
    add_row_sums,
    bounds_of,
    contract,
    gelu,
    integers,
    load_rows,
    no_sums,
    quantize_columns,
    row_extremes,
    signed_codes,
    standardize,
    start_accumulator,
    token_position,
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
from harmoq_ao.triton_kernels.operands import Norm, PackedLinear, padded_columns


@triton.jit
def lowbit_linear_kernel(
    x_ptr: tl.tensor,
    gate_ptr: tl.tensor,
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
    eps: float,
    K: tl.constexpr,
    N: tl.constexpr,
    X_STRIDE: tl.constexpr,
    GATE_STRIDE: tl.constexpr,
    ROW: tl.constexpr,
    DOUBLED: tl.constexpr,
    ACT_BITS: tl.constexpr,
    INPUT: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One `[BLOCK_M, BLOCK_N]` tile; strides lie between rows.

    ``INPUT``: "codes" (uint8), "static", "norm" or "token" (floats; "norm" standardizes rows first and needs
    ``BLOCK_K >= K``). An int32 ``out_ptr`` takes the accumulators themselves.
    """
    _linear_tile(
        x_ptr, gate_ptr,
        Linear(
            weight_ptr, start_ptr, scale_ptr, constant_ptr, reciprocal_ptr, offset_ptr, ROW, DOUBLED, ACT_BITS
        ),
        total_ptr, residual_ptr, out_ptr, M, eps,
        K, N, X_STRIDE, GATE_STRIDE, INPUT, GELU, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _linear_tile(
    x_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    linear: Linear,
    total_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    M: int,
    eps: float,
    K: tl.constexpr,
    N: tl.constexpr,
    X_STRIDE: tl.constexpr,
    GATE_STRIDE: tl.constexpr,
    INPUT: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    # Tiles of the same rows follow each other, so that their input is read from the cache.
    rows = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, inside = rows < M, columns < N
    # Harmless values: the compiler drops what no branch below reads.
    lower = tl.zeros([BLOCK_M], tl.float32)
    step = tl.full([BLOCK_M], 1.0, tl.float32)
    if INPUT == "token":
        # A row's range takes all of its channels: one more pass, before the contraction.
        lower, step = _row_bounds(x_ptr, linear, rows, row_mask, X_STRIDE, K, BLOCK_M, BLOCK_K)
    acc, sums = start_accumulator(linear, columns, inside, BLOCK_M), no_sums(BLOCK_M)
    # The activation is rounded anew in each tile of columns: no codes travel through memory.
    for first in range(0, K, BLOCK_K):
        channels = first + tl.arange(0, BLOCK_K)
        left = _activation(
            x_ptr, gate_ptr, linear, lower, step, eps, rows, row_mask, channels, X_STRIDE, GATE_STRIDE, K, INPUT
        )
        acc, sums = contract(left, linear, columns, inside, first, acc), add_row_sums(left, sums, linear)
    out_at = out_ptr + rows[:, None] * N + columns[None, :]
    mask = row_mask[:, None] & inside[None, :]
    # Accumulators are for tests: they must equal the reference bit for bit.
    if out_ptr.dtype.element_ty == tl.int32:
        tl.store(out_at, integers(acc, sums, linear), mask=mask)
    else:
        y = (
            integers(acc, sums, linear).to(tl.float32)
            * tl.load(linear.scale_ptr + columns, mask=inside, other=0.0)[None, :]
        )
        if INPUT == "token":
            # x = step q + lower: the lower bound contributes the sum of the weights, which `total` holds.
            total = tl.load(total_ptr + columns, mask=inside, other=0.0)
            y = y * step[:, None] + lower[:, None] * total[None, :]
        y = gelu(y + tl.load(linear.constant_ptr + columns, mask=inside, other=0.0)[None, :], GELU)
        if residual_ptr is not None:
            y += load_rows(residual_ptr, rows, N, columns, mask)
        tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _row_bounds(
    x_ptr: tl.tensor,
    linear: Linear,
    rows: tl.tensor,
    row_mask: tl.tensor,
    X_STRIDE: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """``(lower, step)`` of whole rows, `[BLOCK_M]`, in a pass of their own over the row."""
    lower = tl.full([BLOCK_M], float("inf"), tl.float32)
    upper = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for first in range(0, K, BLOCK_K):
        channels = first + tl.arange(0, BLOCK_K)
        mask = row_mask[:, None] & (channels < K)[None, :]
        x = load_rows(x_ptr, rows, X_STRIDE, channels, mask)
        if linear.reciprocal_ptr is not None:
            x = x * tl.load(linear.reciprocal_ptr + channels, mask=channels < K, other=0.0)[None, :]
        least, most = row_extremes(x, mask)
        lower, upper = tl.minimum(lower, least), tl.maximum(upper, most)
    return bounds_of(lower, upper, linear.ACT_BITS)


@triton.jit
def _activation(
    x_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    linear: Linear,
    lower: tl.tensor,
    step: tl.tensor,
    eps: float,
    rows: tl.tensor,
    row_mask: tl.tensor,
    channels: tl.tensor,
    X_STRIDE: tl.constexpr,
    GATE_STRIDE: tl.constexpr,
    K: tl.constexpr,
    INPUT: tl.constexpr,
) -> tl.tensor:
    """Signed codes `[BLOCK_M, BLOCK_K]` int8, zero beyond channel K."""
    inside = channels < K
    mask = row_mask[:, None] & inside[None, :]
    if INPUT == "codes":
        half: tl.constexpr = 1 << (linear.ACT_BITS - 1)
        at = x_ptr + rows[:, None] * X_STRIDE + channels[None, :]
        # int16 between: an unsigned byte less 128 does not fit into a signed one.
        codes = (tl.load(at, mask=mask, other=half).to(tl.int16) - half).to(tl.int8)
    elif INPUT == "token":
        x = load_rows(x_ptr, rows, X_STRIDE, channels, mask)
        if linear.reciprocal_ptr is not None:
            x = x * tl.load(linear.reciprocal_ptr + channels, mask=inside, other=0.0)[None, :]
        # No offset of a column can make padding the code 0 here.
        codes = tl.where(inside[None, :], signed_codes(token_position(x, lower, step), linear.ACT_BITS), 0)
    else:
        x = load_rows(x_ptr, rows, X_STRIDE, channels, mask)
        if INPUT == "norm":
            # The affine of the norm is part of the quantizer (`operands.with_norm`).
            x = standardize(x, mask, K, eps)
        if gate_ptr is not None:
            x = x * load_rows(gate_ptr, rows, GATE_STRIDE, channels, mask)
        codes = quantize_columns(x, linear, channels, inside, INPUT == "static")
    return codes


def launch_lowbit_linear(
    x: Tensor,
    weight: PackedLinear,
    *,
    gate: Tensor | None = None,
    eps: float | None = None,
    gelu: str = "none",
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Run `lowbit_linear_kernel`; arguments as in `reference`.

    Raises:
        KernelError: Operands that the kernel does not take.
    """
    _check_operands(x, weight, gate, eps, gelu, residual, out_dtype)
    return _run(x, weight, gate, eps, gelu, residual, out_dtype)


def launch_accumulate(codes: Tensor, weight: PackedLinear) -> Tensor:
    """Accumulators ``A`` of uint8 codes `[M, K]`: `[M, N]` int32.

    Raises:
        KernelError: Operands that the kernel does not take.
    """
    check_matrix(codes, weight.columns, "The activation", (torch.uint8,))
    return _run(codes, weight, None, None, "none", None, torch.int32)


def canonical(acc: Tensor, codes: Tensor, weight: PackedLinear) -> Tensor:
    """`reference.linear_accumulate`'s integers ``sum_j q_j w_ij`` from ``A``."""
    return (acc - codes.sum(1, keepdim=True, dtype=torch.int32)) // 2 if weight.mid_rise else acc


def _run(
    x: Tensor,
    weight: PackedLinear,
    gate: Tensor | None,
    eps: float | None,
    gelu: str,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    if x.dtype == torch.uint8:
        mode = "codes"
    elif not weight.static:
        mode = "token"
    else:
        mode = "static" if eps is None else "norm"
    sizes, warps = tile(weight.rows, weight.columns, eps is not None)
    out = torch.empty(len(x), weight.rows, dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    with on_device(x):
        lowbit_linear_kernel[(blocks(weight.rows, sizes["BLOCK_N"]), blocks(len(x), sizes["BLOCK_M"]))](
            x, gate, *weight.tensors, weight.total, None if residual is None else residual.contiguous(), out,
            len(x), eps or 0.0, K=weight.columns, N=weight.rows,
            X_STRIDE=x.stride(0), GATE_STRIDE=0 if gate is None else gate.stride(0),
            **weight.constants(), INPUT=mode, GELU=gelu, **sizes, num_warps=warps, num_stages=1, **OPTIONS,
        )  # fmt: skip
    return out


def tile(rows: int, columns: int, norm: bool = False) -> tuple[dict[str, int], int]:
    """Block sizes and warps: 64 rows of activations are one wgmma; steps of up to 128, or whole rows for a norm."""
    long = norm and columns > 128
    sizes = {
        "BLOCK_M": 64,
        "BLOCK_N": min(power_of_two(rows, 16), 64 if long else 128),
        "BLOCK_K": power_of_two(columns, 32) if norm else min(padded_columns(columns), 128),
    }
    return sizes, 8 if long else 4


def _check_operands(
    x: Tensor,
    weight: PackedLinear,
    gate: Tensor | None,
    eps: float | None,
    gelu: str,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    check_matrix(x, weight.columns, "The activation", (torch.uint8, *FLOATS))
    check_residual(residual, len(x), weight.rows)
    check_choice(gelu, GELU_KINDS, "activation function")
    if out_dtype not in FLOATS:
        raise KernelError("The kernel does not write this type", found=out_dtype, expected=FLOATS)
    if x.dtype == torch.uint8 and not weight.static:
        raise KernelError("Codes need a static range", found="a range per token", expected="static, or floats as input")
    if gate is not None:
        check_matrix(gate, weight.columns, "The gate", FLOATS)
    if (eps is not None or gate is not None) and (x.dtype == torch.uint8 or not weight.static):
        raise KernelError("A LayerNorm or a gate needs floats and a static range", found=x.dtype)
    if eps is not None and weight.columns > MAX_CHANNELS:
        raise KernelError("Too long for a LayerNorm", found=weight.columns, expected=f"at most {MAX_CHANNELS}")


# --- reference --------------------------------------------------------------------------------------------------------


def reference_accumulate(codes: Tensor, weight: PackedLinear) -> Tensor:
    """``A`` in plain torch: `[M, K]` uint8 codes to `[M, N]` int32."""
    return reference_integers.integer_matmul(codes, weight.effective_codes().t(), torch.int32)


def reference(
    x: Tensor,
    weight: PackedLinear,
    *,
    gate: Tensor | None = None,
    eps: float | None = None,
    gelu: str = "none",
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Quantized linear and what surrounds it.

    Args:
        x: `[M, K]` uint8 codes of a static range, or float32, float16 or bfloat16.
        weight: From `operands.from_operands`; from `operands.with_norm` if ``eps`` is given.
        gate: `[M, K]` floats that multiply ``x`` before it is rounded, or None.
        eps: Of a LayerNorm in front, or None; K is at most 256 then.
        gelu: "none", "erf" or "tanh", behind the linear.
        residual: `[M, N]` floats added last, or None.
        out_dtype: float32, float16 or bfloat16.

    Returns:
        `[M, N]` of ``out_dtype``.
    """
    # Step by step as in the kernel, so that integers can be compared and floats differ by rounding alone.
    if x.dtype != torch.uint8:
        x = x.float() if eps is None else F.layer_norm(x.float(), x.shape[-1:], eps=eps)
        x = x if gate is None else x * gate.float()
    codes, act = _codes(x, weight)
    if weight.act_bits == 0:
        y = codes @ weight.codes[:, : weight.columns].float().t() * weight.scale
    else:
        y = reference_accumulate(codes, weight).float() * weight.scale
    if act is not None and weight.total is not None:
        y = y * act.step + act.lower * weight.total
    y = y + weight.constant
    if gelu != "none":
        y = F.gelu(y, approximate="tanh" if gelu == "tanh" else "none")
    return finished(y, None, residual).to(out_dtype)


def _codes(x: Tensor, weight: PackedLinear) -> tuple[Tensor, reference_integers.Affine | None]:
    """Codes of ``x``, and their qparams where each token has its own; of a linear in floats, what it contracts."""
    if x.dtype == torch.uint8:
        return x, None
    if weight.reciprocal is not None and weight.offset is not None:
        if weight.act_bits == 0:
            return x * weight.reciprocal + weight.offset, None
        return reference_integers.quantize_codes(x, weight.reciprocal, weight.offset, weight.act_bits), None
    scaled = x if weight.reciprocal is None else x * weight.reciprocal
    return reference_integers.quantize_dynamic(scaled, -1, weight.act_bits)


def finished(y: Tensor, after: Norm | None, residual: Tensor | None) -> Tensor:
    """``y`` float32 behind a LayerNorm, plus a residual, where there are."""
    if after is not None:
        y = F.layer_norm(y, y.shape[-1:], after.weight, after.bias, after.eps)
    return y if residual is None else y + residual.float()


__all__ = [
    "canonical",
    "finished",
    "launch_accumulate",
    "launch_lowbit_linear",
    "lowbit_linear_kernel",
    "reference",
    "reference_accumulate",
    "tile",
]
