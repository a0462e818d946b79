"""Signal to quantization noise of sites on the samples that calibration kept, in dB: what reports say."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from harmoq_ao.quant.quantizer import normalized

if TYPE_CHECKING:
    from harmoq_ao.quant.fake_quant import HarmoqFakeQuantize

_ROWS = 512  # rows of the sample that the ratio is measured on
_VALUES = _ROWS * 64  # the same where the sample is of single values


def linear_db(
    act: HarmoqFakeQuantize | None,
    weight_quantizer: HarmoqFakeQuantize | None,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
) -> float | None:
    """Ratio of ``W x`` over the sampled inputs; None without a sample of rows, which histograms do not keep.

    Args:
        act: Fake-quantizer of the input.
        weight_quantizer: Of the weight.
        weight: `[N, K]` float32, without the joint scale.
        scale: Joint scale `[K]`.
        shift: Joint shift `[K]`.
    """
    observer = None if act is None else act.observer
    if observer is None or not observer.tracks_channels:
        return None
    sample = observer.sample()
    if sample.dim() != 2:
        return None
    x = sample[:_ROWS].float()
    inverse = None if scale is None else 1.0 / scale
    constant = 0.0 if shift is None else weight @ shift
    rounded = _rounded(act, x, scale, shift) @ _rounded(weight_quantizer, weight, inverse).T + constant
    return round(_ratio_db(x @ weight.T, rounded), 2)


def product_db(operands: Iterable[tuple[HarmoqFakeQuantize | None, Tensor | None]]) -> float | None:
    """Ratio of a product from those of its operands, whose relative errors add up; None if none has a sample.

    Args:
        operands: Fake-quantizer and divisor `[K]` of each.
    """
    noise = [10 ** (-_operand_db(q, scale) / 10) for q, scale in operands if q is not None and q.observer is not None]
    return round(-10 * math.log10(max(sum(noise), 1e-30)), 2) if noise else None


def _operand_db(quantizer: HarmoqFakeQuantize, scale: Tensor | None) -> float:
    assert quantizer.observer is not None
    x = quantizer.observer.sample()[:_VALUES].float()
    usable = scale if x.dim() == 2 else None
    return _ratio_db(normalized(x, usable), quantizer.rounded_rows(x, usable))


def _rounded(
    quantizer: HarmoqFakeQuantize | None, rows: Tensor, scale: Tensor | None, shift: Tensor | None = None
) -> Tensor:
    return normalized(rows, scale, shift) if quantizer is None else quantizer.rounded_rows(rows, scale, shift)


def _ratio_db(signal: Tensor, approximation: Tensor) -> float:
    noise = float((signal - approximation).double().square().mean())
    return 10 * math.log10(max(float(signal.double().square().mean()), 1e-30) / max(noise, 1e-30))
