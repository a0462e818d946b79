"""Quantized sites: packed integer codes, scales and quantization ranges. No float weight is kept beside its codes.

Each module holds tensors that do not depend on a device's kernels; what a kernel needs (unpacked, re-ordered, folded)
is derived on first use and never stored. Prepared sites make these modules: ``to_quantized`` and ``empty_quantized``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmoq_ao.common.tracing import is_recording, is_traced
from harmoq_ao.config import SiteSettings
from harmoq_ao.graph.namespaces import active_tracer
from harmoq_ao.kernels import compiler_view, ops
from harmoq_ao.kernels.float_matmul import MatmulContraction
from harmoq_ao.kernels.linear import LinearContraction
from harmoq_ao.kernels.select import Backend, Contraction, UniformContraction, select_kernel
from harmoq_ao.quant import integer_reference
from harmoq_ao.quant.integer_reference import Affine, LinearOperands, MatmulOperand, exact_floats
from harmoq_ao.quant.packing import pack, packed_length, unpack_signed
from harmoq_ao.quant.quantizer import QuantizerSpec, Scheme, quantize, step_size
from harmoq_ao.quant.relative_maps import relative_rows
from harmoq_ao.sites.forms import MatmulForm
from harmoq_ao.sites.site import Site

if TYPE_CHECKING:
    from harmoq_ao.quant.fake_quant import HarmoqFakeQuantize

Rounding = Callable[[Tensor], Tensor]
_HALF_FLOAT = "float (one operand quantized)"


@dataclass
class Derived:
    """What a site makes of its tensors on first use, and forgets when they are moved or loaded.

    Attributes:
        linear: The integer linear with its packings.
        matmul: The quantizers of a product.
        float_weight: The weight that the codes stand for, `[N, K]`.
    """

    linear: LinearContraction | None = None
    matmul: MatmulContraction | None = None
    float_weight: Tensor | None = None


@dataclass(frozen=True)
class WeightFacts:
    """What is known of a weight without its values; to compute with it is a type error.

    Args:
        shape: As its author's.
        device: Of its codes.
    """

    shape: torch.Size
    device: torch.device
    dtype: torch.dtype = torch.float32
    requires_grad: bool = False

    def size(self, dim: int | None = None) -> torch.Size | int:
        """As ``Tensor.size``."""
        return self.shape if dim is None else self.shape[dim]


class ActivationOperand(NamedTuple):
    """One activation of a call, as its quantizer sees it.

    Attributes:
        name: ``input``, or ``left`` and ``right`` of a product.
        values: Any shape, shifted and divided by the joint vectors.
        spec: Its quantizer.
        qparams: Static step and lower bound; None for a dynamic or float operand.
    """

    name: str
    values: Tensor
    spec: QuantizerSpec
    qparams: Affine | None


class QuantizedSite(nn.Module):
    """Base of quantized sites.

    Attributes:
        site: What the site is.
        settings: Quantizers of both operands.
        backend: Which kernels to run; by default the fastest of the input's device.
        joint_scale: float32 `[K]`, or None for ones.
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
    def kernel(self) -> str:
        """Name of the kernel that runs the site where its tensors are."""
        device = next(self.buffers(), torch.empty(0)).device
        return select_kernel(self.contraction(), device, self.backend).name

    def contraction(self) -> Contraction:
        """What :func:`select_kernel` chooses a kernel for."""
        raise NotImplementedError

    @property
    def both_quantized(self) -> bool:
        """Whether the contraction runs on integers."""
        return self.settings.both_quantized

    def act_qparams(self) -> Affine | None:
        """Static step and lower bound (float32, 0-d) of the activation or left operand, or None."""
        raise NotImplementedError

    def activations(self, *args: Tensor) -> list[ActivationOperand]:
        """The activations among the operands of a call, whether they are quantized or not.

        Args:
            args: Operands of the author's call.
        """
        raise NotImplementedError

    def stored_facts(self) -> dict[str, Any]:
        """What the stored tensors tell a :class:`SiteRow`: ``bounds`` and ``joint_scale``, each where there is one."""
        facts: dict[str, Any] = {}
        act = self.act_qparams()
        if act is not None:
            step, lower = float(act.step), float(act.lower)
            facts["bounds"] = (lower, lower + step * self.settings.act.qmax)
        if self.joint_scale is not None:
            facts["joint_scale"] = (float(self.joint_scale.min()), float(self.joint_scale.max()))
        return facts

    def fill(self, **values: Tensor | None) -> None:
        """Copy values into registered tensors by name; None, or a name without a tensor here, changes nothing."""
        for name, value in values.items():
            target = self._buffers[name]
            if target is not None and value is not None:
                target.copy_(value)

    def _active(self) -> bool:
        return True

    def _run(self, *operands: Tensor) -> Tensor:
        return select_kernel(self.contraction(), operands[0].device, self.backend).run(*operands)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedSite:
        """Codes, scales and ranges follow the model's device, never its float type."""
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

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which derive anew."""
        return {**self.__dict__, "_derived": Derived()}


class WeightedSite(QuantizedSite):
    """A quantized site with a weight, flattened to `[N, K]`.

    Attributes:
        codes: Packed weight codes, uint8 `[N, packed K]` (where weights are quantized).
        weight_scale: Step of each row, float32 `[N]` (where weights are quantized).
        weight: Float weight `[N, K]` (where they are not).
        bias: float32 `[N]`, or None.
        joint_shift: float32 `[K]`, or None for zeros; the bias already gives it back.
        act_bounds: float32 `[2]` as a saved model stores it; :meth:`act_qparams` is its meaning.
    """

    codes: Tensor
    weight_scale: Tensor
    weight: nn.Parameter
    bias: Tensor | None
    act_bounds: Tensor | None
    joint_shift: Tensor | None

    def __getattr__(self, name: str) -> Any:
        """What its author asks of a weight (``x.to(self.fc.weight.dtype)``), where there are only codes of it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            codes = vars(self).get("_buffers", {}).get("codes")
            if name != "weight" or codes is None:
                raise
        shape = torch.Size(self.site.shape)
        if active_tracer() is None:
            return WeightFacts(shape, codes.device)
        return torch.zeros((), device=codes.device).expand(shape)  # tied to a functional call, whose site has its own

    def _register_weight(self, rows: int, columns: int) -> None:
        spec = self.settings.weight
        self.columns = columns
        if not spec.enabled:
            self.weight = nn.Parameter(torch.zeros(rows, columns), requires_grad=False)
            return
        self.register_buffer("codes", torch.zeros(rows, packed_length(columns, spec.bits), dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.ones(rows))

    def fill_weight(self, weight: Tensor, quantizer: HarmoqFakeQuantize | None, stored: Rounding) -> None:
        """Quantize the weight for good, its steps rounded first.

        Args:
            weight: float32 `[N, K]`, joint scale included.
            quantizer: Its calibrated fake-quantizer; None keeps the weight in float.
            stored: Rounds a float tensor to what a saved model can hold.
        """
        spec = self.settings.weight
        if not spec.enabled or quantizer is None:
            self.weight.data.copy_(stored(weight))
            return
        lo, hi = (v.reshape(-1, 1).expand(len(weight), 1) for v in quantizer.bounds())
        scale = _stored_step(step_size(lo, hi, spec.bits), stored)
        lower = (_shift(spec) - (1 << (spec.bits - 1))) * scale
        codes = quantize(weight, lower, lower + scale * spec.qmax, spec.bits)
        self.codes.copy_(pack(codes, spec.bits))
        self.weight_scale.copy_(scale.reshape(-1))

    def weight_codes(self) -> Tensor:
        """Signed weight codes `[N, K]` int8."""
        return unpack_signed(self.codes, self.settings.weight.bits, self.columns)

    def weight_shift(self) -> Tensor:
        """Value of the signed code 0 of each row, in steps, `[N]`."""
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
            if not is_traced():
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
            if not is_traced():
                self._derived.linear = linear
        return linear

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self._traced(input) if is_traced() else self._run(input)
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

    def act_qparams(self) -> Affine | None:
        """Of the input; ``act_bounds`` holds step and lower bound."""
        return _affine(self.act_bounds, self.settings.act)

    def activations(self, *args: Tensor) -> list[ActivationOperand]:
        """The input."""
        x = args[0] if self.joint_shift is None else args[0] - self.joint_shift
        x = x if self.joint_scale is None else x / self.joint_scale
        return [ActivationOperand("input", x, self.settings.act, self.act_qparams())]

    def _half_float(self, x: Tensor) -> Tensor:
        if self.settings.act.enabled:
            x = _round_trip(x, self.act_qparams(), self.settings.act, self.joint_scale)
        weight = self._float_weight()
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, weight.to(x.dtype), bias)


class QuantizedConv2d(WeightedSite):
    """Convolution on integer codes, exact, with zero padding as the code of zero.

    Args:
        site: The site; its shape is that of the weight, ``(N, C, H, W)``.
        settings: Quantizers.
        bias: Whether a bias belongs to the site.
        geometry: ``stride``, ``padding``, ``dilation`` and ``groups``.
    """

    def __init__(self, site: Site, settings: SiteSettings, bias: bool, geometry: dict[str, Any]) -> None:
        super().__init__()
        self._init_site(site, settings)
        self.geometry = geometry
        rows, columns = site.shape[0], int(torch.tensor(site.shape[1:]).prod())
        self._register_weight(rows, columns)
        self.register_buffer("bias", torch.zeros(rows) if bias else None)
        self.register_buffer("joint_scale", None)
        self.register_buffer("joint_shift", None)
        self.register_buffer("act_bounds", torch.tensor([1.0, 0.0]) if settings.act.enabled else None)

    def zero_point_qparams(self) -> tuple[Tensor, Tensor] | None:
        """Step and zero point of the input, which is what ``act_bounds`` holds, or None in float."""
        return None if self.act_bounds is None else (self.act_bounds[0], self.act_bounds[1])

    def act_qparams(self) -> Affine | None:
        """Of the input; its lower bound is a whole number of steps."""
        if self.act_bounds is None:
            return None
        step, zero_point = self.act_bounds.unbind()
        return Affine(step, -zero_point * step, self.settings.act.bits)

    def activations(self, *args: Tensor) -> list[ActivationOperand]:
        """The input."""
        return [ActivationOperand("input", args[0], self.settings.act, self.act_qparams())]

    def contraction(self) -> Contraction:
        if self.both_quantized:
            return UniformContraction("float32 on integer codes", self._integer)
        return UniformContraction(_HALF_FLOAT, self._half_float)

    def forward(self, input: Tensor) -> Tensor:
        if is_traced():  # plain torch: the graph gets to see all of it
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
            x = _round_trip(x, self.act_qparams(), self.settings.act, None)
        weight = self._float_weight().reshape(self.site.shape)
        y = _conv(x, weight.to(x.dtype), self.geometry)
        return y if self.bias is None else y + self.bias.to(x.dtype)[:, None, None]


class QuantizedMatmul(QuantizedSite):
    """Product of two quantized activations.

    Tensors: ``left_bounds`` and ``right_bounds`` float32 `[2]`, step and lower bound of static operands,
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

    def contraction(self) -> Contraction:
        return self.operands() if self.both_quantized else UniformContraction(_HALF_FLOAT, self._half_float)

    def operands(self) -> MatmulContraction:
        """The quantizers of both operands, made once (under a tracer they are not kept); both must be quantized."""
        matmul = self._derived.matmul
        if matmul is None:
            matmul = ops.matmul_contraction(*self._tensors(), *self._bits())
            if not is_traced():
                self._derived.matmul = matmul
        return matmul

    def act_qparams(self) -> Affine | None:
        """Of the left operand."""
        return _affine(self.left_bounds, self.settings.act)

    def right_qparams(self) -> Affine | None:
        """Static step and lower bound of the right operand, or None."""
        return _affine(self.right_bounds, self.settings.weight)

    def activations(self, *args: Tensor) -> list[ActivationOperand]:
        """Both operands in canonical form; an attention map may be relative to its rows' largest entries."""
        left, right = self.form.canonical(*args)
        left = relative_rows(left) if self.relative else left
        if self.joint_scale is not None:
            left, right = left / self.joint_scale, right * self.joint_scale[:, None]
        return [
            ActivationOperand("left", left, self.settings.act, self.act_qparams()),
            ActivationOperand("right", right, self.settings.weight, self.right_qparams()),
        ]

    def _tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.left_bounds, self.right_bounds, self.joint_scale

    def _bits(self) -> tuple[int, int]:
        return self.settings.act.bits, self.settings.weight.bits

    def forward(self, *operands: Tensor, **options: Any) -> Tensor:
        left, right = self.form.canonical(*operands)
        self.site.check_length(left, self.joint_scale)
        if self.both_quantized and self.relative and is_recording():
            product = ops.map_product(left, right, *self._tensors(), *self._bits(), self.backend)
        elif self.both_quantized and self.relative:
            product = self.of_map(left, lambda relative: self._product(relative, right))
        else:
            product = self._product(left, right)
        return self.form.finish(product, *operands, **options)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        if not is_traced():
            return self._run(left, right)
        if not self.both_quantized:
            return self._half_float(left, right)
        return ops.matmul(left, right, *self._tensors(), *self._bits(), self.backend)

    def _half_float(self, left: Tensor, right: Tensor) -> Tensor:
        x = _half_quantized(left, self.act_qparams(), self.settings.act)
        return torch.matmul(x, _half_quantized(right, self.right_qparams(), self.settings.weight))

    def of_map(self, attention_map: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """The product of an attention map with the values, normalised after it.

        Args:
            attention_map: `[..., M, K]`.
            product: Takes the map relative to its rows' largest entries, quantizes and multiplies it.
        """
        act = self.act_qparams()
        assert act is not None
        return ops.of_map(attention_map, act, product)


def _conv(x: Tensor, weight: Tensor, geometry: dict[str, Any]) -> Tensor:
    return F.conv2d(x, weight, None, **geometry)


def _exact_conv(x: Tensor, weight: Tensor, geometry: dict[str, Any]) -> Tensor:
    with exact_floats(x):
        return _conv(x, weight, geometry).to(torch.int32)


# --- weights ----------------------------------------------------------------------------------------------------------


def _stored_step(step: Tensor, stored: Rounding) -> Tensor:
    """A step as it will be stored; one that would vanish in storage keeps its float32 value."""
    rounded = stored(step)
    return torch.where(rounded > 0, rounded, step)


def _shift(spec: QuantizerSpec) -> float:
    """Value of the signed code 0, in steps: mid-rise weights lie half a step off zero."""
    return 0.5 if spec.scheme is Scheme.SYMMETRIC else 0.0


# --- activations ------------------------------------------------------------------------------------------------------


def _affine(bounds: Tensor | None, spec: QuantizerSpec) -> Affine | None:
    """Stored step and lower bound `[2]`, typed."""
    return None if bounds is None else Affine(bounds[0], bounds[1], spec.bits)


def _half_quantized(x: Tensor, act: Affine | None, spec: QuantizerSpec) -> Tensor:
    """One operand of a product whose other one is float."""
    return _round_trip(x, act, spec, None) if spec.enabled else x


def _round_trip(x: Tensor, act: Affine | None, spec: QuantizerSpec, scale: Tensor | None) -> Tensor:
    """Activation through its codes and back to float, in the scaled domain."""
    codes, act = integer_reference.quantize_operand(x, MatmulOperand(spec.bits, act, scale), spec.axis)
    return (codes.float() * act.step + act.lower).to(x.dtype)


__all__ = [
    "ActivationOperand",
    "QuantizedConv2d",
    "QuantizedLinear",
    "QuantizedMatmul",
    "QuantizedSite",
    "WeightedSite",
]
