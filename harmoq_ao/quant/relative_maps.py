"""Attention maps quantized relative to the largest entry of each row, and normalised after the product.

With a map `p` `[..., M, K]`, values `v` `[..., K, N]`, and `t = max_j p_j` in each row::

    y = (p' v~) * sum_j p_j / sum_j p'_j        p' = Q(p / t),  v~ = Q(v)

For a softmax ``p / t = exp(s - max s)``: the row's normaliser, by which a softmax divides before the product, cancels.
So every row uses all levels of one static quantizer on 0..1, and rows sum to what they did whatever was rounded away.
In an integer kernel this costs nothing: the largest score and the sum of codes are known there anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harmoq_ao.quant.quantizer import widen

_TINY = 1e-30


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
