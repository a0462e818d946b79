"""Attention of given q, k and v, for windows that `window_attention` does not take whole.

For each window and head::

    S = scale q k^T + bias (- 100 between regions)         "cosine": q, k divided by their lengths
    P = softmax(S)
    o = P v                                                [y = quantized linear of o, all heads, + residual]

Mode "deploy" keeps q, k, v and P in 16-bit floats with float32 sums. Mode "paper" quantizes them with static qparams:
exact contractions of codes (`attention_device`) with the accumulators of `integer_reference.matmul`. There it matters
whether the queries are scaled before they are rounded ("scaled") or the scores after ("products", "cosine"). Relative
maps (`quant/relative_maps.py`) round ``exp(S - max S)`` and divide by the sum of what it was rounded to.

One program takes a head and a block of queries, and all keys at once or, beyond 64, in blocks. `reference` is in plain
torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from harmoq_ao.common.errors import KernelError
from harmoq_ao.quant import integer_reference as integers
from harmoq_ao.quant.relative_maps import relative_rows, renormalized, row_sums
from harmoq_ao.triton_kernels import lowbit_linear
from harmoq_ao.triton_kernels.attention_device import (
    Attention,
    Regions,
    attend,
    attention_scores,
    differ,
    key_operand,
    load_regions,
    probability_codes,
    query_operand,
    value_codes,
    value_product,
)
from harmoq_ao.triton_kernels.attention_operands import LOG2E, MAX_KEYS, MAX_TOKENS, PackedAttention
from harmoq_ao.triton_kernels.device import load_rows, unsigned_codes, window_rows
from harmoq_ao.triton_kernels.launch import OPTIONS, blocks, on_device
from harmoq_ao.triton_kernels.operands import Norm

_COMPUTE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
BLOCK = 64
"""Queries of a program, and keys that it takes at once."""


class Source(NamedTuple):
    """Where the keys and values of a window and head lie.

    Attributes:
        k_ptr: Keys of the head.
        v_ptr: Its values.
        index_ptr: `[windows, KEYS]` int32 rows, or None; negative ones are rows of zeros.
        regions_ptr: `[windows, KEYS]` ids, or None.
        window: Index of the window.
        windows: Windows of an image.
        length: Keys of an image.
        STRIDE: Elements between keys.
    """

    k_ptr: tl.tensor
    v_ptr: tl.tensor
    index_ptr: tl.tensor
    regions_ptr: tl.tensor
    window: tl.tensor
    windows: int
    length: int
    STRIDE: tl.constexpr


@triton.jit
def attention_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    index_ptr: tl.tensor,
    key_index_ptr: tl.tensor,
    regions_ptr: tl.tensor,
    key_regions_ptr: tl.tensor,
    score_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    reciprocal_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    out_ptr: tl.tensor,
    windows: int,
    length: int,
    key_length: int,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    Q_HEAD: tl.constexpr,
    K_STRIDE: tl.constexpr,
    K_HEAD: tl.constexpr,
    LEFT_BITS: tl.constexpr,
    RIGHT_BITS: tl.constexpr,
    RELATIVE: tl.constexpr,
    SCORES: tl.constexpr,
    APART: tl.constexpr,
    DTYPE: tl.constexpr,
    OUT_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """``BLOCK_M`` queries of a window and head.

    Rows of q, k and v are tokens, found by `window_rows`; strides lie between tokens and between heads.
    The output has rows like q, `[HEADS * HEAD_DIM]` each: floats, or codes of ``OUT_BITS`` for the projection.
    """
    window, head = tl.program_id(0), tl.program_id(2)
    tokens, lanes = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, PADDED)
    rows = window_rows(index_ptr, window, windows, length, tokens, TOKENS)
    mask = (tokens < TOKENS)[:, None] & (lanes < HEAD_DIM)[None, :]
    o = _attend(
        load_rows(q_ptr + head * Q_HEAD, rows, Q_STRIDE, lanes, mask), head, tokens,
        load_regions(regions_ptr, window, windows, tokens, TOKENS),
        Source(
            k_ptr + head * K_HEAD, v_ptr + head * K_HEAD, key_index_ptr, key_regions_ptr,
            window, windows, key_length, K_STRIDE,
        ),
        Attention(
            score_scale_ptr, bias_ptr, factors_ptr, bounds_ptr,
            TOKENS, KEYS, HEAD_DIM, LEFT_BITS, RIGHT_BITS, RELATIVE, SCORES, APART, DTYPE,
        ),
        BLOCK_N,
    )  # fmt: skip
    # Heads lie side by side, without their padding, as the projection wants them.
    channels = head * HEAD_DIM + lanes
    out_at = out_ptr + rows[:, None] * (HEADS * HEAD_DIM) + channels[None, :]
    if OUT_BITS == 0:
        tl.store(out_at, o.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        reciprocal = tl.load(reciprocal_ptr + channels, mask=lanes < HEAD_DIM, other=0.0)
        offset = tl.load(offset_ptr + channels, mask=lanes < HEAD_DIM, other=0.0)
        tl.store(out_at, unsigned_codes(o * reciprocal[None, :] + offset[None, :], OUT_BITS), mask=mask)


@triton.jit
def _attend(
    q: tl.tensor,
    head: tl.tensor,
    tokens: tl.tensor,
    ids: tl.tensor,
    s: Source,
    a: Attention,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """``softmax(scores) v`` of a block of queries, `[queries, PADDED]` float32."""
    left = query_operand(q, head, a)
    if a.KEYS <= BLOCK_N:
        k, keys, key_ids = _keys(s, 0, a, q.shape[1], BLOCK_N)
        v = _values(s, keys, a, q.shape[1])
        o = attend(
            left, k, v, head, tokens, keys, Regions(ids, key_ids, differ(ids, key_ids), s.regions_ptr is not None), a
        )
    elif a.LEFT_BITS == 0:
        o = _attend_online(left, head, tokens, ids, s, a, q.shape[1], BLOCK_N)
    else:
        o = _attend_twice(left, head, tokens, ids, s, a, q.shape[1], BLOCK_N)
    return o


@triton.jit
def _keys(
    s: Source, first: tl.tensor, a: Attention, PADDED: tl.constexpr, BLOCK_N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A block of keys: k `[BLOCK_N, PADDED]` float32, zeros around it, their places and regions."""
    keys, lanes = first + tl.arange(0, BLOCK_N), tl.arange(0, PADDED)
    rows = window_rows(s.index_ptr, s.window, s.windows, s.length, keys, a.KEYS)
    mask = ((keys < a.KEYS) & (rows >= 0))[:, None] & (lanes < a.HEAD_DIM)[None, :]
    k = load_rows(s.k_ptr, rows, s.STRIDE, lanes, mask)
    return k, keys, load_regions(s.regions_ptr, s.window, s.windows, keys, a.KEYS)


@triton.jit
def _values(s: Source, keys: tl.tensor, a: Attention, PADDED: tl.constexpr) -> tl.tensor:
    """v of the keys, `[BLOCK_N, PADDED]` float32, zeros around it; apart from k, so that not both are held at once."""
    lanes = tl.arange(0, PADDED)
    rows = window_rows(s.index_ptr, s.window, s.windows, s.length, keys, a.KEYS)
    mask = ((keys < a.KEYS) & (rows >= 0))[:, None] & (lanes < a.HEAD_DIM)[None, :]
    return load_rows(s.v_ptr, rows, s.STRIDE, lanes, mask)


@triton.jit
def _attend_online(
    left: tl.tensor,
    head: tl.tensor,
    tokens: tl.tensor,
    ids: tl.tensor,
    s: Source,
    a: Attention,
    PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Float attention over blocks of keys with a running maximum and total."""
    # Minus infinity: the first block shrinks the empty sums by exp2(-inf) = 0.
    top = tl.full([left.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([left.shape[0]], tl.float32)
    acc = tl.zeros([left.shape[0], PADDED], tl.float32)
    for first in range(0, a.KEYS, BLOCK_N):
        k, keys, key_ids = _keys(s, first, a, PADDED, BLOCK_N)
        scores = attention_scores(
            left, key_operand(k, a), head, tokens, keys,
            Regions(ids, key_ids, differ(ids, key_ids), s.regions_ptr is not None), a,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        # What was summed relative to the old maximum shrinks to the new one.
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        v = _values(s, keys, a, PADDED)
        acc = tl.dot(weights.to(a.DTYPE), v.to(a.DTYPE), acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc * (1.0 / total)[:, None]


@triton.jit
def _attend_twice(
    left: tl.tensor,
    head: tl.tensor,
    tokens: tl.tensor,
    ids: tl.tensor,
    s: Source,
    a: Attention,
    PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Attention with quantized probabilities: they must be final before rounding, so the scores are computed twice."""
    top = tl.full([left.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([left.shape[0]], tl.float32)
    for first in range(0, a.KEYS, BLOCK_N):
        k, keys, key_ids = _keys(s, first, a, PADDED, BLOCK_N)
        scores = attention_scores(
            left, key_operand(k, a), head, tokens, keys,
            Regions(ids, key_ids, differ(ids, key_ids), s.regions_ptr is not None), a,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(scores, 1))
        # Relative maps need the maximum alone; their rows are normalized after the product.
        if not a.RELATIVE:
            total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(scores - new_top[:, None]), 1)
        top = new_top
    # Sums over more than 256 keys exceed 2**24: those of a block are exact in float32, those of all in int32.
    acc, rows = tl.zeros([left.shape[0], PADDED], tl.int32), tl.zeros([left.shape[0]], tl.float32)
    columns = tl.zeros([PADDED], tl.float32)
    for first in range(0, a.KEYS, BLOCK_N):
        k, keys, key_ids = _keys(s, first, a, PADDED, BLOCK_N)
        values = value_codes(_values(s, keys, a, PADDED), keys, a)
        scores = attention_scores(
            left, key_operand(k, a), head, tokens, keys,
            Regions(ids, key_ids, differ(ids, key_ids), s.regions_ptr is not None), a,
        )  # fmt: skip
        codes = probability_codes(tl.exp2(scores - top[:, None]), total, keys, a)
        acc += tl.dot(codes.to(a.DTYPE), values.to(a.DTYPE), input_precision="ieee").to(tl.int32)
        # Both sums enter the epilogue: offsets of the operands times what the other one sums to.
        rows += tl.sum(codes, 1)
        columns += tl.sum(values, 0)
    return value_product(acc.to(tl.float32), rows, columns, a)


def launch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: PackedAttention,
    *,
    index: Tensor | None = None,
    key_index: Tensor | None = None,
    regions: Tensor | None = None,
    key_regions: Tensor | None = None,
    after: Norm | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    compute: torch.dtype | None = None,
) -> Tensor:
    """Run `attention_kernel`, and the projection if ``operands`` has one; arguments as in `reference`.

    Raises:
        KernelError: Operands that the kernels do not take.
    """
    key_index, key_regions = index if key_index is None else key_index, regions if key_regions is None else key_regions
    q, k, v = _evenly_spaced(q, k, v)
    tokens, keys = _check_heads(q, k, v, operands, index, key_index)
    windows = len(q) * (1 if index is None else len(index))
    check_scores(windows, tokens, keys, operands, regions, key_regions)
    proj, out_dtype = operands.proj, out_dtype or q.dtype
    width = operands.heads * operands.head_dim
    # The projection takes codes: a byte a channel between the kernels, and it need not round again.
    codes = proj is not None and proj.act_bits > 0
    out = torch.empty(*q.shape[:2], width, dtype=torch.uint8 if codes else out_dtype, device=q.device)
    if out.numel():
        with on_device(q):
            attention_kernel[(windows, blocks(tokens, BLOCK), operands.heads)](
                q, k, v, index, key_index, regions, key_regions, operands.score_scale, operands.bias, operands.factors,
                operands.bounds, None if proj is None else proj.reciprocal, None if proj is None else proj.offset, out,
                windows_of_image(index, regions), q.shape[1], k.shape[1],
                OUT_BITS=0 if proj is None else proj.act_bits, KEYS=keys,
                **constants(operands, tokens, compute or compute_type(q.dtype)), **strides(q, k),
                BLOCK_M=BLOCK, BLOCK_N=BLOCK, num_warps=warps(operands.padded), num_stages=1, **OPTIONS,
            )  # fmt: skip
    # A projection mixes all heads, which are programs of their own: it is the next kernel.
    if proj is None:
        return out
    direct = None if residual is None or after is not None else residual.reshape(-1, proj.rows)
    y = lowbit_linear.launch_lowbit_linear(out.view(-1, width), proj, residual=direct, out_dtype=out_dtype)
    if after is not None:
        y = lowbit_linear.finished(y.float(), after, None if residual is None else residual.view_as(y)).to(out_dtype)
    return y.view(*q.shape[:2], proj.rows)


def warps(padded: int) -> int:
    """Warps of a program: with heads of 128 channels, what four of them hold does not fit into their registers."""
    return 8 if padded > 64 else 4


def constants(operands: PackedAttention, tokens: int, compute: torch.dtype) -> dict[str, object]:
    """Constexprs that `attention_kernel` and `window_attention.window_kernel` have in common."""
    return {
        "TOKENS": tokens, "HEADS": operands.heads, "HEAD_DIM": operands.head_dim,
        "PADDED": operands.padded, "LEFT_BITS": operands.left_bits, "RIGHT_BITS": operands.right_bits,
        "RELATIVE": operands.relative, "SCORES": operands.scores,
        "APART": operands.apart,
        # Codes are exact in either 16-bit type.
        "DTYPE": tl.float16 if operands.left_bits else _COMPUTE[compute],
    }  # fmt: skip


def compute_type(dtype: torch.dtype) -> torch.dtype:
    """Type of float contractions for inputs of ``dtype``: bfloat16, which does not overflow, unless that is float16."""
    return torch.float16 if dtype == torch.float16 else torch.bfloat16


def windows_of_image(index: Tensor | None, regions: Tensor | None) -> int:
    """After how many windows index and regions begin anew."""
    if index is not None:
        return len(index)
    return 1 if regions is None else len(regions)


def strides(q: Tensor, k: Tensor) -> dict[str, int]:
    """Elements between tokens and between heads, as constexprs."""
    return {"Q_STRIDE": q.stride(1), "Q_HEAD": q.stride(2), "K_STRIDE": k.stride(1), "K_HEAD": k.stride(2)}


def _check_heads(
    q: Tensor, k: Tensor, v: Tensor, operands: PackedAttention, index: Tensor | None, key_index: Tensor | None
) -> tuple[int, int]:
    """Queries and keys of a window."""
    expected = (operands.heads, operands.head_dim)
    fits = all(part.dim() == 4 and part.shape[2:] == expected for part in (q, k, v))
    if not fits or k.shape != v.shape or len(q) != len(k):
        raise KernelError(
            "q, k and v do not fit",
            found=[tuple(part.shape) for part in (q, k, v)],
            expected=f"[windows, tokens, {expected[0]}, {expected[1]}], k and v alike",
        )
    if index is None or key_index is None:
        if index is not None or key_index is not None:
            raise KernelError("Queries have an index and keys have none, or the other way round")
        return q.shape[1], k.shape[1]
    for name, table in (("index", index), ("key_index", key_index)):
        check_table(table, len(index), table.shape[-1], name, torch.int32)
    return index.shape[1], key_index.shape[1]


def _evenly_spaced(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with tokens of all windows evenly spaced, channels of a head adjacent, and k and v of equal strides."""

    def is_even(part: Tensor) -> bool:
        return part.stride(-1) == 1 and (len(part) <= 1 or part.stride(0) == part.shape[1] * part.stride(1))

    if not is_even(q):
        q = q.contiguous()
    if not is_even(k) or not is_even(v) or k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    return q, k, v


def check_table(table: Tensor | None, windows: int, tokens: int, name: str, dtype: torch.dtype) -> None:
    """Raise KernelError unless ``table`` is None or contiguous `[windows, tokens]` of ``dtype``."""
    if table is not None and (table.shape != (windows, tokens) or table.dtype != dtype or not table.is_contiguous()):
        raise KernelError(
            f"The {name} does not fit the windows",
            found=f"{table.dtype} {tuple(table.shape)}",
            expected=f"{dtype} {(windows, tokens)}, contiguous",
        )


def check_scores(
    windows: int, tokens: int, keys: int, operands: PackedAttention, regions: Tensor | None, key_regions: Tensor | None
) -> None:
    """Raise KernelError unless bias and regions fit ``windows`` windows of ``tokens`` queries and ``keys`` keys."""
    if not 1 <= tokens <= MAX_TOKENS:
        raise KernelError("The window has too many tokens", found=tokens, expected=f"1 to {MAX_TOKENS}")
    if not 1 <= keys <= MAX_KEYS:
        raise KernelError("The window has too many keys", found=keys, expected=f"1 to {MAX_KEYS}")
    if operands.bias is not None and operands.bias.shape[1:] != (tokens, keys):
        raise KernelError(
            "The position bias does not fit", found=tuple(operands.bias.shape), expected=(operands.heads, tokens, keys)
        )
    if (regions is None) != (key_regions is None):
        raise KernelError("Queries have regions and keys have none, or the other way round")
    for table, length, name in ((regions, tokens, "regions"), (key_regions, keys, "key_regions")):
        if table is not None and (len(table) == 0 or windows % len(table)):
            expected = f"[divisor of {windows}, {length}]"
            raise KernelError(f"The {name} do not fit", found=tuple(table.shape), expected=expected)
        check_table(table, 0 if table is None else len(table), length, name, torch.uint8)


# --- reference --------------------------------------------------------------------------------------------------------


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: PackedAttention,
    *,
    index: Tensor | None = None,
    key_index: Tensor | None = None,
    regions: Tensor | None = None,
    key_regions: Tensor | None = None,
    after: Norm | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    compute: torch.dtype | None = None,
) -> Tensor:
    """Attention of given q, k and v, and the projection if ``operands`` has one.

    Args:
        q: `[windows, N, heads, D]` floating point, N at most 256; `[images, L, heads, D]` with an index.
        k: `[windows, M, heads, D]`, M at most 1024; `[images, L', heads, D]` with an index.
        v: Like k, and of the same strides.
        operands: From `attention_operands.pack_attention`; its bias is `[heads, N, M]`.
        index: `[nW, N]` int32, rows of the queries of each window of an image: windows are disjoint and hold all rows.
            None if q, k and v are windows.
        key_index: `[nW, M]` int32, rows of the keys, -1 for zeros; ``index`` by default.
        regions: `[nW, N]` uint8 ids of the queries' regions, the windows of an image in order; or None.
        key_regions: `[nW, M]` uint8 of the keys'; ``regions`` by default. ``operands.apart`` is added to scores
            between regions.
        after: A LayerNorm behind the projection, or None.
        residual: Floats of the shape of the result added last, or None.
        out_dtype: Of the result; the type of ``q`` by default.
        compute: Type of q, k, v and the probabilities in the kernels' mode "deploy"; float16 overflows beyond 65504. By
            default bfloat16, or float16 if q is. The reference computes in float32.

    Returns:
        `[windows or images, N or L, O]`, or `[.., heads * D]` without a projection.
    """
    out_dtype, shape = out_dtype or q.dtype, q.shape[:2]
    key_index, key_regions = index if key_index is None else key_index, regions if key_regions is None else key_regions
    q, k, v = (_windows(part, table).transpose(1, 2) for part, table in ((q, index), (k, key_index), (v, key_index)))
    scale = operands.score_scale[:, None, None]
    if operands.cosine:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    if operands.scale_after:
        scores = _reference_scores(q, k, operands) * scale
    else:
        scores = _reference_scores(q * scale, k, operands)
    if operands.bias is not None:
        scores = scores + operands.bias.float() / LOG2E
    if regions is not None and key_regions is not None:
        apart = regions[:, None, :, None] != key_regions[:, None, None, :]
        scores = (scores.unflatten(0, (-1, len(regions))) + operands.apart * apart).flatten(0, 1)
    y = _reference_values(scores.softmax(-1), v, operands).transpose(1, 2).flatten(2)
    if index is not None:
        out = y.new_empty(*shape, y.shape[-1])
        out[:, index.flatten().long()] = y.view(shape[0], -1, y.shape[-1])
        y = out
    if operands.proj is not None:
        y = lowbit_linear.reference(y.flatten(0, 1), operands.proj).view(*y.shape[:2], -1)
    return lowbit_linear.finished(y, after, residual).to(out_dtype)


def _windows(part: Tensor, index: Tensor | None) -> Tensor:
    """`[windows, N, heads, D]` float32 of tokens, by rows of images where there is an index; -1 is a row of zeros."""
    part = part.float()
    if index is None:
        return part
    padded = F.pad(part, (0, 0, 0, 0, 0, 1))
    return padded[:, index.long()].flatten(0, 1)


def _reference_scores(q: Tensor, k: Tensor, operands: PackedAttention) -> Tensor:
    if operands.factors is None or operands.bounds is None:
        return q @ k.transpose(-1, -2)
    factors = operands.factors[:, : operands.head_dim]
    qa = integers.quantize_codes(q, factors[0], operands.bounds[0, 1], operands.left_bits)
    qb = integers.quantize_codes(k, factors[1], operands.bounds[1, 1], operands.right_bits)
    left, right = _affine(operands, 0, operands.left_bits), _affine(operands, 1, operands.right_bits)
    return integers.matmul(qa, qb.transpose(-1, -2), left, right)


def _reference_values(probabilities: Tensor, v: Tensor, operands: PackedAttention) -> Tensor:
    if operands.bounds is None:
        return probabilities @ v
    bounds, left = operands.bounds, _affine(operands, 2, operands.left_bits)
    rounded = relative_rows(probabilities) if operands.relative else probabilities
    qa = integers.quantize_codes(rounded, bounds[2, 0], bounds[2, 1], operands.left_bits)
    qb = integers.quantize_codes(v, bounds[3, 0], bounds[3, 1], operands.right_bits)
    o = integers.matmul(qa, qb, left, _affine(operands, 3, operands.right_bits))
    return renormalized(o, probabilities, row_sums(qa, left.step, left.lower)) if operands.relative else o


def _affine(operands: PackedAttention, row: int, bits: int) -> integers.Affine:
    assert operands.bounds is not None
    return integers.Affine(operands.bounds[row, 2], operands.bounds[row, 3], bits)


__all__ = [
    "attention_kernel",
    "check_scores",
    "check_table",
    "compute_type",
    "constants",
    "launch_attention",
    "reference",
    "warps",
    "windows_of_image",
]
