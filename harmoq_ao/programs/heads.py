"""Operands of attention as heads of windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harmoq_ao.programs.indices import Index, compact, reshaped


@dataclass(frozen=True)
class Heads:
    """An operand of attention.

    Attributes:
        rows: `[windows, tokens]` int32, the row of each token.
        first: Column of the first head's first channel.
        heads: Number of heads.
        width: Channels of a head; heads follow each other.
    """

    rows: Tensor
    first: int
    heads: int
    width: int


def find_heads(index: Index) -> Heads | None:
    """An operand `[..., heads, tokens, channels]` or `[windows * heads, tokens, channels]` as heads of windows."""
    if "heads" not in index.derived:
        index.derived["heads"] = _find_heads(index)
    found: Heads | None = index.derived["heads"]
    return found


def _find_heads(index: Index) -> Heads | None:
    rows, columns = index.rows, index.columns
    if rows.dim() < 3 or not rows.numel():
        return None
    if rows.dim() == 3:
        starts = columns[:, 0, 0]
        heads = next((i for i in range(1, len(starts)) if starts[i] <= starts[i - 1]), len(starts))
        if len(rows) % heads:
            return None
        rows, columns = (reshaped(part, (-1, heads, *part.shape[1:])) for part in (rows, columns))
    rows, columns = (reshaped(part, (-1, *part.shape[-3:])) for part in (rows, columns))
    heads, width = rows.shape[1], rows.shape[3]
    first = int(compact(columns).max()) + 1 - heads * width
    expected = first + torch.arange(heads * width, dtype=torch.int32).reshape(1, heads, 1, width)
    of_token = rows[:, :1, :, :1]
    right = compact(columns) == expected
    if not bool((compact(rows) == of_token).all()):
        return None
    if not bool(right.all()) and not bool((right | (of_token < 0)).all()):
        return None
    return Heads(of_token[:, 0, :, 0].contiguous(), first, heads, width)


def result_index(query: Index, heads: Heads, shape: tuple[int, ...]) -> Index:
    """The result's entries in a matrix `[tokens, heads * width]` whose rows are those of the queries."""
    key = ("attended", shape)
    if key not in query.derived:
        width = shape[-1]
        rows = query.rows[..., :1].expand(shape)
        lead = torch.arange(heads.heads, dtype=torch.int32) * width
        if len(shape) == 3:
            lead = lead.repeat(shape[0] // heads.heads).reshape(-1, 1, 1)
        else:
            lead = lead.reshape(-1, 1, 1)
        columns = (lead + torch.arange(width, dtype=torch.int32)).expand(shape)
        query.derived[key] = Index(rows, columns, query.length)
    found: Index = query.derived[key]
    return found
