"""Prepared sites: the float contraction, with an observer and a fake-quantizer on each operand.

With fake-quantization off every prepared site returns the author's own result, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmoq_ao.config import HarmoqConfig, SiteSettings
from harmoq_ao.graph.contractions import contraction_macs
from harmoq_ao.quant.joint_scale import joint_scale
from harmoq_ao.quant.joint_shift import joint_shift
from harmoq_ao.quant.quantizer import Scheme
from harmoq_ao.quant.relative_maps import map_product, relative_rows
from harmoq_ao.sites import sqnr
from harmoq_ao.sites.base import PreparedSite, observer_of, quiet, solve_activation, stacked_qparams
from harmoq_ao.sites.forms import MatmulForm, has_unit_length
from harmoq_ao.sites.quantized import QuantizedConv2d, QuantizedLinear, QuantizedMatmul
from harmoq_ao.sites.site import Site

if TYPE_CHECKING:
    from harmoq_ao.quant.fake_quant import HarmoqFakeQuantize
    from harmoq_ao.quant.observers.base import OperandObserver

    _Quantizers = tuple[HarmoqFakeQuantize | None, HarmoqFakeQuantize | None]
_Rounding = Callable[[Tensor], Tensor]


class _WeightedSite(PreparedSite):
    """What a linear layer and a convolution share: a weight and a bias of their own."""

    @property
    def own_weight(self) -> nn.Parameter:
        """`[N, K]`, of a convolution `[N, C, H, W]`."""
        return cast(nn.Parameter, self.weight)

    @property
    def own_bias(self) -> nn.Parameter | None:
        """`[N]`, or None."""
        return cast(nn.Parameter | None, self.bias)

    def macs(self, operands: tuple[Any, ...], output: Tensor) -> int:
        """Multiply-accumulates of one call."""
        return contraction_macs(self.site.kind, (operands[0], self.weight), output)


class PreparedLinear(nn.Linear, _WeightedSite):
    """``F.linear`` with quantized input and weight.

    Also stands for functional calls, where it shares the author's parameter and takes the bias as an argument.

    Args:
        site: The site.
        weight: `[N, K]`.
        bias: `[N]`, or None.
    """

    def __init__(self, site: Site, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.bias = bias  # type: ignore[assignment]
        self._init_site(site)

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        bias = self.bias if bias is None else bias
        if not self._active():
            self._observe(input)
            return F.linear(input, self.weight, bias)
        x = self._rounded(self.act_quantizer, input, self.joint_scale, self.joint_shift)
        inverse = None if self.joint_scale is None else 1.0 / self.joint_scale
        return F.linear(x, self._rounded(self.weight_quantizer, self.weight, inverse), self._shifted(bias))

    def _shifted(self, bias: Tensor | None) -> Tensor | None:
        """``b + W z``: what the joint shift takes from the input comes back through the bias, unrounded."""
        if self.joint_shift is None:
            return bias
        constant = self.weight @ self.joint_shift.to(self.weight)
        return constant if bias is None else bias + constant

    def _new_quantizers(self, settings: SiteSettings, config: HarmoqConfig) -> _Quantizers:
        act = self._new_activation_quantizer(settings.act, config, axis=-1, channels=True)
        return act, self.new_weight_quantizer(settings.weight)

    def solve(self, settings: SiteSettings, *, minmax: bool) -> None:
        """Joint scale, then the shift under it, then the input's range, then the weight's under both."""
        observer = observer_of(self.act_quantizer)
        weight = self.weight.detach().float()
        self.set_joint_scale(None)
        self.set_joint_shift(None)
        if observer is not None and self.site.wants_joint_scale(settings):
            self.set_joint_scale(_linear_scale(weight, observer, settings))
            if self.site.wants_joint_shift(settings):
                self.set_joint_shift(_linear_shift(weight, observer, self.joint_scale, settings))
        scale, shift = self.joint_scale, self.joint_shift
        solve_activation(self.act_quantizer, scale, shift)
        moment = None if observer is None or self.weight_quantizer is None else observer.second_moment(shift)
        if moment is not None and scale is not None:
            moment = moment / scale.square()
        self.solve_weight(moment, minmax=minmax)
        self.site.sqnr_db = sqnr.linear_db(self.act_quantizer, self.weight_quantizer, weight, scale, shift)

    def to_quantized(self, settings: SiteSettings, stored: _Rounding) -> QuantizedLinear:
        """Codes of the weight; scales, shift and bias rounded to what is stored."""
        scale = None if self.joint_scale is None else stored(self.joint_scale.detach())
        shift = None if self.joint_shift is None else stored(self.joint_shift.detach())
        site = QuantizedLinear(self.site, settings, self.bias is not None, scale is not None, shift is not None)
        weight = self.weight.detach().float()
        site.fill_weight(weight if scale is None else weight * scale, self.weight_quantizer, stored)
        bias = None if self.bias is None else self.bias.detach().float()
        if shift is not None:
            bias = (0.0 if bias is None else bias) + weight @ shift
        bias = None if bias is None else stored(bias)
        site.fill(bias=bias, joint_shift=shift, joint_scale=scale, act_bounds=stacked_qparams(self.act_quantizer))
        return site

    def empty_quantized(self, settings: SiteSettings) -> QuantizedLinear:
        """A quantized module of the right shapes, whose tensors are yet to be loaded."""
        joint = self.site.wants_joint_scale(settings), self.site.wants_joint_shift(settings)
        return QuantizedLinear(self.site, settings, self.bias is not None, *joint)


class PreparedConv2d(nn.Conv2d, _WeightedSite):
    """``nn.Conv2d`` with quantized input and weight; zero has a code of its own because padding adds zeros.

    Args:
        site: The site.
        conv: The author's convolution, whose parameters are shared.
    """

    def __init__(self, site: Site, conv: nn.Conv2d) -> None:
        nn.Module.__init__(self)
        kept = (k for k in conv.__dict__ if k not in ("_parameters", "_buffers", "_modules"))
        self.__dict__.update({k: conv.__dict__[k] for k in kept})
        self.weight = conv.weight
        self.bias = conv.bias
        self._init_site(site)

    def forward(self, input: Tensor) -> Tensor:
        if not self._active():
            self._observe(input)
            return self._conv_forward(input, self.weight, self.bias)
        x = self._rounded(self.act_quantizer, input, None)
        return self._conv_forward(x, self._rounded(self.weight_quantizer, self.weight, None), self.bias)

    def _new_quantizers(self, settings: SiteSettings, config: HarmoqConfig) -> _Quantizers:
        act = self._new_activation_quantizer(settings.act, config, axis=1, channels=False)
        return act, self.new_weight_quantizer(settings.weight)

    def solve(self, settings: SiteSettings, *, minmax: bool) -> None:
        """Quantization ranges of input and weight."""
        solve_activation(self.act_quantizer, None)
        self.solve_weight(minmax=minmax)

    def to_quantized(self, settings: SiteSettings, stored: _Rounding) -> QuantizedConv2d:
        """Codes of the weight; the lower bound of the input becomes a zero point."""
        site = self.empty_quantized(settings)
        site.fill_weight(self.weight.detach().float().flatten(1), self.weight_quantizer, stored)
        bounds = stacked_qparams(self.act_quantizer)
        if bounds is not None:
            step, lower = bounds.unbind()
            bounds = torch.stack([step, torch.round(-lower / step)])
        site.fill(bias=None if self.bias is None else stored(self.bias.detach().float()), act_bounds=bounds)
        return site

    def empty_quantized(self, settings: SiteSettings) -> QuantizedConv2d:
        """A quantized module of the right shapes, whose tensors are yet to be loaded."""
        geometry = {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups")}
        return QuantizedConv2d(self.site, settings, self.bias is not None, geometry)


class PreparedMatmul(PreparedSite):
    """Product of two activations with both operands quantized.

    Args:
        site: The site.
        form: How the author wrote the product.

    Attributes:
        relative: The left operand is an attention map, quantized relative to the largest entry of each row
            (`quant/relative_maps.py`).
    """

    def __init__(self, site: Site, form: MatmulForm) -> None:
        super().__init__()
        self.form = form
        self.relative = False
        self._init_site(site)

    def forward(self, *operands: Tensor, **options: Any) -> Tensor:
        left, right = self.form.canonical(*operands)
        if not self._active():
            self._observe(self._observed(left), right)
            return self.form.original(*operands, **options)
        scale = self.joint_scale
        self.site.check_length(left, scale)
        b = self._rounded(self.weight_quantizer, right, None if scale is None else 1.0 / scale[:, None])
        if self.relative and self.act_quantizer is not None and self.act_quantizer.active:
            self.act_quantizer.observe(self._observed(left))
            product = map_product(left, b, *self.act_quantizer.bounds(), self.act_quantizer.spec.bits)
        else:
            product = torch.matmul(self._rounded(self.act_quantizer, left, scale), b)
        return self.form.finish(product, *operands, **options)

    def _observed(self, left: Tensor) -> Tensor:
        """The left operand as its observer takes it; as it is where nobody observes, to save the passes over a map."""
        quantizer = self.act_quantizer
        return relative_rows(left) if self.relative and quantizer is not None and quantizer.observing else left

    def macs(self, operands: tuple[Any, ...], output: Tensor) -> int:
        """Multiply-accumulates of one call, batch axes broadcast."""
        left, right = self.form.canonical(*operands)
        repeats = max(1, right[..., 0, 0].numel() // max(1, left[..., 0, 0].numel()))
        return left.numel() * right.shape[-1] * repeats

    def note_length(self, operands: tuple[Any, ...]) -> None:
        """A contracted length other than the one known so far depends on the image: it becomes 0."""
        left, right = self.form.canonical(*operands)
        if self.site.shape != (left.shape[-1],):
            candidate = self.site.unit_length or self.site.shape != (0,)
            self.site.shape = (0,)
            self.site.unit_length = candidate and has_unit_length(left, -1) and has_unit_length(right, -2)

    def settle(self, settings: SiteSettings) -> None:
        """Also whether the left operand is quantized as an attention map, and whether ranges are relative to an RMS."""
        super().settle(settings)
        self.relative = self.site.wants_relative_map(settings)
        self.form = replace(self.form, to_rms=self.site.wants_rms(settings))

    def _new_quantizers(self, settings: SiteSettings, config: HarmoqConfig) -> _Quantizers:
        scheme = Scheme.INTEGER_ZERO_POINT if self.relative else settings.act.scheme  # zero is a level
        channels = self.site.wants_joint_scale(settings)
        act = replace(settings.act, scheme=scheme)
        left = self._new_activation_quantizer(act, config, axis=-1, channels=channels)
        return left, self._new_activation_quantizer(settings.weight, config, axis=-2, channels=channels)

    def solve(self, settings: SiteSettings, *, minmax: bool) -> None:
        """Joint scale of the two operands, then the range of each under it."""
        left, right = observer_of(self.act_quantizer), observer_of(self.weight_quantizer)
        self.set_joint_scale(None)
        if self.site.wants_joint_scale(settings) and left is not None and right is not None:
            self.set_joint_scale(_pair_scale(left, right, settings, self.site.shape[0]))
        scale = self.joint_scale
        inverse = None if scale is None else 1.0 / scale
        if self.relative and self.act_quantizer is not None:
            self.act_quantizer.set_bounds(0.0, 1.0)  # the largest entry of every row is the highest level
        else:
            solve_activation(self.act_quantizer, scale)
        solve_activation(self.weight_quantizer, inverse)
        self.site.sqnr_db = sqnr.product_db(((self.act_quantizer, scale), (self.weight_quantizer, inverse)))

    def to_quantized(self, settings: SiteSettings, stored: _Rounding) -> QuantizedMatmul:
        """Ranges and joint scale alone: there is no weight."""
        scale = None if self.joint_scale is None else stored(self.joint_scale.detach())
        site = QuantizedMatmul(self.site, settings, self.form, scale is not None, self.relative)
        ranges = stacked_qparams(self.act_quantizer), stacked_qparams(self.weight_quantizer)
        site.fill(joint_scale=scale, left_bounds=ranges[0], right_bounds=ranges[1])
        return site

    def empty_quantized(self, settings: SiteSettings) -> QuantizedMatmul:
        """A quantized module of the right shapes, whose tensors are yet to be loaded."""
        joint = self.site.wants_joint_scale(settings)
        return QuantizedMatmul(self.site, settings, self.form, joint, self.relative)


def _linear_scale(weight: Tensor, observer: OperandObserver, settings: SiteSettings) -> Tensor:
    """Joint scale `[K]` of an observed input and a weight `[N, K]`; ones where channels were not told apart."""
    ranges = observer.channel_range()
    if ranges is None:
        return torch.ones(weight.shape[1])
    width = weight.amax(0) - weight.amin(0)
    return joint_scale(ranges[1] - ranges[0], width, settings.act.bits, settings.weight.bits)


def _linear_shift(weight: Tensor, observer: OperandObserver, scale: Tensor | None, settings: SiteSettings) -> Tensor:
    """Joint shift `[K]` under a joint scale; zeros where channels were not told apart."""
    ranges = observer.channel_range()
    if ranges is None or scale is None:
        return torch.zeros(weight.shape[1])
    return joint_shift(observer.sample(), weight, scale, ranges, settings.act)


def _pair_scale(left: OperandObserver, right: OperandObserver, settings: SiteSettings, length: int) -> Tensor:
    """Joint scale `[K]` of two observed operands; ones where channels were not told apart."""
    a, b = left.channel_range(), right.channel_range()
    if a is None or b is None:
        return torch.ones(length)
    return joint_scale(a[1] - a[0], b[1] - b[0], settings.act.bits, settings.weight.bits)


__all__ = ["PreparedConv2d", "PreparedLinear", "PreparedMatmul", "PreparedSite", "quiet"]
