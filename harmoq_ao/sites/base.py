"""What all prepared sites share: observers and fake-quantizers on two operands, and the switch that silences them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harmoq_ao.config import HarmoqConfig, SiteSettings
from harmoq_ao.quant.bounds import weight_bounds
from harmoq_ao.quant.quantizer import QuantizerSpec, Scheme, normalized
from harmoq_ao.sites.quantized import QuantizedSite
from harmoq_ao.sites.report import SiteRow, site_row
from harmoq_ao.sites.site import FloatCause, FloatReason, Site

if TYPE_CHECKING:  # torchao takes longer to import than torch, and a converted model needs none of it
    from harmoq_ao.quant.fake_quant import HarmoqFakeQuantize
    from harmoq_ao.quant.observers.base import OperandObserver

_quiet: ContextVar[bool] = ContextVar("harmoq_quiet_sites", default=False)
"""Whether prepared sites neither observe nor round, per thread: set by :func:`quiet`, read by :func:`is_quiet`."""


@contextmanager
def quiet() -> Iterator[None]:
    """Context manager in which this thread's prepared sites compute their float function and observe nothing.

    Tracing and verification of graphs run in it.
    """
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


def is_quiet() -> bool:
    """Whether the calling thread is inside :func:`quiet`."""
    return _quiet.get()


class PreparedSite(nn.Module):
    """Base of prepared sites: the float contraction, with a fake-quantizer on each operand.

    Attributes:
        site: What the site is.
        act_quantizer: Fake-quantizer of the activation (of the left operand of a product), or None in float.
        weight_quantizer: Fake-quantizer of the weight (of the right operand of a product), or None in float.
        joint_scale: `[K]` vector that divides the activation and multiplies the weight along the contracted axis, or
            None for ones.
        joint_shift: `[K]` vector that is subtracted from the input of a linear before the division, and restored by
            the bias, or None for zeros.
    """

    site: Site
    act_quantizer: HarmoqFakeQuantize | None
    weight_quantizer: HarmoqFakeQuantize | None
    joint_scale: nn.Parameter | None
    joint_shift: nn.Parameter | None

    def _init_site(self, site: Site) -> None:
        self.site = site
        self.act_quantizer = None
        self.weight_quantizer = None
        self.register_parameter("joint_scale", None)
        self.register_parameter("joint_shift", None)

    # --- what stands here ---------------------------------------------------------------------------------------------

    @property
    def own_weight(self) -> nn.Parameter | None:
        """The weight of a linear or convolution; None for a product of two activations."""
        return None

    @property
    def own_bias(self) -> nn.Parameter | None:
        """The bias of a linear or convolution, or None."""
        return None

    def quantizers(self) -> list[HarmoqFakeQuantize]:
        """Fake-quantizers of both operands, as far as they are quantized."""
        return [q for q in (self.act_quantizer, self.weight_quantizer) if q is not None]

    def activation_quantizers(self) -> list[HarmoqFakeQuantize]:
        """Fake-quantizers of activations: of the input, or of both operands of a product."""
        operands = (self.act_quantizer, self.weight_quantizer if self.own_weight is None else None)
        return [q for q in operands if q is not None]

    def weight_quantizers(self) -> list[HarmoqFakeQuantize]:
        """The fake-quantizer of the weight of a linear or convolution, if it is quantized."""
        return [] if self.own_weight is None or self.weight_quantizer is None else [self.weight_quantizer]

    def scaled_weight(self) -> Tensor:
        """The weight as its quantizer takes it, float32: the joint scale is multiplied in."""
        assert self.own_weight is not None
        weight = self.own_weight.detach().float()
        return weight if self.joint_scale is None else weight * self.joint_scale.detach()

    def macs(self, operands: tuple[Any, ...], output: Tensor) -> int:
        """Multiply-accumulates of one call."""
        raise NotImplementedError

    def note_length(self, operands: tuple[Any, ...]) -> None:
        """Take note of a call's contracted length: one that changes with the image has no joint scale."""

    def report_row(self, settings: SiteSettings) -> SiteRow:
        """The report's row; quantization range and SQNR are there after calibration."""
        row = site_row(self.site, settings)
        if self.act_quantizer is not None and self.act_quantizer.has_bounds:
            lo, hi = self.act_quantizer.bounds()
            row.bounds = (float(lo.min()), float(hi.max()))
        if self.joint_scale is not None:
            row.joint_scale = (float(self.joint_scale.min()), float(self.joint_scale.max()))
        row.sqnr_db = self.site.sqnr_db
        return row

    # --- preparation --------------------------------------------------------------------------------------------------

    def attach_quantizers(self, config: HarmoqConfig, device: torch.device) -> None:
        """Install the observers and fake-quantizers of the site's settings: observing, with rounding off.

        Args:
            config: Its rules decide.
            device: Where the model is.
        """
        settings = config.settings(self.site.name, self.site.kind)
        self.settle(settings)
        self.attach(*self._new_quantizers(settings, config))
        self.to(device)

    def settle(self, settings: SiteSettings) -> None:
        """Take note of what the settings alone decide."""
        self.site.reason = None if settings.reason is None else FloatReason(FloatCause.SETTINGS, settings.reason)

    def attach(self, act: HarmoqFakeQuantize | None, weight: HarmoqFakeQuantize | None) -> None:
        """Install the fake-quantizers; with neither, the site stays in float."""
        self.act_quantizer = act
        self.weight_quantizer = weight

    def new_weight_quantizer(self, spec: QuantizerSpec) -> HarmoqFakeQuantize | None:
        """Fake-quantizer of the weight, per output channel, with rounding off; None where `spec` is off."""
        if not spec.enabled:
            return None
        shape = self.site.shape
        quantizer = self._fake_quantizer(spec, (shape[0],) + (1,) * (len(shape) - 1))
        quantizer.learnable = spec.scheme is not Scheme.INTEGER_ZERO_POINT  # signed codes need zero in the middle
        return quantizer

    def _new_quantizers(
        self, settings: SiteSettings, config: HarmoqConfig
    ) -> tuple[HarmoqFakeQuantize | None, HarmoqFakeQuantize | None]:
        """Fake-quantizers of activation and weight (left and right operand) by the settings."""
        raise NotImplementedError

    def _new_activation_quantizer(
        self, spec: QuantizerSpec, config: HarmoqConfig, axis: int, channels: bool
    ) -> HarmoqFakeQuantize | None:
        """Fake-quantizer of an operand contracted along `axis`, whose observer may tell `channels` apart."""
        if not spec.enabled:
            return None
        from harmoq_ao.quant.observers import OBSERVERS

        quantizer = self._fake_quantizer(spec)
        if channels or not spec.dynamic:  # a dynamic range alone needs no statistics
            observer = OBSERVERS[config.observer](spec, contracted_axis=axis, track_channels=channels, seed=config.seed)
            observer.site_name = self.site.name
            quantizer.observer = observer
        return quantizer

    def _fake_quantizer(self, spec: QuantizerSpec, shape: tuple[int, ...] = ()) -> HarmoqFakeQuantize:
        from harmoq_ao.quant.fake_quant import HarmoqFakeQuantize

        quantizer = HarmoqFakeQuantize(spec, shape)
        quantizer.site_name = self.site.name
        quantizer.disable_fake_quant()
        return quantizer

    # --- calibration --------------------------------------------------------------------------------------------------

    def solve(self, settings: SiteSettings, *, minmax: bool) -> None:
        """Compute joint scale, joint shift and quantization parameters from what the observers saw.

        Args:
            settings: Of the site.
            minmax: Take the extremes of the weight instead of the range of least error.
        """
        raise NotImplementedError

    def solve_weight(self, importance: Tensor | None = None, *, minmax: bool = False) -> None:
        """Compute the quantization range of each row of the weight, joint scale included.

        Args:
            importance: Second moment `[K]` of the scaled input, which weighs the columns' errors, or None.
            minmax: Take the extremes of each row.
        """
        if self.own_weight is None or self.weight_quantizer is None:
            return
        lo, hi = weight_bounds(self.scaled_weight().flatten(1), self.weight_quantizer.spec, importance, minmax=minmax)
        shape = (-1,) + (1,) * (self.own_weight.dim() - 1)
        self.weight_quantizer.set_bounds(lo.reshape(shape), hi.reshape(shape))

    def set_joint_scale(self, scale: Tensor | None) -> None:
        """Fix the joint scale `[K]`, or remove it."""
        self.joint_scale = _constant(scale)

    def set_joint_shift(self, shift: Tensor | None) -> None:
        """Fix the joint shift `[K]`, or remove it."""
        self.joint_shift = _constant(shift)

    # --- conversion ---------------------------------------------------------------------------------------------------

    def to_quantized(self, settings: SiteSettings, stored: Callable[[Tensor], Tensor]) -> QuantizedSite:
        """The quantized module of this site, once calibrated.

        Args:
            settings: Of the site.
            stored: Rounds a float tensor to what a saved model can hold.
        """
        raise NotImplementedError

    def empty_quantized(self, settings: SiteSettings) -> QuantizedSite:
        """A quantized module of the right shapes, whose tensors are yet to be loaded."""
        raise NotImplementedError

    # --- forward ------------------------------------------------------------------------------------------------------

    def _observe(self, act: Tensor, weight: Tensor | None = None) -> None:
        """Show the operands to the observers that are switched on."""
        if is_quiet():
            return
        for quantizer, operand in ((self.act_quantizer, act), (self.weight_quantizer, weight)):
            if quantizer is not None and operand is not None:
                quantizer.observe(operand)

    def _active(self) -> bool:
        """Whether the next call rounds an operand."""
        return not is_quiet() and any(q.active for q in self.quantizers())

    def _rounded(
        self, quantizer: HarmoqFakeQuantize | None, operand: Tensor, scale: Tensor | None, shift: Tensor | None = None
    ) -> Tensor:
        """``(operand - shift) / scale``, through its fake-quantizer if that is switched on."""
        if quantizer is not None and quantizer.active:
            rounded: Tensor = quantizer(operand, scale, shift)
            return rounded
        return normalized(operand, scale, shift)


def observer_of(quantizer: HarmoqFakeQuantize | None) -> OperandObserver | None:
    """The observer of a quantizer that may not be there."""
    return None if quantizer is None else quantizer.observer


def solve_activation(quantizer: HarmoqFakeQuantize | None, scale: Tensor | None, shift: Tensor | None = None) -> None:
    """Compute the static quantization range of ``(x - shift) / scale`` from the quantizer's observer, if it has one."""
    if quantizer is not None and quantizer.observer is not None and not quantizer.spec.dynamic:
        quantizer.set_bounds(*quantizer.observer.bounds(scale, shift))


def stacked_qparams(quantizer: HarmoqFakeQuantize | None) -> Tensor | None:
    """Step and lower bound of a static per-tensor quantizer, `[2]`; None without one."""
    if quantizer is None or quantizer.spec.dynamic:
        return None
    return torch.stack([value.reshape(()) for value in quantizer.calculate_qparams()])


def _constant(value: Tensor | None) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(value.detach().clone().float(), requires_grad=False)
