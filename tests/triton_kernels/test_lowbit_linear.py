"""The linear kernel: accumulators bit for bit, floats within rounding of float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harmoq_ao.common.errors import KernelError
from harmoq_ao.quant import integer_reference as integers
from harmoq_ao.quant.integer_reference import LinearOperands
from harmoq_ao.quant.packing import pack
from harmoq_ao.triton_kernels import lowbit_linear
from harmoq_ao.triton_kernels.device import GELU_ERROR
from harmoq_ao.triton_kernels.operands import from_operands, with_norm
from tests.strategies import SEEDS, bit_widths, float_tensors
from tests.triton_kernels import float64
from tests.triton_kernels.helpers import codes_of, random_linear, seeded

few = settings(max_examples=12)


@few
@given(
    seed=SEEDS, m=st.integers(1, 70), k=st.integers(1, 200), n=st.integers(1, 80),
    weight_bits=bit_widths(), act_bits=bit_widths(), mid_rise=st.booleans(),
)  # fmt: skip
def test_accumulators_equal_the_reference_bit_for_bit(
    seed: int, m: int, k: int, n: int, weight_bits: int, act_bits: int, mid_rise: bool
) -> None:
    generator = seeded(seed)
    operands, packed = random_linear(generator, n, k, weight_bits, act_bits, mid_rise=mid_rise)
    codes = codes_of(generator, act_bits, m, k)
    acc = lowbit_linear.launch_accumulate(codes, packed)
    assert torch.equal(acc, lowbit_linear.reference_accumulate(codes, packed))
    canonical = lowbit_linear.canonical(acc, codes, packed)
    assert torch.equal(canonical, integers.linear_accumulate(codes, operands.weight))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("mid_rise", [True, False])
def test_largest_accumulators(bits: int, mid_rise: bool) -> None:
    for code in (0, (1 << bits) - 1):
        signed = torch.full((16, 300), code - (1 << (bits - 1)), dtype=torch.int8)
        unit = torch.ones(16)
        operands = LinearOperands(signed, unit, unit * (0.5 if mid_rise else 0.0), None, 8)
        packed = from_operands(operands, pack(torch.full((16, 300), code, dtype=torch.uint8), bits), bits)
        codes = torch.full((3, 300), 255, dtype=torch.uint8)
        acc = lowbit_linear.canonical(lowbit_linear.launch_accumulate(codes, packed), codes, packed)
        assert torch.equal(acc, integers.linear_accumulate(codes, signed))


@few
@given(
    seed=SEEDS, m=st.integers(1, 70), k=st.integers(1, 150), n=st.integers(1, 80),
    bits=st.sampled_from([2, 3, 4, 8]), static=st.booleans(), mid_rise=st.booleans(),
)  # fmt: skip
def test_floats_are_within_rounding_of_the_dequantized_product(
    seed: int, m: int, k: int, n: int, bits: int, static: bool, mid_rise: bool
) -> None:
    generator = seeded(seed)
    operands, packed = random_linear(generator, n, k, bits, bits, static=static, mid_rise=mid_rise)
    x = torch.randn(m, k, generator=generator)
    y = lowbit_linear.launch_lowbit_linear(x, packed)
    qx, act = _quantized(x, operands)
    left = qx.double() * act.step.double() + act.lower.double()
    weight = (operands.weight.double() + operands.weight_shift.double()[:, None]) * operands.weight_scale.double()[
        :, None
    ]
    assert operands.bias is not None
    exact = left @ weight.t() + operands.bias.double()
    size = left.abs() @ weight.abs().t() + operands.bias.abs().double() + act.lower.abs() * weight.sum(1).abs()
    assert ((y - exact).abs() <= 2.0**-20 * size + 1e-30).all()
    assert torch.allclose(y, integers.linear(x, operands), atol=float(size.max()) * 2.0**-20)


def _quantized(x: torch.Tensor, operands: LinearOperands) -> tuple[torch.Tensor, integers.Affine]:
    if operands.act is None:
        return integers.quantize_dynamic(x, -1, operands.act_bits, operands.joint_scale)
    qparams = integers.static_qparams(operands.act, operands.joint_scale)
    return integers.quantize_codes(x, *qparams, operands.act_bits), operands.act


@few
@given(data=st.data(), seed=SEEDS, m=st.integers(1, 70), k=st.integers(1, 150), bits=bit_widths(), joint=st.booleans())
def test_per_token_nothing_differs_from_the_reference(
    data: st.DataObject, seed: int, m: int, k: int, bits: int, joint: bool
) -> None:
    x = data.draw(float_tensors((m, k)))
    _, packed = random_linear(seeded(seed), 20, k, 4, bits, static=False)
    packed = packed if joint else replace(packed, reciprocal=None)
    # Ranges, codes and epilogue: every operation is rounded alike.
    assert torch.equal(lowbit_linear.launch_lowbit_linear(x, packed), lowbit_linear.reference(x, packed))


@few
@given(
    seed=SEEDS, residual=st.booleans(), codes=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)  # fmt: skip
def test_epilogue(seed: int, residual: bool, codes: bool, dtype: torch.dtype) -> None:
    generator = seeded(seed)
    _, packed = random_linear(generator, 50, 60, 4, 8)
    x = codes_of(generator, 8, 33, 60) if codes else torch.randn(33, 60, generator=generator)
    extra = torch.randn(33, 50, generator=generator) if residual else None
    y = lowbit_linear.launch_lowbit_linear(x, packed, residual=extra, out_dtype=dtype)
    expected = lowbit_linear.reference(x, packed, residual=extra)
    bound = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert y.dtype == dtype
    assert ((y.float() - expected).abs() <= bound * (1 + expected.abs())).all()


@few
@given(
    seed=SEEDS, m=st.integers(1, 70), k=st.integers(1, 200), bits=st.sampled_from([2, 4, 8]), norm=st.booleans(),
    gated=st.booleans(), residual=st.booleans(), gelu=st.sampled_from(["none", "erf", "tanh"]),
)  # fmt: skip
def test_what_surrounds_a_linear(
    seed: int, m: int, k: int, bits: int, norm: bool, gated: bool, residual: bool, gelu: str
) -> None:
    generator = seeded(seed)
    _, packed = random_linear(generator, 40, k, bits, 8)
    eps = None
    if norm:
        eps = 1e-5
        packed = with_norm(packed, torch.rand(k, generator=generator) + 0.5, torch.randn(k, generator=generator))
    x, gate = torch.randn(m, k, generator=generator), torch.randn(m, 2 * k, generator=generator)[:, k:]
    extra = torch.randn(m, 40, generator=generator) if residual else None
    options = {"eps": eps, "gate": gate if gated else None, "gelu": gelu, "residual": extra}
    y = lowbit_linear.launch_lowbit_linear(x, packed, **options)
    error = (y - float64.linear(x, packed, **options)).abs()
    # A code at a tie takes a neighbour: a step of one weight.
    step = (packed.scale * packed.effective_codes().abs().amax(1)).max()
    assert error.max() <= 2 * GELU_ERROR + 2 * step
    assert (error > 2 * GELU_ERROR).float().mean() <= 0.05


def test_what_the_kernel_does_not_take() -> None:
    generator = seeded(0)
    operands, packed = random_linear(generator, 8, 16, 4, 8)
    codes = codes_of(generator, 4, 8, 16)
    shifted = LinearOperands(operands.weight, operands.weight_scale, operands.weight_shift + 0.3, None, 8)
    with pytest.raises(KernelError, match="mid-rise"):
        from_operands(shifted, pack(codes, 4), 4)
    with pytest.raises(KernelError, match="activation does not fit"):
        lowbit_linear.launch_lowbit_linear(torch.zeros(3, 15), packed)
    with pytest.raises(KernelError, match="residual has another number"):
        lowbit_linear.launch_lowbit_linear(torch.zeros(3, 16), packed, residual=torch.zeros(4, 8))
    _, token = random_linear(generator, 8, 16, 4, 8, static=False)
    with pytest.raises(KernelError, match="Codes need a static range"):
        lowbit_linear.launch_lowbit_linear(torch.zeros(3, 16, dtype=torch.uint8), token)
    for options in ({"eps": 1e-5}, {"gate": torch.zeros(3, 16)}):
        with pytest.raises(KernelError, match="floats and a static range"):
            lowbit_linear.launch_lowbit_linear(torch.zeros(3, 16), token, **options)
    _, long = random_linear(generator, 8, 300, 4, 8)
    with pytest.raises(KernelError, match="Too long for a LayerNorm"):
        lowbit_linear.launch_lowbit_linear(torch.zeros(3, 300), long, eps=1e-5)
    assert lowbit_linear.launch_lowbit_linear(torch.zeros(0, 16), packed).shape == (0, 8)
