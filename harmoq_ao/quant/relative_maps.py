"""Attention maps quantized relative to the largest entry of each row, and normalised after the product.

With a map `p` `[..., M, K]`, values `v` `[..., K, N]`, and `t = max_j p_j` in each row::

    y = (p' v~) * sum_j p_j / sum_j p'_j        p' = Q(p / t),  v~ = Q(v)

For a softmax ``p / t = exp(s - max s)``: the row's normaliser, by which a softmax divides before the product, cancels.
So every row uses all levels of one static quantizer on 0..1, and rows sum to what they did whatever was rounded away.
In an integer kernel this costs nothing: the largest score and the sum of codes are known there anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harmoq_ao.quant.operators import operators_for, using
from harmoq_ao.quant.quantizer import affine_form, bound_gradients, step_size, widen

_TINY = 1e-30
_SAMPLED_FROM, _SAMPLED = 64, 8  # rows of a map from which on the range learns from some, and which of them


def relative_rows(attention_map: Tensor) -> Tensor:
    """``p / max_j p_j`` in 0..1; a row of zeros stays one. The largest entry takes no gradient."""
    return attention_map / attention_map.detach().amax(-1, keepdim=True).clamp_min(_TINY)


def renormalized(product: Tensor, attention_map: Tensor, sums: Tensor) -> Tensor:
    """``product * sum_j p_j / sum_j p'_j`` in the type of `product`; the factor of a row is float32 at least.

    Args:
        product: ``p' v~``, `[..., M, N]`.
        attention_map: `p`, `[..., M, K]`.
        sums: ``sum_j p'_j``, `[..., M, 1]`.
    """
    factor = widen(attention_map).sum(-1, keepdim=True) / sums.clamp_min(_TINY)
    return (product * factor).to(product.dtype)


def row_sums(codes: Tensor, step: Tensor, lower: Tensor) -> Tensor:
    """``sum_j (step * codes_j + lower)`` `[..., M, 1]` in float32, of uint8 codes `[..., M, K]`, whose sum is exact."""
    return codes.sum(-1, keepdim=True, dtype=torch.int32) * step + lower * codes.shape[-1]


def map_product(attention_map: Tensor, values: Tensor, lo: Tensor, hi: Tensor, bits: int) -> Tensor:
    """``(p' v~) * sum_j p_j / sum_j p'_j``, differentiable as its parts are by the straight-through estimator.

    Step by step that is some thirty passes over a map and its gradient, of which nothing but the products and the
    rounding need be: the step of the codes cancels, and so does the gradient of their sum but for one number a row.
    Of the range's gradient, two numbers, every eighth row is asked where a map has at least 64.

    Args:
        attention_map: `p`, `[..., M, K]`; its gradient is that of ``relative_rows`` and ``renormalized``.
        values: `v~`, already rounded, `[..., K, N]`.
        lo: Lower bound of ``p / max_j p_j``, 0-d, a whole number of steps and not positive.
        hi: Upper bound, 0-d.
        bits: 2 to 8.

    Returns:
        `[..., M, N]` in the type of a product of the operands.
    """
    result: Tensor = _MapProduct.apply(attention_map, values, lo, hi, bits)
    return result


class _MapProduct(torch.autograd.Function):
    """With whole numbers ``c = p' / step``: ``y = (c v~) * sum p / sum c``."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, values: Tensor, lo: Tensor, hi: Tensor, bits: int) -> Tensor:
        ctx.bits, ctx.operators = bits, operators_for(p, values, lo, hi) if p.is_contiguous() and p.numel() else None
        ctx.clips = bool((lo < 0) | (hi < 1))  # else nothing is clipped: entries are in 0..1
        if ctx.operators is None:
            codes, top, sums, total = _codes(p, lo, hi, bits, ctx.clips)
        else:
            codes, top, sums, total = ctx.operators.relative_codes(p, lo, hi, bits)
        product = torch.matmul(codes.to(values.dtype), values)  # exact in 16 bits too
        y = (product * (sums / total)).to(product.dtype)
        ctx.save_for_backward(p, values, lo, hi, codes, y, top, sums, total)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        p, values, lo, hi, codes, y, top, sums, total = ctx.saved_tensors
        needs_map, needs_values, needs_lo, needs_hi, _ = ctx.needs_input_grad
        grad, wide = widen(grad_outputs[0]), widen(values)
        product = grad * (sums / total)  # of c v~
        along = (grad * y).sum(-1, keepdim=True)  # of the logarithm of the sums' ratio
        grad_map = grad_values = grad_lo = grad_hi = None
        if needs_values:
            grad_values = torch.matmul(codes.mT, product).sum_to_size(values.shape).to(values.dtype)
        if needs_map:
            slope, of_sum = (step_size(lo, hi, ctx.bits) * top).reciprocal(), along / sums.clamp_min(_TINY)
            of_codes = along * slope / total
            grad_map = torch.matmul(product * slope, wide.mT)
            if ctx.operators is not None and grad_map.shape == p.shape:
                ctx.operators.relative_map_backward_(grad_map, p, top, of_codes, of_sum, lo, hi)
            else:
                clipped = (lo, hi) if ctx.clips else None
                grad_map = _through_codes(grad_map, widen(p), top, of_codes, of_sum, clipped)
                grad_map = grad_map.sum_to_size(p.shape).to(p.dtype)
        if needs_lo or needs_hi:
            with using(ctx.operators):
                grad_lo, grad_hi = _range_gradients(ctx.bits, p, top, lo, hi, product, along / total, wide)
        return grad_map, grad_values, grad_lo, grad_hi, None


def _codes(p: Tensor, lo: Tensor, hi: Tensor, bits: int, clips: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``c``, ``max_j p_j``, ``sum_j p_j`` and ``sum_j c_j``."""
    wide = widen(p)
    top = wide.amax(-1, keepdim=True).clamp_min_(_TINY)
    factor, offset = affine_form(lo, hi, bits)
    codes = (wide / top).mul_(factor)
    if clips:
        codes.add_(offset).round_().clamp_(0, 2**bits - 1).sub_(offset.round())
    else:
        codes.round_()
    return codes, top, wide.sum(-1, keepdim=True), codes.sum(-1, keepdim=True).clamp_min_(_TINY)


def _through_codes(
    grad: Tensor, p: Tensor, top: Tensor, of_codes: Tensor, of_sum: Tensor, clipped: tuple[Tensor, Tensor] | None
) -> Tensor:
    """The gradient of a map, in place of that of its codes in entries; those `clipped` by bounds get `of_sum` alone."""
    if clipped is None:
        return grad.add_(of_sum - of_codes)
    relative, (lo, hi) = p / top, clipped
    return grad.sub_(of_codes).masked_fill_((relative < lo) | (relative > hi), 0.0).add_(of_sum)


def _range_gradients(
    bits: int, p: Tensor, top: Tensor, lo: Tensor, hi: Tensor, product: Tensor, of_sum: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the bounds from some of the rows; `product` and `of_sum` are those of ``c v~`` and of ``sum c``."""
    every = _SAMPLED if p.shape[-2] >= _SAMPLED_FROM else 1
    rows = slice(None, None, every)
    factor, _ = affine_form(lo, hi, bits)
    relative = widen(p[..., rows, :]) / top[..., rows, :]
    grad = torch.matmul(product[..., rows, :], values.mT).sub_(of_sum[..., rows, :]).mul_(factor)
    share = p.shape[-2] / relative.shape[-2]
    grad_lo, grad_hi = bound_gradients(grad, relative.expand_as(grad), lo, hi, bits)
    return grad_lo * share, grad_hi * share
