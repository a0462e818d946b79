"""Values brought into shape on a GPU: a strided view where one will do, else a gather; nothing is looked up twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harmoq_ao.programs.indices import Index
from harmoq_ao.programs.materialize import Gather, TorchOperator, to_matrix
from harmoq_ao.programs.steps import Value

_NEEDS_FLOAT32 = ("fft", "linalg", "complex", "upsample", "grid_sampler", "cumsum")


class Strides(NamedTuple):
    """A value as a view of a contiguous matrix.

    Attributes:
        sizes: Of the view's axes; axes of the value are split where their entries lie in two strides.
        strides: In entries.
        offset: The first entry.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


def find_strides(flat: Tensor) -> Strides | None:
    """The view whose entries lie at `flat` (any shape), or None where there is none."""
    if not flat.numel():
        return None
    origin = (0,) * flat.dim()
    offset = int(flat[origin])
    sizes: list[int] = []
    strides: list[int] = []
    expected = torch.full((1,) * flat.dim(), offset, dtype=flat.dtype)
    for axis, size in enumerate(flat.shape):
        places = flat[tuple(slice(None) if a == axis else 0 for a in range(flat.dim()))] - offset
        split = _split(places)
        if split is None:
            return None
        for count, stride in split:
            sizes.append(count)
            strides.append(stride)
        expected = expected + places.reshape([size if a == axis else 1 for a in range(flat.dim())])
    return Strides(tuple(sizes), tuple(strides), offset) if torch.equal(expected, flat) else None


def _split(places: Tensor) -> list[tuple[int, int]] | None:
    """Places along an axis, from 0 on, as up to three nested strides."""
    size = len(places)
    if size == 1:
        return [(1, 0)]
    stride = int(places[1])
    if stride < 0:
        return None
    breaks = (places.diff() != stride).nonzero()
    if not len(breaks):
        return [(size, stride)]
    inner = int(breaks[0]) + 1
    if size % inner or not torch.equal(places.reshape(-1, inner), places[::inner, None] + places[None, :inner]):
        return None
    outer = _split(places[::inner].contiguous())
    return None if outer is None else [*outer, (inner, stride)]


class View(nn.Module):
    """A matrix to a value of any shape.

    Args:
        index: The value's.
        columns: Columns of the matrix.
    """

    def __init__(self, index: Index, columns: int) -> None:
        super().__init__()
        self.shape = tuple(index.shape)
        self.strides: Strides | None = None
        if not bool((index.rows < 0).any()):
            self.strides = find_strides(index.rows.long() * columns + index.columns)
        self.gather = None if self.strides is not None else Gather(index, columns)

    def forward(self, matrix: Tensor) -> Tensor:
        """The value; a view of the matrix where it is one."""
        if self.strides is None:
            assert self.gather is not None
            gathered: Tensor = self.gather(matrix)
            return gathered
        sizes, strides, offset = self.strides
        return matrix.contiguous().as_strided(sizes, strides, matrix.storage_offset() + offset).reshape(self.shape)


class Reordered(nn.Module):
    """A value's matrix in another order.

    Args:
        value: The value.
        natural: Index of the same value in the matrix to make.
    """

    def __init__(self, value: Value, natural: Index) -> None:
        super().__init__()
        self.view = View(value.index, value.matrix.columns)

    def forward(self, matrix: Tensor) -> Tensor:
        """The matrix."""
        return to_matrix(self.view(matrix)).contiguous()


class Operator(TorchOperator):
    """An operator of torch on values and constants, in the type of the values where torch has it.

    Attributes:
        dtype: Of its floating-point results.
    """

    dtype: torch.dtype = torch.float32

    def prepare(self) -> None:
        """Find out how to bring the values into shape."""
        self.views = nn.ModuleList(View(v.index, v.matrix.columns) for v in self.values)
        self.values = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Operator:
        self.leaves = [fn(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return super()._apply(fn, recurse)

    def forward(self, *operands: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The results as matrices."""
        dtype = torch.float32 if any(name in str(self.target) for name in _NEEDS_FLOAT32) else self.dtype
        device = operands[0].device if operands else torch.device("cpu")
        leaves = [self._constant(leaf, dtype, device) for leaf in self.leaves]
        for place, view, matrix in zip(self.places, self.views, operands, strict=True):
            value = view(matrix)
            leaves[place] = value.to(dtype) if value.is_floating_point() else value
        args, kwargs = self.spread(leaves)
        result = self.target(*args, **kwargs)
        if self.parts is None:
            return self._matrix(result)
        matrices = tuple(self._matrix(result[part]) for part in self.parts)
        return matrices[0] if len(matrices) == 1 else matrices

    def _constant(self, leaf: Any, dtype: torch.dtype, device: torch.device) -> Any:
        if isinstance(leaf, Tensor) and leaf.dtype is torch.float32 and not str(self.target).startswith("harmoq"):
            return leaf.to(dtype)
        return device if isinstance(leaf, torch.device) else leaf

    def _matrix(self, result: Tensor) -> Tensor:
        matrix = to_matrix(result)
        return matrix.to(self.dtype) if matrix.is_floating_point() else matrix
