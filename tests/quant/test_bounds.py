"""Searched bounds: never worse than the extremes, and close to the best there is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.common.errors import CalibrationError
from harmoq_ao.quant.bounds import (
    quantization_error,
    search_channel_bounds,
    search_histogram_bounds,
    search_tensor_bounds,
)
from harmoq_ao.quant.quantizer import Granularity, QuantizerSpec, Scheme, fake_quantize, snap_bounds
from tests.strategies import bit_widths, float_tensors, static_specs, weights


def error(x: Tensor, lo: Tensor, hi: Tensor, bits: int, importance: Tensor | float = 1.0) -> Tensor:
    return ((fake_quantize(x, lo, hi, bits) - x).square() * importance).double().sum(-1)


@given(x=float_tensors((600,)), spec=static_specs())
def test_tensor_bounds_are_never_worse_than_min_max(x: Tensor, spec: QuantizerSpec) -> None:
    lo, hi = search_tensor_bounds(x, spec)
    plain = snap_bounds(x.min(), x.max(), spec)
    assert error(x, lo, hi, spec.bits) <= error(x, *plain, spec.bits) * (1 + 1e-5)
    assert [b.item() for b in snap_bounds(lo, hi, spec)] == [lo.item(), hi.item()]


@settings(max_examples=15)
@given(x=float_tensors((30000,), kinds=("normal", "heavy", "one_sided", "offset")), spec=static_specs())
def test_the_histogram_stands_for_the_sample(x: Tensor, spec: QuantizerSpec) -> None:
    """With more values than bins the guarantee holds on the histogram, and nearly on the sample itself."""
    lo, hi = search_tensor_bounds(x, spec)
    plain = snap_bounds(x.min(), x.max(), spec)
    assert error(x, lo, hi, spec.bits) <= error(x, *plain, spec.bits) * 1.01


@pytest.mark.parametrize("scheme", [Scheme.SYMMETRIC, Scheme.ASYMMETRIC])
@pytest.mark.parametrize(("bits", "step"), [(2, 0.9957), (3, 0.5860), (4, 0.3352)])
def test_normal_values_get_the_known_best_step(scheme: Scheme, bits: int, step: float) -> None:
    """Optimal uniform quantizer of a unit normal: J. Max, IRE Trans. Inf. Theory 6 (1960), table II."""
    x = torch.special.ndtri((torch.arange(20000, dtype=torch.float64) + 0.5) / 20000).float()
    lo, hi = search_tensor_bounds(x, QuantizerSpec(bits, scheme))
    assert (hi - lo).item() / (2**bits - 1) == pytest.approx(step, rel=0.02)


@settings(max_examples=15)
@given(x=float_tensors((1500,), kinds=("normal", "one_sided", "sparse")), bits=st.integers(2, 4))
def test_two_sided_search_comes_close_to_a_dense_grid(x: Tensor, bits: int) -> None:
    spec = QuantizerSpec(bits)
    lo, hi = x.min(), x.max()
    pivot = x.mean()
    shares = torch.linspace(0, 1, 60)
    dense_lo = (pivot + (lo - pivot) * shares).repeat_interleave(60)[None]
    dense_hi = (pivot + (hi - pivot) * shares).repeat(60)[None]
    best = quantization_error(x[None], torch.ones(1, 1500), dense_lo, dense_hi, spec).min()
    assert error(x, *search_tensor_bounds(x, spec), bits) <= best * 1.03


def test_quantization_error_is_that_of_the_quantizer() -> None:
    x, weight = torch.randn(3, 50), torch.rand(3, 50)
    lo, hi = torch.tensor([[-1.0, -2.0]] * 3), torch.tensor([[1.5, 1.0]] * 3)
    expected = torch.stack([error(x, lo[:, i : i + 1], hi[:, i : i + 1], 3, weight) for i in range(2)], 1).float()
    torch.testing.assert_close(quantization_error(x, weight, lo, hi, QuantizerSpec(3)), expected)


@given(weight=weights(), bits=bit_widths(), scheme=st.sampled_from(Scheme), data=st.data())
def test_channel_bounds_are_never_worse_than_min_max(
    weight: Tensor, bits: int, scheme: Scheme, data: st.DataObject
) -> None:
    spec = QuantizerSpec(bits, scheme, Granularity.PER_CHANNEL, axis=0)
    importance = data.draw(st.none() | float_tensors((weight.shape[1],), kinds=("one_sided", "sparse")))
    importance = None if importance is None else importance.square()
    lo, hi = search_channel_bounds(weight, spec, importance)
    assert lo.shape == hi.shape == (weight.shape[0], 1)
    plain = snap_bounds(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), spec)
    factor = 1.0 if importance is None else importance
    searched, reference = error(weight, lo, hi, bits, factor), error(weight, *plain, bits, factor)
    floor = 1e-10 * (weight.square() * factor).sum(1)
    assert bool((searched <= reference * (1 + 1e-5) + floor).all())


def test_importance_decides_which_columns_are_represented_well() -> None:
    weight = torch.cat((torch.randn(1, 64) * 0.1, torch.full((1, 1), 3.0)), 1)
    spec = QuantizerSpec(3, Scheme.SYMMETRIC, Granularity.PER_CHANNEL, axis=0)
    many, one = torch.ones(65), torch.ones(65)
    many[-1], one[:-1] = 0.0, 1e-6
    assert search_channel_bounds(weight, spec, many)[1] < 0.5
    assert search_channel_bounds(weight, spec, one)[1] > 2.5


def test_rows_are_searched_independently_of_how_they_are_chunked() -> None:
    weight = torch.randn(40, 700)
    spec = QuantizerSpec(4, granularity=Granularity.PER_CHANNEL, axis=0)
    lo, hi = search_channel_bounds(weight, spec)
    alone = [search_channel_bounds(row[None], spec) for row in weight]
    torch.testing.assert_close(lo, torch.cat([a[0] for a in alone]), rtol=0.05, atol=0.0)
    torch.testing.assert_close(hi, torch.cat([a[1] for a in alone]), rtol=0.05, atol=0.0)


def test_histogram_bounds_ignore_empty_bins() -> None:
    centres, counts = torch.tensor([-1.0, 0.0, 1.0, 100.0]), torch.tensor([5.0, 9.0, 5.0, 0.0])
    lo, hi = search_histogram_bounds(
        centres, counts, QuantizerSpec(8), extremes=(torch.tensor(-1.0), torch.tensor(1.0))
    )
    assert (lo.item(), hi.item()) == pytest.approx((-1.0, 1.0), abs=0.02)


@pytest.mark.parametrize("scheme", list(Scheme))
def test_a_constant_is_represented(scheme: Scheme) -> None:
    x = torch.full((10,), 0.75)
    lo, hi = search_tensor_bounds(x, QuantizerSpec(4, scheme))
    torch.testing.assert_close(fake_quantize(x, lo, hi, 4), x, rtol=1e-3, atol=0.0)


def test_an_empty_sample_is_refused() -> None:
    with pytest.raises(CalibrationError, match="empty sample"):
        search_tensor_bounds(torch.empty(0), QuantizerSpec(4))
