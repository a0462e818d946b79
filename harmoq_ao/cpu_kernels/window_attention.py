"""Attention within windows on a CPU: gather, scores, bias, mask, softmax, values and scatter in one kernel.

For window ``w``, head ``h``, query ``n`` and keys ``m``, with the rows of `q_rows` ``[W, N]`` and `k_rows` ``[W, M]``::

    s_nm = score_factor_h * ((q_factor_h q_n) . k_m) + bias_hnm + mask_wnm
    o_n  = sum_m softmax_m(s_nm) v_m

Shifted windows, window partition and padding are row numbers: nothing is rolled or copied. Plain torch: `reference`;
the kernel: ``csrc/window_attention.cpp``.

Precision. Float: ``half`` rounds ``q`` (with its factors), ``k``, ``v`` and the probabilities before they are
normalised to bfloat16 and sums in float32; scores, bias and mask stay float32. It takes a CPU with bfloat16 products,
others calculate in float32. The probabilities are divided by the sum of the rounded ones. Quantized: codes of q, k and
v equal `quant.integer_reference` bit for bit, codes of the map except where float32 cannot tell on which side of a tie
an entry lies; accumulators are exact.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harmoq_ao.common.errors import KernelError
from harmoq_ao.cpu_kernels.library import kernels
from harmoq_ao.quant import integer_reference
from harmoq_ao.quant.integer_reference import Affine, MatmulOperand
from harmoq_ao.quant.relative_maps import relative_rows, renormalized, row_sums

TILE = 16
"""Queries come in multiples of this."""

_SCORE_BYTES = 1 << 15  # of float32 scores that a block holds: most of a first-level cache
_LARGEST_BLOCK = 32


def query_block(queries: int, keys: int) -> int:
    """How many queries the kernel takes at a time, the ``block`` of `window_attention` and `pack_bias`."""
    fits = max(_SCORE_BYTES // (4 * keys) // TILE, 1) * TILE
    return min(fits, _LARGEST_BLOCK, -(-queries // TILE) * TILE)


def pack_bias(bias: Tensor, block: int) -> Tensor:
    """``[..., N, M]`` to ``[..., ceil(N / block), M, block]`` float32, the layout of bias and mask tables; keep it."""
    queries = bias.shape[-2]
    padded = F.pad(bias.float(), (0, 0, 0, -queries % block))
    return padded.unflatten(-2, (-1, block)).transpose(-1, -2).contiguous()


def unpack_bias(packed: Tensor, queries: int) -> Tensor:
    """What `pack_bias` made, back as ``[..., N, M]``."""
    return packed.transpose(-1, -2).flatten(-3, -2)[..., :queries, :]


def pack_quantizers(
    q: MatmulOperand, k: MatmulOperand, attention_map: MatmulOperand, v: MatmulOperand, head_dim: int
) -> tuple[Tensor, Tensor]:
    """``quantizers`` and ``reciprocals`` of `window_attention`.

    Returns:
        float32 ``[4, 4]``: step, lower bound, offset and largest code of q, k, the map and v; float32
        ``[4, head_dim]``: what each channel is multiplied with.

    Raises:
        KernelError: Bounds are taken from the data, or the product with v has a joint scale.
    """
    rows, factors = [], []
    for name, operand in {"q": q, "k": k, "map": attention_map, "v": v}.items():
        if operand.act is None or (operand.joint_scale is not None and name in ("map", "v")):
            raise KernelError(
                "The attention kernel cannot quantize this operand",
                found=f"{name} with " + ("bounds from the data" if operand.act is None else "a joint scale"),
                expected="static bounds; a joint scale of q and k only",
            )
        scale = None if operand.joint_scale is None else operand.joint_scale.flatten()
        reciprocal, offset = integer_reference.static_qparams(operand.act, scale)
        act = operand.act
        top = torch.full_like(act.step, 2**operand.bits - 1)
        rows.append(torch.stack([act.step, act.lower, offset, top]).float())
        factors.append(reciprocal.float().expand(head_dim))
    return torch.stack(rows), torch.stack(factors)


def operator(isa: str | None = None) -> Any:
    """The operator of an instruction set, by default this machine's; its schema is in the C++ file.

    Raises:
        KernelError: There is no library for it.
    """
    namespace: Any = kernels(isa)
    if namespace is None:
        raise KernelError("The kernels for CPUs are not there", found=f"no library for {isa or 'this machine'}")
    _register_fake(namespace.name)
    return namespace.window_attention


@functools.cache
def _register_fake(namespace: str) -> None:
    torch.library.register_fake(f"{namespace}::window_attention", lambda *args, **kwargs: None)


def window_attention(
    out: Tensor,
    out_rows: Tensor,
    out_col: int,
    q: Tensor,
    q_col: int,
    k: Tensor,
    k_col: int,
    v: Tensor,
    v_col: int,
    q_rows: Tensor,
    k_rows: Tensor,
    heads: int,
    head_dim: int,
    q_factor: Tensor,
    score_factor: Tensor,
    bias: Tensor | None = None,
    q_region: Tensor | None = None,
    k_region: Tensor | None = None,
    mask_value: float = -100.0,
    mask_table: Tensor | None = None,
    mask_index: Tensor | None = None,
    block: int = 64,
    half: bool = False,
    quantizers: Tensor | None = None,
    reciprocals: Tensor | None = None,
    relative: bool = False,
    out_quantizer: Tensor | None = None,
    out_bits: int = 8,
    score_accumulators: Tensor | None = None,
    map_codes: Tensor | None = None,
    value_accumulators: Tensor | None = None,
    isa: str | None = None,
) -> None:
    """Attention within windows, written to columns of `out`.

    Args:
        out: ``[T', C']`` float32, bfloat16 or, with `out_quantizer`, uint8; head ``h`` is written to columns
            ``out_col + h * head_dim ...``.
        out_rows: ``[W, N]`` int32, the row of each query in `out`; -1: not written.
        out_col: First column in `out`.
        q: ``[T, C]`` float32 or bfloat16 with dense rows; head ``h`` has columns ``q_col + h * head_dim ...``. With
            `quantizers` also uint8 codes, those of ``q_factor_h q``.
        q_col: First column of the queries.
        k: Keys, like `q`; may be the same matrix.
        k_col: First column of the keys.
        v: Values, like `q`; may be the same matrix.
        v_col: First column of the values.
        q_rows: ``[W, N]`` int32, the row of each query; -1: a token of zeros.
        k_rows: ``[W, M]`` int32, the rows of keys and values.
        heads: Number of heads.
        head_dim: Channels of a head.
        q_factor: ``[heads]`` float32.
        score_factor: ``[heads]`` float32.
        bias: ``[heads, ceil(N / block), M, block]`` float32, of `pack_bias`.
        q_region: ``[W, N]`` int32, ids of regions: `mask_value` is added where query and key differ.
        k_region: ``[W, M]`` int32.
        mask_value: See `q_region`.
        mask_table: ``[U, ceil(N / block), M, block]`` float32, of `pack_bias`, added to the scores.
        mask_index: ``[W]`` int32, which entry of `mask_table`; -1: none.
        block: Queries at a time, a multiple of 16; `query_block` knows a good one.
        half: bfloat16 products (float only).
        quantizers: ``[4, 4]`` float32, of `pack_quantizers`, or None for float.
        reciprocals: ``[4, head_dim]`` float32, of `pack_quantizers`.
        relative: The map is quantized relative to its rows' largest entries (`quant.relative_maps`).
        out_quantizer: ``[2, heads * head_dim]`` float32, reciprocal and offset of each column of the result, where
            `out` is uint8 and takes codes.
        out_bits: Width of those codes.
        score_accumulators: ``[W, heads, N, M]`` int32 that receives the sums of ``q k`` codes, for tests.
        map_codes: ``[W, heads, N, M]`` uint8 that receives the codes of the map, for tests.
        value_accumulators: ``[W, heads, N, head_dim]`` int32 that receives the sums of map and ``v`` codes, for tests.
        isa: Instruction set, by default this machine's.

    Raises:
        RuntimeError: A shape, type or row number does not fit.
        KernelError: There is no library for `isa`.
    """
    operator(isa)(
        out, out_rows, out_col, q, q_col, k, k_col, v, v_col, q_rows, k_rows, heads, head_dim, q_factor, score_factor,
        bias, q_region, k_region, mask_value, mask_table, mask_index, block, half, quantizers, reciprocals, relative,
        out_quantizer, out_bits, score_accumulators, map_codes, value_accumulators,
    )  # fmt: skip


# --- plain torch ------------------------------------------------------------------------------------------------------


def reference(
    out: Tensor,
    out_rows: Tensor,
    out_col: int,
    q: Tensor,
    q_col: int,
    k: Tensor,
    k_col: int,
    v: Tensor,
    v_col: int,
    q_rows: Tensor,
    k_rows: Tensor,
    heads: int,
    head_dim: int,
    q_factor: Tensor,
    score_factor: Tensor,
    bias: Tensor | None = None,
    q_region: Tensor | None = None,
    k_region: Tensor | None = None,
    mask_value: float = -100.0,
    mask_table: Tensor | None = None,
    mask_index: Tensor | None = None,
    block: int = 64,
    half: bool = False,
    quantizers: Tensor | None = None,
    reciprocals: Tensor | None = None,
    relative: bool = False,
    out_quantizer: Tensor | None = None,
    out_bits: int = 8,
    score_accumulators: Tensor | None = None,
    map_codes: Tensor | None = None,
    value_accumulators: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """`window_attention` in plain torch, in `dtype` where nothing is quantized; the same arguments."""
    sources = (q, q_col, q_rows, 0), (k, k_col, k_rows, 1), (v, v_col, k_rows, 3)
    if quantizers is None:
        x_q, x_k, x_v = (_gather(x, col, rows, heads, head_dim).to(dtype) for x, col, rows, _ in sources)
        scores = (x_q * q_factor[:, None, None].to(dtype)) @ x_k.mT
    else:
        assert reciprocals is not None
        (qq, act_q), (qk, act_k), (qv, act_v) = (
            _gathered_codes(x, col, rows, q_factor if i == 0 else torch.ones(heads), quantizers, reciprocals, i)
            for x, col, rows, i in sources
        )
        scores = integer_reference.matmul(qq, qk.mT, act_q, act_k)
        _show(score_accumulators, qq, qk.mT)
    scores = scores * score_factor[:, None, None].to(scores.dtype)
    scores = scores + _additions(q_rows, bias, q_region, k_region, mask_value, mask_table, mask_index).to(scores.dtype)
    attention_map = scores.softmax(-1)
    if quantizers is None:
        result = attention_map @ x_v
    else:
        assert reciprocals is not None
        left = relative_rows(attention_map) if relative else attention_map
        codes, act = _codes(left, quantizers, reciprocals[:, :1], 2)
        result = integer_reference.matmul(codes, qv, act, act_v)
        if relative:
            result = renormalized(result, attention_map, row_sums(codes, act.step, act.lower))
        _show(value_accumulators, codes, qv)
        if map_codes is not None:
            map_codes.copy_(codes)
    written = out_rows >= 0
    columns = slice(out_col, out_col + heads * head_dim)
    values = result.transpose(1, 2).flatten(2)[written]
    if out_quantizer is not None:
        reciprocal, offset = out_quantizer
        values = integer_reference.quantize_codes(values.float(), reciprocal, offset, out_bits)
    out[out_rows[written].long(), columns] = values.to(out.dtype)


def _gather(x: Tensor, col: int, rows: Tensor, heads: int, head_dim: int, missing: Tensor | None = None) -> Tensor:
    """``[W, heads, tokens, head_dim]``; rows of -1 are `missing` ``[heads * head_dim]``, by default zeros."""
    absent = x.new_zeros(heads * head_dim) if missing is None else missing
    padded = torch.cat([x[:, col : col + heads * head_dim], absent[None]])
    return padded[rows.long()].unflatten(-1, (heads, head_dim)).transpose(1, 2)


def _gathered_codes(
    x: Tensor, col: int, rows: Tensor, factor: Tensor, quantizers: Tensor, reciprocals: Tensor, i: int
) -> tuple[Tensor, Affine]:
    """Codes ``[W, heads, tokens, head_dim]`` of operand `i`, of values times a factor ``[heads]`` or given."""
    heads, head_dim = len(factor), reciprocals.shape[1]
    if x.dtype is torch.uint8:
        zero, act = _codes(torch.zeros(heads, head_dim), quantizers, reciprocals, i)
        return _gather(x, col, rows, heads, head_dim, zero.flatten()), act
    values = _gather(x, col, rows, heads, head_dim).float() * factor[:, None, None]
    return _codes(values, quantizers, reciprocals, i)


def _codes(x: Tensor, quantizers: Tensor, reciprocals: Tensor, i: int) -> tuple[Tensor, Affine]:
    step, lower, offset, top = quantizers[i].unbind()
    bits = int(top).bit_length()
    return integer_reference.quantize_codes(x, reciprocals[i], offset, bits), Affine(step, lower, bits)


def _show(accumulators: Tensor | None, left: Tensor, right: Tensor) -> None:
    if accumulators is not None:
        accumulators.copy_(integer_reference.matmul_accumulate(left, right))


def _additions(
    q_rows: Tensor,
    bias: Tensor | None,
    q_region: Tensor | None,
    k_region: Tensor | None,
    mask_value: float,
    mask_table: Tensor | None,
    mask_index: Tensor | None,
) -> Tensor:
    """What is added to the scores, broadcasts to ``[W, heads, N, M]``."""
    total = torch.zeros(1, 1, 1, 1)
    queries = q_rows.shape[1]
    if bias is not None:
        total = total + unpack_bias(bias, queries)
    if q_region is not None and k_region is not None:
        differ = q_region[:, None, :, None] != k_region[:, None, None, :]
        total = total + torch.where(differ, mask_value, 0.0)
    if mask_table is not None and mask_index is not None:
        masks = torch.cat([unpack_bias(mask_table, queries), torch.zeros_like(unpack_bias(mask_table[:1], queries))])
        total = total + masks[mask_index.long()][:, None]
    return total
