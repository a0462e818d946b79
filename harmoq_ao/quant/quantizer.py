"""The uniform quantizer: bounds ``(lo, hi)``, ``2**bits`` evenly spaced levels, straight-through gradients.

Every function uses one rounding rule, so that simulated and integer execution agree bit for bit::

    codes = clamp(round_half_even(x * r + c), 0, 2**bits - 1)      r = 1 / (scale * step),  c = -lo / step - shift * r
    value = codes * step + lo                                      step = (hi - lo) / (2**bits - 1)

The multiplication and the addition are two float32 operations, each rounded on its own. `value` lives in the *scaled
domain*: it approximates ``(x - shift) / scale``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harmoq_ao.common.errors import ConfigError, shown
from harmoq_ao.quant.operators import operators_for

QUANTIZED_BITS = (2, 3, 4, 5, 6, 7, 8)
"""Bit widths that quantize."""

OFF_BITS = (16, 32)
"""Bit widths that mean: leave the operand in floating point."""

_EDGE = 1e-4
"""A value this close to a bound, in steps, counts as inside: a dynamic bound is a value of the operand itself."""

MIN_STEP = 2.0**-64
"""Step of a degenerate range (``hi <= lo``): positive, a power of two, and far below any activation of interest."""


class Scheme(StrEnum):
    """How the levels lie relative to zero.

    SYMMETRIC: ``lo = -hi``, mid-rise: all ``2**bits`` levels are used and none of them is zero.
    ASYMMETRIC: any float ``lo``.
    INTEGER_ZERO_POINT: ``lo = -zp * step`` with an integer ``zp`` in ``0 .. 2**bits - 1``: zero is exactly a level.
    """

    SYMMETRIC = "symmetric"
    ASYMMETRIC = "asymmetric"
    INTEGER_ZERO_POINT = "integer_zero_point"


class Granularity(StrEnum):
    """Which elements share one pair of bounds: all of them, those of one output channel, or those of one token."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"
    PER_TOKEN = "per_token"


@dataclass(frozen=True)
class QuantizerSpec:
    """What one operand is quantized to.

    Args:
        bits: 2 to 8, or 16 / 32 for "leave in floating point".
        scheme: Placement of the levels relative to zero.
        granularity: Which elements share bounds.
        dynamic: Bounds are the minimum and maximum of each new tensor instead of calibrated constants.
        axis: The kept axis for PER_CHANNEL; the contracted (reduced) axis for PER_TOKEN.

    Raises:
        ConfigError: A value is outside its set, or `dynamic` is combined with PER_CHANNEL.
    """

    bits: int
    scheme: Scheme = Scheme.ASYMMETRIC
    granularity: Granularity = Granularity.PER_TENSOR
    dynamic: bool = False
    axis: int = -1

    def __post_init__(self) -> None:
        check_bits(self.bits)
        object.__setattr__(self, "scheme", _member(Scheme, self.scheme, "scheme"))
        object.__setattr__(self, "granularity", _member(Granularity, self.granularity, "granularity"))
        if self.dynamic and self.granularity is Granularity.PER_CHANNEL:
            raise ConfigError(
                "Dynamic bounds cannot be per channel",
                found=self.granularity.value,
                expected="per_tensor or per_token",
                remedy="use static bounds (dynamic=False) per channel",
            )

    @property
    def enabled(self) -> bool:
        """Whether this operand is quantized at all."""
        return self.bits <= max(QUANTIZED_BITS)

    @property
    def levels(self) -> int:
        """Number of levels, ``2**bits``."""
        return 2**self.bits

    @property
    def qmax(self) -> int:
        """Largest code, ``2**bits - 1``."""
        return self.levels - 1


def check_bits(bits: int) -> None:
    """Raise ConfigError unless `bits` is 2 to 8, 16 or 32."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in QUANTIZED_BITS + OFF_BITS:
        raise ConfigError(
            "Unsupported bit width",
            found=shown(bits),
            expected="an integer from 2 to 8, or 16 or 32",
            remedy="choose 2 to 8 bits to quantize, 16 or 32 to leave the operand in floating point",
        )


def _member(kind: type[Enum], value: object, name: str) -> Enum:
    try:
        return kind(value)
    except ValueError:
        choices = ", ".join(str(member.value) for member in kind)
        raise ConfigError(f"Unknown quantizer {name}", found=shown(value), expected=choices) from None


def step_size(lo: Tensor, hi: Tensor, bits: int) -> Tensor:
    """Distance between neighbouring levels, ``(hi - lo) / (2**bits - 1)``, at least `MIN_STEP`."""
    return ((hi - lo) / (2**bits - 1)).clamp_min(MIN_STEP)


def affine_form(
    lo: Tensor, hi: Tensor, bits: int, scale: Tensor | None = None, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The factor ``r = 1 / (scale * step)`` and the offset ``c = -lo / step - shift * r`` of the rounding rule."""
    step = step_size(lo, hi, bits)
    factor = 1.0 / (step if scale is None else scale * step)
    return factor, -lo / step if shift is None else -lo / step - shift * factor


def snap_bounds(lo: Tensor, hi: Tensor, spec: QuantizerSpec) -> tuple[Tensor, Tensor]:
    """The nearest bounds that the scheme of `spec` allows and that cover ``[lo, hi]`` (idempotent).

    SYMMETRIC takes the larger magnitude on both sides; ASYMMETRIC changes nothing; INTEGER_ZERO_POINT extends the range
    to contain zero and moves `lo` to the closest multiple of the step, which may clip up to half a step at one end.
    """
    if spec.scheme is Scheme.SYMMETRIC:
        magnitude = torch.maximum(lo.abs(), hi.abs())
        return -magnitude, magnitude
    if spec.scheme is Scheme.INTEGER_ZERO_POINT:
        lo, hi = lo.clamp_max(0.0), hi.clamp_min(0.0)
        step = _round_up_to_16_bits(step_size(lo, hi, spec.bits))
        zero_point = torch.round(-lo / step).clamp(0, spec.qmax)
        return 0.0 - zero_point * step, (spec.qmax - zero_point) * step
    return lo, hi


def _round_up_to_16_bits(step: Tensor) -> Tensor:
    """Positive float32 `step` rounded up to 16 significant bits.

    An 8-bit code times such a step is exact in float32, so ``lo``, ``hi`` and the step computed back from them are
    exact too, and the code of zero dequantizes to exactly zero.
    """
    dropped = 0xFF
    return ((step.float().view(torch.int32) + dropped) & ~dropped).view(torch.float32)


def quantize(
    x: Tensor, lo: Tensor, hi: Tensor, bits: int, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """Codes of ``(x - shift) / scale``, uint8 in ``0 .. 2**bits - 1``; all bounds and vectors broadcast against `x`."""
    return _position(x, lo, hi, bits, scale, shift).round_().clamp_(0, 2**bits - 1).to(torch.uint8)


def dequantize(codes: Tensor, lo: Tensor, hi: Tensor, bits: int) -> Tensor:
    """Values ``codes * step + lo`` in the scaled domain, float32."""
    return codes.to(lo.dtype) * step_size(lo, hi, bits) + lo


def fake_quantize(
    x: Tensor, lo: Tensor, hi: Tensor, bits: int, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """Quantize and dequantize ``(x - shift) / scale``, differentiable by the straight-through estimator.

    Args:
        x: Any shape; float16 and bfloat16 are computed in float32 and returned in their own type.
        lo: Lower bound of ``x / scale``, broadcastable to `x`.
        hi: Upper bound, likewise.
        bits: 2 to 8.
        scale: Joint scale, broadcastable to `x`, or None for all ones.
        shift: Joint shift, broadcastable to `x`, or None for all zeros.

    Returns:
        ``codes * step + lo``, an approximation of ``(x - shift) / scale``, in the type of `x`. Its gradient takes the
        derivative of the rounding for one: to `x`, `scale` and `shift` it is that of clamping. A clipped
        value moves the bound it hit; a value inside, at position ``t`` in steps above `lo`, moves `hi` by
        ``(round(t) - t) / (2**bits - 1)`` and `lo` by the opposite (LSQ: Esser et al., ICLR 2020).
    """
    result: Tensor = _FakeQuantize.apply(x, lo, hi, bits, scale, shift)
    return result


def bound_gradients(grad: Tensor, x: Tensor, lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Gradients of `lo` and `hi` in :func:`fake_quantize`.

    Args:
        grad: Gradient of the rounded values.
        x: What is rounded, in the shape of `grad`.
        lo: Lower bound.
        hi: Upper bound.
        bits: 2 to 8.
    """
    operators = None if grad.dtype != x.dtype else _operators_for(x, lo, hi, None, None)
    if operators is not None:
        _, grad_lo, grad_hi, _, _ = operators.fake_quantize_backward(grad, x, lo, hi, bits, None, None)
    else:
        position = _position(x, lo, hi, bits, None, None)
        _, grad_lo, grad_hi, _, _ = _gradients(grad, position, lo, hi, bits, None, None, _Needs(bounds=True))
    assert grad_lo is not None
    assert grad_hi is not None
    return grad_lo, grad_hi


def dynamic_bounds(x: Tensor, axis: int | None = -1) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of `x` over `axis`, which is kept with size 1; over everything (0-dim) if `axis` is None."""
    x = widen(x)
    if axis is None:
        return torch.aminmax(x)
    return torch.aminmax(x, dim=axis, keepdim=True)


def dynamic_bounds_for(x: Tensor, spec: QuantizerSpec, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Bounds of ``x / scale`` for a dynamic `spec`, per token or per tensor, snapped to its scheme; no gradient."""
    x = widen(x.detach())
    scaled = x if scale is None else x / scale.detach()
    axis = spec.axis if spec.granularity is Granularity.PER_TOKEN else None
    return snap_bounds(*dynamic_bounds(scaled, axis), spec)


def normalized(x: Tensor, scale: Tensor | None, shift: Tensor | None = None) -> Tensor:
    """``(x - shift) / scale``, where None stands for no shift and for ones."""
    centred = x if shift is None else x - shift
    return centred if scale is None else centred / scale


def widen(x: Tensor) -> Tensor:
    """`x` in the type the quantizer computes in: float32 for 16-bit floats, unchanged otherwise."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _FakeQuantize(torch.autograd.Function):
    """Forward: round trip through the codes. Backward: the rounding counts as the identity.

    What is kept for the backward pass is the position ``t`` between the bounds, 0 at `lo` and ``2**bits - 1`` at `hi`;
    everything follows from it: ``(x - shift) / scale = t * step + lo``, and ``t`` outside of its range was clipped.
    C++ operators (`quant/operators.py`) compute it again from the operand, which costs less than to keep it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lo: Tensor, hi: Tensor, bits: int, scale: Tensor | None, shift: Tensor | None
    ) -> Tensor:
        ctx.bits, ctx.shape, ctx.dtype = bits, x.shape, x.dtype
        ctx.operators = _operators_for(x, lo, hi, scale, shift)
        if ctx.operators is not None:
            ctx.save_for_backward(x, lo, hi, scale, shift)
            rounded: Tensor = ctx.operators.fake_quantize(x, lo, hi, bits, scale, shift)
            return rounded
        position = _position(x, lo, hi, bits, scale, shift)
        ctx.save_for_backward(position, lo, hi, scale, shift)
        return _value_at(position, lo, hi, bits).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        kept, lo, hi, scale, shift = ctx.saved_tensors
        if ctx.operators is not None:
            *of_bounds, of_scale, of_shift = ctx.operators.fake_quantize_backward(
                grad_outputs[0], kept, lo, hi, ctx.bits, scale, shift
            )
            return *of_bounds, None, None if scale is None else of_scale, None if shift is None else of_shift
        needs_x, needs_lo, needs_hi, _, needs_scale, needs_shift = ctx.needs_input_grad
        needs = _Needs(needs_x, needs_lo or needs_hi, needs_scale, needs_shift)
        grad_x, grad_lo, grad_hi, grad_scale, grad_shift = _gradients(
            grad_outputs[0], kept, lo, hi, ctx.bits, scale, shift, needs
        )
        grad_x = None if grad_x is None else grad_x.sum_to_size(ctx.shape).to(ctx.dtype)
        return grad_x, grad_lo, grad_hi, None, grad_scale, grad_shift


def _operators_for(x: Tensor, lo: Tensor, hi: Tensor, scale: Tensor | None, shift: Tensor | None) -> ModuleType | None:
    operators = operators_for(x, lo, hi, scale, shift)
    return operators if operators is not None and operators.fake_quantize_fits(x, lo, hi, scale, shift) else None


class _Needs(NamedTuple):
    """Whose gradients are asked for."""

    x: bool = False
    bounds: bool = False
    scale: bool = False
    shift: bool = False


def _position(x: Tensor, lo: Tensor, hi: Tensor, bits: int, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    factor, offset = affine_form(lo, hi, bits, scale, shift)
    return (widen(x) * factor).add_(offset)


def _value_at(position: Tensor, lo: Tensor, hi: Tensor, bits: int) -> Tensor:
    return position.round().clamp_(0, 2**bits - 1).mul_(step_size(lo, hi, bits)).add_(lo)


def _gradients(
    grad: Tensor,
    position: Tensor,
    lo: Tensor,
    hi: Tensor,
    bits: int,
    scale: Tensor | None,
    shift: Tensor | None,
    needs: _Needs,
) -> tuple[Tensor | None, ...]:
    """Gradients of `x` (in the shape of the position), `lo`, `hi`, `scale` and `shift`; None for what is not needed."""
    grad, qmax = widen(grad), 2**bits - 1
    inside = torch.ops.aten.hardtanh_backward(grad, position, -_EDGE, qmax + _EDGE)
    grad_x = grad_lo = grad_hi = grad_scale = grad_shift = None
    if needs.x or needs.shift:
        moved = inside if scale is None else inside / scale
        grad_x = moved if needs.x else None
        if needs.shift:
            assert shift is not None
            grad_shift = -moved.sum_to_size(shift.shape).to(shift.dtype)
    if needs.bounds:
        clipped = grad - inside
        above = _sum_to(torch.ops.aten.threshold_backward(clipped, position, qmax / 2), hi)
        below = _sum_to(clipped, lo) - above.sum_to_size(lo.shape)
        rounding = _dot_to(position.round().sub_(position), inside, hi) / qmax
        grad_hi = (above + rounding).to(hi.dtype)
        grad_lo = (below - rounding.sum_to_size(lo.shape)).to(lo.dtype)
    if needs.scale:
        assert scale is not None
        scaled = (position * step_size(lo, hi, bits)).add_(lo)
        grad_scale = (-inside * scaled / scale).sum_to_size(scale.shape).to(scale.dtype)
    return grad_x, grad_lo, grad_hi, grad_scale, grad_shift


def _sum_to(values: Tensor, bound: Tensor) -> Tensor:
    return values.sum() if bound.dim() == 0 else values.sum_to_size(bound.shape)


def _dot_to(left: Tensor, right: Tensor, bound: Tensor) -> Tensor:
    """``(left * right)`` summed to the shape of `bound`; changes `left`."""
    if bound.dim() == 0:
        return torch.dot(left.reshape(-1), right.reshape(-1))
    return _sum_to(left.mul_(right), bound)
