"""Histograms: every value counted, at any range."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.common.errors import CalibrationError
from harmoq_ao.quant.observers import HistogramObserver
from harmoq_ao.quant.quantizer import QuantizerSpec, fake_quantize
from tests.quant.observers.helpers import observed
from tests.strategies import float_tensors, static_specs


@given(stream=st.lists(float_tensors((30, 3)), min_size=1, max_size=5))
def test_the_histogram_counts_everything_within_its_edges(stream: list[Tensor]) -> None:
    observer = HistogramObserver(QuantizerSpec(4), bins=64)
    for x in stream:
        observer(x)
    edges, counts = observer.histogram()
    values = torch.cat([x.flatten() for x in stream]).double()
    assert counts.sum() == values.numel()
    width = edges[1] - edges[0]
    assert edges[0] <= values.min() + 1e-9
    assert edges[-1] >= values.max() - 1e-9
    # Cumulative counts agree with exact ones up to what lies within one bin of the edge.
    below = counts.cumsum(0)[:-1]
    assert bool((below >= (values[:, None] < edges[1:-1] - width).sum(0)).all())
    assert bool((below <= (values[:, None] <= edges[1:-1] + width).sum(0)).all())


def test_doubling_the_range_loses_no_count() -> None:
    observer = HistogramObserver(QuantizerSpec(4), bins=8)
    for x in (torch.linspace(0, 1, 80), torch.full((5,), 3.0), torch.full((7,), -9.0)):
        observer(x)
    edges, counts = observer.histogram()
    assert (edges[0].item(), edges[-1].item()) == (-12.0, 4.0)
    assert counts.tolist() == [0, 7, 0, 0, 0, 0, 80, 5]


@settings(max_examples=15)
@given(spec=static_specs(), seed=st.integers(0, 99))
def test_histogram_bounds_are_as_good_as_those_of_the_whole_sample(spec: QuantizerSpec, seed: int) -> None:
    x = torch.randn(6000, generator=torch.Generator().manual_seed(seed)).view(-1, 1)
    errors = []
    for name in ("histogram", "mse"):
        lo, hi = observed(name, list(x.split(1500)), spec, reservoir_rows=6000).bounds()
        errors.append((fake_quantize(x, lo, hi, spec.bits) - x).square().mean())
    assert errors[0] <= errors[1] * 1.03


def test_histogram_takes_a_scalar_scale_and_refuses_a_vector() -> None:
    x = torch.randn(500, 4)
    observer = observed("histogram", [x])
    halved = [b.item() for b in observer.bounds(torch.tensor(2.0))]
    assert halved == pytest.approx([b.item() / 2 for b in observer.bounds()], rel=1e-4)
    with pytest.raises(CalibrationError, match="mse observer"):
        observer.bounds(torch.ones(4))


def test_histogram_sample_has_the_quantiles_of_the_stream() -> None:
    x = torch.randn(20000, 1)
    sample = observed("histogram", [x]).sample()
    q = torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99])
    torch.testing.assert_close(sample.quantile(q), x.quantile(q), atol=0.01, rtol=0.01)
