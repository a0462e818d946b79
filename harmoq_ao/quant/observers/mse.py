"""The range of least squared error on the sample."""

from __future__ import annotations

from torch import Tensor

from harmoq_ao.quant.bounds import search_tensor_bounds
from harmoq_ao.quant.observers.base import OperandObserver


class MSEObserver(OperandObserver):
    """Bounds that minimise the mean squared quantization error of the sample.

    A two-sided search that follows the distribution, as 2DQuant's DOBI does for its initial bounds.
    """

    def bounds(self, scale: Tensor | None = None, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Searched bounds of the sample of ``(x - shift) / scale``."""
        return search_tensor_bounds(self.scaled_sample(scale, shift), self.spec)
