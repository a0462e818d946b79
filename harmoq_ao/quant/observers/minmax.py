"""The exact extremes."""

from __future__ import annotations

from torch import Tensor

from harmoq_ao.quant.observers.base import OperandObserver
from harmoq_ao.quant.quantizer import snap_bounds


class MinMaxObserver(OperandObserver):
    """Bounds at the exact extremes: nothing is ever clipped."""

    def bounds(self, scale: Tensor | None = None, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Exact extremes of ``(x - shift) / scale``."""
        return snap_bounds(*self.scaled_range(scale, shift), self.spec)
