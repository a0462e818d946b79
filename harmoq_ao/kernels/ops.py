"""Quantized contractions as torch operators: what `torch.compile` and `torch.export` see of a quantized model.

A traced graph holds one opaque call per contraction. Every tensor it needs is among the arguments, so an exported
program runs wherever ``harmoq_ao`` is imported. The kernel is chosen when the graph runs, by the device of the input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from harmoq_ao.kernels.float_matmul import MatmulContraction
from harmoq_ao.kernels.linear import LinearContraction
from harmoq_ao.kernels.select import check_backend, select_kernel
from harmoq_ao.quant import integer_reference
from harmoq_ao.quant.integer_reference import Affine, LinearOperands, MatmulOperand
from harmoq_ao.quant.packing import unpack_signed
from harmoq_ao.quant.relative_maps import relative_rows, renormalized, row_sums

LinearTensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Of a linear: packed weight codes, their scale, bias, range of the activations, joint scale and joint shift."""
_linears: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@torch.library.custom_op("harmoq::linear", mutates_args=())
def linear(
    x: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    act_bounds: Tensor | None,
    joint_scale: Tensor | None,
    joint_shift: Tensor | None,
    weight_bits: int,
    act_bits: int,
    weight_shift: float,
    backend: str,
) -> Tensor:
    """Quantized ``F.linear`` of `[..., K]` to `[..., N]`, in the dtype of ``x``.

    Args:
        x: `[..., K]` floating point.
        codes: Packed weight codes `[N, packed K]` uint8.
        weight_scale: `[N]` float32.
        bias: `[N]` float32, or None.
        act_bounds: `[2]` float32, step and lower bound; None for a range per token.
        joint_scale: `[K]` float32, or None.
        joint_shift: `[K]` float32, or None.
        weight_bits: Width of a weight code.
        act_bits: Width of an activation code.
        weight_shift: Where the signed code 0 lies, in steps.
        backend: See :data:`Backend`.
    """
    tensors = (codes, weight_scale, bias, act_bounds, joint_scale, joint_shift)
    contraction = _linear_of(tensors, x.shape[-1], weight_bits, act_bits, weight_shift)
    return select_kernel(contraction, x.device, check_backend(backend)).run(x)


@linear.register_fake
def _(x: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.custom_op("harmoq::contract", mutates_args=())
def contract(
    act_codes: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    act_bounds: Tensor | None,
    joint_scale: Tensor | None,
    joint_shift: Tensor | None,
    weight_bits: int,
    act_bits: int,
    weight_shift: float,
    dtype: torch.dtype,
) -> Tensor:
    """The part of a linear that follows the rounding of its input, on a CPU: uint8 codes `[..., K]` to `[..., N]`.

    The linear must have a static range and a weight shift that its codes absorb.

    Args:
        act_codes: Codes of the input, contiguous.
        codes: This and the arguments up to ``weight_shift`` are those of :func:`linear`.
        dtype: Type of the result, float32 or bfloat16.
    """
    tensors = (codes, weight_scale, bias, act_bounds, joint_scale, joint_shift)
    packed = _linear_of(tensors, act_codes.shape[-1], weight_bits, act_bits, weight_shift).packed_onednn()
    rows = act_codes.reshape(-1, act_codes.shape[-1])
    return packed.contract(rows, dtype).reshape(*act_codes.shape[:-1], len(packed.total))


@contract.register_fake
def _(act_codes: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    return act_codes.new_empty(*act_codes.shape[:-1], codes.shape[0], dtype=rest[-1])


def _linear_of(
    tensors: LinearTensors, columns: int, weight_bits: int, act_bits: int, weight_shift: float
) -> LinearContraction:
    """The linear of these tensors, made ready once for as long as nobody changes them."""
    codes = tensors[0]
    # An exported program has the tensors and no site. Packing takes longer than a call, so it is kept with the codes
    # and made again when any of the tensors was replaced or written to.
    state = tuple(None if t is None else (t.data_ptr(), t._version) for t in tensors)
    known = _linears.get(codes)
    if known is None or known[0] != state:
        operands = linear_operands(*tensors, columns, weight_bits, act_bits, weight_shift)
        # an alias of the codes: the key itself would never be released
        known = _linears[codes] = (state, LinearContraction(operands, codes.detach(), weight_bits))
    found: LinearContraction = known[1]
    return found


def linear_operands(
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    act_bounds: Tensor | None,
    joint_scale: Tensor | None,
    joint_shift: Tensor | None,
    columns: int,
    weight_bits: int,
    act_bits: int,
    weight_shift: float,
) -> LinearOperands:
    """The integer operands behind the tensors of :func:`linear`, for kernels and tests."""
    signed = unpack_signed(codes, weight_bits, columns)
    act = None if act_bounds is None else Affine(act_bounds[0], act_bounds[1], act_bits)
    shift = torch.full_like(weight_scale, weight_shift)
    return LinearOperands(signed, weight_scale, shift, bias, act_bits, act, joint_scale, joint_shift)


@torch.library.custom_op("harmoq::matmul", mutates_args=())
def matmul(
    left: Tensor,
    right: Tensor,
    left_bounds: Tensor | None,
    right_bounds: Tensor | None,
    joint_scale: Tensor | None,
    left_bits: int,
    right_bits: int,
    backend: str,
) -> Tensor:
    """Product of two quantized activations, `[..., M, K]` and `[..., K, N]` to `[..., M, N]` in the dtype of ``left``.

    Args:
        left: Floating point.
        right: Floating point.
        left_bounds: `[2]` float32, step and lower bound; None for a range per row.
        right_bounds: The same of the right operand; None for a range per column.
        joint_scale: `[K]` float32 that divides the left operand and multiplies the right one, or None.
        left_bits: Width of a left code.
        right_bits: Width of a right code.
        backend: See :data:`Backend`.
    """
    contraction = matmul_contraction(left_bounds, right_bounds, joint_scale, left_bits, right_bits)
    # An operator must not return a view of its input, which an empty product may be.
    return select_kernel(contraction, left.device, check_backend(backend)).run(left, right).clone()


@matmul.register_fake
def _(left: Tensor, right: Tensor, *rest: Any) -> Tensor:
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    return left.new_empty(*batch, left.shape[-2], right.shape[-1])


@torch.library.custom_op("harmoq::map_product", mutates_args=())
def map_product(
    left: Tensor,
    right: Tensor,
    left_bounds: Tensor | None,
    right_bounds: Tensor | None,
    joint_scale: Tensor | None,
    left_bits: int,
    right_bits: int,
    backend: str,
) -> Tensor:
    """Product of an attention map, quantized relative to its rows (`quant/relative_maps.py`), with the values.

    Args:
        left: The map, `[..., M, K]`; all arguments are those of :func:`matmul`.
    """
    contraction = matmul_contraction(left_bounds, right_bounds, joint_scale, left_bits, right_bits)
    kernel = select_kernel(contraction, left.device, check_backend(backend))
    assert contraction.left.act is not None
    return of_map(left, contraction.left.act, lambda relative: kernel.run(relative, right)).clone()


@map_product.register_fake
def _(left: Tensor, right: Tensor, *rest: Any) -> Tensor:
    return left.new_empty(*left.shape[:-1], right.shape[-1])


def of_map(attention_map: Tensor, act: Affine, product: Callable[[Tensor], Tensor]) -> Tensor:
    """The product of an attention map with the values, normalised after it.

    Args:
        attention_map: `[..., M, K]`.
        act: Its quantizer.
        product: Takes the map relative to its rows' largest entries, quantizes and multiplies it.
    """
    relative = relative_rows(attention_map)
    codes = integer_reference.quantize_codes(relative, *integer_reference.static_qparams(act), act.bits)
    return renormalized(product(relative), attention_map, row_sums(codes, act.step, act.lower))


def matmul_contraction(
    left_bounds: Tensor | None, right_bounds: Tensor | None, joint_scale: Tensor | None, left_bits: int, right_bits: int
) -> MatmulContraction:
    """The quantizers of both operands behind the tensors of :func:`matmul`."""
    # The joint scale cancels in the product: what the left operand is divided by, the right one is multiplied by.
    inverse = None if joint_scale is None else (1.0 / joint_scale)[:, None]
    left = None if left_bounds is None else Affine(left_bounds[0], left_bounds[1], left_bits)
    right = None if right_bounds is None else Affine(right_bounds[0], right_bounds[1], right_bits)
    return MatmulContraction(MatmulOperand(left_bits, left, joint_scale), MatmulOperand(right_bits, right, inverse))
