"""Joint scales: what they leave alone, and what they balance."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.common.errors import ConfigError
from harmoq_ao.quant.joint_scale import SCALE_LIMITS, joint_scale, power_scale
from harmoq_ao.quant.quantizer import fake_quantize
from tests.strategies import SEEDS, bit_widths, float_tensors, joint_scales, weights

RANGES = st.floats(1e-3, 1e3)


def uneven(rows: int, channels: int, seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Activation rows whose channels differ in range, and a weight `[24, channels]`."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.exp(spread * torch.randn(channels, generator=generator))
    return torch.randn(rows, channels, generator=generator) * magnitude, torch.randn(24, channels, generator=generator)


@given(bits_x=bit_widths(), bits_w=bit_widths(), data=st.data())
def test_joint_scale_balances_the_steps_of_every_channel(bits_x: int, bits_w: int, data: st.DataObject) -> None:
    """Channel by channel the two steps stand in one common ratio, which moving the bounds takes out."""
    range_x, range_w = (data.draw(joint_scales(9, (0.5, 2.0))) for _ in range(2))
    s = joint_scale(range_x, range_w, bits_x, bits_w, limits=(1e-3, 1e3))
    variance_x = (range_x / s / (2**bits_x - 1)).square() / 12
    variance_w = (range_w * s / (2**bits_w - 1)).square() / 12
    ratio = variance_x / variance_w
    torch.testing.assert_close(ratio, ratio[:1].expand(9), rtol=1e-4, atol=0.0)
    assert s.log().mean().item() == pytest.approx(0.0, abs=1e-5)
    single = (range_x * (2**bits_w - 1) / (range_w * (2**bits_x - 1))).sqrt()  # equation (6), one channel by itself
    torch.testing.assert_close(s / s[0], single / single[0], rtol=1e-4, atol=0.0)


@given(range_x=float_tensors((20,), kinds=("one_sided", "heavy", "sparse")), seed=SEEDS)
def test_scales_stay_in_their_limits_and_are_one_where_a_range_is_zero(range_x: Tensor, seed: int) -> None:
    range_x = range_x.abs()
    range_w = torch.randn(20, generator=torch.Generator().manual_seed(seed)).abs()
    range_w[3] = 0.0
    s = joint_scale(range_x, range_w, 4, 4)
    assert bool(((s >= SCALE_LIMITS[0]) & (s <= SCALE_LIMITS[1])).all())
    assert bool((s[(range_x == 0) | (range_w == 0)] == 1).all())


def test_all_zero_ranges_give_ones() -> None:
    assert torch.equal(joint_scale(torch.zeros(5), torch.zeros(5), 4, 4), torch.ones(5))


@pytest.mark.parametrize(("bits_x", "bits_w"), [(16, 4), (4, 32), (32, 32)])
def test_an_operand_left_in_float_needs_no_scale(bits_x: int, bits_w: int) -> None:
    assert torch.equal(joint_scale(torch.rand(5), torch.rand(5), bits_x, bits_w), torch.ones(5))


def test_exchanged_operands_have_the_inverse_scale() -> None:
    range_q, range_k = torch.rand(2, 10).add(0.5).unbind()
    torch.testing.assert_close(joint_scale(range_q, range_k, 4, 4), 1 / joint_scale(range_k, range_q, 4, 4))


@pytest.mark.parametrize("limits", [(0.0, 10.0), (2.0, 10.0), (0.1, 0.5)])
def test_limits_must_enclose_one(limits: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="limits"):
        joint_scale(torch.ones(3), torch.ones(3), 4, 4, limits)


def test_ranges_of_different_contractions_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(3,\) and \(4,\)"):
        joint_scale(torch.ones(3), torch.ones(4), 4, 4)


@given(range_x=RANGES, range_w=RANGES, bits=bit_widths(), seed=SEEDS)
def test_one_scale_for_all_channels_does_not_change_the_error(
    range_x: float, range_w: float, bits: int, seed: int
) -> None:
    """With bounds that move along, ``Q(x / s) Q(W s) = Q(x) Q(W)``: exactly for a power of two."""
    x, weight = uneven(16, 6, seed)
    power = torch.tensor(2.0 ** round(math.log2(range_x / range_w) / 2))  # equation (6), both widths being the same

    def product(scale: Tensor) -> Tensor:
        lo_x, hi_x = x.min() / scale, x.max() / scale
        lo_w, hi_w = weight.min() * scale, weight.max() * scale
        rounded_x = fake_quantize(x, lo_x, hi_x, bits, scale)
        return rounded_x @ fake_quantize(weight, lo_w, hi_w, bits, 1 / scale).T

    torch.testing.assert_close(product(power), product(torch.tensor(1.0)), rtol=1e-6, atol=1e-6)


@given(weight=weights(), seed=SEEDS, data=st.data())
def test_a_vector_of_scales_never_changes_the_float_function(weight: Tensor, seed: int, data: st.DataObject) -> None:
    weight = weight.double()
    channels = weight.shape[1]
    x = torch.randn(7, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    s = joint_scale(data.draw(joint_scales(channels)), data.draw(joint_scales(channels)), 4, 4).double()
    magnitude = x.abs() @ weight.abs().T
    assert bool((((x / s) @ (weight * s).T - x @ weight.T).abs() <= 1e-13 * magnitude + 1e-300).all())


@given(range_x=joint_scales(8, (0.5, 2.0)), range_w=joint_scales(8, (0.5, 2.0)))
def test_the_ends_of_the_exponent_even_out_one_operand(range_x: Tensor, range_w: Tensor) -> None:
    even_x = range_x / power_scale(range_x, range_w, 1.0)
    even_w = range_w * power_scale(range_x, range_w, 0.0)
    torch.testing.assert_close(even_x, even_x[:1].expand(8))
    torch.testing.assert_close(even_w, even_w[:1].expand(8))
    torch.testing.assert_close(power_scale(range_x, range_w, 0.5), joint_scale(range_x, range_w, 3, 4))
