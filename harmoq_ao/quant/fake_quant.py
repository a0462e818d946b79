"""The fake-quantizer of one operand: an observer, a learnable quantization range, and the rounding between."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from harmoq_ao.common.errors import CalibrationError, ConfigError
from harmoq_ao.common.torchao_import import pt2e
from harmoq_ao.quant.observers.base import OperandObserver
from harmoq_ao.quant.quantizer import (
    QuantizerSpec,
    Scheme,
    dynamic_bounds_for,
    fake_quantize,
    snap_bounds,
    step_size,
)


class HarmoqFakeQuantize(pt2e.FakeQuantizeBase):
    """Observe an operand, then round it to the levels of `spec`.

    The bounds are parameters, so that they can be learned; they take no gradient until :meth:`learn_bounds`. Whether
    statistics are collected and whether values are rounded follow the switches of the base class
    (``enable_observer``, ``enable_fake_quant``, both on at construction).

    Args:
        spec: What to quantize to. 16 and 32 bits leave every input unchanged.
        bounds_shape: Shape of the bounds, broadcastable to the operand. The default ``()`` is one pair for the whole
            operand and gives way to whatever shape :meth:`set_bounds` or a state dict brings.

    Attributes:
        observer: Attached by the caller; None collects nothing.
        site_name: Used in error messages.
        learnable: Whether learning may move the bounds.
        lower_ratio: If given, the range has one free parameter: it is ``(-lower_ratio * upper, upper)``. A symmetric
            quantizer is always like that, with a ratio of 1.
    """

    def __init__(self, spec: QuantizerSpec, bounds_shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.spec = spec
        self.site_name = ""
        self.observer: OperandObserver | None = None
        self.learnable = True
        self.lower_ratio: float | None = 1.0 if spec.scheme is Scheme.SYMMETRIC else None
        self.lower = nn.Parameter(torch.zeros(bounds_shape), requires_grad=False)
        self.upper = nn.Parameter(torch.zeros(bounds_shape), requires_grad=False)
        self.bounds_known: Tensor
        self.register_buffer("bounds_known", torch.zeros(1, dtype=torch.uint8))

    @property
    def has_bounds(self) -> bool:
        """Whether static bounds have been set (never the case for a dynamic quantizer)."""
        return bool(self.bounds_known[0])

    @property
    def active(self) -> bool:
        """Whether :meth:`forward` rounds. If not it returns its input as it is, without dividing by the joint scale."""
        return self.spec.enabled and bool(self.fake_quant_enabled[0])

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Approximation of ``(x - shift) / scale`` on the quantizer's levels, or `x` itself when not :attr:`active`.

        Args:
            x: The operand, any shape.
            scale: Joint scale along the contracted axis, broadcastable to `x`.
            shift: Joint shift along the contracted axis, likewise; only with static bounds.

        Raises:
            CalibrationError: A static quantizer has no bounds yet.
        """
        self.observe(x)
        if not self.active:
            return x
        lo, hi = dynamic_bounds_for(x, self.spec, scale) if self.spec.dynamic else self.bounds()
        return fake_quantize(x, lo, hi, self.spec.bits, scale, shift)

    @property
    def observing(self) -> bool:
        """Whether there is an observer, and it is switched on."""
        return self.observer is not None and bool(self.observer_enabled[0])

    def observe(self, x: Tensor) -> None:
        """Show an operand to the observer, if there is one and it is switched on."""
        if self.observer is not None and self.observing:
            self.observer(x.detach())

    def rounded_rows(self, rows: Tensor, scale: Tensor | None, shift: Tensor | None = None) -> Tensor:
        """``(rows - shift) / scale`` on the quantizer's levels, whatever its switches.

        Args:
            rows: `[R, K]`, contracted axis last whatever axis the operand has it on; or single values `[R]`.
            scale: Joint scale `[K]`, or None for ones.
            shift: Joint shift `[K]`, or None for zeros.
        """
        spec = replace(self.spec, axis=-1)
        lo, hi = dynamic_bounds_for(rows, spec, scale) if spec.dynamic else self.bounds()
        return fake_quantize(rows, lo, hi, spec.bits, scale, shift)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Static bounds as the quantizer uses them: float32, on the scheme also after a learning step.

        Raises:
            CalibrationError: The bounds are not known, or the quantizer is dynamic.
        """
        self._require_bounds()
        lower, upper = self.lower.float(), self.upper.float()
        if self.lower_ratio is not None:
            lower = -self.lower_ratio * upper
        if self.spec.scheme is Scheme.INTEGER_ZERO_POINT:
            snapped = snap_bounds(lower.detach(), upper.detach(), self.spec)
            return _straight_through(snapped[0], lower), _straight_through(snapped[1], upper)
        return lower, upper

    def set_bounds(self, lo: Tensor | float, hi: Tensor | float) -> None:
        """Fix the static bounds, snapped to the scheme.

        Args:
            lo: Lower bound(s) of ``x / scale``, scalar or broadcastable to the operand.
            hi: Upper bound(s), not below `lo`.

        Raises:
            ConfigError: The quantizer is dynamic, or the shapes do not fit.
            CalibrationError: The bounds are not finite, or out of order.
        """
        if self.spec.dynamic:
            raise ConfigError(f"{self._name()} is dynamic and takes no static bounds", remedy="use a static spec")
        lower, upper = self._as_bound(lo), self._as_bound(hi)
        lower, upper = torch.broadcast_tensors(lower, upper)
        self._check_order(lower, upper)
        lower, upper = snap_bounds(lower, upper, self.spec)
        self._store(lower, upper)

    def learn_bounds(self, enabled: bool = True) -> None:
        """Let gradients reach the bounds; of a range with one free parameter, `upper` alone, which is mirrored."""
        self.upper.requires_grad_(enabled)
        self.lower.requires_grad_(enabled and self.lower_ratio is None)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Step and lower bound of the static quantizer, ``(step, lower)``, in the shape of the bounds.

        Raises:
            CalibrationError: The bounds are not known, or the quantizer is dynamic.
        """
        lo, hi = self.bounds()
        return step_size(lo, hi, self.spec.bits).detach(), lo.detach()

    def extra_repr(self) -> str:
        """Bits, scheme, granularity, and the bounds when they are one pair."""
        parts = [f"bits={self.spec.bits}", self.spec.scheme.value, self.spec.granularity.value]
        if self.spec.dynamic:
            parts.append("dynamic")
        elif not self.has_bounds:
            parts.append("no bounds")
        elif self.upper.numel() == 1:
            lo, hi = self.bounds()
            parts.append(f"lo={lo.item():.6g}, hi={hi.item():.6g}")
        return ", ".join(parts)

    def _name(self) -> str:
        return f"The quantizer of {self.site_name}" if self.site_name else "This quantizer"

    def _require_bounds(self) -> None:
        if self.spec.dynamic:
            raise CalibrationError(
                f"{self._name()} is dynamic: its bounds belong to each input",
                remedy="call harmoq_ao.quant.quantizer.dynamic_bounds_for on the input",
            )
        if not self.has_bounds:
            raise CalibrationError(
                f"{self._name()} has no bounds yet",
                found="fake-quantization switched on before calibration",
                expected="bounds from an observer or from set_bounds",
                remedy="run calibration data through the prepared model first, or disable fake-quantization",
            )

    def _as_bound(self, value: Tensor | float) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float32, device=self.bounds_known.device).detach()

    def _check_order(self, lo: Tensor, hi: Tensor) -> None:
        if not bool(torch.isfinite(hi - lo).all()):
            raise CalibrationError(
                f"{self._name()} was given bounds that are not finite",
                found=f"lo in [{lo.min():g}, {lo.max():g}], hi in [{hi.min():g}, {hi.max():g}]",
                expected="finite numbers, with a finite difference",
                remedy="check the calibration data for NaN or infinity",
            )
        if bool((lo > hi).any()):
            raise CalibrationError(
                f"{self._name()} was given a lower bound above its upper bound",
                found=f"{int((lo > hi).sum())} of {lo.numel()} pairs",
                expected="lo <= hi",
                remedy="swap the arguments",
            )

    def _store(self, lower: Tensor, upper: Tensor) -> None:
        if self.upper.dim() and lower.shape != self.upper.shape:
            lower, upper = self._expanded(lower), self._expanded(upper)
        self._resize(lower.shape)
        with torch.no_grad():
            self.lower.copy_(lower)
            self.upper.copy_(upper)
        self.bounds_known.fill_(1)

    def _expanded(self, bound: Tensor) -> Tensor:
        try:
            return bound.expand(self.upper.shape)
        except RuntimeError:
            raise ConfigError(
                f"{self._name()} was given bounds of the wrong shape",
                found=tuple(bound.shape),
                expected=f"a shape that broadcasts to {tuple(self.upper.shape)}",
            ) from None

    def _resize(self, shape: torch.Size) -> None:
        """New parameters only when the shape changes: an optimizer may hold the present ones."""
        if shape == self.upper.shape:
            return
        for name in ("lower", "upper"):
            old: Tensor = getattr(self, name)
            setattr(self, name, nn.Parameter(old.new_zeros(shape), requires_grad=old.requires_grad))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        stored = state_dict.get(prefix + "upper")
        if isinstance(stored, Tensor) and self.upper.dim() == 0:
            self._resize(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class _StraightThrough(torch.autograd.Function):
    """Forward: the first argument. Backward: everything to the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, source: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor]:
        return None, grad_outputs[0]


def _straight_through(value: Tensor, source: Tensor) -> Tensor:
    result: Tensor = _StraightThrough.apply(value, source)
    return result
