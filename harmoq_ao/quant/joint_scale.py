"""Harmonized scale optimization (HSO): one joint scale per channel of a contraction.

A contraction ``y = W x`` is unchanged by ``y = (W s) (x / s)`` for any positive `s` along the contracted axis, but the
two quantizers then see different ranges. Equation (6) of HarmoQ, ``s = sqrt(Rx (2**bw - 1) / (Rw (2**bx - 1)))``, makes
the two quantization steps equal. As one number per layer it changes nothing, because the ranges of uniform quantizers
move along with a scalar (a test); per channel it evens out the channels that share one range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harmoq_ao.common.errors import ConfigError
from harmoq_ao.quant.quantizer import check_bits

SCALE_LIMITS = (0.1, 10.0)
"""Smallest and largest joint scale, around a geometric mean of one."""


def joint_scale(
    range_x: Tensor,
    range_w: Tensor,
    bits_x: int,
    bits_w: int,
    limits: tuple[float, float] = SCALE_LIMITS,
) -> Tensor:
    """Equation (6) per channel, divided by its geometric mean and clamped; of two activations per head dimension.

    A common factor of all scales has no effect (the bounds absorb it), so the bit widths, which enter as one, drop out
    of the result; they decide only whether there is anything to balance.

    Args:
        range_x: Range of every activation channel (of the left operand), `[K]`, not negative.
        range_w: Range of every column of the weight (of the right operand), `[K]`, not negative.
        bits_x: Bits of the activation.
        bits_w: Bits of the weight.
        limits: Smallest and largest scale.

    Returns:
        `[K]` float32. All ones if an operand is not quantized; one for channels where a range is zero.
    """
    check_bits(bits_x)
    check_bits(bits_w)
    if max(bits_x, bits_w) > 8:
        _check_ranges(range_x, range_w, limits)
        return torch.ones_like(range_x, dtype=torch.float32)
    return power_scale(range_x, range_w, 0.5, limits)


def power_scale(
    range_x: Tensor, range_w: Tensor, exponent: float, limits: tuple[float, float] = SCALE_LIMITS
) -> Tensor:
    """``range_x**a / range_w**(1 - a)`` per channel, divided by its geometric mean and clamped.

    Args:
        range_x: `[K]`, not negative.
        range_w: `[K]`, not negative.
        exponent: `a` in [0, 1]: 1 evens out the activation channels, 0 the weight columns, 0.5 is equation (6).
        limits: Smallest and largest scale.

    Returns:
        `[K]` float32; one for channels where a range is zero.
    """
    _check_ranges(range_x, range_w, limits)
    usable = (range_x > 0) & (range_w > 0)
    log_x = torch.where(usable, range_x, 1.0).double().log()
    log_w = torch.where(usable, range_w, 1.0).double().log()
    log_scale = exponent * log_x - (1.0 - exponent) * log_w
    log_scale = log_scale - log_scale.sum() / usable.sum().clamp_min(1)
    return torch.where(usable, log_scale.exp().clamp(*limits), 1.0).float()


def _check_ranges(range_x: Tensor, range_w: Tensor, limits: tuple[float, float]) -> None:
    if range_x.shape != range_w.shape or range_x.dim() != 1:
        raise ConfigError(
            "The ranges of the two operands do not belong to one contraction",
            found=f"shapes {tuple(range_x.shape)} and {tuple(range_w.shape)}",
            expected="one range per channel of the contracted axis, [K] and [K]",
        )
    if not 0 < limits[0] <= 1 <= limits[1]:
        raise ConfigError("Bad limits of the joint scale", found=limits, expected="0 < smallest <= 1 <= largest")
