"""The kernel for chains of token-wise operations against its reference, in the interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harmoq_ao.common.elementwise import Binary, Unary
from harmoq_ao.common.errors import KernelError
from harmoq_ao.triton_kernels import rowwise
from harmoq_ao.triton_kernels.device import GELU_ERROR
from harmoq_ao.triton_kernels.rowwise import Chain, Op
from tests.triton_kernels.interpreter import interpreted


def run(chain: Chain, *inputs: Tensor, rows: int, images: int = 1) -> list[list[Tensor]]:
    """Outputs of the reference and of the kernel."""
    arguments = (inputs, chain.constants, chain.code, chain.numbers, chain.columns, chain.half, rows, rows // images)
    with interpreted():
        return [rowwise.reference(*arguments), rowwise.launch_rowwise(*arguments)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_of_a_sum_and_the_sum(dtype: torch.dtype) -> None:
    weight, bias = torch.randn(12), torch.randn(12)
    chain = Chain(constants=[weight, bias], numbers=[1e-5], columns=[12, 12], half=[dtype is torch.bfloat16] * 2)
    left, right = (chain.emit(Op.LOAD, 12, number, 0, 0) for number in range(2))
    total = chain.emit(Op.BINARY, 12, Binary.ADD, left, right)
    chain.emit(Op.STORE, 12, total, 0, 0)
    chain.emit(Op.STORE, 12, chain.emit(Op.NORM, 12, total, 0, 1, 1), 1, 0)
    x, y = torch.randn(7, 12).to(dtype), torch.randn(7, 12).to(dtype)
    summed = x.float() + y.float()
    expected = [summed.to(dtype), F.layer_norm(summed, (12,), weight, bias).to(dtype)]
    for found in run(chain, x, y, rows=7):
        torch.testing.assert_close(found, expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)


def test_a_norm_does_not_see_what_lies_beyond_its_columns() -> None:
    """Padding of 12 columns to 16 is no longer zero behind a sum with a number."""
    chain = Chain(numbers=[3.0, 1e-5], columns=[12], half=[False])
    raised = chain.emit(Op.SCALAR, 12, Binary.ADD, chain.emit(Op.LOAD, 12, 0, 0, 0), 1)
    chain.emit(Op.STORE, 12, chain.emit(Op.NORM, 12, raised, -1, -1, 2), 0, 0)
    reference, kernel = run(chain, torch.randn(7, 12), rows=7)
    torch.testing.assert_close(kernel, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", list(Unary))
def test_functions_of_one_value(kind: Unary) -> None:
    chain = Chain(numbers=[0.2], columns=[5], half=[False])
    value = chain.emit(Op.UNARY, 5, kind, chain.emit(Op.LOAD, 5, 0, 2, 0), 1)
    chain.emit(Op.STORE, 5, value, 0, 0)
    reference, kernel = run(chain, torch.linspace(-8, 8, 8 * 97).view(97, 8), rows=97)
    stated = GELU_ERROR if kind in (Unary.GELU, Unary.GELU_TANH) else 0.0
    torch.testing.assert_close(kernel, reference, rtol=1e-5, atol=stated + 1e-6)


def test_gates_of_images_and_of_tokens_side_by_side() -> None:
    """A row for each image, a column for each token, a factor and a shift; outputs written in parts."""
    chain = Chain(constants=[torch.randn(6), torch.randn(6)], numbers=[3.0], columns=[12], half=[False])
    x = chain.emit(Op.LOAD, 6, 0, 0, 0)
    image, token = chain.emit(Op.LOAD, 6, 1, 0, 1), chain.emit(Op.LOAD, 1, 2, 0, 0)
    gated = chain.emit(Op.BINARY, 6, Binary.MUL, chain.emit(Op.BINARY, 6, Binary.MUL, x, image), token)
    chain.emit(Op.STORE, 6, chain.emit(Op.AFFINE, 6, gated, 0, 1), 0, 0)
    less = chain.emit(Op.SCALAR, 6, Binary.SUB, x, 1)
    chain.emit(Op.STORE, 6, less, 0, 6)
    inputs = torch.randn(10, 6), torch.randn(2, 6), torch.randn(10, 1)
    spread = inputs[1].repeat_interleave(5, 0)
    scale, shift = chain.constants
    expected = torch.cat([inputs[0] * spread * inputs[2] * scale + shift, inputs[0] - 3], 1)
    for (found,) in run(chain, *inputs, rows=10, images=2):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("channels", "width"), [(5, 3), (3, 12), (60, 8), (8, 8), (1, 9), (9, 1)])
def test_products_with_a_narrow_side(channels: int, width: int) -> None:
    """Of a value whose padding is not zero."""
    weight, bias = torch.randn(channels, width), torch.randn(width)
    chain = Chain(constants=[weight, bias], numbers=[0.0], columns=[width, width], half=[False] * 2)
    x = chain.emit(Op.UNARY, channels, Unary.SIGMOID, chain.emit(Op.LOAD, channels, 0, 1, 0), 1)
    chain.emit(Op.STORE, width, chain.emit(Op.PRODUCT, width, x, 0, 1, channels), 0, 0)
    chain.emit(Op.STORE, width, chain.emit(Op.PRODUCT, width, x, 0, -1, channels), 1, 0)
    inputs = torch.randn(11, channels + 2)
    product = inputs[:, 1:-1].sigmoid() @ weight
    for found in run(chain, inputs, rows=11):
        torch.testing.assert_close(found, [product + bias, product], rtol=1e-4, atol=1e-5)


def test_strided_matrices_are_refused() -> None:
    chain = Chain(columns=[4], half=[False])
    chain.emit(Op.STORE, 4, chain.emit(Op.LOAD, 4, 0, 0, 0), 0, 0)
    with pytest.raises(KernelError, match="contiguous"):
        run(chain, torch.zeros(4, 6).t(), rows=6)
