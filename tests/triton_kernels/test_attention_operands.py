"""Operands of an attention: what the kernels' layout does not hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harmoq_ao.common.errors import KernelError
from harmoq_ao.quant.integer_reference import MatmulOperand
from harmoq_ao.triton_kernels.attention_operands import MatmulQuantizers, pack_attention
from tests.triton_kernels.helpers import affine, seeded, site

DYNAMIC, STATIC = MatmulOperand(8), MatmulOperand(8, affine(0.0, 1.0))
NARROW = MatmulOperand(4, affine(0.0, 1.0, 4))


@pytest.mark.parametrize(
    ("qkv", "proj", "head_dim", "message"),
    [
        (None, None, 129, "this head"),
        (site(seeded(0), 50, 20, 4), None, 10, "qkv linear"),
        (None, site(seeded(0), 20, 21, 4), 10, "projection does not fit"),
    ],
)
def test_linears_and_heads(qkv: Any, proj: Any, head_dim: int, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        pack_attention(qkv, proj, 2, head_dim, torch.ones(2))


@pytest.mark.parametrize(
    ("operands", "message"), [((DYNAMIC,) * 4, "static bounds"), ((STATIC, STATIC, NARROW, STATIC), "same widths")]
)
def test_quantizers_of_the_products(operands: tuple[MatmulOperand, ...], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        MatmulQuantizers(*operands)
