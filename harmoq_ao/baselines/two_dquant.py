"""2DQuant: ranges found by search, then distilled."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from harmoq_ao.baselines.base import Baseline, Budget
from harmoq_ao.baselines.learning import distil_bounds
from harmoq_ao.sites.model import PreparedModel

RATE = 1e-2


class TwoDQuant(Baseline):
    """DOBI, then distillation quantization calibration: Adam on all quantization ranges and on nothing else.

    Source: Liu, Qin, Guo, Yuan, Kong, Chen, Zhang: "2DQuant: Low-bit post-training quantization for image
    super-resolution", NeurIPS 2024. Loss: mean absolute error to the float network's output, plus the error of the
    features between blocks.

    Different here: the first stage is :class:`DOBI`. The rate of 1e-2 is a share of the
    range, falls along a cosine, and gradients are clipped; bounds also learn from the rounding error
    inside of them (LSQ), not only from what they clip. Features are those of every block, their error divided by their
    variance instead of their norm. The last state is kept: the published code picks its checkpoint on Set5. Bounds of
    8-bit weights stay where DOBI put them.
    """

    name = "2dquant"
    title = "2DQuant"
    observer = "mse"
    learns = True

    def learn(self, prepared: PreparedModel, crops: Sequence[Tensor], budget: Budget) -> None:
        """Distil all ranges."""
        distil_bounds(prepared, crops, budget, method=self.name, rate=RATE)
