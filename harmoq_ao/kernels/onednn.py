"""The fast path on CPUs: quantize in cache-sized blocks of rows, multiply codes with oneDNN's u8 x s8 kernels.

Three facts decide the speed of a linear with few channels, and shape this file:

* oneDNN's integer kernels need **unsigned** activations; signed ones fall back to a scalar path hundreds of times
  slower.
* Rounding the input costs as much as the contraction. It runs over blocks of rows that stay in the L2 cache.
* Scale and bias, constant per output channel, are part of the contraction's own epilogue. A further pass over the
  output is made only where the maths needs one (ranges per token, weight shifts that int8 cannot absorb).

**Weight shifts.** Row values are ``scale * (code + z)``. Where ``2 * (code + z)`` or ``code + z`` is an int8 integer,
as for mid-rise weights (``z = 1/2``) of up to 7 bits and for zero points near the middle, the contraction runs on those
*effective codes* with the scale divided accordingly, and its integers are ``factor * (acc + z * row_sum)`` of the
canonical accumulator. Otherwise (8-bit mid-rise, float lower bounds) it runs on the plain codes and the term
``z * row_sum`` is added as an outer product.

CPUs without VNNI saturate pairs of u8 x s8 products at 16 bits. `is_available` tries the worst case once. Where it
fails, torch was built without oneDNN, or int32 may not hold the sums (over more than 65,793 channels), the same codes
go through float32 kernels instead, or through float64 ones where float32 is not exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from harmoq_ao.common.errors import KernelError
from harmoq_ao.kernels.float_matmul import exact_dtype
from harmoq_ao.quant import integer_reference
from harmoq_ao.quant.integer_reference import LinearOperands
from harmoq_ao.quant.quantizer import step_size

_BLOCK_BYTES = 1 << 21  # working set of one thread: larger spills the cache, smaller drowns in operator overhead
_MIN_ROWS = 256  # below this the cost of calling operators shows
_LANES = 64  # row reductions in torch are vectorised over whole groups of this many float32
_PACK_ROWS = 4096  # input rows that oneDNN should choose its weight layout for


@cache
def is_available() -> bool:
    """Whether oneDNN's u8 x s8 linear exists and its accumulators are exact on this CPU. Tried once per process."""
    if not hasattr(torch.ops.onednn, "qlinear_prepack") or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return False
    # The largest products of either sign: pairs that saturate at 16 bits give other sums.
    codes = torch.full((32, 256), 255, dtype=torch.uint8)
    weight = torch.tensor([127, -127, -128], dtype=torch.int8).repeat_interleave(16)[:, None].expand(-1, 256)
    unit = torch.ones(len(weight))
    try:
        found = _qlinear(codes, prepack(weight), unit, None, torch.float32)
    except (RuntimeError, NotImplementedError):
        return False
    return torch.equal(found, integer_reference.linear_accumulate(codes, weight).float())


def is_exact(columns: int) -> bool:
    """Whether the integer kernels run here, and int32 holds every sum of ``columns`` products of codes."""
    return columns <= integer_reference.INT32_LINEAR_LENGTH and is_available()


def prepack(qw: Tensor) -> Tensor:
    """`[N, K]` int8 codes in oneDNN's own layout, an opaque tensor that is valid in this process only."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(qw.contiguous(), [_PACK_ROWS, qw.shape[1]])
    return packed


def _qlinear(
    qx: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, zeros: Tensor | None = None
) -> Tensor:
    """``(qx @ w.T) * scale + bias``, `[M, N]` of ``dtype``."""
    if zeros is None:
        zeros = torch.zeros(scale.shape, dtype=torch.int32)
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        qx, 1.0, 0, packed, scale, zeros, bias, 1.0, 0, dtype, "none", [], ""
    )
    return y


# --- linear -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedLinear:
    """A linear in the layout of this CPU's kernels; built by `pack_linear`, valid in this process only.

    Attributes:
        operands: What it was built from.
        contract: `[M, K]` uint8 codes and a dtype to `[M, N]`: scaled accumulators, plus the folded bias if static.
            With ranges per token its codes are padded to a multiple of 64 channels.
        outer: `[N]`, what one unit of a token's code sum adds to its outputs, or None where the codes absorb it.
        total: `[N]`, what one unit of the activation's lower bound adds to each output.
        reciprocal: Factor of the input: a number, or `[K]` with a joint scale; None if neither is needed.
        offset: Added to the product (static ranges only): a number, or `[K]` with a joint shift.
    """

    operands: LinearOperands
    contract: Callable[[Tensor, torch.dtype], Tensor]
    outer: Tensor | None
    total: Tensor
    reciprocal: float | Tensor | None
    offset: float | Tensor

    @property
    def only_codes(self) -> bool:
        """Whether :attr:`contract` of the codes is the result: a static range, and a weight shift that codes absorb."""
        return self.operands.act is not None and self.outer is None


def pack_linear(operands: LinearOperands) -> PackedLinear:
    """Choose effective weight codes, fold constants, and bring the weight into the kernel's layout.

    Raises:
        KernelError: The operands are not on the CPU, or a static range is not one pair for the whole tensor.
    """
    if operands.weight.device.type != "cpu":
        raise KernelError("The oneDNN path is for CPUs", found=operands.weight.device, expected="cpu")
    codes, factor = effective_codes(operands.weight, operands.weight_shift)
    total = integer_reference.weight_total(operands.weight, operands.weight_scale, operands.weight_shift)
    scale, bias, reciprocal = operands.weight_scale, None, None
    offset: float | Tensor = 0.0
    if operands.act is not None:
        if operands.act.step.numel() != 1 or operands.act.lower.numel() != 1:
            raise KernelError(
                "Static bounds of a linear must be one pair for the whole tensor",
                found=tuple(operands.act.step.shape),
                expected="a single number",
                remedy="use ranges per token (act=None) or a joint scale per channel",
            )
        # x = step * q + lower, so the lower bound adds a constant to every output: it becomes part of the bias.
        lower, step = operands.act.lower.reshape(()), operands.act.step.reshape(())
        bias = integer_reference.fold_bias(total, lower, operands.bias)
        scale = scale * step
        factors, offsets = integer_reference.static_qparams(operands.act, operands.joint_scale, operands.joint_shift)
        reciprocal = factors.item() if operands.joint_scale is None else factors.reshape(-1)
        offset = offsets.item() if operands.joint_shift is None else offsets.reshape(-1)
    elif operands.joint_scale is not None:
        reciprocal = operands.joint_scale.reciprocal()
    outer = None if factor else scale * operands.weight_shift  # times the sum of a token's codes, known only then
    if operands.act is None:
        codes = F.pad(codes, (0, _padded(codes.shape[1]) - codes.shape[1]))
    contract = _contraction(codes, scale / max(factor, 1), bias, operands.weight.shape[1], operands.act_bits)
    return PackedLinear(operands, contract, outer, total, reciprocal, offset)


def effective_codes(qw: Tensor, shift: Tensor) -> tuple[Tensor, int]:
    """int8 codes that absorb the shift, ``factor * (qw + shift)``, with ``factor`` 1 or 2; ``(qw, 0)`` if none can.

    Args:
        qw: `[N, K]` int8 codes.
        shift: `[N]` shift of each row, in steps.
    """
    for factor in (1, 2):
        shifted = factor * (qw.double() + shift.double()[:, None])
        if bool(((shifted >= -128) & (shifted <= 127) & (shifted == shifted.round())).all()):
            return shifted.to(torch.int8), factor
    return qw, 0


def _contraction(
    codes: Tensor, scale: Tensor, bias: Tensor | None, columns: int, act_bits: int
) -> Callable[[Tensor, torch.dtype], Tensor]:
    if is_exact(columns) and codes.numel():
        packed, zeros = prepack(codes), torch.zeros(len(codes), dtype=torch.int32)

        def integer(qx: Tensor, dtype: torch.dtype) -> Tensor:
            return _qlinear(qx, packed, scale, bias, dtype, zeros)

        return integer
    kind = exact_dtype(columns, act_bits, 8)
    weight = codes.to(kind)

    def floating(qx: Tensor, dtype: torch.dtype) -> Tensor:
        with integer_reference.exact_floats(qx):
            total = F.linear(qx.to(kind), weight).float()
        total *= scale
        if bias is not None:
            total += bias
        return total.to(dtype)

    return floating


def linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """Quantized ``F.linear``; equals `integer_reference.linear` up to float32 rounding. Not differentiable.

    Args:
        x: `[..., K]` float32, bfloat16 or float16, any strides.
        packed: From `pack_linear`.

    Returns:
        `[..., N]` in the dtype of ``x``, contiguous.

    Raises:
        KernelError: ``x`` has another number of channels.
        InputError: ``x`` holds a NaN.
    """
    integer_reference.check_input(x, packed.operands)
    rows, width = x.detach().reshape(-1, x.shape[-1]), len(packed.total)
    dtype = x.dtype if x.dtype in (torch.float32, torch.bfloat16) else torch.float32
    if len(rows) == 0:
        y = torch.empty(0, width, dtype=dtype)
    elif packed.operands.act is None:
        y = _linear_per_token(rows, packed, dtype)
    elif packed.outer is None:
        y = packed.contract(quantize(rows, packed), dtype)
    else:
        y = _linear_with_outer(rows, packed, packed.outer, dtype)
    return y.reshape(*x.shape[:-1], width).to(x.dtype)


def quantize(x: Tensor, packed: PackedLinear) -> Tensor:
    """Activation codes of a linear, `[M, K]` floating point to `[M, K]` uint8.

    The same codes as `integer_reference.quantize_codes` and `quantize_dynamic`, bit for bit.

    Raises:
        InputError: ``x`` holds a NaN.
    """
    codes = torch.empty(x.shape, dtype=torch.uint8)
    static = packed.operands.act is not None
    width = x.shape[1] if static else _padded(x.shape[1])
    block = block_rows(len(x), width)
    positions = torch.empty(block, width)
    for values, target in zip(_split(x, block), _split(codes, block), strict=True):
        if static:
            _codes_of(values, packed, positions[: len(values)], target)
        else:
            _token_codes(values, packed, positions[: len(values)])
            target.copy_(positions[: len(values), : x.shape[1]])
    return codes


def _split(tensor: Tensor, size: int, axis: int = 0) -> tuple[Tensor, ...]:
    """Typed ``Tensor.split``; no pieces at all of an empty axis."""
    return torch.split(tensor, size, axis) if tensor.shape[axis] else ()


def _codes_of(values: Tensor, packed: PackedLinear, positions: Tensor, target: Tensor) -> None:
    """One block of `quantize`; leaves the codes as floats in ``positions``."""
    _scaled(values, packed.reciprocal, positions)
    positions.add_(packed.offset)
    _round(positions, packed.operands.act_bits)
    target.copy_(positions)


def _scaled(values: Tensor, factor: float | Tensor | None, out: Tensor) -> None:
    """``values * factor`` in float32. Narrow floats are widened first: with a scalar torch would multiply in theirs."""
    if factor is None:
        out.copy_(values)
    elif values.dtype == torch.float32:
        torch.mul(values, factor, out=out)
    else:
        out.copy_(values).mul_(factor)


def _round(positions: Tensor, bits: int) -> None:
    """Positions to codes, in place; refuses NaN.

    Raises:
        InputError: A position is not a number.
    """
    flat = positions.round_().clamp_(0, (1 << bits) - 1).view(-1)
    # Clamped values cannot overflow, so their squares sum to NaN only if one of them is: much cheaper than isnan().
    if torch.dot(flat, flat).isnan():
        raise integer_reference.nan_error()


def block_rows(rows: int, floats_per_row: int) -> int:
    """Rows whose working set of ``floats_per_row`` float32 each fits the caches of all threads; 1 to ``rows``."""
    fitting = _BLOCK_BYTES * torch.get_num_threads() // (4 * max(1, floats_per_row))
    return max(1, min(rows, max(_MIN_ROWS, fitting)))


def _linear_with_outer(x: Tensor, packed: PackedLinear, outer: Tensor, dtype: torch.dtype) -> Tensor:
    """A static range, and a weight shift that the codes do not absorb: the shift is added as an outer product."""
    y = torch.empty(len(x), len(packed.total), dtype=dtype)
    block = block_rows(len(x), x.shape[1] + y.shape[1])
    positions, codes = torch.empty(block, x.shape[1]), torch.empty(block, x.shape[1], dtype=torch.uint8)
    for values, target in zip(_split(x, block), _split(y, block), strict=True):
        n = len(values)
        _codes_of(values, packed, positions[:n], codes[:n])
        part = packed.contract(codes[:n], torch.float32)
        _addcmul(part, positions[:n].sum(1, keepdim=True), outer, target)
    return y


def _linear_per_token(x: Tensor, packed: PackedLinear, dtype: torch.dtype) -> Tensor:
    """Ranges per token: minimum and maximum, codes, contraction and epilogue of one block of rows at a time."""
    y = torch.empty(len(x), len(packed.total), dtype=dtype)
    width = _padded(x.shape[1])
    block = block_rows(len(x), width + y.shape[1])
    values, codes = torch.empty(block, width), torch.empty(block, width, dtype=torch.uint8)
    for rows, target in zip(_split(x, block), _split(y, block), strict=True):
        lower, step = _token_codes(rows, packed, values[: len(rows)])
        part = packed.contract(codes[: len(rows)].copy_(values[: len(rows)]), torch.float32)
        if packed.outer is not None:
            padding = values[: len(rows), :1] * (width - x.shape[1])
            part.addcmul_(values[: len(rows)].sum(1, keepdim=True) - padding, packed.outer)
        # step * (part + lower / step * total) + bias: one pass less than adding lower * total + bias
        part.addcmul_(lower / step, packed.total)
        if packed.operands.bias is None:
            target.copy_(part.mul_(step))
        else:
            _addcmul(packed.operands.bias, part, step, target)
    return y


def _token_codes(rows: Tensor, packed: PackedLinear, values: Tensor) -> tuple[Tensor, Tensor]:
    """Fill ``values`` with codes as floats, padded; return each token's lower bound and step, `[n, 1]`."""
    channels, bits = rows.shape[1], packed.operands.act_bits
    _scaled(rows, packed.reciprocal, values[:, :channels])
    values[:, channels:] = values[:, :1]
    lower, upper = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    step = step_size(lower, upper, bits)
    values.mul_(step.reciprocal()).add_(-lower / step)
    _round(values, bits)
    return lower, step


def _padded(channels: int) -> int:
    """Channels of the buffers for ranges per token. Whole groups of lanes make the row reductions five times faster.

    The padding repeats a value of the row, which changes no minimum or maximum, and meets weights of zero.
    """
    return -(-channels // _LANES) * _LANES


def _addcmul(base: Tensor, left: Tensor, right: Tensor, out: Tensor) -> None:
    """``out = base + left * right``, computed in float32 whatever the type of ``out``."""
    if out.dtype == torch.float32:
        torch.addcmul(base, left, right, out=out)
    else:
        out.copy_(torch.addcmul(base, left, right))
