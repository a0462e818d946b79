"""The fake-quantizer module: switches, bounds, learning."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from torch import Tensor

from harmoq_ao.common.errors import CalibrationError, ConfigError
from harmoq_ao.quant.fake_quant import HarmoqFakeQuantize
from harmoq_ao.quant.observers import MinMaxObserver
from harmoq_ao.quant.quantizer import Granularity, QuantizerSpec, Scheme, dynamic_bounds_for, fake_quantize, step_size
from tests.strategies import bit_widths, float_tensors, shapes, static_specs


def with_bounds(spec: QuantizerSpec, lo: float = -1.0, hi: float = 2.0) -> HarmoqFakeQuantize:
    quantizer = HarmoqFakeQuantize(spec)
    quantizer.set_bounds(lo, hi)
    return quantizer


@given(x=float_tensors(), spec=static_specs())
def test_off_returns_the_very_same_tensor(x: Tensor, spec: QuantizerSpec) -> None:
    quantizer = with_bounds(spec)
    quantizer.disable_fake_quant()
    assert not quantizer.active
    assert quantizer(x, scale=torch.full((x.shape[-1],), 2.0)) is x


@pytest.mark.parametrize("bits", [16, 32])
def test_unquantized_bits_return_the_very_same_tensor(bits: int) -> None:
    quantizer, x = HarmoqFakeQuantize(QuantizerSpec(bits)), torch.randn(3)
    assert quantizer(x) is x
    assert not quantizer.active


@given(x=float_tensors(), spec=static_specs())
def test_static_forward_rounds_with_its_bounds(x: Tensor, spec: QuantizerSpec) -> None:
    quantizer = with_bounds(spec)
    scale = torch.linspace(0.5, 2.0, x.shape[-1])
    lo, hi = quantizer.bounds()
    assert torch.equal(quantizer(x, scale), fake_quantize(x, lo, hi, spec.bits, scale))


@given(x=float_tensors(shapes(2, 3)), bits=bit_widths())
def test_dynamic_forward_takes_the_bounds_of_the_scaled_input(x: Tensor, bits: int) -> None:
    spec = QuantizerSpec(bits, granularity=Granularity.PER_TOKEN, dynamic=True)
    scale = torch.linspace(0.5, 2.0, x.shape[-1])
    lo, hi = dynamic_bounds_for(x, spec, scale)
    assert torch.equal(HarmoqFakeQuantize(spec)(x, scale), fake_quantize(x, lo, hi, bits, scale))


def test_rounding_without_bounds_names_the_site_and_the_remedy() -> None:
    quantizer = HarmoqFakeQuantize(QuantizerSpec(4))
    quantizer.site_name = "layers.0.qkv"
    with pytest.raises(CalibrationError, match=r"layers\.0\.qkv has no bounds yet.*run calibration data"):
        quantizer(torch.randn(2))


def test_observer_sees_the_input_only_while_switched_on() -> None:
    quantizer = with_bounds(QuantizerSpec(4))
    quantizer.observer = MinMaxObserver(quantizer.spec)
    quantizer(torch.full((2, 3), 5.0), scale=torch.full((3,), 2.0))
    quantizer.disable_observer()
    quantizer(torch.full((2, 3), 50.0))
    assert quantizer.observer.value_range()[1] == 5.0
    assert quantizer.observer.rows_seen == 2


@pytest.mark.parametrize(("lo", "hi"), [(float("nan"), 1.0), (0.0, float("inf")), (-3e38, 3e38)])
def test_bounds_that_are_not_finite_are_refused(lo: float, hi: float) -> None:
    with pytest.raises(CalibrationError, match="not finite"):
        HarmoqFakeQuantize(QuantizerSpec(4)).set_bounds(lo, hi)


def test_bounds_out_of_order_or_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(CalibrationError, match="above its upper bound"):
        HarmoqFakeQuantize(QuantizerSpec(4)).set_bounds(1.0, 0.0)
    with pytest.raises(ConfigError, match=r"wrong shape.*\(3, 1\)"):
        HarmoqFakeQuantize(QuantizerSpec(4), (3, 1)).set_bounds(torch.zeros(4, 1), torch.ones(4, 1))


def test_a_dynamic_quantizer_has_no_static_bounds() -> None:
    quantizer = HarmoqFakeQuantize(QuantizerSpec(4, dynamic=True))
    with pytest.raises(ConfigError, match="dynamic"):
        quantizer.set_bounds(0.0, 1.0)
    with pytest.raises(CalibrationError, match="dynamic"):
        quantizer.calculate_qparams()


def test_bounds_are_snapped_to_the_scheme() -> None:
    lo, hi = with_bounds(QuantizerSpec(4, Scheme.SYMMETRIC)).bounds()
    assert (lo.item(), hi.item()) == (-2.0, 2.0)
    step, lo = with_bounds(QuantizerSpec(4, Scheme.INTEGER_ZERO_POINT)).calculate_qparams()
    assert (lo / step).item() == round((lo / step).item())


def test_bounds_per_channel_are_adopted_expanded_and_reported() -> None:
    spec = QuantizerSpec(4, granularity=Granularity.PER_CHANNEL, axis=0)
    quantizer = HarmoqFakeQuantize(spec, (3, 1))
    quantizer.set_bounds(-1.0, 1.0)
    assert quantizer.bounds()[0].shape == (3, 1)
    lazy = HarmoqFakeQuantize(spec)
    hi = torch.tensor([[1.0], [2.0], [3.0]])
    lazy.set_bounds(-hi, hi)
    step, lo = lazy.calculate_qparams()
    assert torch.equal(lo, -hi)
    assert torch.equal(step, step_size(-hi, hi, 4))


def test_setting_bounds_of_the_same_shape_keeps_the_parameters() -> None:
    quantizer = with_bounds(QuantizerSpec(4))
    before = quantizer.upper
    quantizer.set_bounds(-3.0, 3.0)
    assert quantizer.upper is before


@pytest.mark.parametrize("scheme", list(Scheme))
def test_learning_moves_the_bounds_towards_less_error_and_stays_on_the_scheme(scheme: Scheme) -> None:
    x = torch.randn(4096)
    quantizer = with_bounds(QuantizerSpec(3, scheme), -12.0, 12.0)
    assert not quantizer.upper.requires_grad
    quantizer.learn_bounds()
    optimizer = torch.optim.Adam([p for p in quantizer.parameters() if p.requires_grad], lr=0.2)

    def error() -> Tensor:
        return (quantizer(x) - x).square().mean()

    before = error().item()
    for _ in range(60):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    lo, hi = quantizer.bounds()
    assert error().item() < before / 4
    if scheme is Scheme.SYMMETRIC:
        assert lo == -hi
    if scheme is Scheme.INTEGER_ZERO_POINT:
        assert 0.0 in quantizer(torch.zeros(1)).tolist()


def test_state_dict_carries_bounds_into_a_fresh_quantizer() -> None:
    source = HarmoqFakeQuantize(QuantizerSpec(4))
    source.set_bounds(torch.tensor([[-1.0], [-2.0]]), torch.tensor([[3.0], [4.0]]))
    target = HarmoqFakeQuantize(QuantizerSpec(4))
    target.load_state_dict(source.state_dict())
    x = torch.randn(2, 5)
    assert target.has_bounds
    assert torch.equal(target(x), source(x))


def test_a_copy_is_independent() -> None:
    quantizer = with_bounds(QuantizerSpec(4))
    quantizer.observer = MinMaxObserver(quantizer.spec)
    quantizer(torch.randn(4, 3))
    twin = copy.deepcopy(quantizer)
    twin.set_bounds(-9.0, 9.0)
    twin(torch.full((1, 3), 100.0))
    assert quantizer.bounds()[1] == 2.0
    assert quantizer.observer.value_range()[1] < 100.0


def test_bounds_follow_the_module_to_its_device() -> None:
    quantizer = HarmoqFakeQuantize(QuantizerSpec(4)).to("meta")
    assert quantizer._as_bound(torch.ones(2)).device.type == "meta"


def test_repr_tells_bits_and_bounds() -> None:
    quantizer = HarmoqFakeQuantize(QuantizerSpec(4))
    assert "bits=4, asymmetric, per_tensor, no bounds" in repr(quantizer)
    quantizer.set_bounds(-1.0, 2.0)
    assert "lo=-1, hi=2" in repr(quantizer)
