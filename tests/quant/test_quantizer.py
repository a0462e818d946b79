"""The quantizer's rounding rule, its schemes, and its gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.common.errors import ConfigError
from harmoq_ao.quant.quantizer import (
    MIN_STEP,
    Granularity,
    QuantizerSpec,
    Scheme,
    dequantize,
    dynamic_bounds,
    dynamic_bounds_for,
    fake_quantize,
    quantize,
    snap_bounds,
    step_size,
)
from tests.strategies import bit_widths, float_tensors, joint_scales, shapes, specs, static_specs

EPS = torch.finfo(torch.float32).eps


def snapped_range(x: Tensor, spec: QuantizerSpec, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    return snap_bounds(x.min() * shrink, x.max() * shrink, spec)


@pytest.mark.parametrize("bits", [0, 1, 9, 12, 64, -4, True, 4.0, "4", None])
def test_unsupported_bits_are_refused(bits: object) -> None:
    with pytest.raises(ConfigError, match="bit width"):
        QuantizerSpec(bits)  # type: ignore[arg-type]


def test_unknown_scheme_and_granularity_are_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="symmetric, asymmetric, integer_zero_point"):
        QuantizerSpec(4, "affine")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="per_tensor, per_channel, per_token"):
        QuantizerSpec(4, granularity="per_group")  # type: ignore[arg-type]


def test_dynamic_per_channel_is_refused() -> None:
    with pytest.raises(ConfigError, match="Dynamic bounds"):
        QuantizerSpec(4, granularity=Granularity.PER_CHANNEL, dynamic=True)


def test_names_are_accepted_for_enum_members() -> None:
    spec = QuantizerSpec(4, "symmetric", "per_channel")  # type: ignore[arg-type]
    assert spec == QuantizerSpec(4, Scheme.SYMMETRIC, Granularity.PER_CHANNEL)


@pytest.mark.parametrize(("bits", "enabled"), [(2, True), (8, True), (16, False), (32, False)])
def test_sixteen_and_thirtytwo_bits_are_off(bits: int, enabled: bool) -> None:
    spec = QuantizerSpec(bits)
    assert spec.enabled is enabled
    assert spec.qmax == spec.levels - 1 == 2**bits - 1


@given(x=float_tensors(), spec=static_specs(), shrink=st.sampled_from([0.1, 0.7, 1.0, 3.0]))
def test_codes_are_always_in_range(x: Tensor, spec: QuantizerSpec, shrink: float) -> None:
    lo, hi = snapped_range(x, spec, shrink)
    codes = quantize(x, lo, hi, spec.bits)
    assert codes.dtype == torch.uint8
    assert codes.shape == x.shape
    assert int(codes.max()) <= spec.qmax


@given(value=st.floats(-(2.0**100), 2.0**100, width=32), bits=bit_widths())
def test_codes_are_in_range_for_extreme_values_and_degenerate_bounds(value: float, bits: int) -> None:
    x = torch.tensor([value, -value, 0.0, 1e30, -1e30])
    for lo, hi in ((-1.0, 1.0), (0.0, 0.0), (3.0, 3.0), (-2.0, -2.0), (1.0, -1.0)):
        bounds = torch.tensor(lo), torch.tensor(hi)
        codes, values = quantize(x, *bounds, bits), fake_quantize(x, *bounds, bits)
        assert int(codes.max()) <= 2**bits - 1
        assert torch.isfinite(values).all()


def test_a_degenerate_range_has_the_smallest_step() -> None:
    lo, hi = torch.tensor([0.0, 5.0, 1.0]), torch.tensor([0.0, 5.0, -1.0])
    assert torch.equal(step_size(lo, hi, 4), torch.full((3,), MIN_STEP))
    assert torch.equal(fake_quantize(torch.tensor([9.0, 9.0]), lo[:2], hi[:2], 4), torch.tensor([15 * MIN_STEP, 5.0]))


@given(x=float_tensors(), spec=static_specs())
def test_rounding_is_two_float32_operations_then_half_even(x: Tensor, spec: QuantizerSpec) -> None:
    """Against numpy, operation by operation."""
    lo, hi = snapped_range(x, spec)
    step = np.maximum((hi.numpy() - lo.numpy()) / np.float32(spec.qmax), np.float32(MIN_STEP))
    product = x.numpy() * (np.float32(1) / step)
    expected = np.clip(np.rint(product + -lo.numpy() / step), 0, spec.qmax)
    np.testing.assert_array_equal(quantize(x, lo, hi, spec.bits).numpy(), expected.astype(np.uint8))


def test_halves_round_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, 3.5, 6.5])
    assert quantize(x, torch.tensor(0.0), torch.tensor(7.0), 3).tolist() == [0, 2, 2, 4, 6]


@given(x=float_tensors(), spec=static_specs(), shrink=st.sampled_from([0.5, 1.0, 2.0]))
def test_quantizing_twice_changes_no_code(x: Tensor, spec: QuantizerSpec, shrink: float) -> None:
    lo, hi = snapped_range(x, spec, shrink)
    codes = quantize(x, lo, hi, spec.bits)
    again = quantize(dequantize(codes, lo, hi, spec.bits), lo, hi, spec.bits)
    if hi > lo:
        assert torch.equal(codes, again)


@given(x=float_tensors(), spec=static_specs(), shrink=st.sampled_from([0.3, 1.0]))
def test_error_is_at_most_half_a_step_inside_the_bounds(x: Tensor, spec: QuantizerSpec, shrink: float) -> None:
    lo, hi = snapped_range(x, spec, shrink)
    inside = x.clamp(lo, hi)
    error = (dequantize(quantize(x, lo, hi, spec.bits), lo, hi, spec.bits) - inside).abs()
    rounding = 4 * EPS * torch.maximum(lo.abs(), hi.abs())
    assert bool((error <= step_size(lo, hi, spec.bits) / 2 + rounding).all())


@given(x=float_tensors(), spec=static_specs())
def test_codes_are_monotone(x: Tensor, spec: QuantizerSpec) -> None:
    lo, hi = snapped_range(x, spec, 0.8)
    codes = quantize(x.flatten().sort().values, lo, hi, spec.bits).int()
    assert bool((codes.diff() >= 0).all())


@given(x=float_tensors(), spec=static_specs())
def test_fake_quantize_is_the_round_trip_through_codes(x: Tensor, spec: QuantizerSpec) -> None:
    lo, hi = snapped_range(x, spec, 0.7)
    scale = torch.linspace(0.5, 2.0, x.shape[-1])
    for s in (None, scale):
        expected = dequantize(quantize(x, lo, hi, spec.bits, s), lo, hi, spec.bits)
        assert torch.equal(fake_quantize(x, lo, hi, spec.bits, s), expected)


@given(x=float_tensors(), bits=bit_widths(), exponent=st.integers(-6, 6))
def test_a_scalar_scale_of_a_power_of_two_changes_nothing(x: Tensor, bits: int, exponent: int) -> None:
    lo, hi = x.min() * 0.8, x.max() * 0.8
    scale = torch.tensor(2.0**exponent)
    plain = fake_quantize(x, lo, hi, bits)
    assert torch.equal(quantize(x, lo / scale, hi / scale, bits, scale), quantize(x, lo, hi, bits))
    assert torch.equal(fake_quantize(x, lo / scale, hi / scale, bits, scale) * scale, plain)


@given(x=float_tensors(kinds=("normal", "heavy", "one_sided")), bits=bit_widths(), factor=st.floats(0.1, 10.0))
def test_a_scalar_scale_changes_the_codes_by_rounding_only(x: Tensor, bits: int, factor: float) -> None:
    """A code may differ only where the value lies on a rounding boundary to within float32 precision."""
    lo, hi = x.min() * 0.8, x.max() * 0.8
    scale = torch.tensor(factor)
    moved = quantize(x, lo / scale, hi / scale, bits, scale).int()
    position = ((x.double() - lo) / step_size(lo, hi, bits)).clamp(0, 2**bits - 1)
    boundary = (position - position.floor() - 0.5).abs() < 1e-4
    differs = (moved - quantize(x, lo, hi, bits).int()).abs()
    assert bool((differs <= boundary.int()).all())


@given(x=float_tensors(), spec=static_specs())
def test_snapping_is_idempotent_and_follows_the_scheme(x: Tensor, spec: QuantizerSpec) -> None:
    lo, hi = snapped_range(x, spec)
    again = snap_bounds(lo, hi, spec)
    assert torch.equal(lo, again[0])
    assert torch.equal(hi, again[1])
    if spec.scheme is Scheme.SYMMETRIC:
        assert lo == -hi == -x.abs().max()
    if spec.scheme is Scheme.ASYMMETRIC:
        assert (lo, hi) == (x.min(), x.max())


@given(x=float_tensors(), bits=bit_widths())
def test_integer_zero_point_represents_zero_exactly(x: Tensor, bits: int) -> None:
    spec = QuantizerSpec(bits, Scheme.INTEGER_ZERO_POINT)
    lo, hi = snapped_range(x, spec)
    step = step_size(lo, hi, bits)
    zero = quantize(torch.zeros(1), lo, hi, bits)
    assert dequantize(zero, lo, hi, bits).item() == 0.0
    assert lo == -zero.item() * step
    slack = step * (0.5 + 1e-4)
    assert lo - slack <= min(x.min().item(), 0.0)
    assert hi + slack >= max(x.max().item(), 0.0)
    assert hi - lo <= (x.max().clamp_min(0) - x.min().clamp_max(0)) * (1 + 2**-14) + spec.qmax * MIN_STEP


@pytest.mark.parametrize("bits", [2, 4])
def test_symmetric_levels_are_mid_rise(bits: int) -> None:
    codes = torch.arange(2**bits, dtype=torch.uint8)
    levels = dequantize(codes, torch.tensor(-1.0), torch.tensor(1.0), bits)
    torch.testing.assert_close(levels, -levels.flip(0))
    assert bool((levels != 0).all())
    assert levels.unique().numel() == 2**bits


@given(x=float_tensors(shapes(2, 4)), spec=specs())
def test_dynamic_bounds_cover_every_token(x: Tensor, spec: QuantizerSpec) -> None:
    scale = torch.linspace(0.5, 2.0, x.shape[-1])
    lo, hi = dynamic_bounds_for(x, spec, scale)
    values = x / scale
    if spec.granularity is Granularity.PER_TOKEN:
        assert lo.shape == (*x.shape[:-1], 1)
    else:
        assert lo.shape == ()
    slack = 0.0 if spec.scheme is not Scheme.INTEGER_ZERO_POINT else step_size(lo, hi, spec.bits) * 0.5001
    assert bool((values >= lo - slack).all())
    assert bool((values <= hi + slack).all())


def test_dynamic_bounds_keep_the_reduced_axis() -> None:
    x = torch.tensor([[1.0, -2.0], [5.0, 3.0]])
    lo, hi = dynamic_bounds(x, 0)
    assert lo.tolist() == [[1.0, -2.0]]
    assert hi.tolist() == [[5.0, 3.0]]
    assert [b.item() for b in dynamic_bounds(x, None)] == [-2.0, 5.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(64).to(dtype)
    lo, hi = torch.tensor(-1.7), torch.tensor(1.9)
    assert torch.equal(fake_quantize(x, lo, hi, 8), fake_quantize(x.float(), lo, hi, 8).to(dtype))
    assert torch.equal(quantize(x, lo, hi, 8), quantize(x.float(), lo, hi, 8))
    x.requires_grad_()
    fake_quantize(x, lo, hi, 8).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


@given(data=st.data(), spec=static_specs())
def test_gradient_is_that_of_rounding_taken_for_the_identity(data: st.DataObject, spec: QuantizerSpec) -> None:
    """Against autograd of the formula with a detached rounding error, bounds per row, a joint scale per column."""
    x = data.draw(float_tensors((5, 7), kinds=("normal", "heavy", "one_sided"), dtype=torch.float64))
    scale = data.draw(joint_scales(7)).double()
    scaled = x / scale
    lo, hi = (scaled.quantile(q, dim=1, keepdim=True) for q in (0.2, 0.8))
    shift = torch.randn(7, dtype=torch.float64)
    x = x + shift
    upstream = torch.randn(5, 7, dtype=torch.float64)

    def gradients(straight_through: bool) -> tuple[Tensor, ...]:
        leaves = [t.detach().clone().requires_grad_() for t in (x, lo, hi, scale, shift)]
        if straight_through:
            result = fake_quantize(leaves[0], leaves[1], leaves[2], spec.bits, leaves[3], leaves[4])
        else:
            _, low, high, _, _ = leaves
            step = (high - low) / spec.qmax
            position = ((leaves[0] - leaves[4]) / leaves[3] - low) / step
            position = torch.where(position < 0, 0.0, torch.where(position > spec.qmax, spec.qmax, position))
            codes = position + (position.round() - position).detach()
            result = codes * step + low
        return torch.autograd.grad((result * upstream).sum(), leaves)

    for actual, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-10)


def test_gradient_of_the_bounds_is_that_of_finite_differences_where_everything_is_clipped() -> None:
    """Clipped values follow their bound exactly, so here the straight-through gradient is the true one."""
    x = torch.tensor([-5.0, -4.0, 6.0, 7.0, 8.0], dtype=torch.float64)
    lo = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    hi = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def loss(low: Tensor, high: Tensor) -> Tensor:
        return (fake_quantize(x, low, high, 4) * torch.arange(1.0, 6.0, dtype=torch.float64)).sum()

    grads = torch.autograd.grad(loss(lo, hi), (lo, hi))
    h = 1e-4
    numeric = (loss(lo + h, hi) - loss(lo - h, hi)) / (2 * h), (loss(lo, hi + h) - loss(lo, hi - h)) / (2 * h)
    torch.testing.assert_close(grads, tuple(n.detach() for n in numeric))
    assert [g.item() for g in grads] == [3.0, 12.0]


def test_gradient_without_scale_is_one_inside_and_zero_outside() -> None:
    x = torch.tensor([-3.0, -0.5, 0.7, 4.0], requires_grad=True)
    fake_quantize(x, torch.tensor(-1.0), torch.tensor(1.0), 2).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]
