"""Quantized sites: packed integer codes, scales and bounds. No float weight is left behind a quantized weight.

Each module holds tensors that do not depend on a device's kernels; what a kernel wants (unpacked, re-ordered, folded)
is derived on first use and never stored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmoq_ao.config import SiteSettings
from harmoq_ao.kernels import compiler_view, ops
from harmoq_ao.kernels.float_matmul import MatmulContraction
from harmoq_ao.kernels.linear import LinearContraction
from harmoq_ao.kernels.select import Backend, Contraction, UniformContraction, select_kernel
from harmoq_ao.quant import integer_reference
from harmoq_ao.quant.integer_reference import Affine, LinearOperands, MatmulOperand, exact_floats
from harmoq_ao.quant.packing import pack, packed_length, unpack_signed
from harmoq_ao.quant.quantizer import QuantizerSpec, Scheme, quantize, step_size
from harmoq_ao.quant.relative_maps import relative_rows, renormalized, row_sums
from harmoq_ao.sites.forms import MatmulForm
from harmoq_ao.sites.prepared import PreparedConv2d, PreparedLinear, PreparedMatmul, PreparedSite, check_length
from harmoq_ao.sites.site import Site

Rounding = Callable[[Tensor], Tensor]
_HALF_FLOAT = "float (one operand quantized)"


@dataclass
class Derived:
    """What a site makes of its tensors on first use, and forgets when they are moved or loaded.

    Attributes:
        linear: The integer linear with its packings.
        matmul: The quantizers of a product.
        float_weight: The weight that the codes stand for, `[N, K]`.
        attention: What a fused attention kernel packed of its two products.
    """

    linear: LinearContraction | None = None
    matmul: MatmulContraction | None = None
    float_weight: Tensor | None = None
    attention: Any = None


class QuantizedSite(nn.Module):
    """Base of quantized sites.

    Attributes:
        site: What the site is.
        settings: Quantizers of both operands.
        backend: Which kernels to run; by default the fastest of the input's device.
    """

    site: Site
    settings: SiteSettings
    joint_scale: Tensor | None

    def _init_site(self, site: Site, settings: SiteSettings) -> None:
        self.site = site
        self.settings = settings
        self.backend: Backend = "auto"
        self._derived = Derived()

    @property
    def both_quantized(self) -> bool:
        """Whether the contraction runs on integers."""
        return self.settings.act.enabled and self.settings.weight.enabled

    @property
    def kernel(self) -> str:
        """Name of the kernel that runs the site where its tensors are."""
        device = next(self.buffers(), torch.empty(0)).device
        return select_kernel(self.contraction(), device, self.backend).name

    def contraction(self) -> Contraction:
        """What :func:`select_kernel` chooses a kernel for."""
        raise NotImplementedError

    def _active(self) -> bool:
        return True

    def _run(self, *operands: Tensor) -> Tensor:
        return select_kernel(self.contraction(), operands[0].device, self.backend).run(*operands)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedSite:
        """Codes, scales and bounds follow the model's device, never its float type."""
        self._derived = Derived()
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer).device)
        for parameter in self._parameters.values():
            if parameter is not None:
                parameter.data = fn(parameter.data)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._derived = Derived()
        super()._load_from_state_dict(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedSite:
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != "_derived"})
        twin._derived = Derived()
        return twin


class WeightedSite(QuantizedSite):
    """A quantized site with a weight, flattened to `[N, K]`.

    Attributes:
        codes: Packed weight codes, uint8 `[N, packed K]` (where weights are quantized).
        weight_scale: Step of each row, float32 `[N]` (where weights are quantized).
        weight: Float weight `[N, K]` (where they are not).
        bias: float32 `[N]`, or None.
        act_bounds: float32 `[2]`: step, and lower bound (zero point, for a convolution) of static activations.
    """

    codes: Tensor
    weight_scale: Tensor
    weight: nn.Parameter
    bias: Tensor | None
    act_bounds: Tensor | None

    def _register_weight(self, rows: int, columns: int) -> None:
        spec = self.settings.weight
        self.columns = columns
        if not spec.enabled:
            self.weight = nn.Parameter(torch.zeros(rows, columns), requires_grad=False)
            return
        self.register_buffer("codes", torch.zeros(rows, packed_length(columns, spec.bits), dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.ones(rows))

    def _fill_weight(self, weight: Tensor, prepared: PreparedSite, stored: Rounding) -> None:
        """Codes of `weight` `[N, K]` (joint scale included) under the calibrated bounds; scales are rounded first."""
        spec = self.settings.weight
        if not spec.enabled or prepared.weight_quantizer is None:
            self.weight.data.copy_(stored(weight))
            return
        lo, hi = (v.reshape(-1, 1).expand(len(weight), 1) for v in prepared.weight_quantizer.bounds())
        scale = stored_step(step_size(lo, hi, spec.bits), stored)
        lower = (_shift(spec) - (1 << (spec.bits - 1))) * scale
        codes = quantize(weight, lower, lower + scale * spec.qmax, spec.bits)
        self.codes.copy_(pack(codes, spec.bits))
        self.weight_scale.copy_(scale.reshape(-1))

    def weight_codes(self) -> Tensor:
        """Signed weight codes `[N, K]` int8."""
        return unpack_signed(self.codes, self.settings.weight.bits, self.columns)

    def weight_shift(self) -> Tensor:
        """Where the signed code 0 of each row lies, in steps, `[N]`."""
        return torch.full_like(self.weight_scale, _shift(self.settings.weight))

    def float_weight(self) -> Tensor:
        """The weight the codes stand for, `[N, K]` float32; the float weight itself where it is not quantized."""
        if not self.settings.weight.enabled:
            return self.weight
        return (self.weight_codes().float() + self.weight_shift()[:, None]) * self.weight_scale[:, None]

    def _float_weight(self) -> Tensor:
        """:meth:`float_weight`, made once. Under a tracer, with its stand-ins, it is made and not kept."""
        weight = self._derived.float_weight
        if weight is None:
            weight = self.float_weight()
            if not torch.compiler.is_compiling():
                self._derived.float_weight = weight
        return weight


class QuantizedLinear(WeightedSite):
    """``F.linear`` on integer codes.

    ``joint_scale`` is float32 `[K]` or None; the weight codes already include it. So is ``joint_shift``, which the bias
    already gives back.

    Args:
        site: The site; its shape is ``(N, K)``.
        settings: Quantizers.
        bias: Whether a bias belongs to the site.
        joint_scale: Whether a joint scale belongs to the site.
        joint_shift: Whether a joint shift does; then it has a bias in any case.
    """

    joint_shift: Tensor | None

    def __init__(
        self, site: Site, settings: SiteSettings, bias: bool, joint_scale: bool, joint_shift: bool = False
    ) -> None:
        super().__init__()
        self._init_site(site, settings)
        rows, columns = site.shape
        self._register_weight(rows, columns)
        self.register_buffer("bias", torch.zeros(rows) if bias or joint_shift else None)
        self.register_buffer("joint_scale", torch.ones(columns) if joint_scale else None)
        self.register_buffer("joint_shift", torch.zeros(columns) if joint_shift else None)
        static = settings.act.enabled and not settings.act.dynamic
        self.register_buffer("act_bounds", torch.tensor([1.0, 0.0]) if static else None)

    @classmethod
    def from_prepared(cls, prepared: PreparedLinear, settings: SiteSettings, stored: Rounding) -> QuantizedLinear:
        """Quantize for good.

        Args:
            prepared: A calibrated site.
            settings: Its quantizers.
            stored: Rounds a float tensor to what a saved model can hold.
        """
        scale = None if prepared.joint_scale is None else stored(prepared.joint_scale.detach())
        shift = None if prepared.joint_shift is None else stored(prepared.joint_shift.detach())
        self = cls(prepared.site, settings, prepared.bias is not None, scale is not None, shift is not None)
        weight = prepared.weight.detach().float()
        self._fill_weight(weight if scale is None else weight * scale, prepared, stored)
        if self.bias is not None:
            bias = 0.0 if prepared.bias is None else prepared.bias.detach().float()
            self.bias.copy_(stored(bias + (0.0 if shift is None else weight @ shift)))
        if self.joint_shift is not None and shift is not None:
            self.joint_shift.copy_(shift)
        if self.joint_scale is not None and scale is not None:
            self.joint_scale.copy_(scale)
        if self.act_bounds is not None and prepared.act_quantizer is not None:
            self.act_bounds.copy_(torch.stack([v.reshape(()) for v in prepared.act_quantizer.calculate_qparams()]))
        return self

    def contraction(self) -> Contraction:
        if self.both_quantized:
            return self.integer_linear()
        return UniformContraction(_HALF_FLOAT, self._half_float, "one operand is float")

    def operands(self) -> LinearOperands:
        """The integer operands, for kernels and tests."""
        return self.integer_linear().operands

    def integer_linear(self) -> LinearContraction:
        """The linear on integers, made once (under a tracer it is not kept); both operands must be quantized."""
        linear = self._derived.linear
        if linear is None:
            operands = ops.linear_operands(*self._tensors(), self.columns, *self._numbers())
            linear = LinearContraction(operands, self.codes, self.settings.weight.bits)
            if not torch.compiler.is_compiling():
                self._derived.linear = linear
        return linear

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self._traced(input) if torch.compiler.is_compiling() else self._run(input)
        return y if bias is None else y + bias

    def _traced(self, x: Tensor) -> Tensor:
        """What a graph gets to see: operators that choose their kernel when the graph runs."""
        if not self.both_quantized:
            return self._half_float(x)
        linear = self._derived.linear
        ready = None if linear is None else linear.ready_onednn()
        return compiler_view.linear(x, self._tensors(), self._numbers(), self.backend, ready)

    def _tensors(self) -> ops.LinearTensors:
        return self.codes, self.weight_scale, self.bias, self.act_bounds, self.joint_scale, self.joint_shift

    def _numbers(self) -> tuple[int, int, float]:
        return self.settings.weight.bits, self.settings.act.bits, _shift(self.settings.weight)

    def _act(self) -> Affine | None:
        if self.act_bounds is None:
            return None
        return Affine(self.act_bounds[0], self.act_bounds[1], self.settings.act.bits)

    def _half_float(self, x: Tensor) -> Tensor:
        if self.settings.act.enabled:
            x = _round_trip(x, self._act(), self.settings.act, self.joint_scale)
        weight = self._float_weight()
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, weight.to(x.dtype), bias)


class QuantizedConv2d(WeightedSite):
    """Convolution on integer codes, exact, with zero padding as the code of zero."""

    def __init__(self, site: Site, settings: SiteSettings, bias: bool, geometry: dict[str, Any]) -> None:
        super().__init__()
        self._init_site(site, settings)
        self.geometry = geometry
        rows, columns = site.shape[0], int(torch.tensor(site.shape[1:]).prod())
        self._register_weight(rows, columns)
        self.register_buffer("bias", torch.zeros(rows) if bias else None)
        self.register_buffer("act_bounds", torch.tensor([1.0, 0.0]) if settings.act.enabled else None)

    @classmethod
    def from_prepared(cls, prepared: PreparedConv2d, settings: SiteSettings, stored: Rounding) -> QuantizedConv2d:
        """Quantize for good; arguments as in :meth:`QuantizedLinear.from_prepared`."""
        self = cls(prepared.site, settings, prepared.bias is not None, conv_geometry(prepared))
        self._fill_weight(prepared.weight.detach().float().flatten(1), prepared, stored)
        if self.bias is not None and prepared.bias is not None:
            self.bias.copy_(stored(prepared.bias.detach().float()))
        if self.act_bounds is not None and prepared.act_quantizer is not None:
            step, lower = (v.reshape(()) for v in prepared.act_quantizer.calculate_qparams())
            self.act_bounds.copy_(torch.stack([step, torch.round(-lower / step)]))
        return self

    def contraction(self) -> Contraction:
        if self.both_quantized:
            return UniformContraction("float32 on integer codes", self._integer)
        return UniformContraction(_HALF_FLOAT, self._half_float)

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # plain torch: the graph gets to see all of it
            return self._integer(input) if self.both_quantized else self._half_float(input)
        return self._run(input)

    def _integer(self, input: Tensor) -> Tensor:
        assert self.act_bounds is not None
        step, zero_point = self.act_bounds.unbind()
        codes = integer_reference.quantize_codes(input, 1.0 / step, zero_point, self.settings.act.bits)
        acc = self.accumulate(codes).to(torch.float32)
        y = acc * (self.weight_scale * step / 2)[:, None, None]
        if self.bias is not None:
            y = y + self.bias[:, None, None]
        return y.to(input.dtype)

    def accumulate(self, codes: Tensor) -> Tensor:
        """Twice ``sum (q - zero_point) (w + shift)`` over each patch, exact, int32 `[B, N, H, W]`.

        Twice, because the shift of mid-rise weights is one half. Channels are taken in chunks whose float32 sums are
        exact (below 2**24).
        """
        assert self.act_bounds is not None
        centred = codes.float() - self.act_bounds[1]
        weight = 2 * (self.weight_codes().float() + self.weight_shift()[:, None])
        weight = weight.reshape(self.site.shape)
        patch = weight[0, 0].numel()
        chunk = max(1, (1 << 24) // (255 * 256 * patch))
        groups = self.geometry["groups"]
        if groups > 1 or chunk >= weight.shape[1]:
            return _exact_conv(centred, weight, self.geometry)
        parts = zip(centred.split(chunk, 1), weight.split(chunk, 1), strict=True)
        sums = [_exact_conv(x, w, self.geometry) for x, w in parts]
        return torch.stack(sums).sum(0, dtype=torch.int32)

    def _half_float(self, x: Tensor) -> Tensor:
        if self.act_bounds is not None:
            step, zero_point = self.act_bounds.unbind()
            x = _round_trip(x, Affine(step, -zero_point * step, self.settings.act.bits), self.settings.act, None)
        weight = self._float_weight().reshape(self.site.shape)
        y = _conv(x, weight.to(x.dtype), self.geometry)
        return y if self.bias is None else y + self.bias.to(x.dtype)[:, None, None]


class QuantizedMatmul(QuantizedSite):
    """Product of two quantized activations.

    Tensors: ``left_bounds`` and ``right_bounds`` float32 `[2]` = step and lower bound of static operands,
    ``joint_scale`` float32 `[K]`.

    Args:
        site: The site.
        settings: Quantizers (``act`` left, ``weight`` right).
        form: How the author wrote the product.
        joint_scale: Whether a joint scale belongs to the site.
        relative: Whether the left operand is an attention map, quantized relative to the largest entry of each row
            (`relative_maps.py`).
    """

    left_bounds: Tensor | None
    right_bounds: Tensor | None

    def __init__(
        self, site: Site, settings: SiteSettings, form: MatmulForm, joint_scale: bool, relative: bool = False
    ) -> None:
        super().__init__()
        self._init_site(site, settings)
        self.form = form
        self.relative = relative
        self.register_buffer("joint_scale", torch.ones(site.shape[0]) if joint_scale else None)
        for name, spec in (("left_bounds", settings.act), ("right_bounds", settings.weight)):
            static = spec.enabled and not spec.dynamic
            self.register_buffer(name, torch.tensor([1.0, 0.0]) if static else None)

    @classmethod
    def from_prepared(cls, prepared: PreparedMatmul, settings: SiteSettings, stored: Rounding) -> QuantizedMatmul:
        """Quantize for good; arguments as in :meth:`QuantizedLinear.from_prepared`."""
        self = cls(prepared.site, settings, prepared.form, prepared.joint_scale is not None, prepared.relative)
        if prepared.joint_scale is not None and self.joint_scale is not None:
            self.joint_scale.copy_(stored(prepared.joint_scale.detach()))
        for bounds, quantizer in (
            (self.left_bounds, prepared.act_quantizer),
            (self.right_bounds, prepared.weight_quantizer),
        ):
            if bounds is not None and quantizer is not None:
                bounds.copy_(torch.stack([v.reshape(()) for v in quantizer.calculate_qparams()]))
        return self

    def contraction(self) -> Contraction:
        return self.operands() if self.both_quantized else UniformContraction(_HALF_FLOAT, self._half_float)

    def operands(self) -> MatmulContraction:
        """The quantizers of both operands, made once (under a tracer they are not kept); both must be quantized."""
        matmul = self._derived.matmul
        if matmul is None:
            matmul = ops.matmul_contraction(*self._tensors(), *self._bits())
            if not torch.compiler.is_compiling():
                self._derived.matmul = matmul
        return matmul

    def _tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.left_bounds, self.right_bounds, self.joint_scale

    def _bits(self) -> tuple[int, int]:
        return self.settings.act.bits, self.settings.weight.bits

    def forward(self, *operands: Tensor, **options: Any) -> Tensor:
        left, right = self.form.canonical(*operands)
        check_length(left, self.joint_scale, self.site)
        if self.both_quantized and self.relative:
            product = self.of_map(left, lambda relative: self._product(relative, right))
        else:
            product = self._product(left, right)
        return self.form.finish(product, *operands, **options)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return self._run(left, right)
        if not self.both_quantized:
            return self._half_float(left, right)
        return ops.matmul(left, right, *self._tensors(), *self._bits(), self.backend)

    def _half_float(self, left: Tensor, right: Tensor) -> Tensor:
        x = self._float_operand(left, self.left_bounds, self.settings.act)
        return torch.matmul(x, self._float_operand(right, self.right_bounds, self.settings.weight))

    def of_map(self, attention_map: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """The product of an attention map with the values, normalised after it.

        Args:
            attention_map: `[..., M, K]`.
            product: Takes the map relative to its rows' largest entries, quantizes and multiplies it.
        """
        relative = relative_rows(attention_map)
        assert self.left_bounds is not None
        act = Affine(self.left_bounds[0], self.left_bounds[1], self.settings.act.bits)
        codes = integer_reference.quantize_codes(relative, *integer_reference.static_qparams(act), act.bits)
        return renormalized(product(relative), attention_map, row_sums(codes, act.step, act.lower))

    @staticmethod
    def _float_operand(x: Tensor, bounds: Tensor | None, spec: QuantizerSpec) -> Tensor:
        if not spec.enabled:
            return x
        return _round_trip(x, None if bounds is None else Affine(bounds[0], bounds[1], spec.bits), spec, None)


def quantize_site(prepared: PreparedSite, settings: SiteSettings, stored: Rounding) -> QuantizedSite:
    """The quantized module of a calibrated prepared site."""
    if isinstance(prepared, PreparedLinear):
        return QuantizedLinear.from_prepared(prepared, settings, stored)
    if isinstance(prepared, PreparedConv2d):
        return QuantizedConv2d.from_prepared(prepared, settings, stored)
    assert isinstance(prepared, PreparedMatmul)
    return QuantizedMatmul.from_prepared(prepared, settings, stored)


def empty_site(prepared: PreparedSite, settings: SiteSettings, joint_scale: bool, joint_shift: bool) -> QuantizedSite:
    """A quantized module of the right shapes, whose tensors are yet to be loaded."""
    if isinstance(prepared, PreparedLinear):
        return QuantizedLinear(prepared.site, settings, prepared.bias is not None, joint_scale, joint_shift)
    if isinstance(prepared, PreparedConv2d):
        return QuantizedConv2d(prepared.site, settings, prepared.bias is not None, conv_geometry(prepared))
    assert isinstance(prepared, PreparedMatmul)
    return QuantizedMatmul(prepared.site, settings, prepared.form, joint_scale, prepared.relative)


def conv_geometry(conv: nn.Conv2d) -> dict[str, Any]:
    """Stride, padding, dilation and groups of a convolution with zero padding."""
    return {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}


def _conv(x: Tensor, weight: Tensor, geometry: dict[str, Any]) -> Tensor:
    return F.conv2d(x, weight, None, **geometry)


def _exact_conv(x: Tensor, weight: Tensor, geometry: dict[str, Any]) -> Tensor:
    with exact_floats(x):
        return _conv(x, weight, geometry).to(torch.int32)


# --- weights ----------------------------------------------------------------------------------------------------------


def stored_step(step: Tensor, stored: Rounding) -> Tensor:
    """A step as it will be stored; one that would vanish in storage keeps its float32 value."""
    rounded = stored(step)
    return torch.where(rounded > 0, rounded, step)


def _shift(spec: QuantizerSpec) -> float:
    """Where the signed code 0 lies, in steps: mid-rise weights sit half a step off zero."""
    return 0.5 if spec.scheme is Scheme.SYMMETRIC else 0.0


# --- activations ------------------------------------------------------------------------------------------------------


def _round_trip(x: Tensor, act: Affine | None, spec: QuantizerSpec, scale: Tensor | None) -> Tensor:
    """Activation through its codes and back to float, in the scaled domain."""
    codes, act = integer_reference.quantize_operand(x, MatmulOperand(spec.bits, act, scale), spec.axis)
    return (codes.float() * act.step + act.lower).to(x.dtype)


__all__ = [
    "QuantizedConv2d",
    "QuantizedLinear",
    "QuantizedMatmul",
    "QuantizedSite",
    "conv_geometry",
    "empty_site",
    "quantize_site",
]
