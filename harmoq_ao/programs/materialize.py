"""Values brought into shape, for operators of torch: a view where one will do, else a gather."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from harmoq_ao.programs.indices import Index
from harmoq_ao.programs.steps import Read, Value

_MOST_AXES = 5


class Gather(nn.Module):
    """A matrix to a value of any shape.

    Args:
        index: The value's.
        columns: Columns of the matrix.
    """

    def __init__(self, index: Index, columns: int) -> None:
        super().__init__()
        self.shape = tuple(index.shape)
        self.axes: tuple[int, ...] | None = None
        self.first = 0
        self.rows: Tensor | None
        self.flat: Tensor | None
        self.register_buffer("rows", None)
        self.register_buffer("flat", None)
        if not self._as_rows(index):
            flat = index.rows.long() * columns + index.columns
            self.flat = torch.where(index.rows < 0, index.length * columns, flat).reshape(-1)

    def _as_rows(self, index: Index) -> bool:
        """Find an order of axes in which the value is rows of neighbouring columns."""
        axes = range(len(self.shape))
        if len(self.shape) > _MOST_AXES:
            return False
        for last in reversed(axes):
            channels = index.channels(last)
            if channels is None:
                continue
            others = [a for a in axes if a != last]
            self.first = channels.first
            for order in itertools.permutations(others):
                rows = index.rows.select(last, 0).permute([others.index(a) for a in order]).reshape(-1)
                if len(rows) == index.length and torch.equal(rows, torch.arange(len(rows), dtype=rows.dtype)):
                    self.axes = (*order, last)
                    return True
            self.axes = (*others, last)
            self.rows = torch.where(channels.rows < 0, index.length, channels.rows).long()
            return True
        return False

    def forward(self, matrix: Tensor) -> Tensor:
        if self.axes is None:
            padded = torch.cat([matrix.reshape(-1), matrix.new_zeros(1)])
            return padded[self.flat].reshape(self.shape)
        sizes = [self.shape[a] for a in self.axes]
        part = matrix[:, self.first : self.first + sizes[-1]]
        if self.rows is not None:
            part = torch.cat([part, part.new_zeros(1, sizes[-1])]).index_select(0, self.rows)
        inverse = sorted(range(len(sizes)), key=self.axes.__getitem__)
        return part.reshape(sizes).permute(inverse)


def to_matrix(value: Tensor) -> Tensor:
    """A value in torch's own layout as a matrix; see :meth:`Lowering.place_value`."""
    if value.dim() == 4:
        return value.permute(0, 2, 3, 1).reshape(-1, value.shape[1])
    return value.reshape(-1, value.shape[-1] if value.dim() else 1)


class Reordered(nn.Module):
    """A value's matrix in another order.

    Args:
        index: The value's.
        natural: Index of the same value in the matrix to make.
    """

    def __init__(self, value: Value, natural: Index) -> None:
        super().__init__()
        self.gather = Gather(value.index, value.matrix.columns)

    def forward(self, matrix: Tensor) -> Tensor:
        return to_matrix(self.gather(matrix))


class TorchOperator(nn.Module):
    """An operator of torch on values and constants.

    Args:
        target: The operator.
        args: Of the call, with a :class:`Value` for each value of the graph.
        kwargs: Likewise.

    Attributes:
        reads: The matrices behind the values, in the order in which the module takes them.
        parts: Which of several results it gives; None for the only one.
    """

    def __init__(self, target: Any, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.target = target
        leaves, self.tree = pytree.tree_flatten((args, kwargs))
        values = [leaf for leaf in leaves if isinstance(leaf, Value)]
        self.reads = [Read(v.matrix, 0, v.matrix.columns) for v in values]
        self.values = values
        self.gathers: list[Gather] = []  # see `prepare`: most operators turn out to be part of a kernel
        self.leaves = [None if isinstance(leaf, Value) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Value)]
        self.parts: tuple[int, ...] | None = None

    def prepare(self) -> None:
        """Find out how to bring the values into shape."""
        self.gathers = [Gather(v.index, v.matrix.columns) for v in self.values]
        self.values = []

    def spread(self, leaves: list[Any]) -> tuple[Any, Any]:
        """Positional and named arguments of the call."""
        args, kwargs = pytree.tree_unflatten(leaves, self.tree)
        return args, kwargs

    def forward(self, *operands: Tensor) -> Tensor | tuple[Tensor, ...]:
        leaves = list(self.leaves)
        for place, gather, matrix in zip(self.places, self.gathers, operands, strict=True):
            leaves[place] = gather(matrix.float() if matrix.is_floating_point() else matrix)
        args, kwargs = self.spread(leaves)
        result = self.target(*args, **kwargs)
        if self.parts is None:
            return to_matrix(result)
        matrices = tuple(to_matrix(result[part]) for part in self.parts)
        return matrices[0] if len(matrices) == 1 else matrices  # as every module with one result
