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
from harmoq_ao.cpu_kernels.channel_map import MapQuantizers, channel_map, channel_map_codes
from harmoq_ao.cpu_kernels.column_means import column_means
from harmoq_ao.cpu_kernels.rowwise import Broadcast, Columns, Op, RowProgram
from harmoq_ao.kernels.ops import matmul_contraction
from harmoq_ao.programs.attention_matching import Match, constant_of, match_normalized, resolved, scaled
from harmoq_ao.programs.codes import coded
from harmoq_ao.programs.context import Context
from harmoq_ao.programs.heads import Heads, find_heads, result_index
from harmoq_ao.programs.indices import Index
from harmoq_ao.programs.steps import Matrix, Read, Value
from harmoq_ao.quant.integer_reference import Affine, static_qparams

_TURN: tuple[Any, Any, Any] = (torch.ops.aten.transpose.int, (-2, -1), {})


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
    quantizers: MapQuantizers | None
    index: Index


def find_channel_attention(lowering: Context, match: Match) -> Channels | None:
    """An attention among channels; None where it is another."""
    (query_node, q_gain), (key_node, k_gain) = scaled(lowering.known, match.query), scaled(lowering.known, match.key)
    query, key, value = (
        normalized(lowering, query_node),
        normalized(lowering, key_node),
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
    quantizers: Any = _quantizers(lowering, match, (q_gain, k_gain))
    if factor is None or quantizers is False:
        return None
    index = result_index(turned, v, (*turned.shape[:-1], v.width)).moved(*_TURN)
    return Channels(q_matrix, k_matrix, value, q, k, v, (q_eps, k_eps), factor * (q_gain * k_gain), quantizers, index)


def lower_channel_attention(lowering: Context, match: Match) -> Value | None:
    """Token-wise products with maps from one pass over the tokens; None where the attention is another."""
    found = find_channel_attention(lowering, match)
    if found is None:
        return None
    q, k, v = found.q, found.k, found.v
    together = found.query is found.key and k.first == q.first + q.heads * q.width
    maps = ChannelMaps(q, k, found.eps, found.factor, found.quantizers, together)
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


def _quantizers(lowering: Context, match: Match, gains: tuple[float, float]) -> MapQuantizers | bool | None:
    """Static quantizers of both operands of both products; None in float, False where the kernels take others.

    Those of queries and keys are of the normalized ones, which are multiplied by `gains` before they are quantized.
    """
    found: list[Affine | None] = []
    for arguments in (match.scores, match.products):
        own = resolved(lowering.known, arguments)
        if own is None:
            return None
        left_bounds, right_bounds, joint_scale, left_bits, right_bits, backend = own
        if left_bounds is None or right_bounds is None or joint_scale is not None or backend != "auto":
            return False
        contraction = matmul_contraction(left_bounds, right_bounds, None, left_bits, right_bits)
        found += [contraction.left.act, contraction.right.act]
    query, key, of_map, value = found
    if query is None or key is None or of_map is None or value is None:
        return False
    query, key = (
        Affine(act.step / gain, act.lower / gain, act.bits) for act, gain in zip((query, key), gains, strict=True)
    )
    return MapQuantizers(query, key, of_map, value, match.relative)


class ChannelMaps(nn.Module):
    """Attention maps of channels as the matrices that tokens are multiplied with, `[images * C, C]`.

    Args:
        query: Where queries are.
        key: Where keys are.
        eps: Smallest lengths of queries and keys.
        factor: `[heads]`, of the scores.
        quantizers: Of both products; None in float. With them tokens are codes, the matrices hold rounded maps times
            the step of the values, and a second result `[images, C]` is what the lower bound of the values adds.
        together: Whether keys are the columns behind the queries.
    """

    def __init__(
        self,
        query: Heads,
        key: Heads,
        eps: tuple[float, float],
        factor: Tensor,
        quantizers: MapQuantizers | None,
        together: bool = False,
    ) -> None:
        super().__init__()
        self.query, self.key, self.eps, self.factor, self.quantizers = query, key, eps, factor, quantizers
        self.together = together

    def forward(self, query: Tensor, key: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        heads, width, images = self.query.heads, self.query.width, len(self.query.rows)
        q, k = Operand(query, self.query.first), Operand(key, self.key.first)
        if self.quantizers is None:
            return channel_map(channel_gram(q, k, heads, width, images), self.eps, self.factor)
        acts, squares = (self.quantizers.query, self.quantizers.key), self._squares(q, k, heads * width, images)
        q_codes, k_codes = (
            Quantizer(s, eps, factor, offset, act.bits)
            for s, eps, act, (factor, offset, *_) in zip(
                squares, self.eps, acts, self.quantizers.numbers[:2], strict=True
            )
        )
        gram = channel_gram_codes(q, k, heads, width, images, q_codes, k_codes)
        return channel_map_codes(gram, len(query) // images, self.factor, self.quantizers)

    def _squares(self, q: Operand, k: Operand, width: int, images: int) -> tuple[Tensor, Tensor]:
        """Mean squares of both operands, in one pass where their columns follow one another."""
        if self.together:
            both = column_means(q.matrix, q.first, 2 * width, images, squares=True)
            return both[:, :width], both[:, width:]
        means = [column_means(x.matrix, x.first, width, images, squares=True) for x in (q, k)]
        return means[0], means[1]


def _mixed(
    lowering: Context, values: Matrix, heads: Heads, results: list[Matrix], quantizers: MapQuantizers | None
) -> Matrix:
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
    act = quantizers.value
    factor, offset = (v.expand(width).contiguous() for v in static_qparams(act))
    codes = coded(lowering, read, factor, offset, act.bits)
    return lowering.row_step(values.rows, width, [codes, matrices, Read(results[1], 0, width)], emit)
