"""Harmonized scale optimization (HSO): one joint scale per channel of a contraction.

A contraction ``y = W x`` is unchanged by ``y = (W s) (x / s)`` for any positive `s` along the contracted axis, but the
two quantizers then see other ranges. Equation (6) of HarmoQ, ``s = sqrt(Rx (2**bw - 1) / (Rw (2**bx - 1)))``, makes the
two quantization steps equal. Applied once per layer it changes nothing, because the bounds of uniform quantizers move
along with a scalar; applied per channel it evens out the channels that share one pair of bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from harmoq_ao.common.errors import ConfigError
from harmoq_ao.quant.bounds import search_channel_bounds, search_tensor_bounds
from harmoq_ao.quant.quantizer import Granularity, QuantizerSpec, check_bits, dynamic_bounds_for, fake_quantize

SCALE_LIMITS = (0.1, 10.0)
"""Smallest and largest joint scale, around a geometric mean of one."""

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Exponents tried by :func:`search_exponent`."""

Quantize = Callable[[Tensor], Tensor]
"""Replaces an already scaled operand by its quantized approximation."""


class ScaleChoice(NamedTuple):
    """What :func:`search_exponent` found.

    Attributes:
        scale: Joint scale, `[K]`.
        exponent: The exponent that gave it, or None if leaving the channels alone (all ones) was best.
        error: Mean squared output error with it, on the sample.
    """

    scale: Tensor
    exponent: float | None
    error: float


def scalar_scale(range_x: float, range_w: float, bits_x: int, bits_w: int) -> float:
    """Equation (6) for one pair of ranges: the scale at which ``x / s`` and ``W s`` have the same step.

    Args:
        range_x: Range ``hi - lo`` of the activation.
        range_w: Range of the weight.
        bits_x: Bits of the activation.
        bits_w: Bits of the weight.

    Returns:
        ``sqrt(range_x (2**bits_w - 1) / (range_w (2**bits_x - 1)))``; 1 if an operand is not quantized or a range is
        zero.
    """
    check_bits(bits_x)
    check_bits(bits_w)
    if max(bits_x, bits_w) > 8 or range_x <= 0 or range_w <= 0:
        return 1.0
    return float((range_x * (2**bits_w - 1) / (range_w * (2**bits_x - 1))) ** 0.5)


def joint_scale(
    range_x: Tensor,
    range_w: Tensor,
    bits_x: int,
    bits_w: int,
    limits: tuple[float, float] = SCALE_LIMITS,
) -> Tensor:
    """Equation (6) per channel, divided by its geometric mean and clamped.

    A common factor of all scales has no effect (the bounds absorb it), so the bit widths, which enter as one, drop out
    of the result; they decide only whether there is anything to balance.

    Args:
        range_x: Clipped range of every activation channel, `[K]`, not negative.
        range_w: Range of every column of the weight, `[K]`, not negative.
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


def pair_scale(
    range_q: Tensor,
    range_k: Tensor,
    bits_q: int,
    bits_k: int,
    limits: tuple[float, float] = SCALE_LIMITS,
) -> Tensor:
    """Equation (6) per head dimension between two activations, for ``(q / s) (k s)^T``. See :func:`joint_scale`."""
    return joint_scale(range_q, range_k, bits_q, bits_k, limits)


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


def search_exponent(
    x: Tensor,
    weight: Tensor,
    quantizer_x: QuantizerSpec | Quantize,
    quantizer_w: QuantizerSpec | Quantize,
    *,
    range_x: Tensor | None = None,
    range_w: Tensor | None = None,
    limits: tuple[float, float] = SCALE_LIMITS,
    exponents: tuple[float, ...] = EXPONENTS,
) -> ScaleChoice:
    """The joint scale of least compound error ``mean |Q(x / s) Q(W s)^T - x W^T|**2`` on a sample.

    Candidates are no scale, and :func:`power_scale` with each exponent (0.5 is equation (6) per channel: the two differ
    by a common factor). Bounds are searched anew for each candidate. For two activations give a sample of rows of the
    second one as `weight`.

    Args:
        x: Rows of the activation, `[R, K]`.
        weight: `[m, K]`.
        quantizer_x: Spec of the activation's quantizer, or a function that quantizes ``x / s``.
        quantizer_w: Spec of the weight's quantizer, or a function that quantizes ``W s``.
        range_x: `[K]`; the range of each column of `x` by default.
        range_w: `[K]`; the range of each column of `weight` by default.
        limits: Smallest and largest scale.
        exponents: Exponents to try.
    """
    x, weight = x.detach().float(), weight.detach().float()
    range_x = x.amax(0) - x.amin(0) if range_x is None else range_x.to(x)
    range_w = weight.amax(0) - weight.amin(0) if range_w is None else range_w.to(x)
    best = ScaleChoice(torch.ones_like(range_x), None, torch.inf)
    for exponent, scale in _candidate_scales(range_x, range_w, exponents, limits):
        error = compound_error(x, weight, scale, quantizer_x, quantizer_w)
        if error < best.error:
            best = ScaleChoice(scale, exponent, error)
    return best


def compound_error(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    quantizer_x: QuantizerSpec | Quantize,
    quantizer_w: QuantizerSpec | Quantize,
) -> float:
    """Mean squared error of ``Q(x / s) Q(W s)^T`` against ``x W^T``; `x` `[R, K]`, `weight` `[m, K]`, `scale` `[K]`."""
    scaled_x, scaled_w = x / scale, weight * scale
    rounded_x = quantized_operand(scaled_x, quantizer_x)
    rounded_w = quantized_operand(scaled_w, quantizer_w, importance=scaled_x.square().mean(0))
    return float((rounded_x @ rounded_w.T - x @ weight.T).square().mean())


def quantized_operand(operand: Tensor, quantizer: QuantizerSpec | Quantize, importance: Tensor | None = None) -> Tensor:
    """`operand` rounded with the bounds that suit it best: dynamic, or searched per row or per tensor.

    Args:
        operand: `[R, K]`, contracted axis last, with any joint scale applied.
        quantizer: A spec, or a function to use instead.
        importance: Weights of the channels in a per-row search, `[K]`.
    """
    if not isinstance(quantizer, QuantizerSpec):
        return quantizer(operand)
    if not quantizer.enabled:
        return operand
    if quantizer.dynamic:
        lo, hi = dynamic_bounds_for(operand, replace(quantizer, axis=-1))
    elif quantizer.granularity is Granularity.PER_TENSOR:
        lo, hi = search_tensor_bounds(operand, quantizer)
    else:
        lo, hi = search_channel_bounds(operand, quantizer, importance)
    return fake_quantize(operand, lo, hi, quantizer.bits)


def _candidate_scales(
    range_x: Tensor, range_w: Tensor, exponents: tuple[float, ...], limits: tuple[float, float]
) -> Iterator[tuple[float | None, Tensor]]:
    yield None, torch.ones_like(range_x)
    for exponent in exponents:
        yield exponent, power_scale(range_x, range_w, exponent, limits)


def _check_ranges(range_x: Tensor, range_w: Tensor, limits: tuple[float, float]) -> None:
    if range_x.shape != range_w.shape or range_x.dim() != 1:
        raise ConfigError(
            "The ranges of the two operands do not belong to one contraction",
            found=f"shapes {tuple(range_x.shape)} and {tuple(range_w.shape)}",
            expected="one range per channel of the contracted axis, [K] and [K]",
        )
    if not 0 < limits[0] <= 1 <= limits[1]:
        raise ConfigError("Bad limits of the joint scale", found=limits, expected="0 < smallest <= 1 <= largest")
