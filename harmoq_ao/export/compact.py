"""Constants of an ONNX graph, stored without loss in few bytes; engines restore them when they load a file.

The mask of an image repeats the windows of its interior, and a position bias repeats one row of a table for every pair
of tokens as far apart. Such a constant is stored as its different slices and an index (a Gather), whole numbers in the
narrowest type that holds them (a Cast), and what is equal once.
"""

from __future__ import annotations

from collections.abc import Hashable
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import DeduplicateHashedInitializersPass

_SMALL = 4096  # bytes; a node takes a few hundred
_GAIN = 2  # what is not smaller by this factor stays as it is
_INTEGERS = (np.int8, np.int16, np.int32)  # indices are cast, and some engines take no unsigned ones


def compact_constants(model: ir.Model) -> None:
    """Store the initializers of a graph in fewer bytes, in place; their values and the graph's results are the same."""
    for value in model.graph.initializers.values():
        array = _array(value)
        if array is not None and not array.flags.c_contiguous:  # the pass hashes memory as it lies
            value.const_value = ir.Tensor(np.ascontiguousarray(array), name=value.name)
    DeduplicateHashedInitializersPass(size_limit=1 << 40)(model)
    restoring = _Restoring(model.graph)
    for value in list(model.graph.initializers.values()):
        array = _array(value)
        if array is None or array.nbytes < _SMALL:
            continue
        found = restoring.restored(array)
        if found is not None:
            value.replace_all_uses_with(found)
            del model.graph.initializers[str(value.name)]
    restoring.place()


def repeated_slices(array: np.ndarray) -> tuple[np.ndarray, np.ndarray, int] | None:
    """A constant as its different slices.

    Returns:
        Slices, index and axis, with ``array == slices.take(index, axis).reshape(array.shape)``, in the split that takes
        the least memory; None where none takes less than half.
    """
    best, found = array.nbytes // _GAIN, None
    for axes in range(1, array.ndim):
        outer = prod(array.shape[:axes])
        flat = array.reshape(outer, -1)
        for axis, rows in ((0, flat), (1, flat.T)):
            first, index = _different(rows)
            size = len(first) * (flat.nbytes // flat.shape[axis]) + len(index) * _index_type(len(first)).itemsize
            if size < best:
                best, found = size, (flat.take(first, axis), index, axis)
    return found


def _different(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the different rows in order of appearance, and of each row its number among them; by their bytes."""
    joined = np.ascontiguousarray(rows)
    whole = joined.view(np.dtype((np.void, joined.itemsize * joined.shape[1]))).reshape(-1)
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return first[order], np.argsort(order)[inverse.reshape(-1)]


def _index_type(count: int) -> np.dtype:
    return np.dtype(next(t for t in _INTEGERS if count - 1 <= np.iinfo(t).max))


def narrowed(array: np.ndarray) -> np.ndarray:
    """The same whole numbers in the narrowest type; anything else as it is."""
    if array.dtype.kind not in "fi" or array.dtype == np.int8 or not np.isfinite(array).all():
        return array
    low, high = array.min(initial=0), array.max(initial=0)
    for kind in _INTEGERS:
        if np.dtype(kind).itemsize < array.itemsize and np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            narrow = array.astype(kind)
            return narrow if narrow.astype(array.dtype).tobytes() == array.tobytes() else array  # no negative zero
    return array


class _Restoring:
    """Nodes, in front of a graph, that restore constants; equal parts are stored once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._nodes: list[ir.Node] = []
        self._known: dict[Hashable, ir.Value] = {}

    def restored(self, array: np.ndarray) -> ir.Value | None:
        """A value of the same content that takes less room; None where there is none."""
        parts = repeated_slices(array)
        if parts is None:
            return self._stored(array) if narrowed(array) is not array else None
        slices, index, axis = parts
        gathered = self._node("Gather", [self._stored(slices), self._stored(index.astype(np.int32))], axis=axis)
        return self._node("Reshape", [gathered, self._stored(np.array(array.shape, np.int64))])

    def place(self) -> None:
        """Put the nodes where everything else comes after them."""
        if self._nodes:
            self._graph.insert_before(self._graph[0], self._nodes)

    def _stored(self, array: np.ndarray) -> ir.Value:
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            narrow = narrowed(array) if array.nbytes >= _SMALL else array
            tensor = ir.Tensor(narrow, name=f"stored_{len(self._known)}")
            value = ir.Value(
                name=tensor.name, shape=ir.Shape(narrow.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._graph.register_initializer(value)
            if narrow is not array:
                value = self._node("Cast", [value], to=int(ir.DataType.from_numpy(array.dtype)))
            self._known[key] = value
        return self._known[key]

    def _node(self, kind: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        node = ir.node(kind, inputs, attributes)
        node.outputs[0].name = f"restored_{len(self._nodes)}"
        self._nodes.append(node)
        output: ir.Value = node.outputs[0]
        return output


def _array(value: ir.Value) -> np.ndarray | None:
    """The values of a constant in a type of numpy's own; None where it has none (int4)."""
    if value.const_value is None or value.dtype in (ir.DataType.INT4, ir.DataType.UINT4):
        return None
    array: np.ndarray = value.const_value.numpy()
    return array
