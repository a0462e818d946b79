"""Attention of given q, k and v, for windows that `window_attention` does not take whole.

For each window and head::

    S = scale q k^T + bias + mask                          "cosine": q, k divided by their lengths
    P = softmax(S)
    o = P v                                                [y = quantized linear of o, all heads, + residual]

Mode "deploy" keeps q, k, v and P in 16-bit floats with float32 sums. Mode "paper" quantizes them with static qparams:
integer contractions with the accumulators and the epilogue of `integer_reference.matmul_epilogue`. There it matters
whether the queries are scaled before they are rounded ("scaled") or the scores after ("products", "cosine"). Relative
maps (`quant/relative_maps.py`) round ``exp(S - max S)`` and divide by the sum of what it was rounded to.

One program takes a head and a block of queries, and loops over blocks of keys. Plain torch: `reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from harmoq_ao.common.errors import KernelError
from harmoq_ao.quant import integer_reference as integers
from harmoq_ao.quant.relative_maps import relative_rows, renormalized, row_sums
from harmoq_ao.triton_kernels import lowbit_linear
from harmoq_ao.triton_kernels.attention_device import Attention, attention_scores, value_codes, value_product
from harmoq_ao.triton_kernels.attention_operands import LOG2E, MAX_KEYS, MAX_TOKENS, PackedAttention
from harmoq_ao.triton_kernels.device import load_rows, unsigned_codes
from harmoq_ao.triton_kernels.launch import OPTIONS, blocks

_COMPUTE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def attention_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    score_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    reciprocal_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    out_ptr: tl.tensor,
    window_stride: int,
    token_stride: int,
    head_stride: int,
    key_window_stride: int,
    key_token_stride: int,
    key_head_stride: int,
    masks: int,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    LEFT_BITS: tl.constexpr,
    RIGHT_BITS: tl.constexpr,
    RELATIVE: tl.constexpr,
    SCORES: tl.constexpr,
    DTYPE: tl.constexpr,
    OUT_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """``BLOCK_M`` queries of a window and head.

    q is `[windows, TOKENS, HEADS, HEAD_DIM]`, k and v are `[windows, KEYS, HEADS, HEAD_DIM]` of equal strides.

    The output is `[windows, TOKENS, HEADS * HEAD_DIM]`: floats, or codes of ``OUT_BITS`` for the projection.
    """
    # Pixels of a large image times channels exceed 2**31: offsets of windows are int64.
    window, head = tl.program_id(0).to(tl.int64), tl.program_id(2)
    tokens, lanes = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, PADDED)
    mask = (tokens < TOKENS)[:, None] & (lanes < HEAD_DIM)[None, :]
    base = window * key_window_stride + head * key_head_stride
    q = load_rows(q_ptr + window * window_stride + head * head_stride, tokens, token_stride, lanes, mask)
    o = _attend(
        q, k_ptr + base, v_ptr + base, key_token_stride, tokens,
        Attention(
            score_scale_ptr, bias_ptr, mask_ptr, factors_ptr, bounds_ptr, head, window % masks,
            TOKENS, KEYS, HEAD_DIM, LEFT_BITS, RIGHT_BITS, RELATIVE, SCORES, DTYPE,
        ),
        BLOCK_N,
    )  # fmt: skip
    # Heads lie side by side, without their padding, as the projection wants them.
    channels = head * HEAD_DIM + lanes
    out_at = out_ptr + (window * TOKENS + tokens)[:, None] * (HEADS * HEAD_DIM) + channels[None, :]
    if OUT_BITS == 0:
        tl.store(out_at, o.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        reciprocal = tl.load(reciprocal_ptr + channels, mask=lanes < HEAD_DIM, other=0.0)
        offset = tl.load(offset_ptr + channels, mask=lanes < HEAD_DIM, other=0.0)
        tl.store(out_at, unsigned_codes(o * reciprocal[None, :] + offset[None, :], OUT_BITS), mask=mask)


@triton.jit
def _attend(
    q: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    token_stride: int,
    tokens: tl.tensor,
    a: Attention,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """``softmax(scores) v`` of a block of queries, `[queries, PADDED]` float32."""
    if a.LEFT_BITS == 0:
        o = _attend_online(q, k_ptr, v_ptr, token_stride, tokens, a, BLOCK_N)
    else:
        o = _attend_twice(q, k_ptr, v_ptr, token_stride, tokens, a, BLOCK_N)
    return o


@triton.jit
def _attend_online(
    q: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    token_stride: int,
    tokens: tl.tensor,
    a: Attention,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Float attention over blocks of keys with a running maximum and total."""
    # Minus infinity: the first block shrinks the empty sums by exp2(-inf) = 0.
    top = tl.full([q.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    acc = tl.zeros(q.shape, tl.float32)
    for first in range(0, a.KEYS, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        scores = attention_scores(q, _head_rows(k_ptr, keys, token_stride, q.shape[1], a), tokens, keys, a)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        # What was summed relative to the old maximum shrinks to the new one.
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        v = _head_rows(v_ptr, keys, token_stride, q.shape[1], a)
        acc = tl.dot(weights.to(a.DTYPE), v.to(a.DTYPE), acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc / total[:, None]


@triton.jit
def _attend_twice(
    q: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    token_stride: int,
    tokens: tl.tensor,
    a: Attention,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Attention with quantized probabilities: they must be final before rounding, so the scores are computed twice."""
    top = tl.full([q.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    for first in range(0, a.KEYS, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        scores = attention_scores(q, _head_rows(k_ptr, keys, token_stride, q.shape[1], a), tokens, keys, a)
        new_top = tl.maximum(top, tl.max(scores, 1))
        # Relative maps need the maximum alone; their rows are normalized after the product.
        if not a.RELATIVE:
            total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(scores - new_top[:, None]), 1)
        top = new_top
    acc, rows, columns = tl.zeros(q.shape, tl.int32), tl.zeros([q.shape[0]], tl.int32), tl.zeros([q.shape[1]], tl.int32)
    for first in range(0, a.KEYS, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        scores = attention_scores(q, _head_rows(k_ptr, keys, token_stride, q.shape[1], a), tokens, keys, a)
        weights = tl.exp2(scores - top[:, None])
        if not a.RELATIVE:
            weights = weights / total[:, None]
        left, right = value_codes(weights, _head_rows(v_ptr, keys, token_stride, q.shape[1], a), keys, a)
        acc = tl.dot(left, right, acc, out_dtype=tl.int32)
        # Both sums enter the epilogue: offsets of the operands times what the other one sums to.
        rows += tl.sum(left.to(tl.int32), 1)
        columns += tl.sum(right.to(tl.int32), 0)
    return value_product(acc, rows, columns, a)


@triton.jit
def _head_rows(ptr: tl.tensor, keys: tl.tensor, token_stride: int, PADDED: tl.constexpr, a: Attention) -> tl.tensor:
    """Rows ``keys`` of a head of k or v, `[keys, PADDED]` float32, zeros around it."""
    lanes = tl.arange(0, PADDED)
    return load_rows(ptr, keys, token_stride, lanes, (keys < a.KEYS)[:, None] & (lanes < a.HEAD_DIM)[None, :])


def launch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: PackedAttention,
    *,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    compute: torch.dtype = torch.float16,
) -> Tensor:
    """Run `attention_kernel`, and the projection if ``operands`` has one; arguments as in `reference`.

    Raises:
        KernelError: Operands that the kernels do not take.
    """
    _check_heads(q, k, v, operands, mask)
    windows, tokens = q.shape[:2]
    proj, out_dtype = operands.proj, out_dtype or q.dtype
    width = operands.heads * operands.head_dim
    # The projection takes codes: a byte a channel between the kernels, and it need not round again.
    out = torch.empty(windows, tokens, width, dtype=out_dtype if proj is None else torch.uint8, device=q.device)
    sizes = tile(tokens, operands.warps)
    if out.numel():
        attention_kernel[(windows, blocks(tokens, sizes["BLOCK_M"]), operands.heads)](
            q, k, v, operands.score_scale, operands.bias, mask, operands.factors, operands.bounds,
            None if proj is None else proj.reciprocal, None if proj is None else proj.offset, out,
            *q.stride()[:3], *k.stride()[:3], 1 if mask is None else len(mask),
            OUT_BITS=0 if proj is None else proj.act_bits, KEYS=k.shape[1], **constants(operands, tokens, compute),
            **sizes, num_warps=operands.warps, num_stages=1, **OPTIONS,
        )  # fmt: skip
    # A projection mixes all heads, which are programs of their own: it is the next kernel.
    if proj is None:
        return out
    rows = None if residual is None else residual.reshape(-1, proj.rows)
    y = lowbit_linear.launch_lowbit_linear(out.view(-1, width), proj, residual=rows, out_dtype=out_dtype)
    return y.view(windows, tokens, proj.rows)


def constants(operands: PackedAttention, tokens: int, compute: torch.dtype) -> dict[str, object]:
    """Constexprs that `attention_kernel` and `window_attention.window_kernel` have in common."""
    return {
        "TOKENS": tokens, "HEADS": operands.heads, "HEAD_DIM": operands.head_dim,
        "PADDED": operands.padded, "LEFT_BITS": operands.left_bits, "RIGHT_BITS": operands.right_bits,
        "RELATIVE": operands.relative, "SCORES": operands.scores, "DTYPE": _COMPUTE[compute],
    }  # fmt: skip


def tile(tokens: int, warps: int) -> dict[str, int]:
    """Block sizes of `attention_kernel`; 128 queries where there are as many and 8 warps to hold them."""
    return {"BLOCK_M": 128 if warps == 8 and tokens > 64 else 64, "BLOCK_N": 64}


def _check_heads(q: Tensor, k: Tensor, v: Tensor, operands: PackedAttention, mask: Tensor | None) -> None:
    expected = (operands.heads, operands.head_dim)
    same = k.shape == v.shape and k.stride() == v.stride() and q.shape[:1] == k.shape[:1]
    fits = all(part.dim() == 4 and part.shape[2:] == expected and part.stride(3) == 1 for part in (q, k, v))
    if not (same and fits):
        raise KernelError(
            "q, k and v do not fit",
            found=[(tuple(part.shape), part.stride()) for part in (q, k, v)],
            expected=f"[windows, tokens, {expected[0]}, {expected[1]}], the last stride one, k and v alike",
        )
    if not 1 <= k.shape[1] <= MAX_KEYS:
        raise KernelError("The window has too many keys", found=k.shape[1], expected=f"1 to {MAX_KEYS}")
    check_scores(q.shape[0], q.shape[1], k.shape[1], operands, mask)


def check_scores(windows: int, tokens: int, keys: int, operands: PackedAttention, mask: Tensor | None) -> None:
    """Raise KernelError unless bias and mask fit windows of ``tokens`` queries and ``keys`` keys."""
    if not 1 <= tokens <= MAX_TOKENS:
        raise KernelError("The window has too many tokens", found=tokens, expected=f"1 to {MAX_TOKENS}")
    if operands.bias is not None and operands.bias.shape[1:] != (tokens, keys):
        raise KernelError(
            "The position bias does not fit", found=tuple(operands.bias.shape), expected=(operands.heads, tokens, keys)
        )
    fits = mask is None or (mask.dim() == 3 and mask.shape[1:] == (tokens, keys) and mask.is_contiguous())
    if mask is not None and (not fits or len(mask) == 0 or windows % len(mask)):
        raise KernelError(
            "The mask does not fit", found=tuple(mask.shape), expected=f"[divisor of {windows}, {tokens}, {keys}]"
        )


# --- reference --------------------------------------------------------------------------------------------------------


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: PackedAttention,
    *,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    compute: torch.dtype = torch.float16,
) -> Tensor:
    """Attention of given q, k and v, and the projection if ``operands`` has one.

    Args:
        q: `[windows, N, heads, D]` floating point, N at most 256.
        k: `[windows, M, heads, D]`, M at most 1024.
        v: `[windows, M, heads, D]`, of the same strides.
        operands: From `attention_operands.pack_attention`; its bias is `[heads, N, M]`.
        mask: `[nW, N, M]` added to the scores, the windows of an image in order; ``windows`` is a multiple of nW.
        residual: `[windows, N, O]` floats added last, or None.
        out_dtype: Of the result; the type of ``q`` by default.
        compute: Type of q, k, v and the probabilities in the kernels' mode "deploy": float16 (values beyond 65504
            overflow) or bfloat16. The reference computes in float32.

    Returns:
        `[windows, N, O]`, or `[windows, N, heads * D]` without a projection.
    """
    out_dtype = out_dtype or q.dtype
    q, k, v = (part.float().transpose(1, 2) for part in (q, k, v))
    scale = operands.score_scale[:, None, None]
    if operands.cosine:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    if operands.scale_after:
        scores = _reference_scores(q, k, operands) * scale
    else:
        scores = _reference_scores(q * scale, k, operands)
    if operands.bias is not None:
        scores = scores + operands.bias.float() / LOG2E
    if mask is not None:
        grouped = scores.unflatten(0, (-1, len(mask)))
        scores = (grouped + mask.float()[:, None]).flatten(0, 1)
    y = _reference_values(scores.softmax(-1), v, operands).transpose(1, 2).flatten(2)
    if operands.proj is not None:
        y = lowbit_linear.reference(y.flatten(0, 1), operands.proj).view(*y.shape[:2], -1)
    return (y if residual is None else y + residual.float()).to(out_dtype)


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


__all__ = ["attention_kernel", "check_scores", "constants", "launch_attention", "reference", "tile"]
