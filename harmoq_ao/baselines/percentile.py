"""Percentile: ranges that clip a fixed share of the values."""

from __future__ import annotations

from harmoq_ao.baselines.base import Baseline


class Percentile(Baseline):
    """Activation ranges from percentile 0.2 to 99.8 of the values seen.

    Source: Li, Wang, Liang, Qin, Yan, Fan: "Fully quantized network for object detection", CVPR 2019, where activations
    are clipped at a percentile because their extremes are unstable.

    Different here: percentiles of a sample of all calibration images (at most 131072 values, or 2048 whole tokens)
    instead of each batch; clipped on both sides; weights keep the bounds of least squared error that the library gives
    every calibrated method but MinMax, which is better than their extremes.
    """

    name = "percentile"
    title = "Percentile"
    observer = "percentile"
