"""The integer reference against numpy integers, and against dequantize-then-multiply in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.common.errors import InputError, KernelError
from harmoq_ao.quant import integer_reference, quantizer
from harmoq_ao.quant.integer_reference import Affine, LinearOperands

SEEDS = st.integers(0, 2**31)
BITS = st.integers(2, 8)


def uniform(generator: torch.Generator, *shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def codes_of(generator: torch.Generator, bits: int, *shape: int) -> Tensor:
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)


def signed_codes_of(generator: torch.Generator, bits: int, *shape: int) -> Tensor:
    half = 1 << (bits - 1)
    return torch.randint(-half, half, shape, dtype=torch.int8, generator=generator)


def values_of(codes: Tensor, affine: Affine) -> Tensor:
    return codes.double() * affine.step.double() + affine.lower.double()


# --- float to codes ---------------------------------------------------------------------------------------------------


def test_halves_round_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, 3.5, 14.5, 15.5])
    codes = integer_reference.quantize_codes(x, torch.tensor(1.0), torch.tensor(0.0), 4)
    assert codes.tolist() == [0, 2, 2, 0, 4, 14, 15]


def test_product_is_rounded_before_the_addition() -> None:
    x = torch.tensor([1 + 2.0**-12])  # squared: 1 + 2**-11 + 2**-24, and the last term is lost in float32
    codes = integer_reference.quantize_codes(x, x, torch.tensor(-(0.5 + 2.0**-11)), 2)
    assert codes.tolist() == [0]  # a fused multiply-add would keep it and round up to 1


@given(seed=SEEDS, bits=BITS)
def test_codes_are_those_of_float32_arithmetic_and_in_range(seed: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, scale = uniform(generator, 33, 7, low=-9, high=9), uniform(generator, 7, low=0.2, high=30)
    offset = uniform(generator, 33, 1, low=-5, high=200)
    codes = integer_reference.quantize_codes(x, scale, offset, bits)
    expected = np.rint(x.numpy() * scale.numpy() + offset.numpy()).clip(0, 2**bits - 1).astype(np.uint8)
    assert np.array_equal(codes.numpy(), expected)


@given(seed=SEEDS, bits=BITS, joint=st.booleans())
def test_codes_are_those_of_the_quantizer(seed: int, bits: int, joint: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = uniform(generator, 50, 6, low=-3, high=3)
    lo, hi = torch.tensor(-2.1), torch.tensor(1.7)
    scale = uniform(generator, 6, low=0.1, high=10) if joint else None
    affine = Affine(quantizer.step_size(lo, hi, bits), lo, bits)
    codes = integer_reference.quantize_codes(x, *integer_reference.static_qparams(affine, scale), bits)
    assert torch.equal(codes, quantizer.quantize(x, lo, hi, bits, scale))


def test_nan_is_refused_and_infinity_saturates() -> None:
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    with pytest.raises(InputError, match="not a number"):
        integer_reference.quantize_codes(torch.tensor([1.0, float("nan")]), one, zero, 8)
    codes = integer_reference.quantize_codes(torch.tensor([float("inf"), float("-inf")]), one, zero, 3)
    assert codes.tolist() == [7, 0]


@given(seed=SEEDS, bits=BITS, axis=st.sampled_from([0, 1, -1, (0, 2)]))
def test_dynamic_bounds_hold_every_value_within_half_a_step(seed: int, bits: int, axis: int | tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = uniform(generator, 4, 5, 6) * uniform(generator, 4, 5, 1, low=0.01, high=100)
    lower, step = integer_reference.dynamic_qparams(x, axis, bits)
    codes = integer_reference.quantize_codes(x, step.reciprocal(), -lower / step, bits)
    error = (values_of(codes, Affine(step, lower, bits)) - x).abs() / step
    assert lower.shape == step.shape == x.amin(axis, keepdim=True).shape
    assert error.max() <= 0.501


@pytest.mark.parametrize("length", [2047, 2048, 5003])
@pytest.mark.parametrize("axis", [-2, 1])
def test_dynamic_bounds_of_a_long_strided_axis(length: int, axis: int) -> None:
    x = torch.randn(2, length, 3, generator=torch.Generator().manual_seed(length))
    x[0, -1, 0], x[1, 0, 1], x[1, length // 2, 2] = 9.0, -9.0, float("nan")  # at both ends and inside
    lower, step = integer_reference.dynamic_qparams(x, axis, 8)
    assert torch.equal(lower.nan_to_num(7.0), x.amin(1, keepdim=True).nan_to_num(7.0))
    assert torch.allclose(lower + 255 * step, x.amax(1, keepdim=True), equal_nan=True)
    assert lower[1, 0, 2].isnan()


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e-30, 4e5])
def test_constant_tokens_keep_their_value(value: float) -> None:
    codes, affine = integer_reference.quantize_dynamic(torch.full((3, 8), value), -1, 4)
    assert torch.allclose(values_of(codes, affine), torch.tensor(value).double(), rtol=1e-6, atol=1e-18)


def test_dynamic_bounds_are_those_of_the_scaled_tensor() -> None:
    scale = torch.tensor([1.0, 4.0])
    codes, affine = integer_reference.quantize_dynamic(torch.tensor([[1.0, 8.0], [3.0, -4.0]]), -1, 8, scale)
    assert codes.tolist() == [[0, 255], [255, 0]]
    assert affine.lower.flatten().tolist() == [1.0, -1.0]


# --- accumulators -----------------------------------------------------------------------------------------------------


@given(seed=SEEDS, m=st.integers(0, 9), k=st.integers(0, 40), n=st.integers(1, 9))
def test_linear_accumulators_are_exact(seed: int, m: int, k: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    qx, qw = codes_of(generator, 8, 2, m, k), signed_codes_of(generator, 8, n, k)
    acc = integer_reference.linear_accumulate(qx, qw)
    assert acc.dtype == torch.int32
    assert np.array_equal(acc.numpy(), qx.numpy().astype(np.int64) @ qw.numpy().astype(np.int64).T)


@pytest.mark.parametrize(
    ("longest", "more", "right"),
    [
        *((integer_reference.INT32_LINEAR_LENGTH, more, -128) for more in (0, 1, 4208)),
        *((integer_reference.INT32_MATMUL_LENGTH, more, 255) for more in (0, 1, 266975)),
    ],
)
def test_long_contractions_do_not_overflow(longest: int, more: int, right: int) -> None:
    qa = torch.full((1, longest + more), 255, dtype=torch.uint8)
    if right < 0:
        acc = integer_reference.linear_accumulate(qa, torch.full_like(qa, right, dtype=torch.int8))
    else:
        acc = integer_reference.matmul_accumulate(qa, qa.t())
    assert acc.dtype == (torch.int64 if more else torch.int32)
    assert acc.item() == 255 * right * qa.numel()


@given(seed=SEEDS, m=st.integers(1, 6), k=st.integers(0, 30), n=st.integers(1, 6))
def test_matmul_accumulators_are_exact_with_broadcast_batches(seed: int, m: int, k: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    qa, qb = codes_of(generator, 8, 3, 1, m, k), codes_of(generator, 8, 2, k, n)
    acc = integer_reference.matmul_accumulate(qa, qb)
    assert acc.shape == (3, 2, m, n)
    assert np.array_equal(acc.numpy(), qa.numpy().astype(np.int64) @ qb.numpy().astype(np.int64))


def test_products_are_exact_on_devices_without_float64() -> None:
    left, right = torch.randint(0, 256, (3, 700)), torch.randint(-255, 256, (700, 5))
    left[0], right[:, 0] = 255, 255
    assert torch.equal(integer_reference._float32_matmul(left, right, torch.int32), (left @ right).to(torch.int32))


def test_operands_that_do_not_fit_are_refused() -> None:
    u8, s8 = torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.int8)
    for qx, qw in ((s8, s8), (u8, u8), (u8, s8.t()), (u8, s8[0]), (u8.sum(), s8)):
        with pytest.raises(KernelError, match="linear"):
            integer_reference.linear_accumulate(qx, qw)
    for qa, qb in ((u8, u8), (u8, s8.t()), (u8[0], u8.t()), (u8.expand(2, 2, 3), u8.t().expand(3, 3, 2))):
        with pytest.raises(KernelError, match="matmul"):
            integer_reference.matmul_accumulate(qa, qb)


# --- epilogues --------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, bits=BITS, act_bits=BITS, per_token=st.booleans(), with_bias=st.booleans())
def test_linear_epilogue_equals_float64(seed: int, bits: int, act_bits: int, per_token: bool, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    m, k, n = 6, 21, 5
    qx, qw = codes_of(generator, act_bits, m, k), signed_codes_of(generator, bits, n, k)
    shape = (m, 1) if per_token else ()
    act = Affine(uniform(generator, *shape, low=0.01, high=0.1), uniform(generator, *shape, low=-5, high=5), act_bits)
    scale, shift = uniform(generator, n, low=0.001, high=0.1), uniform(generator, n, low=-100, high=100)
    bias = uniform(generator, n) if with_bias else None
    weight = scale.double()[:, None] * (qw.double() + shift.double()[:, None])
    x = values_of(qx, act)
    expected = x @ weight.t() + (0 if bias is None else bias)
    total = integer_reference.weight_total(qw, scale, shift)
    found = integer_reference.linear_epilogue(
        integer_reference.linear_accumulate(qx, qw),
        qx.sum(-1, keepdim=True, dtype=torch.int64),
        act.step,
        scale,
        shift,
        integer_reference.fold_bias(total, act.lower, bias),
    )
    assert found.dtype == torch.float32
    # the two large terms cancel, so errors are relative to them
    size = act.step * qx.double().sum(-1, keepdim=True) + act.lower.abs() * k
    assert ((found - expected).abs() <= 1e-6 * (size * scale * (128 + shift.abs()) + 1)).all()


@given(seed=SEEDS, bits=BITS, rows=st.booleans(), columns=st.booleans())
def test_matmul_epilogue_equals_float64(seed: int, bits: int, rows: bool, columns: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, m, k, n = 3, 4, 10, 7
    qa, qb = codes_of(generator, bits, batch, m, k), codes_of(generator, bits, batch, k, n)
    left, right = (batch, m, 1) if rows else (), (batch, 1, n) if columns else ()
    a = Affine(uniform(generator, *left, low=0.01, high=0.1), uniform(generator, *left, low=-5, high=5), bits)
    b = Affine(uniform(generator, *right, low=0.01, high=0.1), uniform(generator, *right, low=-5, high=5), bits)
    expected = values_of(qa, a) @ values_of(qb, b)
    found = integer_reference.matmul(qa, qb, a, b)
    size = (qa.double() * a.step + a.lower.abs()) @ (qb.double() * b.step + b.lower.abs())
    assert ((found - expected).abs() <= 1e-6 * size).all()


# --- whole linear -----------------------------------------------------------------------------------------------------


def operands(**changes: object) -> LinearOperands:
    weight = torch.tensor([[1, -2, 3], [4, 5, -6]], dtype=torch.int8)
    fields: dict[str, object] = {
        "weight": weight,
        "weight_scale": torch.tensor([0.5, 0.25]),
        "weight_shift": torch.tensor([0.5, 0.0]),
        "bias": torch.tensor([1.0, -1.0]),
        "act_bits": 8,
        "act": Affine(torch.tensor(0.125), torch.tensor(-2.0), 8),
    }
    return LinearOperands(**(fields | changes))  # type: ignore[arg-type]


def test_linear_on_values_that_are_codes_is_exact() -> None:
    x = torch.tensor([[0.0, 1.0, -1.5], [2.0, 0.25, 0.5]])
    weight = torch.tensor([[0.75, -0.75, 1.75], [1.0, 1.25, -1.5]])
    expected = torch.nn.functional.linear(x, weight, torch.tensor([1.0, -1.0]))
    assert torch.equal(integer_reference.linear(x, operands()), expected)
    assert torch.equal(integer_reference.linear(x[0], operands()), expected[0])
    assert torch.equal(integer_reference.linear(x.bfloat16(), operands()), expected.bfloat16())


def test_joint_scale_divides_the_input() -> None:
    scale = torch.tensor([2.0, 0.5, 1.0])
    x = torch.tensor([[0.0, 1.0, -1.5]])
    for act in (operands().act, None):
        plain, scaled = operands(act=act), operands(act=act, joint_scale=scale)
        assert torch.allclose(integer_reference.linear(x * scale, scaled), integer_reference.linear(x, plain))


@pytest.mark.parametrize(
    "changes",
    [
        {"weight": torch.zeros(2, 3)},
        {"weight": torch.zeros(2, 0, dtype=torch.int8)},
        {"weight_scale": torch.ones(3)},
        {"weight_shift": torch.ones(2, dtype=torch.float64)},
        {"bias": torch.ones(2, 1)},
        {"joint_scale": torch.ones(2)},
        {"act_bits": 4},
    ],
)
def test_operands_are_checked(changes: dict[str, object]) -> None:
    with pytest.raises(KernelError):
        operands(**changes)


@pytest.mark.parametrize("x", [torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.int32), torch.tensor(1.0)])
def test_input_is_checked(x: Tensor) -> None:
    with pytest.raises(KernelError, match="input does not fit"):
        integer_reference.linear(x, operands())
