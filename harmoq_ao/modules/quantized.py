"""Quantized sites: packed integer codes, scales and bounds. No float weight is left behind a quantized weight.

Each module holds tensors that do not depend on a device's kernels; what a kernel wants (unpacked, re-ordered, folded) is
derived on first use and never stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmoq_ao.config import SiteSettings
from harmoq_ao.lowering import onednn, reference
from harmoq_ao.lowering.reference import Affine, LinearOperands
from harmoq_ao.modules.forms import MatmulForm
from harmoq_ao.modules.prepared import PreparedConv2d, PreparedLinear, PreparedMatmul, PreparedSite
from harmoq_ao.packing import pack, packed_length, unpack
from harmoq_ao.quantizer import QuantizerSpec, Scheme, quantize, step_size
from harmoq_ao.sites import Site

Rounding = Callable[[Tensor], Tensor]


class QuantizedSite(nn.Module):
    """Base of quantized sites.

    Attributes:
        site: What the site is.
        settings: Quantizers of both operands.
        use_reference: Run the plain integer path instead of the device's fast one.
    """

    site: Site
    settings: SiteSettings

    def _init_site(self, site: Site, settings: SiteSettings) -> None:
        self.site = site
        self.settings = settings
        self.use_reference = False
        self._derived: dict[str, Any] = {}

    @property
    def kernel(self) -> str:
        """Name of the path that runs on the module's device."""
        raise NotImplementedError

    def _active(self) -> bool:
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedSite:
        self._derived.clear()
        before = {name: b.dtype for name, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, dtype in before.items():  # codes and scales follow the device, never the float type of the model
            buffer = self._buffers[name]
            if buffer is not None and buffer.dtype != dtype:
                self._buffers[name] = buffer.to(dtype)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._derived.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedSite:
        import copy

        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != "_derived"})
        twin.__dict__["_derived"] = {}
        return twin


class QuantizedLinear(QuantizedSite):
    """``F.linear`` on integer codes.

    Tensors (those that apply): ``codes`` uint8 `[N, packed K]`, ``weight_scale`` float32 `[N]`, ``bias`` float32 `[N]`,
    ``joint_scale`` float32 `[K]`, ``act_bounds`` float32 `[2]` = step and lower bound of static activations, ``weight``
    `[N, K]` only where weights stay in float.

    Args:
        site: The site; its shape is ``(N, K)``.
        settings: Quantizers.
        bias: Whether a bias belongs to the site.
        joint_scale: Whether a joint scale belongs to the site.
    """

    def __init__(self, site: Site, settings: SiteSettings, bias: bool, joint_scale: bool) -> None:
        super().__init__()
        self._init_site(site, settings)
        rows, columns = site.shape
        _register_weight(self, rows, columns, settings.weight)
        self.register_buffer("bias", torch.zeros(rows) if bias else None)
        self.register_buffer("joint_scale", torch.ones(columns) if joint_scale else None)
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
        self = cls(prepared.site, settings, prepared.bias is not None, scale is not None)
        weight = prepared.weight.detach().float()
        _fill_weight(self, weight if scale is None else weight * scale, prepared, stored)
        if prepared.bias is not None:
            self.bias.copy_(stored(prepared.bias.detach().float()))
        if scale is not None:
            self.joint_scale.copy_(scale)
        if self.act_bounds is not None and prepared.left is not None:
            self.act_bounds.copy_(torch.stack([v.reshape(()) for v in prepared.left.calculate_qparams()]))
        return self

    @property
    def kernel(self) -> str:
        """``onednn u8s8``, ``reference integer`` or, where one operand is float, ``float``."""
        if not (self.settings.act.enabled and self.settings.weight.enabled):
            return "float (one operand quantized)"
        if self.use_reference or self.codes.device.type != "cpu":
            return "reference integer"
        return "onednn u8s8" if onednn.is_available() else "float32 on integer codes"

    def operands(self) -> LinearOperands:
        """The integer operands, for kernels and tests."""
        if "operands" not in self._derived:
            act = self._act()
            self._derived["operands"] = LinearOperands(
                self.weight_codes(),
                self.weight_scale,
                _weight_shift(self),
                self.bias,
                self.settings.act.bits,
                act,
                self.joint_scale,
            )
        operands: LinearOperands = self._derived["operands"]
        return operands

    def weight_codes(self) -> Tensor:
        """Signed weight codes `[N, K]` int8."""
        return _signed_codes(self)

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self.settings.act.enabled or not self.settings.weight.enabled:
            y = self._half_float(input)
        elif self.use_reference or input.device.type != "cpu":
            y = reference.linear(input, self.operands())
        else:
            if "packed" not in self._derived:
                self._derived["packed"] = onednn.pack_linear(self.operands())
            y = onednn.linear(input, self._derived["packed"])
        return y if bias is None else y + bias

    def _act(self) -> Affine | None:
        if self.act_bounds is None:
            return None
        return Affine(self.act_bounds[0], self.act_bounds[1], self.settings.act.bits)

    def _half_float(self, x: Tensor) -> Tensor:
        if self.settings.act.enabled:
            x = _round_trip(x, self._act(), self.settings.act, self.joint_scale)
        if "float_weight" not in self._derived:
            self._derived["float_weight"] = _float_weight(self)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self._derived["float_weight"].to(x.dtype), bias)


class QuantizedConv2d(QuantizedSite):
    """Convolution on integer codes, exact, with zero padding as the code of zero.

    Tensors as in :class:`QuantizedLinear`, with ``codes`` `[N, packed (C kh kw)]` and ``act_bounds`` = step and zero
    point.
    """

    def __init__(self, site: Site, settings: SiteSettings, bias: bool, geometry: dict[str, Any]) -> None:
        super().__init__()
        self._init_site(site, settings)
        self.geometry = geometry
        rows, columns = site.shape[0], int(torch.tensor(site.shape[1:]).prod())
        _register_weight(self, rows, columns, settings.weight)
        self.register_buffer("bias", torch.zeros(rows) if bias else None)
        self.register_buffer("act_bounds", torch.tensor([1.0, 0.0]) if settings.act.enabled else None)

    @classmethod
    def from_prepared(cls, prepared: PreparedConv2d, settings: SiteSettings, stored: Rounding) -> QuantizedConv2d:
        """Quantize for good; arguments as in :meth:`QuantizedLinear.from_prepared`."""
        self = cls(prepared.site, settings, prepared.bias is not None, conv_geometry(prepared))
        _fill_weight(self, prepared.weight.detach().float().flatten(1), prepared, stored)
        if prepared.bias is not None:
            self.bias.copy_(stored(prepared.bias.detach().float()))
        if self.act_bounds is not None and prepared.left is not None:
            step, lower = (v.reshape(()) for v in prepared.left.calculate_qparams())
            self.act_bounds.copy_(torch.stack([step, torch.round(-lower / step)]))
        return self

    @property
    def kernel(self) -> str:
        """``float32 on integer codes``, or ``float`` where one operand is float."""
        both = self.settings.act.enabled and self.settings.weight.enabled
        return "float32 on integer codes" if both else "float (one operand quantized)"

    def forward(self, input: Tensor) -> Tensor:
        if not (self.settings.act.enabled and self.settings.weight.enabled):
            return self._half_float(input)
        step, zero_point = self.act_bounds
        codes = reference.quantize_codes(input, 1.0 / step, zero_point, self.settings.act.bits)
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
        centred = codes.float() - self.act_bounds[1]
        weight = 2 * (self.weight_codes().float() + _weight_shift(self)[:, None])
        weight = weight.reshape(self.site.shape)
        patch = weight[0, 0].numel()
        chunk = max(1, (1 << 24) // (255 * 256 * patch))
        groups = self.geometry["groups"]
        if groups > 1 or chunk >= weight.shape[1]:
            return _conv(centred, weight, self.geometry).to(torch.int32)
        parts = zip(centred.split(chunk, 1), weight.split(chunk, 1), strict=True)
        return sum((_conv(x, w, self.geometry).to(torch.int32) for x, w in parts), start=torch.zeros((), dtype=torch.int32))

    def weight_codes(self) -> Tensor:
        """Signed weight codes `[N, C kh kw]` int8."""
        return _signed_codes(self)

    def _half_float(self, x: Tensor) -> Tensor:
        if self.settings.act.enabled:
            step, zero_point = self.act_bounds
            x = _round_trip(x, Affine(step, -zero_point * step, self.settings.act.bits), self.settings.act, None)
        if "float_weight" not in self._derived:
            self._derived["float_weight"] = _float_weight(self).reshape(self.site.shape)
        y = _conv(x, self._derived["float_weight"].to(x.dtype), self.geometry)
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
    """

    def __init__(self, site: Site, settings: SiteSettings, form: MatmulForm, joint_scale: bool) -> None:
        super().__init__()
        self._init_site(site, settings)
        self.form = form
        self.register_buffer("joint_scale", torch.ones(site.shape[0]) if joint_scale else None)
        for name, spec in (("left_bounds", settings.act), ("right_bounds", settings.weight)):
            static = spec.enabled and not spec.dynamic
            self.register_buffer(name, torch.tensor([1.0, 0.0]) if static else None)

    @classmethod
    def from_prepared(cls, prepared: PreparedMatmul, settings: SiteSettings, stored: Rounding) -> QuantizedMatmul:
        """Quantize for good; arguments as in :meth:`QuantizedLinear.from_prepared`."""
        self = cls(prepared.site, settings, prepared.form, prepared.joint_scale is not None)
        if prepared.joint_scale is not None:
            self.joint_scale.copy_(stored(prepared.joint_scale.detach()))
        for bounds, quantizer in ((self.left_bounds, prepared.left), (self.right_bounds, prepared.right)):
            if bounds is not None and quantizer is not None:
                bounds.copy_(torch.stack([v.reshape(()) for v in quantizer.calculate_qparams()]))
        return self

    @property
    def kernel(self) -> str:
        """``float32 on integer codes`` (exact), ``reference integer``, or ``float`` where one operand is float."""
        if not (self.settings.act.enabled and self.settings.weight.enabled):
            return "float (one operand quantized)"
        return "reference integer" if self.use_reference else "float32 on integer codes"

    def forward(self, *operands: Tensor, **options: Any) -> Tensor:
        left, right = self.form.canonical(*operands)
        scale = self.joint_scale if self.joint_scale is not None and left.shape[-1] == len(self.joint_scale) else None
        inverse = None if scale is None else (1.0 / scale)[:, None]
        if self.settings.act.enabled and self.settings.weight.enabled:
            qa, a = _codes(left, self.left_bounds, self.settings.act, scale, -1)
            qb, b = _codes(right, self.right_bounds, self.settings.weight, inverse, -2)
            product = reference.matmul_epilogue(self._accumulate(qa, qb), qa, qb, a, b).to(left.dtype)
        else:
            x = self._float_operand(left, self.left_bounds, self.settings.act, scale)
            product = torch.matmul(x, self._float_operand(right, self.right_bounds, self.settings.weight, inverse))
        return self.form.finish(product, *operands, **options)

    def _accumulate(self, qa: Tensor, qb: Tensor) -> Tensor:
        if self.use_reference or qa.device.type != "cpu":
            return reference.matmul_accumulate(qa, qb)
        return onednn.matmul_accumulate(qa, qb, self.settings.act.bits, self.settings.weight.bits)

    @staticmethod
    def _float_operand(x: Tensor, bounds: Tensor | None, spec: QuantizerSpec, scale: Tensor | None) -> Tensor:
        if not spec.enabled:
            return x if scale is None else x / scale
        return _round_trip(x, None if bounds is None else Affine(bounds[0], bounds[1], spec.bits), spec, scale)


def quantize_site(prepared: PreparedSite, settings: SiteSettings, stored: Rounding) -> QuantizedSite:
    """The quantized module of a calibrated prepared site."""
    if isinstance(prepared, PreparedLinear):
        return QuantizedLinear.from_prepared(prepared, settings, stored)
    if isinstance(prepared, PreparedConv2d):
        return QuantizedConv2d.from_prepared(prepared, settings, stored)
    assert isinstance(prepared, PreparedMatmul)
    return QuantizedMatmul.from_prepared(prepared, settings, stored)


def empty_site(prepared: PreparedSite, settings: SiteSettings, joint_scale: bool) -> QuantizedSite:
    """A quantized module of the right shapes, whose tensors are yet to be loaded."""
    if isinstance(prepared, PreparedLinear):
        return QuantizedLinear(prepared.site, settings, prepared.bias is not None, joint_scale)
    if isinstance(prepared, PreparedConv2d):
        return QuantizedConv2d(prepared.site, settings, prepared.bias is not None, conv_geometry(prepared))
    assert isinstance(prepared, PreparedMatmul)
    return QuantizedMatmul(prepared.site, settings, prepared.form, joint_scale)


def conv_geometry(conv: nn.Conv2d) -> dict[str, Any]:
    """Stride, padding, dilation and groups of a convolution with zero padding."""
    return {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}


def _conv(x: Tensor, weight: Tensor, geometry: dict[str, Any]) -> Tensor:
    return F.conv2d(x, weight, None, **geometry)


# --- weights ----------------------------------------------------------------------------------------------------------


def _register_weight(module: QuantizedSite, rows: int, columns: int, spec: QuantizerSpec) -> None:
    if not spec.enabled:
        module.register_parameter("weight", nn.Parameter(torch.zeros(rows, columns), requires_grad=False))
        return
    module.columns = columns
    module.register_buffer("codes", torch.zeros(rows, packed_length(columns, spec.bits), dtype=torch.uint8))
    module.register_buffer("weight_scale", torch.ones(rows))


def _fill_weight(module: QuantizedSite, weight: Tensor, prepared: PreparedSite, stored: Rounding) -> None:
    """Codes of `weight` `[N, K]` (already times the joint scale) under the calibrated bounds, scales rounded first."""
    spec = module.settings.weight
    if not spec.enabled or prepared.right is None:
        module.weight.data.copy_(stored(weight))
        return
    lo, hi = (v.reshape(-1, 1).expand(len(weight), 1) for v in prepared.right.bounds())
    scale = stored_step(step_size(lo, hi, spec.bits), stored)
    lower = (_shift(spec) - (1 << (spec.bits - 1))) * scale
    codes = quantize(weight, lower, lower + scale * spec.qmax, spec.bits)
    module.codes.copy_(pack(codes, spec.bits))
    module.weight_scale.copy_(scale.reshape(-1))


def stored_step(step: Tensor, stored: Rounding) -> Tensor:
    """A step as it will be stored; one that would vanish in storage keeps its float32 value."""
    rounded = stored(step)
    return torch.where(rounded > 0, rounded, step)


def _shift(spec: QuantizerSpec) -> float:
    """Where the signed code 0 lies, in steps: mid-rise weights sit half a step off zero."""
    return 0.5 if spec.scheme is Scheme.SYMMETRIC else 0.0


def _weight_shift(module: QuantizedSite) -> Tensor:
    return torch.full_like(module.weight_scale, _shift(module.settings.weight))


def _signed_codes(module: QuantizedSite) -> Tensor:
    bits = module.settings.weight.bits
    return (unpack(module.codes, bits, module.columns).to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def _float_weight(module: QuantizedSite) -> Tensor:
    if not module.settings.weight.enabled:
        return module.weight
    return (module.weight_codes().float() + _weight_shift(module)[:, None]) * module.weight_scale[:, None]


# --- activations ------------------------------------------------------------------------------------------------------


def _codes(
    x: Tensor, bounds: Tensor | None, spec: QuantizerSpec, scale: Tensor | None, axis: int
) -> tuple[Tensor, Affine]:
    if bounds is None:
        return reference.quantize_dynamic(x, axis, spec.bits, scale)
    act = Affine(bounds[0], bounds[1], spec.bits)
    return reference.quantize_codes(x, *reference.static_qparams(act, scale), spec.bits), act


def _round_trip(x: Tensor, act: Affine | None, spec: QuantizerSpec, scale: Tensor | None) -> Tensor:
    """Activation through its codes and back to float, in the scaled domain."""
    bounds = None if act is None else torch.stack([act.step, act.lower])
    codes, act = _codes(x, bounds, spec, scale, spec.axis)
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
