"""Products of two quantized activations on CPUs: integer codes in floating-point kernels.

oneDNN has no batched integer product of two activations. A float32 product of codes gives the same result while its
sums stay below 2**24, since every partial sum is then an integer that float32 represents exactly. Longer contractions
(channel attention runs over all pixels) use float64, which is exact up to 2**53.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from harmoq_ao.kernels.select import NO_TRITON, Family, Kernel
from harmoq_ao.quant import integer_reference
from harmoq_ao.quant.integer_reference import Affine, MatmulOperand

_FLOAT32_EXACT = 1 << 24
_BLOCK_BYTES = 1 << 21  # working set of one thread in `quantized_matmul`


class MatmulContraction(NamedTuple):
    """A product of two quantized activations, `[..., M, K]` and `[..., K, N]` to `[..., M, N]` in the left's type.

    Attributes:
        left: Quantizer of the left operand.
        right: Quantizer of the right operand.
    """

    left: MatmulOperand
    right: MatmulOperand

    def kernel(self, family: Family) -> Kernel:
        """The kernel of a family; GPUs run the integer reference, since Triton takes products within attention only."""
        if family == "cpu":
            return Kernel("float32 on integer codes", lambda a, b: quantized_matmul(a, b, *self))
        refusal = NO_TRITON if family == "triton" else None
        return Kernel("reference integer", lambda a, b: integer_reference.quantized_matmul(a, b, *self), refusal)


def exact_dtype(length: int, bits_a: int, bits_b: int) -> torch.dtype:
    """Narrowest float type in which a sum of ``length`` products of codes is exact, whatever the order of addition."""
    largest = length * ((1 << bits_a) - 1) * ((1 << bits_b) - 1)
    return torch.float32 if largest <= _FLOAT32_EXACT else torch.float64


def quantized_matmul(left: Tensor, right: Tensor, a: MatmulOperand, b: MatmulOperand) -> Tensor:
    """Product of two quantized activations; equals `integer_reference.quantized_matmul` up to float32 rounding.

    A few batch entries at a time are rounded, multiplied and rescaled, so that everything between input and output
    stays in the cache. Codes and accumulators equal the reference bit for bit. Not differentiable.

    Args:
        left: `[..., M, K]` floating point, any strides.
        right: `[..., K, N]` floating point, any strides.
        a: Quantizer of the left operand.
        b: Quantizer of the right operand.

    Returns:
        `[..., M, N]` in the dtype of ``left``.

    Raises:
        KernelError: The operands are not floating point or do not fit.
        InputError: An operand holds a NaN.
    """
    integer_reference.check_float_matmul(left, right)
    left, right = left.detach(), right.detach()
    if left.dim() < 3 or left.shape[:-2] != right.shape[:-2] or left.numel() == 0 or right.numel() == 0:
        return _product(left, right, a, b).to(left.dtype)
    y = torch.empty(*left.shape[:-1], right.shape[-1], dtype=left.dtype)
    block = max(1, _BLOCK_BYTES * torch.get_num_threads() * len(y) // (4 * (left.numel() + right.numel() + y.numel())))
    for x, w, target in zip(torch.split(left, block), torch.split(right, block), torch.split(y, block), strict=True):
        _product(x, w, a, b, target)
    return y


def _product(left: Tensor, right: Tensor, a: MatmulOperand, b: MatmulOperand, out: Tensor | None = None) -> Tensor:
    """One block of `quantized_matmul`, written to ``out`` or returned in float32."""
    exact = exact_dtype(left.shape[-1], a.bits, b.bits)
    qa, act_a = codes_as_floats(left, a, -1)
    qb, act_b = codes_as_floats(right, b, -2)
    qa, qb = qa.to(exact), qb.to(exact)
    # The lower bounds multiply these sums. A NaN in an operand shows in them too, at no extra pass.
    rows, columns = qa.sum(-1, keepdim=True), qb.sum(-2, keepdim=True)
    if bool(rows.isnan().any()) or bool(columns.isnan().any()):
        raise integer_reference.nan_error()
    # Where sums are exact in the type of the output, the product is written into it and rescaled in place.
    direct = out is not None and out.dtype == exact == torch.float32
    with integer_reference.exact_floats(qa):
        acc = torch.matmul(qa, qb, out=out) if direct else torch.matmul(qa, qb).float()
    _rescale(acc, rows.float(), columns.float(), act_a, act_b, left.shape[-1])
    return acc if out is None or direct else out.copy_(acc)


def codes_as_floats(x: Tensor, operand: MatmulOperand, axis: int) -> tuple[Tensor, Affine]:
    """Codes of an operand as float32, and its quantization parameters; a NaN stays a NaN.

    The codes equal `integer_reference.quantize_operand` bit for bit.
    """
    if operand.act is not None:
        factor, offset = integer_reference.static_qparams(operand.act, operand.joint_scale)
        positions, act = x.float() * factor, operand.act
    else:
        positions = x.to(torch.float32, copy=True)
        if operand.joint_scale is not None:
            positions *= operand.joint_scale.reciprocal()
        lower, step = integer_reference.dynamic_qparams(positions, axis, operand.bits)
        positions, offset, act = positions.mul_(step.reciprocal()), -lower / step, Affine(step, lower, operand.bits)
    return positions.add_(offset).round_().clamp_(0, (1 << operand.bits) - 1), act


def _rescale(acc: Tensor, rows: Tensor, columns: Tensor, a: Affine, b: Affine, length: int) -> None:
    """`integer_reference.matmul_epilogue` in place, in as few passes over the output as the parameters allow."""
    if a.step.numel() == 1 or b.step.numel() == 1:
        acc.mul_(a.step * b.step)
    else:
        acc.mul_(a.step).mul_(b.step)  # their product would be as large as the output
    acc.addcmul_(rows * a.step + a.lower * length, b.lower).addcmul_(columns * b.step, a.lower)
