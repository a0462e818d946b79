"""Operands of an attention in the kernels' layout: heads padded for the tensor cores, qparams of both products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from harmoq_ao.common.errors import KernelError
from harmoq_ao.quant import integer_reference
from harmoq_ao.quant.integer_reference import LinearOperands, MatmulOperand
from harmoq_ao.quant.packing import pack, unpack
from harmoq_ao.triton_kernels import operands as linears
from harmoq_ao.triton_kernels.launch import check_vector, power_of_two
from harmoq_ao.triton_kernels.operands import PackedLinear, from_floats, from_operands, padded_columns

LOG2E = 1.4426950408889634
"""Factor of position bias and scores: the kernels' softmax takes ``exp2``."""

APART = -100
"""What authors add to scores between regions, as a rule."""

MAX_HEAD_DIM = 128
FUSED_HEAD_DIM = 32
"""Widest head of an attention that is one kernel with its linears: it holds q, k and v of a window at once."""

_CODES = 32  # shortest contraction of int8
MAX_TOKENS = 256
MAX_KEYS = 1024


@dataclass(frozen=True)
class MatmulQuantizers:
    """Quantizers of both products of an attention, all static (mode "paper").

    Attributes:
        q: Left operand of the scores; ``joint_scale`` `[D]` or None.
        k: Right operand of the scores, `[D, N]`; ``joint_scale`` `[D, 1]` or None.
        attention: Probabilities.
        v: Values.
        relative: The probabilities are rounded relative to the largest one of their row.
    """

    q: MatmulOperand
    k: MatmulOperand
    attention: MatmulOperand
    v: MatmulOperand
    relative: bool = False

    def __post_init__(self) -> None:
        parts = (self.q, self.k, self.attention, self.v)
        if any(part.act is None for part in parts):
            raise KernelError("The attention kernel takes static bounds", found="bounds from the data")
        if self.attention.joint_scale is not None or self.v.joint_scale is not None:
            raise KernelError("The product with the values has no joint scale in the kernel", found="a joint scale")
        if self.q.bits != self.attention.bits or self.k.bits != self.v.bits:
            raise KernelError(
                "Both products of an attention have the same widths in the kernel",
                found=[part.bits for part in parts],
                expected="q like attention, k like v",
            )


@dataclass(frozen=True)
class PackedAttention:
    """A window attention made ready for the kernels; build it with `pack_attention`.

    Attributes:
        qkv: The linear of q, k and v as it is; None where it is not part of the operation.
        qkv_heads: The same with rows ordered `[3, heads, padded head]`, padding rows zero; None where a head has more
            than `FUSED_HEAD_DIM` channels.
        proj: The projection as it is; None where it is not part of the operation.
        proj_heads: The projection with columns ordered `[heads, 32]`: channel ``d`` of a head at ``d * 32 / padded``,
            weights of zero elsewhere, because int8 contractions are at least 32 long; or None, like ``qkv_heads``.
        heads: Number of heads.
        head_dim: Channels of a head.
        padded: Channels of a padded head, the next power of two from 16 on.
        score_scale: `[heads]` float32 factor of the scores.
        cosine: Whether q and k are normalised to length one.
        scale_after: Whether the product is scaled, not q before it; cosines always are.
        bias: `[heads, N, M]` relative position bias of N queries and M keys, times log2(e); or None.
        factors: `[2, padded]` float32: what q and k are multiplied by before rounding; None in mode "deploy".
        bounds: `[4, 4]` float32: reciprocal, offset, step and lower bound of q, k, attention and v; or None.
        left_bits: Width of q and of the probabilities (0 in mode "deploy").
        right_bits: Width of k and v.
        relative: Whether the probabilities are rounded relative to the largest one of their row, and the product
            normalised afterwards.
        apart: What is added to scores between regions.
    """

    qkv: PackedLinear | None
    qkv_heads: PackedLinear | None
    proj: PackedLinear | None
    proj_heads: PackedLinear | None
    heads: int
    head_dim: int
    padded: int
    score_scale: Tensor
    cosine: bool
    scale_after: bool
    bias: Tensor | None
    factors: Tensor | None
    bounds: Tensor | None
    left_bits: int
    right_bits: int
    relative: bool = False
    apart: int = APART

    @property
    def scores(self) -> str:
        """How the scores are scaled: ``cosine``, ``products`` or ``scaled`` (the queries)."""
        if self.cosine:
            return "cosine"
        return "products" if self.scale_after else "scaled"


def pack_attention(
    qkv: tuple[LinearOperands, Tensor, int] | None,
    proj: tuple[LinearOperands, Tensor, int] | None,
    heads: int,
    head_dim: int,
    score_scale: Tensor,
    *,
    bias: Tensor | None = None,
    cosine: bool = False,
    scale_after: bool = False,
    matmuls: MatmulQuantizers | None = None,
    floats: bool = False,
    apart: int = APART,
) -> PackedAttention:
    """Bring an attention into the kernels' layout.

    Args:
        qkv: Operands `[3 C, C]` in the order q, k, v, each `[heads, head_dim]`; packed codes; width. None if q, k and v
            come from elsewhere.
        proj: Likewise `[O, C]`; None if the attention's output is wanted as it is.
        heads: Number of heads.
        head_dim: Channels of a head, at most 128.
        score_scale: `[heads]` float32; ``head_dim**-0.5`` as a rule, ``exp(logit_scale)`` with cosine scores.
        bias: `[heads, N, M]` relative position bias, or None; with qkv there are as many keys as queries.
        cosine: Normalise q and k.
        scale_after: Scale the product of q and k, and not q; rounding tells them apart in mode "paper" only.
        matmuls: Quantize the operands of both products (mode "paper"); None leaves them in 16-bit floats ("deploy").
        floats: Leave the linears in bfloat16 too (`operands.from_floats`).
        apart: What is added to scores between regions.

    Raises:
        KernelError: Shapes or bounds that the kernels do not take.
    """
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise KernelError(
            "The attention kernels do not take this head", found=head_dim, expected=f"1 to {MAX_HEAD_DIM} channels"
        )
    check_vector(score_scale, heads, "score_scale")
    if bias is not None and (bias.dim() != 3 or len(bias) != heads):
        raise KernelError("The position bias does not fit", found=tuple(bias.shape), expected=f"[{heads}, N, M]")
    # Contractions of 16-bit floats are at least 16 long.
    padded, fused = power_of_two(head_dim, 16), head_dim <= FUSED_HEAD_DIM
    make = from_floats if floats else from_operands
    first = None if qkv is None else _checked_qkv(make(*qkv), heads * head_dim)
    projection = None if proj is None else _checked_projection(make(*proj), heads * head_dim)
    return PackedAttention(
        first,
        _pad_rows(*qkv, heads, padded, make) if qkv is not None and fused else None,
        projection,
        _spread_columns(projection, heads, _CODES // padded) if projection is not None and fused else None,
        heads, head_dim, padded, score_scale, cosine, scale_after or cosine,
        # Once here instead of once a score in the kernel.
        None if bias is None else (bias.float() * LOG2E).contiguous(),
        None if matmuls is None else _factors(matmuls, head_dim, padded),
        None if matmuls is None else _bounds(matmuls),
        0 if matmuls is None else matmuls.q.bits,
        0 if matmuls is None else matmuls.k.bits,
        matmuls is not None and matmuls.relative,
        apart,
    )  # fmt: skip


def with_norm(attention: PackedAttention, weight: Tensor | None, bias: Tensor | None) -> PackedAttention:
    """The attention with the affine of a LayerNorm in front folded into qkv's quantizer.

    Raises:
        KernelError: The attention has no qkv of its own.
    """
    if attention.qkv is None:
        raise KernelError("A LayerNorm folds into qkv", found="an attention of given q, k and v")
    qkv, heads = (
        None if linear is None else linears.with_norm(linear, weight, bias)
        for linear in (attention.qkv, attention.qkv_heads)
    )
    return replace(attention, qkv=qkv, qkv_heads=heads)


def regions_of(mask: Tensor) -> Tensor | None:
    """Regions whose tokens attend to each other only, from a mask that is added to scores.

    Args:
        mask: `[windows, N, N]` floats: zero between tokens of a region, -50 or less between regions.

    Returns:
        `[windows, N]` uint8 ids, or None where the mask is zero.

    Raises:
        KernelError: The mask is none of regions, or N is more than 256.
    """
    apart = mask != 0
    if not bool(apart.any()):
        return None
    # A region goes by the first of its tokens.
    ids = (~apart).to(torch.uint8).argmax(2)
    if (
        mask.shape[1] > 256
        or bool((mask[apart] > -50).any())
        or bool((apart != (ids[:, :, None] != ids[:, None])).any())
    ):
        raise KernelError(
            "The mask does not divide windows into regions",
            found=f"{tuple(mask.shape)}, values from {float(mask.min())} to {float(mask.max())}",
            expected="[windows, N, N], N at most 256, zero within regions and -50 or less between them",
        )
    return ids.to(torch.uint8)


def _checked_qkv(packed: PackedLinear, width: int) -> PackedLinear:
    if packed.rows != 3 * width:
        raise KernelError("The qkv linear does not fit", found=packed.rows, expected=3 * width)
    if not packed.static:
        raise KernelError("The attention kernels take static bounds", found="bounds per token")
    return packed


def _checked_projection(packed: PackedLinear, width: int) -> PackedLinear:
    if packed.columns != width or not packed.static:
        raise KernelError(
            "The projection does not fit",
            found=f"{packed.columns} columns, {'static' if packed.static else 'per token'}",
            expected=f"{width} columns, static bounds",
        )
    return packed


def _pad_rows(
    operands: LinearOperands, codes: Tensor, bits: int, heads: int, padded: int, make: Callable[..., PackedLinear]
) -> PackedLinear:
    def spread(value: Tensor) -> Tensor:
        return _spread(value.t(), 3 * heads, padded).t().contiguous()

    columns = operands.weight.shape[1]
    wide = replace(
        operands,
        weight=spread(operands.weight),
        weight_scale=spread(operands.weight_scale),
        weight_shift=operands.weight_shift[:1].expand(3 * heads * padded).contiguous(),
        bias=None if operands.bias is None else spread(operands.bias),
    )
    return make(wide, pack(spread(unpack(codes, bits, columns)), bits), bits)


def _spread_columns(linear: PackedLinear, heads: int, stride: int) -> PackedLinear:
    assert linear.reciprocal is not None
    assert linear.offset is not None

    def spread(value: Tensor, fill: float = 0.0) -> Tensor:
        return _spread(value, heads, _CODES, stride, fill)

    columns = heads * _CODES
    codes = spread(linear.codes[:, : linear.columns])
    # Codes in between are zero as well (half a range as signed: the offset): row sums must not see them.
    return replace(
        linear,
        codes=F.pad(codes, (0, padded_columns(columns) - columns)),
        columns=columns,
        reciprocal=spread(linear.reciprocal),
        offset=spread(linear.offset, float((1 << linear.act_bits) // 2)),
    )


def _spread(value: Tensor, groups: int, width: int, stride: int = 1, fill: float = 0.0) -> Tensor:
    """The last axis, ``groups`` of D, as groups of ``width``: channel ``d`` at ``d * stride``, ``fill`` elsewhere."""
    parts = value.unflatten(-1, (groups, -1))
    out = value.new_full((*parts.shape[:-1], width), fill)
    out[..., : parts.shape[-1] * stride : stride] = parts
    return out.flatten(-2)


def _factors(matmuls: MatmulQuantizers, head_dim: int, padded: int) -> Tensor:
    out = torch.zeros(2, padded)
    for row, operand in enumerate((matmuls.q, matmuls.k)):
        assert operand.act is not None
        scale = None if operand.joint_scale is None else operand.joint_scale.reshape(-1)
        out[row, :head_dim] = integer_reference.static_qparams(operand.act, scale)[0].cpu()
    assert matmuls.q.act is not None
    return out.to(matmuls.q.act.step.device)


def _bounds(matmuls: MatmulQuantizers) -> Tensor:
    rows = []
    for operand in (matmuls.q, matmuls.k, matmuls.attention, matmuls.v):
        assert operand.act is not None
        reciprocal, offset = integer_reference.static_qparams(operand.act)
        rows.append(torch.stack([v.reshape(()) for v in (reciprocal, offset, operand.act.step, operand.act.lower)]))
    return torch.stack(rows)


__all__ = [
    "FUSED_HEAD_DIM",
    "LOG2E",
    "MAX_HEAD_DIM",
    "MAX_KEYS",
    "MAX_TOKENS",
    "MatmulQuantizers",
    "PackedAttention",
    "pack_attention",
    "regions_of",
    "with_norm",
]
