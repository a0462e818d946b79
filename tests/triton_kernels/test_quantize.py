"""The quantizing kernels against the integer reference: the same codes, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harmoq_ao.common.errors import KernelError
from harmoq_ao.quant import integer_reference as integers
from harmoq_ao.triton_kernels import quantize
from harmoq_ao.triton_kernels.operands import fold_norm
from tests.strategies import SEEDS, bit_widths, float_tensors, joint_scales
from tests.triton_kernels.helpers import seeded

few = settings(max_examples=12)
SIZES = st.tuples(st.integers(1, 130), st.integers(1, 150))


@few
@given(data=st.data(), size=SIZES, bits=bit_widths())
def test_static_codes_are_those_of_the_reference(data: st.DataObject, size: tuple[int, int], bits: int) -> None:
    x = data.draw(float_tensors(size))
    reciprocal = data.draw(joint_scales(size[1])) * (1 << bits) / (x.abs().max() + 1e-6)
    offset = data.draw(joint_scales(size[1], (1.0, 2.0**bits)))
    expected = integers.quantize_codes(x, reciprocal, offset, bits)
    assert torch.equal(quantize.launch_quantize(x, reciprocal, offset, bits), expected)


@few
@given(seed=SEEDS, size=SIZES, bits=bit_widths(), affine=st.booleans())
def test_layernorm_codes_differ_at_ties_only(seed: int, size: tuple[int, int], bits: int, affine: bool) -> None:
    generator = seeded(seed)
    x = torch.randn(size, generator=generator) * 5 + 2
    weight = torch.rand(size[1], generator=generator) + 0.5 if affine else None
    bias = torch.randn(size[1], generator=generator) if affine else None
    reciprocal, offset = torch.full(size[1:], (1 << bits) / 6), torch.full(size[1:], 2.0 ** (bits - 1))
    folded = fold_norm(weight, bias, reciprocal, offset)
    found = quantize.launch_quantize(x, *folded, bits, eps=1e-5)
    normed = torch.nn.functional.layer_norm(x.double(), (size[1],), eps=1e-5)
    if weight is not None and bias is not None:
        normed = normed * weight.double() + bias.double()
    position = (normed * reciprocal.double() + offset.double()).clamp(0, (1 << bits) - 1)
    assert (found.double() - position).abs().max() <= 0.5 + 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_floats_and_strided_rows(dtype: torch.dtype) -> None:
    x = torch.randn(20, 100).to(dtype)[:, :37]
    scale = torch.full((37,), 40.0)
    assert torch.equal(quantize.launch_quantize(x, scale, scale, 8), quantize.reference(x, scale, scale, 8))


def test_ties_go_to_even_and_the_product_is_rounded_first() -> None:
    one, zero = torch.ones(7), torch.zeros(7)
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, 3.5, 14.5, 15.5]])
    assert quantize.launch_quantize(x, one, zero, 4).tolist() == [[0, 2, 2, 0, 4, 14, 15]]
    x = torch.tensor([[1 + 2.0**-12]])  # see the test of the same name of the reference
    assert quantize.launch_quantize(x, x[0], torch.tensor([-(0.5 + 2.0**-11)]), 2).tolist() == [[0]]


def test_infinities_saturate_and_nan_becomes_code_zero() -> None:
    one, two = torch.ones(5), torch.full((5,), 2.0)
    x = torch.tensor([[float("inf"), float("-inf"), float("nan"), 1e30, -1e30]])
    assert quantize.launch_quantize(x, one, two, 3).tolist() == [[7, 0, 0, 7, 0]]


def test_nothing_in_nothing_out() -> None:
    one = torch.ones(5)
    assert quantize.launch_quantize(torch.zeros(0, 5), one, one, 8).shape == (0, 5)


def test_what_the_kernel_does_not_take() -> None:
    x, one = torch.zeros(4, 6), torch.ones(6)
    with pytest.raises(KernelError, match="contiguous along the last axis"):
        quantize.launch_quantize(x.t(), one, one, 8)
    with pytest.raises(KernelError, match="width of activation"):
        quantize.launch_quantize(x, one, one, 9)
    with pytest.raises(KernelError, match="reciprocal"):
        quantize.launch_quantize(x, torch.ones(5), one, 8)
    long = torch.zeros(1, quantize.MAX_ROW + 1)
    with pytest.raises(KernelError, match="rows this long"):
        quantize.launch_quantize(long, long[0], long[0], 8, eps=1e-5)
