"""Windows, shifts, splits into heads and back, as indices: which entry of a matrix of tokens each entry of a value is.

Authors move tokens about between operations that treat every token alike. Here such a move is not carried out but
followed: the same operators are applied to the indices of rows and columns, so that whatever an author writes (roll and
partition, unfold, pad and crop, permute for a convolution) needs no rule of its own. An :class:`Index` keeps what was
derived from it, so that the blocks of a network, which all move alike, share the work.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harmoq_ao.cpu_kernels.rowwise import Broadcast

_aten = torch.ops.aten
_RESHAPES = {_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default}
#: Operators that give some entries of their operand in another order; pads are rows of -1.
MOVEMENTS = _RESHAPES | {
    _aten.permute.default,
    _aten.transpose.int,
    _aten.t.default,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.unbind.int,
    _aten.chunk.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.squeeze.default,
    _aten.unsqueeze.default,
    _aten.expand.default,
    _aten.roll.default,
    _aten.flip.default,
    _aten.constant_pad_nd.default,
    _aten.reflection_pad2d.default,
    _aten.replication_pad2d.default,
    _aten.im2col.default,
    _aten.pixel_shuffle.default,
    _aten.pixel_unshuffle.default,
    _aten.repeat.default,
}
_NO_INTEGERS = {_aten.im2col.default, _aten.reflection_pad2d.default, _aten.replication_pad2d.default}
PADDED = -1


class Channels(NamedTuple):
    """A value whose entries along one axis are neighbouring columns of one row.

    Attributes:
        first: The first column.
        rows: Row of each position of the other axes, flattened, int32.
        in_order: Whether these are all rows of the matrix, in order.
        padded: Whether some are :data:`PADDED`.
    """

    first: int
    rows: Tensor
    in_order: bool
    padded: bool


class Aligned(NamedTuple):
    """How a value meets another of the same shape row by row.

    Attributes:
        mode: Which of its entries a row sees.
        offset: Its column minus the other's; for one column per row, that column.
    """

    mode: Broadcast
    offset: int


class Span(NamedTuple):
    """Columns from `first` to `last` that a value is made of, and whether rows of it are :data:`PADDED`."""

    first: int
    last: int
    padded: bool


@dataclass(eq=False)
class Index:
    """Row and column of each entry of a value in its matrix.

    Args:
        rows: int32, the value's shape.
        columns: Likewise.
        length: Rows of the matrix.
    """

    rows: Tensor
    columns: Tensor
    length: int
    derived: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def shape(self) -> torch.Size:
        """Shape of the value."""
        return self.rows.shape

    def moved(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a movement makes of the value: an index, or a list of them."""
        key = (target, repr(args), repr(kwargs))
        if key not in self.derived:
            self.derived[key] = self._moved(target, args, kwargs)
        return self.derived[key]

    def _moved(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is _aten.constant_pad_nd.default and len(args) > 1 and args[1] != 0:
            raise ValueError("a pad with another value than zero")
        parts = []
        for index, pad in ((self.rows, PADDED), (self.columns, 0)):
            if target in _RESHAPES:
                moved: Any = reshaped(index, args[0])
            elif target is _aten.roll.default and len(args) > 1:
                moved = target(compact(index), *args, **kwargs).expand(index.shape)
            elif target is _aten.constant_pad_nd.default:
                moved = target(index, args[0], pad)
            elif target in _NO_INTEGERS:  # float64 is exact; im2col pads with zero, which stands for PADDED
                shifted = target((index - pad).double(), *args, **kwargs)
                moved = shifted.to(torch.int32) + pad
            else:
                moved = target(index, *args, **kwargs)
            parts.append(moved)
        if isinstance(parts[0], Tensor):
            return Index(parts[0], parts[1], self.length)
        return [Index(r, c, self.length) for r, c in zip(*parts, strict=True)]

    def span(self) -> Span:
        """Columns that the value is made of."""
        if "span" not in self.derived:
            rows, columns = compact(self.rows), compact(self.columns)
            self.derived["span"] = Span(int(columns.min()), int(columns.max()), bool((rows < 0).any()))
        found: Span = self.derived["span"]
        return found

    def channels(self, axis: int) -> Channels | None:
        """The value as rows of neighbouring columns along an axis; None where it is not."""
        key = ("channels", axis % len(self.shape))
        if key not in self.derived:
            self.derived[key] = self._channels(axis)
        found: Channels | None = self.derived[key]
        return found

    def _channels(self, axis: int) -> Channels | None:
        rows, columns = self.rows.movedim(axis, -1), self.columns.movedim(axis, -1)
        first = int(columns[(0,) * columns.dim()]) if columns.numel() else 0
        expected = torch.arange(first, first + columns.shape[-1], dtype=torch.int32)
        if rows.stride(-1) and not bool((rows == rows[..., :1]).all()):
            return None
        real = compact(rows) >= 0
        right = compact(columns) == expected
        if not bool(right.all()) and not bool((right | ~real).all()):
            return None
        flat = rows[..., 0].reshape(-1).contiguous()
        in_order = len(flat) == self.length and torch.equal(flat, torch.arange(self.length, dtype=torch.int32))
        return Channels(first, flat, in_order, not bool(real.all()))

    def shifted(self, first: int) -> Index:
        """The same rows of a matrix that begins with column `first` of this one."""
        if first == 0:
            return self
        key = ("shifted", first)
        if key not in self.derived:
            self.derived[key] = Index(self.rows, self.columns - first, self.length)
        found: Index = self.derived[key]
        return found

    def widened(self, axis: int, width: int) -> Index:
        """A value with `width` columns along an axis, in the same rows."""
        key = ("widened", axis % len(self.shape), width)
        if key not in self.derived:
            rows = self.rows.movedim(axis, -1)[..., :1]
            columns = torch.arange(width, dtype=torch.int32).expand(*rows.shape[:-1], width)
            rows = rows.expand(*rows.shape[:-1], width)
            self.derived[key] = Index(rows.movedim(-1, axis), columns.movedim(-1, axis), self.length)
        found: Index = self.derived[key]
        return found

    def aligned(self, other: Index) -> Aligned | None:
        """How another value of the same shape meets this one, row by row; None where it does not."""
        key = ("aligned", id(other))
        if key not in self.derived:  # the other index is held with the answer, so that its identity stays its own
            self.derived[key] = (_aligned(self, other), other)
        found: Aligned | None = self.derived[key][0]
        return found


def compact(index: Tensor) -> Tensor:
    """An index with length one along every axis in which all of its entries lie at one place in memory.

    A row is the same for all channels of a token and a column for all tokens, so that an index is stored for one of
    them: what compares or moves indices takes the time of what is stored.
    """
    for axis, (size, stride) in enumerate(zip(index.shape, index.stride(), strict=True)):
        if size > 1 and stride == 0:
            index = index.narrow(axis, 0, 1)
    return index


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two indices of the same shape are equal."""
    return bool((compact(one) == compact(other)).all())


def reshaped(index: Tensor, shape: Any) -> Tensor:
    """``index.reshape(shape)``, where axes of one place in memory stay so if they are not joined with others."""
    wanted = _sizes(index.numel(), shape)
    if not index.numel():
        return index.reshape(wanted)
    small, new = list(index.shape), list(wanted)
    for old_axes, new_axes in _segments(index.shape, wanted):
        if all(index.stride(axis) == 0 or index.shape[axis] == 1 for axis in old_axes):
            for axis in old_axes:
                small[axis] = 1
            for axis in new_axes:
                new[axis] = 1
    return index[tuple(slice(0, size) for size in small)].reshape(new).expand(wanted)


def _sizes(entries: int, shape: Any) -> list[int]:
    """A shape without -1."""
    sizes = [int(n) for n in shape]
    known = math.prod(n for n in sizes if n != -1)
    return [entries // max(known, 1) if n == -1 else n for n in sizes]


def _segments(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Groups of neighbouring axes before and after a reshape that hold the same entries, as small as possible."""
    i = j = 0
    while i < len(old) or j < len(new):
        left, right, before, after = [], [], 1, 1
        while True:
            if i < len(old) and (before <= after or j >= len(new)):
                before *= old[i]
                left.append(i)
                i += 1
            elif j < len(new):
                after *= new[j]
                right.append(j)
                j += 1
            if before == after or (i >= len(old) and j >= len(new)):
                break
        yield left, right


def _aligned(this: Index, other: Index) -> Aligned | None:
    if this.shape != other.shape:
        return None
    difference = compact(other.columns) - compact(this.columns)
    offset = int(difference.flatten()[0]) if difference.numel() else 0
    same_offset = bool((difference == offset).all())
    if this.length == other.length and same(this.rows, other.rows):
        if same_offset:
            return Aligned(Broadcast.NONE, offset)
        columns = compact(other.columns)
        column = int(columns.flatten()[0])
        return Aligned(Broadcast.COLUMN, column) if bool((columns == column).all()) else None
    if this.length % other.length or not same_offset:
        return None
    images = torch.div(compact(this.rows), this.length // other.length, rounding_mode="floor")
    return Aligned(Broadcast.IMAGE, offset) if bool((images == compact(other.rows)).all()) else None


class Roots:
    """Indices of values as they are made, one object for all of a kind."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Index] = {}

    def rows_last(self, shape: tuple[int, ...]) -> Index:
        """A value `[..., C]` whose rows are the positions of the leading axes."""
        return self._root(shape, -1)

    def channels_first(self, shape: tuple[int, ...]) -> Index:
        """A value `[B, C, ...]` whose rows are the positions of the other axes."""
        return self._root(shape, 1)

    def _root(self, shape: tuple[int, ...], axis: int) -> Index:
        key = (shape, axis)
        if key not in self._known:
            width = shape[axis]
            others = torch.Size(n for i, n in enumerate(shape) if i != axis % len(shape))
            length = others.numel()
            rows = torch.arange(length, dtype=torch.int32).reshape(*others, 1).expand(*others, width)
            columns = torch.arange(width, dtype=torch.int32).expand(*others, width)
            self._known[key] = Index(rows.movedim(-1, axis), columns.movedim(-1, axis), length)
        return self._known[key]
