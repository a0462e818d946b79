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
        leads: Whether the operand has all windows of the first head first, and not all heads of the first window.
    """

    rows: Tensor
    first: int
    heads: int
    width: int
    leads: bool = False


def find_heads(index: Index) -> Heads | None:
    """An operand `[..., tokens, channels]` as heads of windows, which are the other axes in either order."""
    if "heads" not in index.derived:
        index.derived["heads"] = _find_heads(index)
    found: Heads | None = index.derived["heads"]
    return found


def _find_heads(index: Index) -> Heads | None:
    rows, columns = index.rows, index.columns
    if rows.dim() < 3 or not rows.numel():
        return None
    if rows.dim() > 3:
        found = _as_heads(rows, columns, rows.shape[-3], False)
        if found is not None:
            return found
    rows, columns = (reshaped(part, (-1, *part.shape[-2:])) for part in (rows, columns))
    starts = compact(columns[..., 0]).amax(-1).expand(len(rows))  # tokens of padding have column 0
    together = next((i for i in range(1, len(starts)) if starts[i] <= starts[i - 1]), len(starts))
    found = _as_heads(rows, columns, together, False)
    apart = int((starts[1:] > starts[:-1]).sum()) + 1
    return found if found is not None or apart in (1, together) else _as_heads(rows, columns, apart, True)


def _as_heads(rows: Tensor, columns: Tensor, heads: int, leads: bool) -> Heads | None:
    """Operands with a given number of heads."""
    groups = rows.shape[:-2].numel()
    if groups % heads:
        return None
    shape = (heads, groups // heads, *rows.shape[-2:]) if leads else (groups // heads, heads, *rows.shape[-2:])
    rows, columns = (reshaped(part, shape) for part in (rows, columns))
    if leads:
        rows, columns = rows.transpose(0, 1), columns.transpose(0, 1)
    width = rows.shape[3]
    first = int(compact(columns).max()) + 1 - heads * width
    expected = first + torch.arange(heads * width, dtype=torch.int32).reshape(1, heads, 1, width)
    of_token = rows[:, :1, :, :1]
    right = compact(columns) == expected
    if not bool((compact(rows) == of_token).all()):
        return None
    if not bool(right.all()) and not bool((right | (of_token < 0)).all()):
        return None
    return Heads(of_token[:, 0, :, 0].contiguous(), first, heads, width, leads)


def result_index(query: Index, heads: Heads, shape: tuple[int, ...]) -> Index:
    """The result's entries in a matrix `[tokens, heads * width]` whose rows are those of the queries."""
    key = ("attended", shape)
    if key not in query.derived:
        width = shape[-1]
        rows = query.rows[..., :1].expand(shape)
        lead = torch.arange(heads.heads, dtype=torch.int32) * width
        groups = torch.Size(shape[:-2]).numel() // heads.heads
        if heads.leads:
            lead = lead.repeat_interleave(groups).reshape(*shape[:-2], 1, 1)
        elif len(shape) == 3 or shape[-3] != heads.heads:
            lead = lead.repeat(groups).reshape(*shape[:-2], 1, 1)
        else:
            lead = lead.reshape(-1, 1, 1)
        columns = (lead + torch.arange(width, dtype=torch.int32)).expand(shape)
        query.derived[key] = Index(rows, columns, query.length)
    found: Index = query.derived[key]
    return found
