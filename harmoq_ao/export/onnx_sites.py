"""Quantized sites written so that they export to ONNX's QuantizeLinear and DequantizeLinear.

A site becomes::

    x -> * reciprocal, + offset -> clip to 0..2**bits - 1 -> QuantizeLinear of step 1 to uint8      our codes
      -> DequantizeLinear, step of the activation, no zero point
      -> MatMul with DequantizeLinear(integer codes, step of each column)
      -> + folded bias

The multiplication and the addition are those of :func:`quantize_codes` and include joint scale and joint shift. Lower
bounds need not be multiples of the step: they are folded into the bias, so both operands of the product are plain
multiples of integers, and an engine may compute it in integers. Below 8 bits the clip replaces fewer levels, since
rounding and a clip at whole numbers commute. A convolution pads with zeros, which need a code of their own: its
DequantizeLinear has a zero point.

Weights: signed codes in int4 at 2 to 4 bits, in int8 above. Mid-rise codes ``w`` stand for ``w + 1/2``; where
``2 w + 1`` fits the same type it is stored, with half the step. At 4 bits it does not fit: a linear stores ``w`` and
adds half a step times the sum of its input, a convolution stores ``2 w + 1`` in int8.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmoq_ao.kernels import onednn
from harmoq_ao.quant import integer_reference
from harmoq_ao.quant.relative_maps import relative_rows, renormalized
from harmoq_ao.sites.quantized import QuantizedConv2d, QuantizedLinear, QuantizedMatmul, QuantizedSite, WeightedSite

INT4 = (-8, 7)
"""Smallest and largest value of int4."""
_rounding = ContextVar("rounding", default=True)


@contextmanager
def without_rounding() -> Iterator[None]:
    """Context manager in which codes are not rounded: two graphs of one function then differ by float32 sums alone."""
    token = _rounding.set(False)
    try:
        yield
    finally:
        _rounding.reset(token)


@torch.library.custom_op("harmoq::quantize_dequantize", mutates_args=())
def quantize_dequantize(position: Tensor, step: float, zero_point: int) -> Tensor:
    """``(clamp(round_half_even(position), 0, 255) - zero_point) * step``; as ONNX a node for each direction."""
    rounded = position.round() if _rounding.get() else position
    return (rounded.clamp(0, 255) - zero_point) * step


@quantize_dequantize.register_fake
def _(position: Tensor, step: float, zero_point: int) -> Tensor:
    return torch.empty_like(position)


@torch.library.custom_op("harmoq::dequantize_weight", mutates_args=())
def dequantize_weight(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    """``codes * scale`` in float32, the scale `[codes.shape[axis]]` along an axis; as ONNX one DequantizeLinear."""
    return codes.float() * scale.reshape([-1 if i == axis else 1 for i in range(codes.dim())])


@dequantize_weight.register_fake
def _(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def rewrite_sites(model: nn.Module) -> None:
    """Exchange every quantized site of a model, in place, for its form with quantize and dequantize operators."""
    views: dict[type, type] = {QuantizedLinear: _Linear, QuantizedConv2d: _Conv2d, QuantizedMatmul: _Matmul}
    for module in list(model.modules()):
        if isinstance(module, QuantizedSite):
            module.__class__ = views[type(module)]
            module.setup()  # type: ignore[operator]


def _keep(module: nn.Module, **tensors: Tensor | None) -> None:
    """Register what a site needs, as buffers: constants of the exported graph."""
    for name, tensor in tensors.items():
        module.register_buffer(f"onnx_{name}", None if tensor is None else tensor.detach().clone(), persistent=False)


class _Linear(QuantizedLinear):
    """A quantized linear in quantize and dequantize operators; ``setup`` comes before the first call."""

    onnx_codes: Tensor
    onnx_scale: Tensor
    onnx_rest: Tensor | None
    onnx_factor: Tensor | None
    onnx_offset: Tensor
    onnx_constant: Tensor | None
    onnx_total: Tensor
    onnx_inverse: Tensor | None

    def setup(self) -> None:
        """Derive the constants of the graph."""
        act, bias = self.act_qparams(), self.bias
        if self.settings.weight.enabled:
            codes, scale, rest = _stored_weight(self)
            _keep(self, codes=codes.t().contiguous(), scale=scale, rest=rest)
        total = self.float_weight().double().sum(1).float()
        factor = offset = None
        if act is not None:
            factor, offset = integer_reference.static_qparams(act, self.joint_scale, self.joint_shift)
            bias = integer_reference.fold_bias(total, act.lower, bias)
        inverse = None if self.joint_scale is None else self.joint_scale.reciprocal()
        _keep(self, factor=factor, offset=offset, constant=bias, total=total, inverse=inverse)
        self.onnx_step = 1.0 if act is None else float(act.step)

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        spec, lower, step = self.settings.act, None, None
        x = input
        if not spec.enabled:
            pass
        elif self.onnx_factor is not None:
            x = _codes(x * self.onnx_factor + self.onnx_offset, spec.bits, self.onnx_step)
        else:
            x, lower, step = _codes_per_slice(x, spec.bits, -1, self.onnx_inverse)
        y = self._product(x)
        if step is not None and lower is not None:
            y = y * step + lower * self.onnx_total
        for term in (self.onnx_constant, bias):
            y = y if term is None else y + term
        return y

    def _product(self, x: Tensor) -> Tensor:
        if not self.settings.weight.enabled:
            return F.linear(x, self.weight)
        y = x @ dequantize_weight(self.onnx_codes, self.onnx_scale, 1)
        return y if self.onnx_rest is None else y + x.sum(-1, keepdim=True) * self.onnx_rest


class _Conv2d(QuantizedConv2d):
    """A quantized convolution in quantize and dequantize operators; ``setup`` comes before the first call."""

    onnx_codes: Tensor
    onnx_scale: Tensor
    onnx_factor: Tensor
    onnx_offset: Tensor

    def setup(self) -> None:
        """Derive the constants of the graph."""
        if self.settings.weight.enabled:
            codes, factor = onednn.effective_codes(self.weight_codes(), self.weight_shift())
            assert factor  # an 8-bit weight has a level at zero, so its shift is none
            _keep(self, codes=codes.reshape(self.site.shape), scale=self.weight_scale / factor)
        qparams = self.zero_point_qparams()
        if qparams is not None:
            step, zero_point = qparams
            _keep(self, factor=1.0 / step, offset=zero_point)
            self.onnx_step, self.onnx_zero_point = float(step), int(zero_point)

    def forward(self, input: Tensor) -> Tensor:
        x = input
        if self.act_bounds is not None:
            position = x * self.onnx_factor + self.onnx_offset
            x = _codes(position, self.settings.act.bits, self.onnx_step, self.onnx_zero_point)
        if self.settings.weight.enabled:
            weight = dequantize_weight(self.onnx_codes, self.onnx_scale, 0)
        else:
            weight = self.weight.reshape(self.site.shape)
        return F.conv2d(x, weight, self.bias, **self.geometry)


class _Matmul(QuantizedMatmul):
    """A product of two activations in quantize and dequantize operators; ``setup`` comes before the first call.

    With codes ``p``, ``q``, steps ``s`` and lower bounds ``l``, of which a float operand has none::

        y = (s p)(s q) + rowsum(s p) l_q + l_p colsum(s q) + K l_p l_q
    """

    def setup(self) -> None:
        """Derive the constants of the graph."""
        for side, act in (("left", self.act_qparams()), ("right", self.right_qparams())):
            scale = self.joint_scale if self.both_quantized else None
            if scale is not None and side == "right":
                scale = (1.0 / scale)[:, None]
            factor = offset = lower = None
            step = 1.0
            if act is not None:
                factor, offset = integer_reference.static_qparams(act, scale)
                lower, step = act.lower, float(act.step)
            inverse = None if scale is None else scale.reciprocal()
            values = {"factor": factor, "offset": offset, "lower": lower, "inverse": inverse}
            _keep(self, **{f"{side}_{name}": value for name, value in values.items()})
            setattr(self, f"onnx_{side}_step", step)

    def forward(self, *operands: Tensor, **options: Any) -> Tensor:
        given, right = self.form.canonical(*operands)
        left = relative_rows(given) if self.relative else given
        p, lower_p = self._operand(left, "left", self.settings.act.enabled, -1)
        q, lower_q = self._operand(right, "right", self.settings.weight.enabled, -2)
        y = p @ q
        if lower_q is not None:
            y = y + p.sum(-1, keepdim=True) * lower_q
        if lower_p is not None:
            columns = q.sum(-2, keepdim=True)
            if lower_q is not None:
                columns = columns + lower_q * left.shape[-1]
            y = y + columns * lower_p
        if self.relative:
            sums = p.sum(-1, keepdim=True)
            y = renormalized(y, given, sums if lower_p is None else sums + lower_p * left.shape[-1])
        return self.form.finish(y, *operands, **options)

    def _operand(self, x: Tensor, side: str, enabled: bool, axis: int) -> tuple[Tensor, Tensor | None]:
        """The operand less its lower bound, and that bound; a float operand has none."""
        if not enabled:
            return x, None
        bits = self.settings.act.bits if side == "left" else self.settings.weight.bits
        factor = getattr(self, f"onnx_{side}_factor")
        if factor is None:
            codes, lower, step = _codes_per_slice(x, bits, axis, getattr(self, f"onnx_{side}_inverse"))
            return codes * step, lower
        position = x * factor + getattr(self, f"onnx_{side}_offset")
        return _codes(position, bits, getattr(self, f"onnx_{side}_step")), getattr(self, f"onnx_{side}_lower")


def _stored_weight(site: WeightedSite) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes `[N, K]` int8, step of each row, and what each row adds per unit of the input's sum, or None."""
    codes, factor = onednn.effective_codes(site.weight_codes(), site.weight_shift())
    narrow = site.settings.weight.bits <= 4
    if factor and (not narrow or fits_int4(codes)):
        return codes, site.weight_scale / factor, None
    return site.weight_codes(), site.weight_scale, site.weight_scale * site.weight_shift()


def fits_int4(codes: Tensor) -> bool:
    """Whether every code lies in -8..7."""
    return bool(((codes >= INT4[0]) & (codes <= INT4[1])).all())


def _codes(position: Tensor, bits: int, step: float, zero_point: int = 0) -> Tensor:
    """Codes at `position`, times the step; narrower ones than uint8 are clipped first."""
    if bits < 8:
        position = position.clamp(0.0, float(2**bits - 1))
    return quantize_dequantize(position, step, zero_point)


def _codes_per_slice(x: Tensor, bits: int, axis: int, inverse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes as floats, lower bound and step, one range per slice along `axis`."""
    scaled = x if inverse is None else x * inverse
    lower, step = integer_reference.dynamic_qparams(scaled, axis, bits)
    return _codes(scaled * step.reciprocal() - lower / step, bits, 1.0), lower, step
