"""The joint shift: exact algebra, never worse than none, and the same codes in simulation and integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import harmoq_ao as h
from harmoq_ao.common.errors import ConfigError, KernelError
from harmoq_ao.kernels import onednn
from harmoq_ao.quant import integer_reference
from harmoq_ao.quant.bounds import search_channel_bounds, search_tensor_bounds
from harmoq_ao.quant.integer_reference import Affine, LinearOperands
from harmoq_ao.quant.joint_scale import joint_scale
from harmoq_ao.quant.joint_shift import joint_shift
from harmoq_ao.quant.quantizer import Granularity, QuantizerSpec, Scheme, fake_quantize, quantize
from harmoq_ao.sites.prepared import PreparedLinear
from harmoq_ao.sites.quantized import QuantizedLinear
from tests.models import PER_TOKEN, calibrated, images
from tests.strategies import float_tensors, joint_scales


def specs(bits: int) -> tuple[QuantizerSpec, QuantizerSpec]:
    return QuantizerSpec(bits), QuantizerSpec(bits, Scheme.SYMMETRIC, Granularity.PER_CHANNEL, axis=0)


def compound_error(x: Tensor, weight: Tensor, scale: Tensor, act: QuantizerSpec, weights: QuantizerSpec) -> float:
    """Mean squared error of ``Q(x / s) Q(W s)^T`` against ``x W^T``."""
    left, right = x / scale, weight * scale
    if weights.enabled:
        lo, hi = search_channel_bounds(right, weights, left.square().mean(0))
        right = fake_quantize(right, lo, hi, weights.bits)
    left = fake_quantize(left, *search_tensor_bounds(left, act), act.bits)
    return float((left @ right.T - x @ weight.T).square().mean())


@given(data=st.data(), bits=st.integers(2, 4))
def test_the_chosen_shift_is_never_worse_than_none(data: st.DataObject, bits: int) -> None:
    x = data.draw(float_tensors((64, 6), kinds=("normal", "heavy", "one_sided")))
    x = x + 4.0 * torch.randn(6)
    weight, act, weights = torch.randn(5, 6), QuantizerSpec(bits), QuantizerSpec(16)
    ranges = x.amin(0), x.amax(0)
    scale = joint_scale(ranges[1] - ranges[0], weight.amax(0) - weight.amin(0), bits, bits)
    shift = joint_shift(x, weight, scale, ranges, act)
    chosen = compound_error(x - shift, weight, scale, act, weights)
    assert chosen <= compound_error(x, weight, scale, act, weights)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_channels_with_different_means_gain_much(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 16, generator=generator) + 6.0 * torch.randn(16, generator=generator)
    weight, (act, weights), scale = torch.randn(8, 16, generator=generator), specs(bits), torch.ones(16)
    shift = joint_shift(x, weight, scale, (x.amin(0), x.amax(0)), act)
    plain = compound_error(x, weight, scale, act, weights)
    assert compound_error(x - shift, weight, scale, act, weights) < plain / 3


def test_a_dynamic_quantizer_takes_none() -> None:
    dynamic = QuantizerSpec(4, granularity=Granularity.PER_TOKEN, dynamic=True)
    with pytest.raises(ConfigError, match="static"):
        joint_shift(torch.rand(4, 2), torch.rand(3, 2), torch.ones(2), (torch.zeros(2), torch.ones(2)), dynamic)


@given(data=st.data(), bits=st.integers(2, 8))
def test_shifting_is_quantizing_the_difference(data: st.DataObject, bits: int) -> None:
    """In float64, where the order of the operations does not show."""
    x = data.draw(float_tensors((9, 5), kinds=("normal", "one_sided"), dtype=torch.float64))
    scale, shift = data.draw(joint_scales(5)).double(), torch.randn(5, dtype=torch.float64)
    lo, hi = torch.tensor(-2.0, dtype=torch.float64), torch.tensor(1.5, dtype=torch.float64)
    actual = fake_quantize(x, lo, hi, bits, scale, shift)
    step = (hi - lo) / (2**bits - 1)
    distance = (actual - ((x - shift) / scale).clamp(lo, hi)).abs()
    assert bool((distance <= step / 2 + 1e-9).all())


@given(data=st.data(), bits=st.integers(2, 8))
def test_simulated_reference_and_cpu_codes_are_the_same(data: st.DataObject, bits: int) -> None:
    x: Tensor = data.draw(float_tensors((33, 12), kinds=("normal", "heavy", "one_sided")))
    scale, shift = data.draw(joint_scales(12)), torch.randn(12)
    lo, hi = torch.tensor(-1.75), torch.tensor(2.5)
    step = (hi - lo) / (2**bits - 1)
    act = Affine(step, lo, bits)
    simulated = quantize(x, lo, hi, bits, scale, shift)
    assert torch.equal(
        integer_reference.quantize_codes(x, *integer_reference.static_qparams(act, scale, shift), bits), simulated
    )
    weight = torch.randint(-2, 2, (7, 12), dtype=torch.int8)
    operands = LinearOperands(
        weight, torch.rand(7) + 0.1, torch.full((7,), 0.5), torch.randn(7), bits, act, scale, shift
    )
    packed = onednn.pack_linear(operands)
    assert torch.equal(onednn.quantize(x, packed), simulated)
    torch.testing.assert_close(onednn.linear(x, packed), integer_reference.linear(x, operands), rtol=1e-4, atol=1e-4)


def test_bounds_per_token_and_a_shift_are_refused() -> None:
    with pytest.raises(KernelError, match="static bounds"):
        LinearOperands(
            torch.zeros(2, 3, dtype=torch.int8), torch.ones(2), torch.zeros(2), None, 4, None, None, torch.ones(3)
        )


def test_every_static_linear_of_a_model_is_shifted_and_the_bias_gives_it_back() -> None:
    prepared = calibrated("SwinIR/light", h.HarmoqConfig(2, 2, profile="paper", storage_dtype="float32"))
    linears = [site for site in prepared.sites() if isinstance(site, PreparedLinear)]
    assert all(site.joint_shift is not None for site in linears)
    assert any(bool(site.joint_shift.any()) for site in linears)
    quantized = h.convert_harmoq(prepared)
    modules = {m.site.name: m for m in quantized.modules() if isinstance(m, QuantizedLinear)}
    for site in linears:
        bias = site.weight @ site.joint_shift + (0 if site.bias is None else site.bias)
        torch.testing.assert_close(modules[site.site.name].bias, bias.detach(), rtol=1e-5, atol=1e-6)
    image = images(1, (24, 32))[0]
    with torch.no_grad():
        torch.testing.assert_close(quantized(image), prepared(image), rtol=0, atol=2e-3)


def test_without_it_nothing_is_shifted() -> None:
    prepared = calibrated("SwinIR/light", h.HarmoqConfig(2, 2, profile="paper", joint_shift=False))
    assert all(site.joint_shift is None for site in prepared.sites())
    dynamic = calibrated("SwinIR/light", h.HarmoqConfig(4, 4, rules=PER_TOKEN))
    assert all(site.joint_shift is None for site in dynamic.sites())
