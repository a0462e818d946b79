"""DBDC+Pac: clip by density, then learn the ranges, activations before weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from harmoq_ao.baselines.base import Baseline, Budget, activation_quantizers, minmax_weights
from harmoq_ao.baselines.learning import distil_bounds, rows_to_learn
from harmoq_ao.harmonization.teacher import Teacher
from harmoq_ao.quant.fake_quant import HarmoqFakeQuantize
from harmoq_ao.quant.observers import HistogramObserver
from harmoq_ao.sites.model import PreparedModel

RATE = 1e-2


class DBDCPac(Baseline):
    """Density-based dual clipping of activations, then pixel-aware calibration of all bounds.

    Source: Tu, Hu, Chen, Wang: "Toward accurate post-training quantization for image super resolution", CVPR 2023.
    Clipping takes bins off the ends of the histogram, always off the end that is less dense, until a share of 1e-4 of
    the values is clipped (1e-5 at 8 bits); weights start at their extremes. Calibration then learns by gradients from
    the float network's output and features, first the bounds of activations, then those of weights.

    Different here: one histogram of all calibration images instead of a moving average of the bounds of single batches,
    and never more than the share is clipped. Half of the steps goes to either part; the rate is a share of the distance
    of the bounds. Bounds also learn from the rounding error inside of them (LSQ). Features are compared at every block,
    relative to their variance. Bounds of weights are per row and symmetric; those of 8-bit weights and of dynamic
    activations are not learned.
    """

    name = "dbdc-pac"
    title = "DBDC+Pac"
    observer = "histogram"
    learns = True

    def adjust_qparams(self, prepared: PreparedModel) -> None:
        """Clip activations by density; weights start at their extremes."""
        for quantizer in activation_quantizers(prepared):
            _clip(quantizer)
        minmax_weights(prepared)

    def learn(self, prepared: PreparedModel, crops: Sequence[Tensor], budget: Budget) -> None:
        """Distil the ranges of activations, then those of weights, half of the steps each if there are both.

        Progress is kept of the last part; one before it is repeated on resuming.
        """
        first = budget.steps // 2 if rows_to_learn(prepared) else budget.steps
        first = first if activation_quantizers(prepared) else 0
        second = replace(budget, steps=budget.steps - first, seed=budget.seed + 1)
        teacher = Teacher(prepared)
        learn = partial(distil_bounds, prepared, crops, method=self.name, rate=RATE, teacher=teacher)
        learn(replace(budget, steps=first, checkpoint=None if second.steps else budget.checkpoint), weights=False)
        learn(second, activations=False)


def clipped_share(bits: int) -> float:
    """Largest share of values that dual clipping cuts off."""
    return 1e-5 if bits == 8 else 1e-4


def dual_clip(edges: Tensor, counts: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The range left after taking bins off the less dense end while no more than `share` of the values is lost.

    Args:
        edges: Ascending bin edges, `[bins + 1]`.
        counts: Values per bin, `[bins]`.
        share: Largest share to clip, both sides together.

    Returns:
        ``(lo, hi)``, 0-dimensional: the outer edges of the bins that are left, at least one.
    """
    left = counts.tolist()
    budget = share * sum(left)
    low, high = 0, len(left) - 1
    while low < high:
        at_low = left[low] < left[high]
        budget -= left[low if at_low else high]
        if budget < 0:
            break
        low, high = (low + 1, high) if at_low else (low, high - 1)
    return edges[low], edges[high + 1]


def _clip(quantizer: HarmoqFakeQuantize) -> None:
    observer = quantizer.observer
    assert isinstance(observer, HistogramObserver)  # the observer of this baseline's configuration
    lo, hi = dual_clip(*observer.histogram(), clipped_share(quantizer.spec.bits))
    least, most = observer.value_range()
    quantizer.set_bounds(lo.float().clamp_min(least), hi.float().clamp_max(most))
