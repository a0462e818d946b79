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
@given(data=st.data(), size=SIZES, bits=bit_widths(), per_channel=st.booleans())
def test_static_codes_are_those_of_the_reference(
    data: st.DataObject, size: tuple[int, int], bits: int, per_channel: bool
) -> None:
    x = data.draw(float_tensors(size))
    reciprocal = data.draw(joint_scales(size[1])) * (1 << bits) / (x.abs().max() + 1e-6)
    offset = data.draw(joint_scales(size[1], (1.0, 2.0**bits)))
    if not per_channel:
        reciprocal, offset = reciprocal[0], offset[:1]
    expected = integers.quantize_codes(x, reciprocal, offset, bits)
    assert torch.equal(quantize.launch_quantize(x, reciprocal, offset, bits), expected)


@few
@given(seed=SEEDS, size=SIZES, bits=st.sampled_from(quantize.PACKED_BITS))
def test_packed_codes_are_those_of_packing(seed: int, size: tuple[int, int], bits: int) -> None:
    x, unit = torch.randn(size, generator=seeded(seed)) * (1 << bits), torch.tensor(1.0)
    found = quantize.launch_quantize(x, unit, unit, bits, packed=True)
    assert torch.equal(found, quantize.reference(x, unit, unit, bits, packed=True))


@few
@given(data=st.data(), size=SIZES, bits=bit_widths(), joint=st.booleans())
def test_codes_and_bounds_per_token_are_those_of_the_reference(
    data: st.DataObject, size: tuple[int, int], bits: int, joint: bool
) -> None:
    x = data.draw(float_tensors(size))
    scale = data.draw(joint_scales(size[1])) if joint else None
    found = quantize.launch_quantize_tokens(x, bits, scale)
    for left, right in zip(found, quantize.reference_tokens(x, bits, scale), strict=True):
        assert torch.equal(left, right)


@few
@given(seed=SEEDS, size=SIZES, bits=bit_widths(), affine=st.booleans())
def test_layernorm_codes_differ_at_ties_only(seed: int, size: tuple[int, int], bits: int, affine: bool) -> None:
    generator = seeded(seed)
    x = torch.randn(size, generator=generator) * 5 + 2
    weight = torch.rand(size[1], generator=generator) + 0.5 if affine else None
    bias = torch.randn(size[1], generator=generator) if affine else None
    reciprocal, offset = torch.tensor((1 << bits) / 6), torch.tensor(2.0 ** (bits - 1))
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
    scale = torch.tensor(40.0)
    assert torch.equal(quantize.launch_quantize(x, scale, scale, 8), quantize.reference(x, scale, scale, 8))


def test_ties_go_to_even_and_the_product_is_rounded_first() -> None:
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, 3.5, 14.5, 15.5]])
    assert quantize.launch_quantize(x, one, zero, 4).tolist() == [[0, 2, 2, 0, 4, 14, 15]]
    x = torch.tensor([[1 + 2.0**-12]])  # see the test of the same name of the reference
    assert quantize.launch_quantize(x, x[0], torch.tensor(-(0.5 + 2.0**-11)), 2).tolist() == [[0]]


def test_infinities_saturate_and_nan_becomes_code_zero() -> None:
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    x = torch.tensor([[float("inf"), float("-inf"), float("nan"), 1e30, -1e30]])
    assert quantize.launch_quantize(x, one, two, 3).tolist() == [[7, 0, 0, 7, 0]]


def test_nothing_in_nothing_out() -> None:
    one = torch.tensor(1.0)
    assert quantize.launch_quantize(torch.zeros(0, 5), one, one, 8).shape == (0, 5)
    assert quantize.launch_quantize_tokens(torch.zeros(0, 5), 8)[0].shape == (0, 5)


def test_what_the_kernel_does_not_take() -> None:
    x, one = torch.zeros(4, 6), torch.tensor(1.0)
    with pytest.raises(KernelError, match="contiguous along the last axis"):
        quantize.launch_quantize(x.t(), one, one, 8)
    with pytest.raises(KernelError, match="width of activation"):
        quantize.launch_quantize(x, one, one, 9)
    with pytest.raises(KernelError, match="packed activation"):
        quantize.launch_quantize(x, one, one, 5, packed=True)
    with pytest.raises(KernelError, match="reciprocal"):
        quantize.launch_quantize(x, torch.ones(5), one, 8)
    with pytest.raises(KernelError, match="rows this long"):
        quantize.launch_quantize_tokens(torch.zeros(1, quantize.MAX_ROW + 1), 8)
