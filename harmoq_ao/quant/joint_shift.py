"""The joint shift: one offset per input channel of a linear layer, taken before quantization, given back by the bias.

``y = W x + b = (W s) ((x - z) / s) + (b + W z)`` for any `z` `[K]`. Where channels have different means, the bounds
that they share must cover all of them; centred, the same levels lie closer. It costs an integer kernel nothing: its
quantizer adds a constant per channel instead of one for all, and the bias is constant either way. Moreover ``W z`` is
exact, which ``W~ z`` would not be. (Outlier Suppression+, Wei et al., EMNLP 2023, shifts channels by their mid-range
for language models; here the shift is chosen by the error of the output.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from harmoq_ao.common.errors import ConfigError
from harmoq_ao.quant.bounds import search_tensor_bounds
from harmoq_ao.quant.quantizer import QuantizerSpec, fake_quantize

TAIL = 1e-3
"""Share of a channel's values on either side that its robust mid-range leaves out."""

ROBUST_BITS = 2
"""Up to this width robust centres are tried as well."""


def joint_shift(x: Tensor, weight: Tensor, scale: Tensor, ranges: tuple[Tensor, Tensor], act: QuantizerSpec) -> Tensor:
    """The best of a few shifts by the output's squared error: none, the mid-range, and at 2 bits robust centres.

    The error is that of the rounded input alone: the weight's share shrinks as `x` is centred better.

    At 2 bits most of an operand's error is rounding, and the centre of the bulk matters more than the tails. With more
    levels clipping the tails costs more in the image than the local error says (measured on DAT-light at 4 bits:
    mid-range +0.2 dB, robust mid-range -0.7 dB), so there only the mid-range is tried.

    Args:
        x: Sample of the input, `[R, K]`.
        weight: `[m, K]`.
        scale: Joint scale `[K]`.
        ranges: Minimum and maximum of each channel, `[K]` each.
        act: Quantizer of the input, static.

    Returns:
        `[K]` float32, zeros if none is better.

    Raises:
        ConfigError: `act` is dynamic.
    """
    if act.dynamic:
        raise ConfigError("A joint shift needs static bounds", found="a dynamic quantizer", expected="dynamic=False")
    best = torch.zeros_like(scale)
    least = _output_error(x, weight, scale, act)
    for candidate in _candidates(x, ranges, act.bits):
        error = _output_error(x - candidate, weight, scale, act)
        if error < least:
            best, least = candidate, error
    return best


def _output_error(x: Tensor, weight: Tensor, scale: Tensor, act: QuantizerSpec) -> float:
    """Mean squared error of ``Q(x / s) (W s)^T`` against ``x W^T``, under the range of least error."""
    scaled = x / scale
    rounded = fake_quantize(scaled, *search_tensor_bounds(scaled, act), act.bits)
    return float((rounded @ (weight * scale).T - x @ weight.T).square().mean())


def _candidates(x: Tensor, ranges: tuple[Tensor, Tensor], bits: int) -> Iterator[Tensor]:
    yield (ranges[0] + ranges[1]) / 2
    if bits > ROBUST_BITS:
        return
    yield (x.quantile(TAIL, dim=0) + x.quantile(1 - TAIL, dim=0)) / 2
    yield x.median(0).values
