"""The range of least squared error on a histogram of everything seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harmoq_ao.common.distributed import all_gather, is_first
from harmoq_ao.common.errors import CalibrationError, ConfigError
from harmoq_ao.quant.bounds import search_histogram_bounds
from harmoq_ao.quant.observers.base import Call, OperandObserver
from harmoq_ao.quant.quantizer import QuantizerSpec


class HistogramObserver(OperandObserver):
    """Bounds of least squared error on a histogram of everything seen, instead of a sample.

    The histogram has a fixed number of bins; when a value falls outside, neighbouring bins are merged in pairs, which
    doubles the range and loses no count. Channels are told apart by their extremes alone, so a per-channel joint scale
    cannot be applied.

    Args:
        bins: Number of bins, even.
    """

    def __init__(self, spec: QuantizerSpec, *, bins: int = 4096, **options: Any) -> None:
        if bins < 2 or bins % 2:
            raise ConfigError("Bad number of histogram bins", found=bins, expected="a positive even number")
        self.bins = bins
        super().__init__(spec, **options)

    def reset(self) -> None:
        """Discard all statistics."""
        super().reset()
        self._counts: Tensor | None = None
        self._start = 0.0
        self._width = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes held by the statistics."""
        return super().nbytes + (self._counts.numel() * 8 if self._counts is not None else 0)

    def histogram(self) -> tuple[Tensor, Tensor]:
        """Bin edges `[bins + 1]` and counts `[bins]`, float64.

        Raises:
            CalibrationError: Nothing was seen.
        """
        if self._counts is None:
            raise self._nothing_seen()
        steps = torch.arange(self.bins + 1, dtype=torch.float64, device=self._counts.device)
        return self._start + steps * (self._width / self.bins), self._counts

    def sample(self) -> Tensor:
        """8192 values `[8192]` at evenly spaced quantiles of the histogram, float32."""
        edges, counts = self.histogram()
        total = counts.cumsum(0)
        ranks = (torch.arange(8192, dtype=torch.float64, device=counts.device) + 0.5) * (total[-1] / 8192)
        inside = torch.searchsorted(total, ranks).clamp_max(self.bins - 1)
        share = (ranks - (total[inside] - counts[inside])) / counts[inside].clamp_min(1.0)
        values = edges[inside] + share * (edges[inside + 1] - edges[inside])
        return values.float().clamp(*self.value_range())

    def second_moment(self, shift: Tensor | None = None) -> Tensor | None:
        """None: a histogram does not tell channels apart."""
        return None

    def bounds(self, scale: Tensor | None = None, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Searched bounds of the histogram, divided by a scalar scale if there is one."""
        if shift is not None or (scale is not None and scale.numel() > 1):
            raise CalibrationError(
                f"{self._name()} keeps one histogram for all channels and cannot apply a joint scale",
                found="a joint shift" if scale is None or shift is not None else f"a scale of {scale.numel()} channels",
                remedy="use the mse observer at sites with a joint scale",
            )
        edges, counts = self.histogram()
        divisor = 1.0 if scale is None else scale.detach().to(edges).reshape(())
        centres = (edges[:-1] + edges[1:]) / 2
        extremes = tuple(bound / divisor for bound in self.value_range())
        return search_histogram_bounds((centres / divisor).float(), counts, self.spec, extremes=extremes)

    def _update_sample(self, rows: Tensor) -> None:
        lo, hi = (float(v) for v in torch.aminmax(rows))
        if self._counts is None:
            self._start, self._width = lo, max(hi - lo, abs(lo) * 1e-3, 1e-12)
            self._counts = torch.zeros(self.bins, dtype=torch.float64, device=rows.device)
        self._grow(lo, hi)
        for chunk in _in_memory_order(rows).split(1 << 20):
            self._count(chunk)

    def _count(self, chunk: Tensor) -> None:
        """Bins by floor; what rounding pushes over an outer edge belongs to the outer bin."""
        assert self._counts is not None
        index = ((chunk.float() - self._start) * (self.bins / self._width)).long().clamp_(0, self.bins - 1)
        self._counts += torch.bincount(index, minlength=self.bins)

    def begin_share(self) -> None:
        """Start to observe this rank's share alone; what every rank saw before counts once, as the first rank's."""
        if self._counts is not None and not is_first():
            self._counts.zero_()

    def _pass_over_sample(self, call: Call) -> None:
        """A histogram is merged by its counts alone."""

    def _merge_sample(self) -> None:
        """Add up all histograms on the bins of the first rank that has one, grown to cover everything seen.

        Counts go to the new bins in proportion to the overlap. The bins depend on the order of images, so the counts
        are those of a single process only up to about one bin in place, unless no image was outside of the first one's
        range.
        """
        lo, hi = (float(bound) for bound in self.value_range())
        device = self._last_call.device if self._last_call is not None else None
        own = self._counts if self._counts is not None else torch.zeros(self.bins, dtype=torch.float64, device=device)
        grids = [(float(g[0]), float(g[1])) for g in all_gather(own.new_tensor([self._start, self._width]))]
        counts = all_gather(own)
        self._start, self._width = next(grid for grid in grids if grid[1] > 0)
        self._counts = torch.zeros_like(own)
        self._grow(lo, hi)
        edges, _ = self.histogram()
        for (start, width), part in zip(grids, counts, strict=True):
            if (start, width) == (self._start, self._width):
                self._counts += part
            elif width > 0:
                self._counts += _cumulative(part, start, width, edges).diff()

    def _grow(self, lo: float, hi: float) -> None:
        """Double the range downwards or upwards until it covers ``[lo, hi]``."""
        assert self._counts is not None
        while lo < self._start or hi > self._start + self._width:
            merged = self._counts.view(-1, 2).sum(1)
            empty = torch.zeros_like(merged)
            downwards = lo < self._start
            self._counts = torch.cat((empty, merged) if downwards else (merged, empty))
            self._start -= self._width if downwards else 0.0
            self._width *= 2


def _cumulative(counts: Tensor, start: float, width: float, edges: Tensor) -> Tensor:
    """How many of the values of a histogram lie below each of `edges`; within a bin they count as evenly spread."""
    total = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    place = ((edges - start) * (len(counts) / width)).clamp(0, len(counts))
    bin_ = place.long().clamp_max(len(counts) - 1)
    return total[bin_].lerp(total[bin_ + 1], place - bin_)


def _in_memory_order(x: Tensor) -> Tensor:
    """All values of `x`, flat, in storage order: a view wherever `x` is a permutation of a dense tensor."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return x.permute(order).reshape(-1)
