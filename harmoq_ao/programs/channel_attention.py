"""Attention among channels, whose scores are sums over all pixels of an image.

With queries and keys `[images, heads, D, L]` of length one along the pixels, ``S = q k^T`` is `[images, heads, D, D]`:
one pass over the tokens sums the products of neighbouring channels, and one number per channel its squares. What the
map makes of the values is then token-wise: every token times one small matrix of its image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from harmoq_ao.common.elementwise import Binary
from harmoq_ao.cpu_kernels.channel_gram import Operand, Quantizer, channel_gram, channel_gram_codes
from harmoq_ao.cpu_kernels.column_means import column_means
from harmoq_ao.cpu_kernels.rowwise import Broadcast, Columns, Op, RowProgram
from harmoq_ao.kernels.ops import matmul_contraction
from harmoq_ao.programs.attention_matching import Match, constant_of, match_normalized, resolved
from harmoq_ao.programs.codes import coded
from harmoq_ao.programs.context import Context
from harmoq_ao.programs.heads import Heads, find_heads, result_index
from harmoq_ao.programs.indices import Index
from harmoq_ao.programs.steps import Matrix, Read, Value
from harmoq_ao.quant.integer_reference import Affine, quantize_codes, static_qparams

_TURN: tuple[Any, Any, Any] = (torch.ops.aten.transpose.int, (-2, -1), {})


Quantizers = tuple[tuple[Affine, Affine], tuple[Affine, Affine]]


@dataclass(frozen=True, eq=False)
class Channels:
    """What an attention among channels computes.

    Attributes:
        query: The matrix of the queries before they are normalized.
        key: Likewise.
        value: The values.
        q: Where queries are; `k` and `v` likewise, with whole images for windows.
        eps: Smallest lengths of queries and keys.
        factor: `[heads]`, of the scores.
        quantizers: Of both products; None in float.
        index: Of the result, in a matrix with the rows of the values.
    """

    query: Matrix
    key: Matrix
    value: Value
    q: Heads
    k: Heads
    v: Heads
    eps: tuple[float, float]
    factor: Tensor
    quantizers: Quantizers | None
    index: Index


def find_channel_attention(lowering: Context, match: Match) -> Channels | None:
    """An attention among channels; None where it is another."""
    query, key, value = (
        normalized(lowering, match.query),
        normalized(lowering, match.key),
        lowering.known.get(match.value),
    )
    if query is None or key is None or not isinstance(value, Value):
        return None
    (q_matrix, q_index, q_eps), (k_matrix, k_index, k_eps) = query, key
    turned = value.index.moved(*_TURN)
    parts: list[Any] = [find_heads(index) for index in (q_index.moved(*_TURN), k_index, turned)]
    if any(p is None or not _whole_images(p, value.matrix.rows) for p in parts):
        return None
    q, k, v = parts
    if not q.heads == k.heads == v.heads or not q.width == k.width == v.width:
        return None
    if not len(q.rows) == len(k.rows) == len(v.rows) == lowering.images:
        return None
    factor = _factor(lowering, match, q.heads)
    quantizers: Any = _quantizers(lowering, match)
    if factor is None or quantizers is False:
        return None
    index = result_index(turned, v, (*turned.shape[:-1], v.width)).moved(*_TURN)
    return Channels(q_matrix, k_matrix, value, q, k, v, (q_eps, k_eps), factor, quantizers, index)


def lower_channel_attention(lowering: Context, match: Match) -> Value | None:
    """Token-wise products with maps from one pass over the tokens; None where the attention is another."""
    found = find_channel_attention(lowering, match)
    if found is None:
        return None
    q, k, v = found.q, found.k, found.v
    maps = ChannelMaps(q, k, found.eps, found.factor, found.quantizers)
    exact = bool(found.quantizers) or not lowering.half
    reads = [Read(found.query, q.first, q.heads * q.width, exact), Read(found.key, k.first, k.heads * k.width, exact)]
    matrices = [((v.heads * v.width,), _rows(lowering, len(v.rows) * v.heads * v.width, v.heads * v.width))]
    if found.quantizers:
        matrices.append(((v.heads * v.width,), _rows(lowering, len(v.rows), v.heads * v.width)))
    results = [made.matrix for made in lowering.module_step(maps, reads, matrices)]
    return Value(_mixed(lowering, found.value.matrix, v, results, found.quantizers), found.index)


def _rows(lowering: Context, rows: int, columns: int) -> Index:
    return lowering.roots.rows_last((rows, columns))


def normalized(lowering: Context, node: fx.Node) -> tuple[Matrix, Index, float] | None:
    """What a normalized operand is made from, moved as the operand is."""
    found = match_normalized(node)
    source = None if found is None else lowering.known.get(found.source)
    if found is None or not isinstance(source, Value) or found.axis != len(source.shape) - 1:
        return None
    index = source.index
    for move in found.moves:
        if move.target not in (torch.ops.aten.clone.default, torch.ops.aten.alias.default):
            index = index.moved(move.target, tuple(move.args[1:]), dict(move.kwargs))
    return source.matrix, index, found.eps


def _whole_images(heads: Heads, length: int) -> bool:
    """Whether the tokens of each "window" are all those of an image, in order."""
    return torch.equal(heads.rows.reshape(-1), torch.arange(length, dtype=torch.int32))


def _factor(lowering: Context, match: Match, heads: int) -> Tensor | None:
    """`[heads]` factor of the scores; None where something else happens to them."""
    factor = torch.ones(heads)
    for kind, operand in match.terms:
        if kind == "view":
            continue
        constant = constant_of(lowering.known, operand)
        if kind == "add" or constant is None:
            return None
        number = torch.as_tensor(constant, dtype=torch.float32).reshape(-1)
        if len(number) not in (1, heads):
            return None
        factor = factor * number if kind == "mul" else factor / number
    return factor


def _quantizers(lowering: Context, match: Match) -> Quantizers | bool | None:
    """Static quantizers of both operands of both products; None in float, False where the kernels take others."""
    found: list[Any] = []
    for arguments in (match.scores, match.products):
        own = resolved(lowering.known, arguments)
        if own is None:
            return None
        left_bounds, right_bounds, joint_scale, left_bits, right_bits, backend = own
        if left_bounds is None or right_bounds is None or joint_scale is not None or backend != "auto":
            return False
        contraction = matmul_contraction(left_bounds, right_bounds, None, left_bits, right_bits)
        found.append((contraction.left.act, contraction.right.act))
    return False if match.relative else (found[0], found[1])


class ChannelMaps(nn.Module):
    """Attention maps of channels as the matrices that tokens are multiplied with, `[images * C, C]`.

    Args:
        query: Where queries are.
        key: Where keys are.
        eps: Smallest lengths of queries and keys.
        factor: `[heads]`, of the scores.
        quantizers: Of both products; None in float. With them tokens are codes, the matrices hold rounded maps times
            the step of the values, and a second result `[images, C]` is what the lower bound of the values adds.
    """

    def __init__(
        self, query: Heads, key: Heads, eps: tuple[float, float], factor: Tensor, quantizers: Quantizers | None
    ) -> None:
        super().__init__()
        self.query, self.key, self.eps, self.factor, self.quantizers = query, key, eps, factor, quantizers

    def forward(self, query: Tensor, key: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        heads, width, images = self.query.heads, self.query.width, len(self.query.rows)
        operands = Operand(query, self.query.first), Operand(key, self.key.first), heads, width, images
        if self.quantizers is None:
            gram, *squares = channel_gram(*operands)
            q_norms, k_norms = (s.sqrt().clamp_min(e) for s, e in zip(squares, self.eps, strict=True))
            scores = gram / q_norms.unsqueeze(-1) / k_norms.unsqueeze(-2)
            return _block_diagonal(torch.softmax(scores * self.factor[:, None, None], -1).transpose(-2, -1))
        (left, right), (map_act, value_act) = self.quantizers
        q_norms, k_norms = (self._norms(x, eps) for x, eps in zip(operands[:2], self.eps, strict=True))
        scores = self._integer_scores(operands, left, right, q_norms, k_norms)
        weights = torch.softmax(scores * self.factor[:, None, None], -1)
        codes = quantize_codes(weights, *static_qparams(map_act), map_act.bits)
        rounded = codes.float() * map_act.step + map_act.lower
        return _block_diagonal((rounded * value_act.step).transpose(-2, -1)), (
            rounded.sum(-1) * value_act.lower
        ).flatten(1)

    def _norms(self, operand: Operand, eps: float) -> Tensor:
        """Lengths along the pixels, `[images, heads, D]`."""
        heads, width, images = self.query.heads, self.query.width, len(self.query.rows)
        squares = column_means(operand.matrix, operand.first, heads * width, images, squares=True)
        length = len(operand.matrix) // images
        return (squares * length).sqrt().clamp_min(eps).reshape(images, heads, width)

    def _integer_scores(self, operands: Any, left: Affine, right: Affine, q_norms: Tensor, k_norms: Tensor) -> Tensor:
        qparams = []
        for act, norms in ((left, q_norms), (right, k_norms)):
            factor, offset = static_qparams(act)
            qparams.append(Quantizer((factor / norms).contiguous(), offset.expand(norms.shape).contiguous(), act.bits))
        acc, q_sums, k_sums = channel_gram_codes(*operands, *qparams)
        length = len(operands[0].matrix) // operands[-1]
        rows, columns = q_sums.float().unsqueeze(-1), k_sums.float().unsqueeze(-2)
        outer = (rows * left.step + left.lower * length) * right.lower
        return acc.float() * left.step * right.step + outer + columns * right.step * left.lower


def _block_diagonal(blocks: Tensor) -> Tensor:
    """`[images, heads, D, D]` to `[images * heads * D, heads * D]`."""
    images, heads, width, _ = blocks.shape
    whole = blocks.new_zeros(images, heads, width, heads, width)
    diagonal = torch.arange(heads)
    whole[:, diagonal, :, diagonal] = blocks.transpose(0, 1)
    return whole.reshape(images * heads * width, heads * width)


def _mixed(lowering: Context, values: Matrix, heads: Heads, results: list[Matrix], quantizers: Any) -> Matrix:
    """Each token's values times the matrix of its image."""
    width = heads.heads * heads.width
    exact = bool(quantizers) or not lowering.half
    read, matrices = Read(values, heads.first, width, exact), Read(results[0], 0, width)

    def emit(p: RowProgram, to: Columns, at: Any) -> None:
        p.emit(Op.PRODUCT, to, at[0], width, width, at[1].slot)
        if len(at) > 2:
            p.emit(Op.BINARY, Binary.ADD, to, to, at[2], width, Broadcast.IMAGE)

    if not quantizers:
        return lowering.row_step(values.rows, width, [read, matrices], emit)
    act = quantizers[1][1]
    factor, offset = (v.expand(width).contiguous() for v in static_qparams(act))
    codes = coded(lowering, read, factor, offset, act.bits)
    return lowering.row_step(values.rows, width, [codes, matrices, Read(results[1], 0, width)], emit)
