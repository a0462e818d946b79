"""Percentiles of the sample."""

from __future__ import annotations

import pytest
import torch

from harmoq_ao.common.errors import ConfigError
from harmoq_ao.quant.observers import PercentileObserver
from harmoq_ao.quant.quantizer import QuantizerSpec, Scheme


def test_percentile_bounds_are_percentiles() -> None:
    x = torch.arange(1001.0).view(-1, 1)
    asymmetric = PercentileObserver(QuantizerSpec(4), percentile=99.0)
    asymmetric(x)
    assert [b.item() for b in asymmetric.bounds()] == pytest.approx([10.0, 990.0], rel=1e-4)
    symmetric = PercentileObserver(QuantizerSpec(4, Scheme.SYMMETRIC), percentile=99.0)
    symmetric(x - 500.0)
    assert [b.item() for b in symmetric.bounds()] == pytest.approx([-495.0, 495.0], rel=1e-2)


@pytest.mark.parametrize("percentile", [50.0, 0.0, 100.1, -3.0])
def test_percentiles_out_of_range_are_refused(percentile: float) -> None:
    with pytest.raises(ConfigError, match="Percentile"):
        PercentileObserver(QuantizerSpec(4), percentile=percentile)
