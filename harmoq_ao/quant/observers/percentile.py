"""Percentiles of the sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harmoq_ao.common.errors import ConfigError
from harmoq_ao.quant.observers.base import OperandObserver
from harmoq_ao.quant.quantizer import QuantizerSpec, Scheme, snap_bounds


class PercentileObserver(OperandObserver):
    """Bounds at percentiles of the sample.

    Args:
        percentile: In (50, 100]: the upper bound's percentile; the lower bound lies at ``100 - percentile``. A
            symmetric quantizer takes the percentile of the magnitude.
    """

    def __init__(self, spec: QuantizerSpec, *, percentile: float = 99.8, **options: Any) -> None:
        super().__init__(spec, **options)
        if not 50.0 < percentile <= 100.0:
            raise ConfigError("Percentile out of range", found=percentile, expected="above 50, at most 100")
        self.percentile = percentile

    def bounds(self, scale: Tensor | None = None, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Percentiles of the sample of ``(x - shift) / scale``."""
        values = self.scaled_sample(scale, shift).flatten()
        top = self.percentile / 100.0
        if self.spec.scheme is Scheme.SYMMETRIC:
            hi = torch.quantile(values.abs(), top)
            return snap_bounds(-hi, hi, self.spec)
        lo, hi = torch.quantile(values, values.new_tensor([1.0 - top, top])).unbind()
        return snap_bounds(lo, hi, self.spec)
