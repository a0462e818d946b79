"""PAMS: one learned scale per activation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from harmoq_ao.baselines.base import Baseline, Budget, activation_quantizers
from harmoq_ao.baselines.learning import distil_bounds
from harmoq_ao.quant.fake_quant import HarmoqFakeQuantize
from harmoq_ao.quant.quantizer import Scheme
from harmoq_ao.sites.model import PreparedModel

RATE = 1e-2


class PAMS(Baseline):
    """Parameterized max scale: activations are clipped to ``[-alpha, alpha]``, and only the alphas are learned.

    Source: Li, Yan, Lin, Zheng, Zhang, Yang, Ji: "PAMS: Quantized super-resolution via parameterized max scale",
    ECCV 2020. Alpha starts at the largest magnitude seen; weights are rounded at theirs; the loss has a term that
    transfers the float network's features (structured knowledge transfer).

    Different here: PAMS trains the weights too, with labels, for tens of epochs; post-training only the alphas are
    learned, from the float network's output. An operand that is never negative (after softmax or ReLU) is clipped to
    ``[0, alpha]`` and has all its levels there. There are ``2**bits`` levels, not ``2**bits - 1`` around zero; inputs
    of convolutions, which need a level at zero, have those of the paper and one more above. The largest weight is that
    of its row, not of its layer. Features are compared at every block, relative to their variance, not as spatial
    attention maps after the last one. Dynamic activations have no alpha.
    """

    name = "pams"
    title = "PAMS"
    observer = "minmax"
    learns = True

    def adjust_qparams(self, prepared: PreparedModel) -> None:
        """Put every alpha at the largest magnitude seen."""
        for quantizer in activation_quantizers(prepared):
            lowest, highest = _range(quantizer)
            share = lower_share(quantizer)
            _set_upper(quantizer, torch.maximum(highest, -lowest / share if share else highest), share)

    def learn(self, prepared: PreparedModel, crops: Sequence[Tensor], budget: Budget) -> None:
        """Distil the alphas."""
        operands = activation_quantizers(prepared)
        with one_scale(operands):
            distil_bounds(prepared, crops, budget, method=self.name, rate=RATE, weights=False)
        for quantizer in operands:
            _set_upper(quantizer, quantizer.upper, lower_share(quantizer))


def lower_share(quantizer: HarmoqFakeQuantize) -> float:
    """How far the lower bound lies below zero, in units of the upper one: 1, or 0 where nothing negative was seen.

    With an integer zero point there is one level less below zero than above it.
    """
    if float(_range(quantizer)[0]) >= 0.0:
        return 0.0
    spec = quantizer.spec
    if spec.scheme is not Scheme.INTEGER_ZERO_POINT:
        return 1.0
    below = spec.qmax // 2
    return below / (spec.qmax - below)


@contextmanager
def one_scale(quantizers: Iterable[HarmoqFakeQuantize]) -> Iterator[None]:
    """Context manager inside which the upper bound is the only parameter of each range, the lower one in proportion."""
    before = [(quantizer, quantizer.lower_ratio) for quantizer in quantizers]
    for quantizer, _ in before:
        quantizer.lower_ratio = lower_share(quantizer)
    try:
        yield
    finally:
        for quantizer, ratio in before:
            quantizer.lower_ratio = ratio


def _range(quantizer: HarmoqFakeQuantize) -> tuple[Tensor, Tensor]:
    assert quantizer.observer is not None
    return quantizer.observer.value_range()


def _set_upper(quantizer: HarmoqFakeQuantize, upper: Tensor, share: float) -> None:
    upper = upper.detach().clamp_min(0.0)
    quantizer.set_bounds(0.0 - share * upper, upper)
