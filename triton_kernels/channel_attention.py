"""Attention among channels, whose scores are sums over all tokens of an image, in kernels that need few of their bytes.

For each image and head, with queries and keys of length one along the tokens::

    S_ij = factor sum_t q_ti k_tj / (max(|q_i|, eps) max(|k_j|, eps))
    P    = softmax(S)                                             over j
    y_ti = sum_j P_ij v_tj

In mode "deploy" the contractions are of floats with float32 sums. In mode "paper" normalised queries and keys, ``P``
and v are rounded to codes, whose contractions are exact: 16-bit floats hold codes, float32 the products of a block of
tokens, int32 those of a part of an image, int64 all of them. Relative maps (`quant/relative_maps.py`) round
``exp(S - max S)`` and divide the product by the sum of what it was rounded to.

Sums come from parts of an image, which programs of their own write down: no atomics, the same bits each time. `sums`
(twice in mode "paper": lengths first, as codes need them), `maps` and `product` are operators of torch; `reference` is
all of them in plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from harmoq_ao.common.errors import KernelError
from harmoq_ao.quant.integer_reference import Affine, product_from_sums, quantize_codes, static_qparams
from harmoq_ao.quant.relative_maps import relative_rows
from harmoq_ao.triton_kernels.attention_operands import LOG2E
from harmoq_ao.triton_kernels.device import float_codes
from harmoq_ao.triton_kernels.launch import (
    FLOATS,
    OPTIONS,
    blocks,
    check_vector,
    on_device,
    power_of_two,
    precision,
)

MAX_WIDTH = 128
"""Widest head."""

_LOG2E = tl.constexpr(LOG2E)
_BLOCK = 128  # tokens that a program takes at once, at most: 128 * 255 * 255 < 2**24
_PART, _PARTS = 1024, 128  # tokens of a part of an image, and parts, where both can be had
_LONGEST = 32768  # 32768 * 255 * 255 < 2**31


@dataclass(frozen=True)
class PackedChannels:
    """An attention among channels; build it with `pack_channels`.

    Attributes:
        heads: Number of heads.
        width: Channels of a head.
        factor: `[heads]` float32, of the scores.
        eps: Smallest lengths of queries and keys.
        bounds: `[4, 4]` float32: reciprocal, offset, step and lower bound of queries, keys, map and values; None in
            mode "deploy".
        bits: Widths of their codes; zeros in mode "deploy".
        relative: Whether the map is rounded relative to its rows' largest entries (`quant.relative_maps`).
    """

    heads: int
    width: int
    factor: Tensor
    eps: tuple[float, float]
    bounds: Tensor | None
    bits: tuple[int, int, int, int]
    relative: bool = False


def pack_channels(
    heads: int,
    width: int,
    factor: Tensor,
    eps: tuple[float, float],
    quantizers: Sequence[Affine] | None = None,
    relative: bool = False,
) -> PackedChannels:
    """Bring an attention among channels into the kernels' form.

    Args:
        heads: Number of heads.
        width: Channels of a head, at most 128.
        factor: `[heads]` float32, of the scores.
        eps: Smallest lengths of queries and keys.
        quantizers: Of queries, keys, map and values, a single range each (mode "paper"); None leaves them in floats.
        relative: Whether the map's range is of a map relative to its rows' largest entries.

    Raises:
        KernelError: A head or a range that the kernels do not take.
    """
    if not 1 <= width <= MAX_WIDTH:
        raise KernelError("The channel attention does not take this head", found=width, expected=f"1 to {MAX_WIDTH}")
    check_vector(factor, heads, "factor")
    if quantizers is None:
        return PackedChannels(heads, width, factor, eps, None, (0, 0, 0, 0))
    several = [tuple(act.step.shape) for act in quantizers if act.step.numel() != 1 or act.lower.numel() != 1]
    if several:
        raise KernelError("Static bounds of a product must be one pair", found=several[0], expected="a single number")
    rows = [[*static_qparams(act), act.step, act.lower] for act in quantizers]
    bounds = torch.stack([torch.stack([value.reshape(()) for value in row]) for row in rows])
    q, k, probabilities, v = (act.bits for act in quantizers)
    return PackedChannels(heads, width, factor, eps, bounds, (q, k, probabilities, v), relative)


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _lengths(
    squares_ptr: tl.tensor, eps: float, parts: int, STRIDE: tl.constexpr, PADDED: tl.constexpr, BLOCK_S: tl.constexpr
) -> tl.tensor:
    """Lengths of the channels of a head, at least ``eps``, `[PADDED]`, from their squares in each part."""
    lanes = tl.arange(0, PADDED)
    total = tl.zeros([PADDED], tl.float32)
    for first in range(0, parts, BLOCK_S):
        part = first + tl.arange(0, BLOCK_S)
        at = squares_ptr + part[:, None] * STRIDE + lanes[None, :]
        total += tl.sum(tl.load(at, mask=(part < parts)[:, None], other=0.0), 0)
    return tl.maximum(tl.sqrt_rn(total), eps)


@triton.jit
def _codes(x: tl.tensor, factor: tl.tensor, offset_ptr: tl.tensor, mask: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Codes of ``x * factor + offset`` as whole float32 numbers; 0 outside ``mask``."""
    return tl.where(mask, float_codes(x.to(tl.float32) * factor + tl.load(offset_ptr), BITS), 0.0)


@triton.jit
def sums_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    squares_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    out_ptr: tl.tensor,
    length: int,
    part_length: int,
    parts: int,
    q_eps: float,
    k_eps: float,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    GRAM: tl.constexpr,
    LEFT_BITS: tl.constexpr,
    RIGHT_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    """Sums over a part of an image for a head: `[2, PADDED]` of q and k, with ``GRAM`` `[PADDED, PADDED]` of products.

    Of squares and floats; or, with ``squares_ptr``, of codes, as int32.
    """
    head, part, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pair, lanes = image * tl.num_programs(0) + head, tl.arange(0, PADDED)
    q_ptr, k_ptr = q_ptr + head * WIDTH, k_ptr + head * WIDTH
    kind: tl.constexpr = tl.float32 if squares_ptr is None else tl.int32
    q_sums, k_sums = tl.zeros([PADDED], kind), tl.zeros([PADDED], kind)
    acc = tl.zeros([PADDED, PADDED], kind)
    # Harmless values: the compiler drops what no branch below reads.
    q_factor, k_factor = tl.zeros([PADDED], tl.float32), tl.zeros([PADDED], tl.float32)
    if squares_ptr is not None:
        squares_ptr += pair.to(tl.int64) * parts * 2 * PADDED
        q_factor = tl.div_rn(tl.load(bounds_ptr), _lengths(squares_ptr, q_eps, parts, 2 * PADDED, PADDED, 16))
        k_factor = tl.div_rn(
            tl.load(bounds_ptr + 4), _lengths(squares_ptr + PADDED, k_eps, parts, 2 * PADDED, PADDED, 16)
        )
    for first in range(0, part_length, BLOCK_T):
        tokens = part * part_length + first + tl.arange(0, BLOCK_T)
        mask = (tokens < length)[:, None] & (lanes < WIDTH)[None, :]
        # Rows times channels of a large image exceed 2**31.
        rows = image.to(tl.int64) * length + tokens
        q = tl.load(q_ptr + rows[:, None] * Q_STRIDE + lanes[None, :], mask=mask, other=0.0)
        k = tl.load(k_ptr + rows[:, None] * K_STRIDE + lanes[None, :], mask=mask, other=0.0)
        if squares_ptr is not None:
            q = _codes(q, q_factor[None, :], bounds_ptr + 1, mask, LEFT_BITS)
            k = _codes(k, k_factor[None, :], bounds_ptr + 5, mask, RIGHT_BITS)
            acc += tl.dot(tl.trans(q.to(DTYPE)), k.to(DTYPE), input_precision=PRECISION).to(tl.int32)
            q_sums, k_sums = q_sums + tl.sum(q, 0).to(tl.int32), k_sums + tl.sum(k, 0).to(tl.int32)
        else:
            if GRAM:
                acc = tl.dot(tl.trans(q.to(DTYPE)), k.to(DTYPE), acc, input_precision=PRECISION)
            q, k = q.to(tl.float32), k.to(tl.float32)
            q_sums, k_sums = q_sums + tl.sum(q * q, 0), k_sums + tl.sum(k * k, 0)
    rows_of: tl.constexpr = 2 + PADDED if GRAM else 2
    out_ptr += (pair.to(tl.int64) * parts + part) * rows_of * PADDED
    tl.store(out_ptr + lanes, q_sums)
    tl.store(out_ptr + PADDED + lanes, k_sums)
    if GRAM:
        tl.store(out_ptr + (2 + lanes)[:, None] * PADDED + lanes[None, :], acc)


@triton.jit
def maps_kernel(
    sums_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    out_ptr: tl.tensor,
    length: int,
    parts: int,
    heads: int,
    q_eps: float,
    k_eps: float,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BITS: tl.constexpr,
    RELATIVE: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    """The map of a head, `[PADDED, PADDED]`, from the sums of all parts: probabilities, or their codes of ``BITS``."""
    pair, lanes = tl.program_id(0), tl.arange(0, PADDED)
    rows_of: tl.constexpr = (2 + PADDED) * PADDED
    sums_ptr += pair.to(tl.int64) * parts * rows_of
    acc = _total(sums_ptr + 2 * PADDED, parts, rows_of, PADDED, PADDED, BLOCK_S).to(tl.float32)
    if BITS == 0:
        acc = acc / _lengths(sums_ptr, q_eps, parts, rows_of, PADDED, 16)[:, None]
        scores = acc / _lengths(sums_ptr + PADDED, k_eps, parts, rows_of, PADDED, 16)[None, :]
    else:
        q_step, q_lower = tl.load(bounds_ptr + 2), tl.load(bounds_ptr + 3)
        k_step, k_lower = tl.load(bounds_ptr + 6), tl.load(bounds_ptr + 7)
        sides = _total(sums_ptr, parts, rows_of, 2, PADDED, BLOCK_S).to(tl.float32)
        first = (tl.arange(0, 2) == 0)[:, None]
        q_sums, k_sums = tl.sum(tl.where(first, sides, 0.0), 0), tl.sum(tl.where(first, 0.0, sides), 0)
        outer = (q_sums * q_step + q_lower * length) * k_lower
        scores = acc * q_step * k_step + outer[:, None] + (k_sums * k_step * q_lower)[None, :]
    scores = tl.where((lanes < WIDTH)[None, :], scores * (tl.load(factor_ptr + pair % heads) * _LOG2E), float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    if not RELATIVE:
        weights = weights / tl.sum(weights, 1)[:, None]
    if BITS != 0:
        inside = (lanes < WIDTH)[None, :]
        weights = _codes(weights, tl.load(bounds_ptr + 8), bounds_ptr + 9, inside, BITS)
    out_ptr += pair * PADDED * PADDED
    tl.store(out_ptr + lanes[:, None] * PADDED + lanes[None, :], weights.to(out_ptr.dtype.element_ty))


@triton.jit
def _total(
    sums_ptr: tl.tensor, parts: int, STRIDE: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """`[ROWS, PADDED]` sums over all parts, in their order: float32, or int64 of int32."""
    kind: tl.constexpr = tl.float32 if sums_ptr.dtype.element_ty == tl.float32 else tl.int64
    at = tl.arange(0, ROWS)[:, None] * PADDED + tl.arange(0, PADDED)[None, :]
    total = tl.zeros([ROWS, PADDED], kind)
    for first in range(0, parts, BLOCK_S):
        part = first + tl.arange(0, BLOCK_S)
        inside = (part < parts)[:, None, None]
        found = tl.load(sums_ptr + part[:, None, None] * STRIDE + at[None, :, :], mask=inside, other=0)
        total += tl.sum(found.to(kind), 0)
    return total


@triton.jit
def product_kernel(
    v_ptr: tl.tensor,
    maps_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    out_ptr: tl.tensor,
    length: int,
    V_STRIDE: tl.constexpr,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BITS: tl.constexpr,
    RELATIVE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    """``BLOCK_T`` tokens of an image and head: values times the map."""
    head, image, lanes = tl.program_id(0), tl.program_id(2), tl.arange(0, PADDED)
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = (tokens < length)[:, None] & (lanes < WIDTH)[None, :]
    rows = image.to(tl.int64) * length + tokens
    v = tl.load(v_ptr + head * WIDTH + rows[:, None] * V_STRIDE + lanes[None, :], mask=mask, other=0.0)
    pair = image * tl.num_programs(0) + head
    weights = tl.load(maps_ptr + pair * PADDED * PADDED + lanes[:, None] * PADDED + lanes[None, :])
    if BITS != 0:
        codes = _codes(v, tl.load(bounds_ptr + 12), bounds_ptr + 13, mask, BITS)
        acc = tl.dot(codes.to(DTYPE), tl.trans(weights), input_precision=PRECISION)
        left_step, left_lower = tl.load(bounds_ptr + 10), tl.load(bounds_ptr + 11)
        # Both sums enter: offsets of the operands times what the other one sums to.
        of_map = tl.sum(weights.to(tl.float32), 1) * left_step + left_lower * WIDTH
        acc = (acc * left_step + (tl.sum(codes, 1) * left_lower)[:, None]) * tl.load(bounds_ptr + 14)
        acc += (of_map * tl.load(bounds_ptr + 15))[None, :]
        if RELATIVE:  # rows sum to one again
            acc = acc * (1.0 / tl.maximum(of_map, 1e-30))[None, :]
    else:
        acc = tl.dot(v.to(DTYPE), tl.trans(weights), input_precision=PRECISION)
    out_at = out_ptr + rows[:, None] * OUT + (head * WIDTH + lanes)[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=mask)


# --- launches ---------------------------------------------------------------------------------------------------------


def split(length: int) -> tuple[int, int]:
    """In how many parts an image of ``length`` tokens is summed, and tokens of each: whole blocks."""
    part = min(max(_PART, blocks(length, _PARTS)), _LONGEST)
    part = blocks(part, _BLOCK) * _BLOCK
    return blocks(length, part), part


def warps(padded: int) -> int:
    """Warps of a program, by the padded width of a head."""
    return 8 if padded > 64 else 4


def token_block(padded: int) -> int:
    """Tokens that a program takes at once."""
    return _BLOCK if padded == 16 else 64


def part_block(padded: int) -> int:
    """Parts whose sums `maps_kernel` loads at once."""
    return max(1, 4096 // (padded * padded))


def launch_sums(
    query: Tensor,
    key: Tensor,
    squares: Tensor | None,
    bounds: Tensor | None,
    heads: int,
    images: int,
    eps: Sequence[float],
    bits: Sequence[int],
) -> Tensor:
    """Run `sums_kernel`; arguments as in `reference_sums`.

    Raises:
        KernelError: Matrices that do not fit.
    """
    width, out = _check_rows(query, key, heads, images), _empty_sums(query, squares, bounds, heads, images)
    length = len(query) // images
    parts, part = split(length)
    padded = out.shape[-1]
    if out.numel():
        with on_device(query):
            sums_kernel[(heads, parts, images)](
                query, key, squares, bounds, out, length, part, parts, float(eps[0]), float(eps[1]),
                Q_STRIDE=query.stride(0), K_STRIDE=key.stride(0), WIDTH=width, PADDED=padded,
                GRAM=out.shape[-2] > 2, LEFT_BITS=bits[0], RIGHT_BITS=bits[1],
                **_contraction(query.dtype, bounds), BLOCK_T=token_block(padded),
                num_warps=warps(padded), num_stages=2, **OPTIONS,
            )  # fmt: skip
    return out


def launch_maps(
    sums: Tensor,
    factor: Tensor,
    bounds: Tensor | None,
    width: int,
    length: int,
    eps: Sequence[float],
    bits: Sequence[int],
    relative: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Run `maps_kernel`; arguments as in `reference_maps`."""
    images, heads, parts, _, padded = sums.shape
    out = torch.empty(images, heads, padded, padded, dtype=dtype, device=sums.device)
    with on_device(sums):
        maps_kernel[(images * heads,)](
            sums, factor, bounds, out, length, parts, heads, float(eps[0]), float(eps[1]), WIDTH=width, PADDED=padded,
            BITS=bits[2], RELATIVE=relative, BLOCK_S=part_block(padded), num_warps=warps(padded), num_stages=1,
            **OPTIONS,
        )  # fmt: skip
    return out


def launch_product(value: Tensor, maps: Tensor, bounds: Tensor | None, bits: Sequence[int], relative: bool) -> Tensor:
    """Run `product_kernel`; arguments as in `reference_product`.

    Raises:
        KernelError: Matrices that do not fit.
    """
    images, heads, padded, _ = maps.shape
    width = _check_rows(value, value, heads, images)
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    length = len(value) // images
    if out.numel():
        with on_device(value):
            product_kernel[(heads, blocks(length, token_block(padded)), images)](
                value, maps, bounds, out, length, V_STRIDE=value.stride(0), OUT=value.shape[1], WIDTH=width,
                PADDED=padded, BITS=bits[3], RELATIVE=relative, **_contraction(value.dtype, bounds),
                BLOCK_T=token_block(padded), num_warps=warps(padded), num_stages=1, **OPTIONS,
            )  # fmt: skip
    return out


def _contraction(dtype: torch.dtype, bounds: Tensor | None) -> dict[str, Any]:
    """Type of the operands of contractions and how they are multiplied, as constexprs."""
    compute = _operand(dtype, bounds)
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    return {"DTYPE": types[compute], "PRECISION": precision(compute)}


def _operand(dtype: torch.dtype, bounds: Tensor | None) -> torch.dtype:
    """Type of the operands of contractions: that of the matrices, or one in which codes are exact."""
    return dtype if bounds is None else torch.float16


def _check_rows(left: Tensor, right: Tensor, heads: int, images: int) -> int:
    """Channels of a head."""
    fits = left.shape == right.shape and left.dtype == right.dtype and left.dtype in FLOATS and left.dim() == 2
    fits = fits and not (left.shape[1] % heads or len(left) % images)
    if not fits or left.stride(1) != 1 or right.stride(1) != 1:
        raise KernelError(
            "The matrices of a channel attention do not fit",
            found=[f"{x.dtype} {tuple(x.shape)} with strides {x.stride()}" for x in (left, right)],
            expected=f"alike floats [{images} images of tokens, {heads} heads of channels], unit stride along channels",
        )
    return left.shape[1] // heads


def _empty_sums(query: Tensor, squares: Tensor | None, bounds: Tensor | None, heads: int, images: int) -> Tensor:
    padded, parts = power_of_two(query.shape[1] // heads, 16), split(len(query) // images)[0]
    rows = 2 if bounds is not None and squares is None else 2 + padded
    dtype = torch.float32 if squares is None else torch.int32
    return torch.empty(images, heads, parts, rows, padded, dtype=dtype, device=query.device)


# --- references -------------------------------------------------------------------------------------------------------


def reference_sums(
    query: Tensor,
    key: Tensor,
    squares: Tensor | None,
    bounds: Tensor | None,
    heads: int,
    images: int,
    eps: Sequence[float],
    bits: Sequence[int],
) -> Tensor:
    """Sums over the parts of each image.

    Args:
        query: `[images * tokens, heads * D]` floats.
        key: Likewise.
        squares: With ``bounds``: what this function returns without, or None at first.
        bounds: Of `PackedChannels`.
        heads: Number of heads.
        images: Size of the batch.
        eps: Of `PackedChannels`.
        bits: Likewise.

    Returns:
        `[images, heads, parts, 2 or 2 + P, P]`, D padded to P: squares of q and k, float32, below them products unless
        there are bounds; with squares too, sums of codes, int32, and products.
    """
    out = _empty_sums(query, squares, bounds, heads, images).zero_()
    parts, part = split(len(query) // images)
    sides = []
    for row, x in enumerate((query, key)):
        side = x.float().view(images, -1, heads, x.shape[1] // heads).transpose(1, 2)
        if squares is not None and bounds is not None:
            norms = squares[..., row, : side.shape[-1]].sum(2).sqrt().clamp_min(eps[row])
            side = quantize_codes(side, (bounds[row, 0] / norms)[:, :, None], bounds[row, 1], bits[row]).double()
        side = F.pad(side, (0, 0, 0, parts * part - side.shape[2])).unflatten(2, (parts, part))
        sides.append(side)
        out[..., row, : side.shape[-1]] = (side if squares is not None else side.square()).sum(3)
    if out.shape[3] > 2:
        width = sides[0].shape[-1]
        # Codes as float64: their sums are exact.
        out[..., 2 : 2 + width, :width] = sides[0].mT @ sides[1]
    return out


def reference_maps(
    sums: Tensor,
    factor: Tensor,
    bounds: Tensor | None,
    width: int,
    length: int,
    eps: Sequence[float],
    bits: Sequence[int],
    relative: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Maps of channels from sums.

    Args:
        sums: From `reference_sums`.
        factor: Of `PackedChannels`.
        bounds: Likewise.
        width: Channels of a head.
        length: Tokens of an image.
        eps: Of `PackedChannels`.
        bits: Likewise.
        relative: Likewise.
        dtype: Of the result.

    Returns:
        `[images, heads, P, P]`, rows of probabilities or of their codes, zero beyond ``width`` columns; relative ones
        are divided by what they sum to behind the product.
    """
    total = sums.sum(2) if bounds is None else sums.long().sum(2).float()
    q, k, gram = total[..., 0, :width], total[..., 1, :width], total[..., 2 : 2 + width, :width]
    if bounds is None:
        lengths = [side.sqrt().clamp_min(least) for side, least in zip((q, k), eps, strict=True)]
        scores = gram / lengths[0][..., None] / lengths[1][..., None, :]
    else:
        left, right = (Affine(bounds[side, 2], bounds[side, 3], bits[side]) for side in (0, 1))
        scores = product_from_sums(gram, q[..., None], k[..., None, :], length, left, right)
    weights = torch.softmax(scores * factor[:, None, None], -1)
    if bounds is not None:
        weights = relative_rows(weights) if relative else weights
        weights = quantize_codes(weights, bounds[2, 0], bounds[2, 1], bits[2]).float()
    beyond = sums.shape[-1] - width
    return F.pad(weights, (0, beyond, 0, beyond)).to(dtype)


def reference_product(
    value: Tensor, maps: Tensor, bounds: Tensor | None, bits: Sequence[int], relative: bool
) -> Tensor:
    """Values times maps.

    Args:
        value: `[images * tokens, heads * D]` floats.
        maps: From `reference_maps`.
        bounds: Of `PackedChannels`.
        bits: Likewise.
        relative: Likewise.

    Returns:
        `[images * tokens, heads * D]` in the type of ``value``.
    """
    images, heads = maps.shape[:2]
    width = value.shape[1] // heads
    v = value.float().view(images, -1, heads, width).transpose(1, 2)
    weights = maps[..., :width, :width].float()
    if bounds is not None:
        weights = weights * bounds[2, 2] + bounds[2, 3]
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-30) if relative else weights
        v = quantize_codes(v, bounds[3, 0], bounds[3, 1], bits[3]).float() * bounds[3, 2] + bounds[3, 3]
    return (v @ weights.mT).transpose(1, 2).reshape(value.shape).to(value.dtype)


# --- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("harmoq::channel_sums", mutates_args=())
def _sums(
    query: Tensor,
    key: Tensor,
    squares: Tensor | None,
    bounds: Tensor | None,
    heads: int,
    images: int,
    eps: Sequence[float],
    bits: Sequence[int],
) -> Tensor:
    run = launch_sums if query.is_cuda else reference_sums
    return run(query, key, squares, bounds, heads, images, eps, bits)


@_sums.register_fake
def _(query: Tensor, key: Any, squares: Any, bounds: Any, heads: int, images: int, eps: Any, bits: Any) -> Tensor:
    return _empty_sums(query, squares, bounds, heads, images)


@torch.library.custom_op("harmoq::channel_maps", mutates_args=())
def _maps(
    sums: Tensor,
    factor: Tensor,
    bounds: Tensor | None,
    width: int,
    length: int,
    eps: Sequence[float],
    bits: Sequence[int],
    relative: bool,
    dtype: torch.dtype,
) -> Tensor:
    run = launch_maps if sums.is_cuda else reference_maps
    return run(sums, factor, bounds, width, length, eps, bits, relative, dtype)


@_maps.register_fake
def _(
    sums: Tensor, factor: Any, bounds: Any, width: Any, length: Any, eps: Any, bits: Any, relative: Any, dtype: Any
) -> Tensor:
    return sums.new_empty(*sums.shape[:2], sums.shape[-1], sums.shape[-1], dtype=dtype)


@torch.library.custom_op("harmoq::channel_product", mutates_args=())
def _product(value: Tensor, maps: Tensor, bounds: Tensor | None, bits: Sequence[int], relative: bool) -> Tensor:
    run = launch_product if value.is_cuda else reference_product
    return run(value, maps, bounds, bits, relative)


@_product.register_fake
def _(value: Tensor, maps: Tensor, bounds: Any, bits: Any, relative: Any) -> Tensor:
    return value.new_empty(value.shape)


def channel_attention(query: Tensor, key: Tensor, value: Tensor, operands: PackedChannels, images: int) -> Tensor:
    """`reference` as operators ``harmoq::channel_...``: the kernels on a GPU."""
    return _attention(query, key, value, operands, images, (_sums, _maps, _product))


def launch_channel_attention(
    query: Tensor, key: Tensor, value: Tensor, operands: PackedChannels, images: int
) -> Tensor:
    """Run the kernels; arguments as in `reference`.

    Raises:
        KernelError: Matrices that do not fit.
    """
    return _attention(query, key, value, operands, images, (launch_sums, launch_maps, launch_product))


def reference(query: Tensor, key: Tensor, value: Tensor, operands: PackedChannels, images: int) -> Tensor:
    """Attention among channels.

    Args:
        query: `[images * tokens, heads * D]` float32, float16 or bfloat16; unit stride along the channels.
        key: Likewise.
        value: Likewise.
        operands: From `pack_channels`.
        images: Size of the batch.

    Returns:
        `[images * tokens, heads * D]` in the type of ``value``.
    """
    return _attention(query, key, value, operands, images, (reference_sums, reference_maps, reference_product))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, operands: PackedChannels, images: int, steps: tuple[Any, Any, Any]
) -> Tensor:
    sums_of, maps_of, product_of = steps
    o, bounds, eps, bits = operands, operands.bounds, list(operands.eps), list(operands.bits)
    squares = None if bounds is None else sums_of(query, key, None, bounds, o.heads, images, eps, bits)
    sums = sums_of(query, key, squares, bounds, o.heads, images, eps, bits)
    length, dtype = len(query) // images, _operand(value.dtype, bounds)
    maps = maps_of(sums, o.factor, bounds, o.width, length, eps, bits, o.relative, dtype)
    y: Tensor = product_of(value, maps, bounds, bits, o.relative)
    return y


__all__ = [
    "MAX_WIDTH",
    "PackedChannels",
    "channel_attention",
    "launch_channel_attention",
    "launch_maps",
    "launch_product",
    "launch_sums",
    "maps_kernel",
    "pack_channels",
    "part_block",
    "product_kernel",
    "reference",
    "reference_sums",
    "split",
    "sums_kernel",
    "token_block",
    "warps",
]
