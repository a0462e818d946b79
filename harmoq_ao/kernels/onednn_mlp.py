"""Linear, GELU, linear on CPUs as one chain of codes, a block of rows at a time.

The hidden activations stay in the cache and in float32: they are never written out for the whole image, nor rounded to
the type of the input. For a float32 input, codes and accumulators equal those of the two linears run one by one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from harmoq_ao.kernels.onednn import PackedLinear, block_rows, quantize
from harmoq_ao.quant import integer_reference


def takes(fc1: PackedLinear, fc2: PackedLinear) -> bool:
    """Whether both linears have static ranges, and weight shifts that their codes absorb."""
    return fc1.only_codes and fc2.only_codes


def mlp(x: Tensor, fc1: PackedLinear, fc2: PackedLinear, gelu: str) -> Tensor:
    """``fc2(gelu(fc1(x)))``. Not differentiable.

    Args:
        x: `[..., K]` float32 or bfloat16, any strides.
        fc1: First linear, `[H, K]`; :func:`takes` must hold for both.
        fc2: Second linear, `[N, H]`.
        gelu: Approximation of the GELU, ``none`` or ``tanh``.

    Returns:
        `[..., N]` in the dtype of ``x``, contiguous.

    Raises:
        KernelError: ``x`` has another number of channels.
        InputError: ``x`` holds a NaN.
    """
    integer_reference.check_input(x, fc1.operands)
    rows = x.detach().reshape(-1, x.shape[-1])
    hidden, width = len(fc1.total), len(fc2.total)
    y = torch.empty(len(rows), width, dtype=x.dtype)
    if len(rows):
        block = block_rows(len(rows), 2 * hidden)  # float32 before and after the GELU are the largest buffers
        for values, target in zip(rows.split(block), y.split(block), strict=True):
            between = F.gelu(fc1.contract(quantize(values, fc1), torch.float32), approximate=gelu)
            target.copy_(fc2.contract(quantize(between, fc2), x.dtype))
    return y.reshape(*x.shape[:-1], width)
