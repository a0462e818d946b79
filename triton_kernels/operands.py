"""Operands of a linear in the kernels' layout, unpacked once from a site's `LinearOperands`.

Kernels contract signed activation codes ``s = q - h``, ``h = 2**(act_bits - 1)``, with effective weight codes ``E``
(``2 w + 1`` for mid-rise weights, ``factor = 2``; else ``w``, ``factor = 1``), so that a row of weights needs no shift
of its own::

    A_i = sum_j s_j E_ij + start_i = sum_j q_j E_ij                       start_i = h sum_j E_ij
    y_i = scale_i A_i + constant_i                                        static qparams
    y_i = step (scale_i A_i) + lower total_i + constant_i                 qparams per token

``A`` is ``factor * sum_j q_j w_ij + (factor - 1) sum_j q_j`` of the canonical accumulator, exactly. ``E`` is stored as
int8 at any width: a byte of a weight costs less than the instructions that would unpack it in every program. Only
mid-rise weights of 8 bits do not fit; then ``w`` is stored, and ``A`` is
``2 (sum_j s_j w_ij + start_i / 2) + sum_j s_j``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from harmoq_ao.common.errors import KernelError
from harmoq_ao.quant import integer_reference
from harmoq_ao.quant.integer_reference import LinearOperands
from harmoq_ao.quant.packing import unpack
from harmoq_ao.triton_kernels.launch import check_bits, check_vector, power_of_two

MAX_COLUMNS = (2**31 - 1) // (255 * 255)
"""Longest contraction whose ``A`` int32 always holds."""

_BLOCK_COLUMNS = 128
_ONE_BLOCK = 256


def padded_columns(columns: int) -> int:
    """Columns of a row of weights: whole blocks of any kernel, so that none asks where a row ends."""
    return power_of_two(columns, 32) if columns <= _ONE_BLOCK else columns + -columns % _BLOCK_COLUMNS


@dataclass(frozen=True)
class Norm:
    """A LayerNorm behind an operation.

    Attributes:
        weight: `[N]` float32.
        bias: `[N]` float32.
        eps: Added to the variance.
    """

    weight: Tensor
    bias: Tensor
    eps: float


def check_norm(norm: Norm | None, columns: int) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a LayerNorm behind an operation, or None for each.

    Raises:
        KernelError: They are not float32 `[columns]`.
    """
    if norm is None:
        return None, None
    check_vector(norm.weight, columns, "The weight of the LayerNorm behind")
    check_vector(norm.bias, columns, "The bias of the LayerNorm behind")
    return norm.weight, norm.bias


@dataclass(frozen=True)
class PackedLinear:
    """A linear made ready for the kernels; build it with `from_operands`.

    Attributes:
        codes: `[N, padded_columns(K)]` int8, ``E``, or ``w`` if ``doubled``; bfloat16 weights if ``act_bits`` is 0;
            zeros behind K.
        columns: K.
        doubled: Whether weights are mid-rise with 8 bits.
        mid_rise: Whether weights are ``w + 1/2`` steps (else ``w``).
        act_bits: Width of an activation code, 2 to 8, or 0 where nothing is rounded to codes.
        start: `[N]` int32, where accumulators start; half of it if ``doubled``.
        scale: `[N]` float32, value of one unit of ``A`` (per token: of one unit times the step).
        constant: `[N]` float32: bias, and with static bounds all that is constant with it.
        total: `[N]` float32, what one unit of a token's lower bound adds; None with static bounds.
        reciprocal: `[K]` float32 that the input is multiplied by; None for ones (per token only).
        offset: `[K]` float32 that is added then; None per token.
    """

    codes: Tensor
    columns: int
    doubled: bool
    mid_rise: bool
    act_bits: int
    start: Tensor
    scale: Tensor
    constant: Tensor
    total: Tensor | None
    reciprocal: Tensor | None
    offset: Tensor | None

    def __post_init__(self) -> None:
        if self.act_bits:
            check_bits(self.act_bits, "activation")
        row, dtype = padded_columns(self.columns), torch.int8 if self.act_bits else torch.bfloat16
        if self.codes.dtype != dtype or self.codes.dim() != 2 or self.codes.shape[1] != row:
            raise KernelError(
                "Weights have the wrong shape",
                found=f"{self.codes.dtype} {tuple(self.codes.shape)}",
                expected=f"{dtype} [N, {row}] for {self.columns} columns",
                remedy="unpack them with from_operands",
            )
        if self.columns > MAX_COLUMNS:
            raise KernelError("The contraction is too long", found=self.columns, expected=f"at most {MAX_COLUMNS}")
        check_vector(self.start, len(self.codes), "start", torch.int32)
        for name in ("scale", "constant", "total"):
            check_vector(getattr(self, name), len(self.codes), name)
        for name in ("reciprocal", "offset"):
            check_vector(getattr(self, name), self.columns, name)
        if (self.total is None) == (self.offset is None):
            raise KernelError("A linear has static bounds (offset) or bounds per token (total)", found="both or none")

    @property
    def rows(self) -> int:
        """N."""
        return len(self.codes)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Arguments of a kernel: ``weight_ptr``, ``start_ptr``, ``scale_ptr``, ``constant_ptr``, ``reciprocal_ptr``,
        ``offset_ptr``."""
        return self.codes, self.start, self.scale, self.constant, self.reciprocal, self.offset

    def constants(self, suffix: str = "") -> dict[str, int]:
        """Constexprs of a kernel, ``suffix`` behind each name."""
        return {
            f"ROW{suffix}": self.codes.shape[1],
            f"DOUBLED{suffix}": self.doubled,
            f"ACT_BITS{suffix}": self.act_bits,
        }

    @property
    def static(self) -> bool:
        """Whether the activation has static bounds."""
        return self.offset is not None

    def effective_codes(self) -> Tensor:
        """``E``, `[N, K]` int16; for references."""
        codes = self.codes[:, : self.columns].to(torch.int16)
        return codes * 2 + 1 if self.doubled else codes


def from_operands(operands: LinearOperands, packed_codes: Tensor, weight_bits: int) -> PackedLinear:
    """Bring a quantized linear into the kernels' layout.

    Args:
        operands: From ``QuantizedLinear.operands()``.
        packed_codes: Its ``codes``, `[N, packed_length(K, weight_bits)]`.
        weight_bits: Width of a weight code, 2 to 8.

    Raises:
        KernelError: Weight shifts other than one half for all rows or zero for all rows; static bounds that are not one
            pair; a contraction too long for int32.
    """
    check_bits(weight_bits, "weight")
    shift, columns = operands.weight_shift, operands.weight.shape[1]
    mid_rise = bool((shift == 0.5).all())
    if not mid_rise and bool((shift != 0).any()):
        raise KernelError(
            "The kernels take mid-rise weights or weights with zero at the middle code",
            found=f"shifts from {float(shift.min())} to {float(shift.max())}",
            expected="0.5 for all rows, or 0 for all rows",
        )
    doubled = mid_rise and weight_bits == 8
    signed = unpack(packed_codes, weight_bits, columns).to(torch.int16) - (1 << (weight_bits - 1))
    effective = signed * 2 + 1 if mid_rise else signed
    # What the shift to signed codes takes away, the accumulator begins with. Half a range is even: so is its half.
    start = (effective.sum(1, dtype=torch.int64) << (operands.act_bits - 1)) // (2 if doubled else 1)
    codes = (signed if doubled else effective).to(torch.int8)
    total = integer_reference.weight_total(operands.weight, operands.weight_scale, shift)
    # Mid-rise codes were doubled; halving a float is exact.
    scale = operands.weight_scale / (2 if mid_rise else 1)
    bias = torch.zeros_like(scale) if operands.bias is None else operands.bias
    act, joint = operands.act, operands.joint_scale
    reciprocal: Tensor | None = None if joint is None else joint.reciprocal()
    offset: Tensor | None = None
    # Static qparams fold into the epilogue; per token, the kernel applies them.
    if act is not None:
        reciprocal, offset = (
            value.reshape(-1).expand(columns).contiguous()
            for value in integer_reference.static_qparams(_one_pair(act), joint, operands.joint_shift)
        )
        scale, bias = (
            scale * act.step.reshape(()),
            integer_reference.fold_bias(total, act.lower.reshape(()), operands.bias),
        )
    return PackedLinear(
        F.pad(codes, (0, padded_columns(columns) - columns)), columns, doubled, mid_rise, operands.act_bits,
        start.to(torch.int32), scale.contiguous(), bias.contiguous(), total if act is None else None,
        reciprocal, offset,
    )  # fmt: skip


def from_floats(operands: LinearOperands, packed_codes: Tensor, weight_bits: int) -> PackedLinear:
    """The same linear in bfloat16, in the same kernels: what integers alone give is what it is slower by.

    Args:
        operands: As of `from_operands`; values of weight codes become the weights, joint scale and shift stay.
        packed_codes: Not read, like the next one; both as of `from_operands`.
        weight_bits: Width of a weight code.
    """
    rows, columns = operands.weight.shape
    weights = (operands.weight.float() + operands.weight_shift[:, None]) * operands.weight_scale[:, None]
    ones = torch.ones(columns, device=weights.device)
    reciprocal = ones if operands.joint_scale is None else operands.joint_scale.reciprocal()
    offset = ones * 0 if operands.joint_shift is None else -operands.joint_shift * reciprocal
    return PackedLinear(
        F.pad(weights.bfloat16(), (0, padded_columns(columns) - columns)), columns, False, False, 0,
        torch.zeros(rows, dtype=torch.int32, device=weights.device), torch.ones(rows, device=weights.device),
        torch.zeros(rows, device=weights.device) if operands.bias is None else operands.bias, None,
        reciprocal.contiguous(), offset.contiguous(),
    )  # fmt: skip


def fold_norm(weight: Tensor | None, bias: Tensor | None, reciprocal: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Reciprocal and offset that also apply a LayerNorm's affine: ``w r`` and ``b r + c``, `[K]` or 0-d."""
    factor = reciprocal if weight is None else weight.float() * reciprocal
    return factor, offset if bias is None else bias.float() * reciprocal + offset


def with_norm(linear: PackedLinear, weight: Tensor | None, bias: Tensor | None) -> PackedLinear:
    """The linear with a LayerNorm's affine folded into its quantizer; the kernel then only standardizes.

    Raises:
        KernelError: The activation is quantized per token.
    """
    if linear.reciprocal is None or linear.offset is None:
        raise KernelError("A LayerNorm folds into static bounds only", found="bounds per token", expected="static")
    reciprocal, offset = fold_norm(weight, bias, linear.reciprocal, linear.offset)
    return replace(linear, reciprocal=reciprocal.contiguous(), offset=offset.contiguous())


def _one_pair(act: integer_reference.Affine) -> integer_reference.Affine:
    if act.step.numel() != 1 or act.lower.numel() != 1:
        raise KernelError(
            "Static bounds of a linear must be one pair for the whole tensor",
            found=tuple(act.step.shape),
            expected="a single number",
        )
    return integer_reference.Affine(act.step.reshape(()), act.lower.reshape(()), act.bits)


__all__ = [
    "MAX_COLUMNS",
    "Norm",
    "PackedLinear",
    "fold_norm",
    "from_floats",
    "from_operands",
    "padded_columns",
    "with_norm",
]
