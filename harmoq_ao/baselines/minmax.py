"""MinMax: ranges from the extremes."""

from __future__ import annotations

from harmoq_ao.baselines.base import Baseline


class MinMax(Baseline):
    """Ranges from the smallest to the largest value seen; weights up to the largest magnitude of each row.

    Source: Jacob, Kligys, Chen, Zhu, Tang, Howard, Adam, Kalenichenko: "Quantization and training of neural networks
    for efficient integer-arithmetic-only inference", CVPR 2018 (its ranges, without its training).

    Different here: no moving average of the extremes, which training needs and calibration does not. Nothing seen in
    calibration is clipped; at 8 bits, whose weight codes are signed, the largest weight of a row may lose half a step.
    """

    name = "minmax"
    title = "MinMax"
    observer = "minmax"
