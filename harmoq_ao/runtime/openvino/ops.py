"""Quantized sites as OpenVINO operations, written so that its integer kernels run our codes.

OpenVINO's CPU plugin runs a product in u8 x s8 when it finds a ``FakeQuantize`` of 256 levels onto 0..255 on the left
and a constant of int8 with a scale on the right. A site is therefore emitted as::

    x -> * reciprocal, + offset -> clamp to 0..2**bits - 1 -> FakeQuantize 0..255 onto 0..255      the reference's codes
      -> MatMul with int8 effective codes, times the row's scale                              no zero point anywhere
      -> + folded bias

The multiplication and the addition are those of `reference.quantize_codes`, so the codes are the same except
for ties, which the plugin may move when it fuses neighbouring constants (with a LayerNorm before, say). Below 8 bits
the clamp in front replaces fewer levels, since rounding and a clamp at whole numbers commute. So every width runs the
8-bit kernel. Ranges per token do too: they are part of the multiplication and the addition, not of the FakeQuantize.

On CPUs without VNNI the plugin adds products in pairs at 16 bits, which saturate at 32,767. Where weights (or codes of
the right operand) are large enough for that, they are given as floats there: the same codes, in float32 products.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import openvino
import torch
from openvino import opset13 as ops
from torch import Tensor

from harmoq_ao.kernels import onednn
from harmoq_ao.quant import integer_reference
from harmoq_ao.quant.integer_reference import LinearOperands, MatmulOperand
from harmoq_ao.quant.quantizer import MIN_STEP
from harmoq_ao.runtime.openvino.compiling import compile_on_cpu
from harmoq_ao.sites.quantized import QuantizedConv2d

Node = Any
"""An OpenVINO node, or one of its outputs."""

_CENTRE = 128  # of codes that have to be signed
_HALF_PAIR = (2**15 - 1) // (2 * 255)  # largest right-hand code of which two fit 16 bits beside any two left-hand ones


def linear(x: Node, operands: LinearOperands, name: str) -> Node:
    """A quantized linear, `[..., K]` to `[..., N]`.

    Args:
        x: Input, floating point.
        operands: Codes, scales and bounds.
        name: Friendly name of the product, by which the compiled model tells its kernel.
    """
    total = integer_reference.weight_total(operands.weight, operands.weight_scale, operands.weight_shift)
    if operands.act is not None:
        codes = _static_codes(x, operands)
        folded = integer_reference.fold_bias(total, operands.act.lower, operands.bias)
        scale = operands.weight_scale * operands.act.step
        return ops.add(_product(codes, _weight(operands, scale), name), _constant(folded))
    scaled = x if operands.joint_scale is None else ops.multiply(x, _constant(operands.joint_scale.reciprocal()))
    codes, lower, step = _codes_per_slice(scaled, operands.act_bits, -1, 0)
    y = _product(codes, _weight(operands, operands.weight_scale), name)
    y = ops.add(ops.multiply(y, step), ops.multiply(lower, _constant(total)))
    return y if operands.bias is None else ops.add(y, _constant(operands.bias))


def conv2d(x: Node, site: QuantizedConv2d) -> Node:
    """A quantized convolution with static bounds, `[B, C, H, W]`; zero padding is the code of zero, exactly."""
    qparams = site.zero_point_qparams()
    assert qparams is not None
    step, zero_point = qparams
    zero, bits = float(zero_point), site.settings.act.bits
    position = ops.add(ops.multiply(x, _constant(1.0 / step)), _constant(zero_point))
    codes = _round(position, bits, (0.0, 255.0), (-zero, 255.0 - zero))
    integers, factor = onednn.effective_codes(site.weight_codes(), site.weight_shift())
    if factor == 0:
        integers, factor = integers.float() + site.weight_shift()[:, None], 1
    shape, geometry = list(site.site.shape), site.geometry
    scale = (site.weight_scale * step / factor)[:, None, None, None]
    places = [list(geometry[key]) for key in ("stride", "padding", "padding", "dilation")]
    if geometry["groups"] == 1:
        y = ops.convolution(codes, _scaled(integers.reshape(shape), scale), *places)
    else:
        shape = [geometry["groups"], shape[0] // geometry["groups"], *shape[1:]]
        weight = _scaled(integers.reshape(shape), scale.reshape(*shape[:2], 1, 1, 1))
        y = ops.group_convolution(codes, weight, *places)
    y.set_friendly_name(site.site.name)
    return y if site.bias is None else ops.add(y, _constant(site.bias[None, :, None, None]))


def matmul(left: Node, right: Node, a: MatmulOperand, b: MatmulOperand, name: str) -> Node:
    """A product of two quantized activations, `[..., M, K]` and `[..., K, N]`.

    Integer kernels need signed codes on the right. Codes of 8 bits are centred, which the row sums of the left operand
    compensate. With codes ``p``, ``q`` and centre ``c``, steps ``s`` and lower bounds ``l``::

        y = s_p s_q p (q - c) + rowsum(p) s_p (l_q + c s_q) + colsum(q - c) s_q l_p + K l_p (l_q + c s_q)

    Args:
        left: Left operand, floating point.
        right: Right operand.
        a: Quantizer of the left operand.
        b: Quantizer of the right operand.
        name: Friendly name of the product.
    """
    centre = _CENTRE if b.bits == 8 else 0
    length = ops.convert(ops.gather(ops.shape_of(left), ops.constant([-1]), ops.constant(0)), np.float32)
    p, lower_p, step_p = _operand_codes(left, a, -1, 0)
    q, lower_q, step_q = _operand_codes(right, b, -2, centre)
    base = ops.add(lower_q, ops.multiply(step_q, _constant(float(centre))))
    rows = ops.reduce_sum(p, ops.constant([-1]), True)
    columns = ops.reduce_sum(q, ops.constant([-2]), True)
    product = ops.matmul(p, q, False, False)
    product.set_friendly_name(name)
    y = ops.multiply(product, ops.multiply(step_p, step_q))
    y.set_friendly_name(f"{name}/scaled")  # the plugin names what it fuses after the last operation
    y = ops.add(y, ops.multiply(ops.multiply(rows, step_p), base))
    rest = ops.add(ops.multiply(columns, step_q), ops.multiply(base, length))
    return ops.add(y, ops.multiply(rest, lower_p))


# --- activations ------------------------------------------------------------------------------------------------------


def _static_codes(x: Node, operands: LinearOperands) -> Node:
    assert operands.act is not None
    factor, offset = integer_reference.static_qparams(operands.act, operands.joint_scale, operands.joint_shift)
    position = ops.add(ops.multiply(x, _constant(factor)), _constant(offset))
    return _round(position, operands.act_bits, (0.0, 255.0), (0.0, 255.0))


def _operand_codes(x: Node, operand: MatmulOperand, axis: int, centre: int) -> tuple[Node, Node, Node]:
    """Codes minus ``centre``, lower bound and step of one operand of a product."""
    if operand.act is None:
        scaled = x if operand.joint_scale is None else ops.multiply(x, _constant(operand.joint_scale.reciprocal()))
        return _codes_per_slice(scaled, operand.bits, axis, centre)
    factor, offset = integer_reference.static_qparams(operand.act, operand.joint_scale)
    position = ops.add(ops.multiply(x, _constant(factor)), _constant(offset))
    codes = _round_operand(position, operand.bits, axis, centre)
    return codes, _constant(operand.act.lower), _constant(operand.act.step)


def _codes_per_slice(x: Node, bits: int, axis: int, centre: int) -> tuple[Node, Node, Node]:
    """Codes minus ``centre``, lower bound and step, one range per slice along ``axis``."""
    lower = ops.reduce_min(x, ops.constant([axis]), True)
    upper = ops.reduce_max(x, ops.constant([axis]), True)
    step = ops.maximum(ops.divide(ops.subtract(upper, lower), _constant(float(2**bits - 1))), _constant(MIN_STEP))
    position = ops.divide(ops.subtract(x, lower), step)
    return _round_operand(position, bits, axis, centre), lower, step


def _round_operand(position: Node, bits: int, axis: int, centre: int) -> Node:
    """Codes minus ``centre``; those on the right as floats where integer products would not be exact."""
    largest = 2**bits - 1
    if axis == -2 and not _in_integers(centre or largest):
        codes = ops.round(ops.clamp(position, 0.0, float(largest)), "half_to_even")
        return ops.subtract(codes, _constant(float(centre)))
    ends = _ends(axis, centre)
    return _round(position, bits, ends, _shifted(ends, centre))


def _in_integers(largest: int) -> bool:
    """Whether integer products are exact with right-hand codes up to ``largest`` in size."""
    return largest <= _HALF_PAIR or not pairs_saturate()


@cache
def pairs_saturate() -> bool:
    """Whether pairs of u8 x s8 products saturate at 16 bits on this CPU. Tried once per process."""
    codes = ops.parameter([1, 64, 64], np.float32)
    weight = _integers(torch.full((16, 64), 127, dtype=torch.int8), torch.ones(16, 1))  # floats without a scale
    y = ops.matmul(_round(codes, 8, (0.0, 255.0), (0.0, 255.0)), weight, False, True)
    compiled = compile_on_cpu(openvino.Model([y], [codes]), INFERENCE_PRECISION_HINT="f32")
    found = compiled(np.full((1, 64, 64), 255, np.float32))[0]
    return bool((found != 64 * 255 * 127).any())


def _ends(axis: int, centre: int) -> tuple[float, float]:
    """Range of the 256 levels: unsigned on the left; on the right, one that is signed once the centre is taken off."""
    return (0.0, 255.0) if axis == -1 or centre else (-128.0, 127.0)


def _shifted(ends: tuple[float, float], centre: int) -> tuple[float, float]:
    return ends[0] - centre, ends[1] - centre


def _round(position: Node, bits: int, ends: tuple[float, float], values: tuple[float, float]) -> Node:
    """Round to 256 levels at whole numbers; narrower codes are clamped first."""
    if bits < 8:
        position = ops.clamp(position, 0.0, float(2**bits - 1))
    return ops.fake_quantize(position, *(_constant(v) for v in (*ends, *values)), 256)


# --- weights ----------------------------------------------------------------------------------------------------------


def _weight(operands: LinearOperands, scale: Tensor) -> Node:
    """`[N, K]` effective codes times a scale per row; float codes where the shift does not fit int8."""
    codes, factor = onednn.effective_codes(operands.weight, operands.weight_shift)
    if factor == 0:
        return _scaled(operands.weight.float() + operands.weight_shift[:, None], scale[:, None])
    return _scaled(codes, (scale / factor)[:, None])


def _scaled(codes: Tensor, scale: Tensor) -> Node:
    if codes.dtype != torch.int8 or not _in_integers(int(codes.int().abs().max())):
        return _constant(codes * scale)
    return _integers(codes, scale)


def _integers(codes: Tensor, scale: Tensor) -> Node:
    return ops.multiply(ops.convert(ops.constant(codes.contiguous().numpy()), np.float32), _constant(scale))


def _product(codes: Node, weight: Node, name: str) -> Node:
    product = ops.matmul(codes, weight, False, True)
    product.set_friendly_name(name)
    return product


def _constant(value: Tensor | float) -> Node:
    array = value.detach().float().numpy() if isinstance(value, Tensor) else np.float32(value)
    return ops.constant(np.ascontiguousarray(array, dtype=np.float32) if np.ndim(array) else array)
