"""Attention within windows in a recorded graph: windows and heads as indices, bias and mask as tables of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harmoq_ao.programs.attention_matching import Match, constant_of, resolved
from harmoq_ao.programs.context import Context
from harmoq_ao.programs.heads import Heads, find_heads, result_index
from harmoq_ao.programs.indices import Index, compact, reshaped
from harmoq_ao.programs.masks import EXCLUDED, Mask
from harmoq_ao.programs.steps import Read, Value


@dataclass(frozen=True, eq=False)
class Attention:
    """What an attention within windows computes.

    Attributes:
        query: The queries' matrix and entries; `key` and `value` likewise.
        q: Where queries are; `k` and `v` likewise, with the same rows.
        q_factor: Of the queries, before anything else happens to them.
        factor: `[heads]`, of the scores.
        bias: `[heads, N, M]` float32, or None.
        mask: Or None.
        scores: Arguments of a quantized score product after its operands; None where it is float.
        products: Likewise of the product with the values.
        relative: Whether the map is quantized relative to its rows.
        index: Of the result, in a matrix with the rows of the queries' and a column for each head and channel.
    """

    query: Value
    key: Value
    value: Value
    q: Heads
    k: Heads
    v: Heads
    q_factor: float
    factor: Tensor
    bias: Tensor | None
    mask: Mask | None
    scores: tuple[Any, ...] | None
    products: tuple[Any, ...] | None
    relative: bool
    index: Index

    @property
    def width(self) -> int:
        """Columns of the result."""
        return self.v.heads * self.v.width

    def reads(self, exact: bool) -> list[Read]:
        """The columns that it reads, in the order queries, keys, values."""
        parts = (self.query, self.q), (self.key, self.k), (self.value, self.v)
        return [Read(operand.matrix, part.first, part.heads * part.width, exact) for operand, part in parts]


def find_attention(lowering: Context, match: Match, operands: list[Any], q_factor: float) -> Attention | None:
    """An attention within windows; None where it is another.

    Args:
        lowering: The walk.
        match: The attention in the graph.
        operands: Queries, transposed keys and values.
        q_factor: Of the queries.
    """
    if not all(isinstance(value, Value) for value in operands):
        return None
    query, key, value = operands
    turned = key.index.moved(torch.ops.aten.transpose.int, (-2, -1), {})
    parts: list[Any] = [find_heads(index) for index in (query.index, turned, value.index)]
    if any(part is None for part in parts):
        return None
    q, k, v = parts
    if k.rows.shape != v.rows.shape or not torch.equal(k.rows, v.rows) or (q.heads, q.width) != (k.heads, k.width):
        return None
    if len(q.rows) != len(k.rows) or v.heads != q.heads or v.width != q.width or not _once(query.index, q.rows):
        return None
    if len({q.leads, k.leads, v.leads}) != 1:
        return None
    shape = (len(q.rows), q.heads, q.rows.shape[1], k.rows.shape[1])
    scores = _scores(lowering, match, shape, q.leads)
    if scores is None:
        return None
    first, second = (resolved(lowering.known, arguments) for arguments in (match.scores, match.products))
    index = result_index(query.index, q, (*query.shape[:-1], value.shape[-1]))
    return Attention(query, key, value, q, k, v, q_factor, *scores, first, second, match.relative, index)


def _once(index: Index, rows: Tensor) -> bool:
    """Whether no token is in two windows."""
    if "once" not in index.derived:
        real = rows[rows >= 0]
        seen = torch.zeros(index.length, dtype=torch.bool)
        seen[real.long()] = True
        index.derived["once"] = int(seen.sum()) == len(real)
    found: bool = index.derived["once"]
    return found


# --- scores -----------------------------------------------------------------------------------------------------------


def _scores(
    lowering: Context, match: Match, shape: tuple[int, ...], leads: bool
) -> tuple[Tensor, Tensor | None, Mask | None] | None:
    """Factor `[heads]`, bias `[heads, N, M]`, mask of scores `[windows, heads, N, M]`; None where they are others."""
    _, heads, queries, keys = shape
    view: tuple[int, ...] = (*tuple(match.query.meta["shape"][:-1]), keys)
    factor, bias, mask = torch.ones(heads), None, None
    for kind, operand in match.terms:
        if kind == "view":
            view = operand
            continue
        constant = _excluding(lowering, *operand) if kind == "fill" else constant_of(lowering.known, operand)
        parts = None if constant is None else _parts(constant, view, shape, leads)
        if parts is None:
            return None
        of_heads, of_windows = parts
        if kind in ("mul", "div"):
            number = None if of_heads is None or of_windows is not None else of_heads.flatten(1)
            if number is None or not bool((number == number[:, :1]).all()) or bias is not None or mask is not None:
                return None
            factor = factor * number[:, 0] if kind == "mul" else factor / number[:, 0]
        elif of_windows is not None:
            if mask is not None:
                return None
            mask = _mask(lowering, of_windows)
        elif of_heads is not None:
            bias = of_heads if bias is None else bias + of_heads
    whole = None if bias is None else bias.expand(heads, queries, keys).float().contiguous()
    return factor, whole, mask


def _excluding(lowering: Context, where: Any, number: float) -> Tensor | None:
    """A term that leaves nothing of the scores that a number so small replaces; None for another number."""
    chosen = constant_of(lowering.known, where)
    if not isinstance(chosen, Tensor) or number > EXCLUDED or bool(chosen.all(-1).any()):
        return None
    return torch.where(chosen, EXCLUDED, 0.0)


def _parts(
    constant: Any, view: tuple[int, ...], shape: tuple[int, ...], leads: bool
) -> tuple[Tensor | None, Tensor | None] | None:
    """A term as a table of the heads `[heads or 1, N or 1, M or 1]`, or of the windows `[windows, N, M]`."""
    windows, heads, queries, keys = shape
    whole = torch.as_tensor(constant, dtype=torch.float32).expand(view)
    if leads:
        term = reshaped(whole, (heads, windows, queries, keys)).transpose(0, 1)
    else:
        term = reshaped(whole, shape)
    if windows == 1 or term.stride(0) == 0:
        return compact(term)[0], None
    if heads > 1 and term.stride(1) and not bool((term == term[:, :1]).all()):
        return (term[0], None) if bool((term == term[:1]).all()) else None
    return None, term[:, 0]


def _mask(lowering: Context, table: Tensor) -> Mask | None:
    """A mask `[windows, N, M]` with equal tables stored once; None where all are zero."""
    place = table.data_ptr(), table.shape, table.stride()
    for other, mask in lowering.masks:  # all blocks share what was recorded, as a rule
        if place == (other.data_ptr(), other.shape, other.stride()):
            return mask
    for other, mask in lowering.masks:
        if other.shape == table.shape and torch.equal(other, table):
            return mask
    lowering.masks.append((table, Mask.of(table)))
    return lowering.masks[-1][1]
