"""Merges chains of transposes and reshapes of an OpenVINO model into one transpose, or none.

Window models split images into windows and join them again: several permutations with reshapes in between, each a pass
over the memory, which OpenVINO does not merge. With fixed sizes any such chain is one reshape, one permutation and one
reshape. Where the permutations cancel, only a reshape is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from openvino import Model, Node
from openvino import opset13 as ops

_RESHAPES = ("Reshape", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Permutation:
    """The effect of a chain on a tensor: reshape to ``sizes``, transpose by ``order``."""

    sizes: tuple[int, ...]
    order: tuple[int, ...]


class _Atoms:
    """Axes of a tensor as products of parts of the axes it had first; parts are split as reshapes need it.

    ``parts`` lists the parts as they lie in the first tensor, ``axes`` the parts of each present axis.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.sizes = dict(enumerate(shape))
        self.parts = list(self.sizes)
        self.axes = [[i] for i in self.parts]

    def transpose(self, order: tuple[int, ...]) -> None:
        self.axes = [self.axes[i] for i in order]

    def reshape(self, shape: tuple[int, ...]) -> bool:
        """False where an axis would take a fraction of a part."""
        rest = [part for axis in self.axes for part in axis if self.sizes[part] != 1]
        axes: list[list[int]] = []
        for size in shape:
            axis: list[int] = []
            while size > 1:
                part = rest.pop(0)
                if size % self.sizes[part] == 0:
                    axis.append(part)
                    size //= self.sizes[part]
                elif self.sizes[part] % size == 0:
                    rest.insert(0, self._split(part, size))
                    axis.append(part)
                    size = 1
                else:
                    return False
            axes.append(axis)
        self.axes = axes
        return True

    def _split(self, part: int, size: int) -> int:
        """Keep the outer ``size`` in the part; returns the new inner part."""
        inner = len(self.sizes)
        self.sizes[inner] = self.sizes[part] // size
        self.sizes[part] = size
        self.parts.insert(self.parts.index(part) + 1, inner)
        return inner

    def permutation(self) -> Permutation:
        """With neighbours that stay neighbours as one axis."""
        before = [p for p in self.parts if self.sizes[p] != 1]
        after = [p for axis in self.axes for p in axis if self.sizes[p] != 1]
        follows = dict(pairwise(before))
        runs: list[list[int]] = []
        for part in after:
            if runs and follows.get(runs[-1][-1]) == part:
                runs[-1].append(part)
            else:
                runs.append([part])
        ordered = sorted(runs, key=lambda run: before.index(run[0]))
        sizes = tuple(prod(self.sizes[p] for p in run) for run in ordered)
        return Permutation(sizes, tuple(ordered.index(run) for run in runs))


def permutation_of(shape: tuple[int, ...], steps: list[tuple[str, tuple[int, ...]]]) -> Permutation | None:
    """One permutation for a chain of ``("transpose", order)`` and ``("reshape", shape)``; None where there is none.

    Args:
        shape: Shape of the first tensor; no axis is empty.
        steps: What happens to it.
    """
    atoms = _Atoms(shape)
    for kind, value in steps:
        if kind == "transpose":
            atoms.transpose(value)
        elif not atoms.reshape(value):
            return None
    return atoms.permutation()


def merge_views(model: Model) -> int:
    """Replace, in place, every chain whose transposes can be fewer; returns how many transposes are gone."""
    gone = 0
    for node in model.get_ordered_ops():
        if not _is_view(node) or _continues(node):
            continue
        chain = _chain(node)
        transposes = sum(n.get_type_name() == "Transpose" for n in chain)
        if transposes < 1:
            continue
        source = chain[0].input_value(0)
        found = permutation_of(tuple(source.get_shape()), [_step(n) for n in chain])
        if found is None:
            continue
        moves = found.order != tuple(range(len(found.order)))
        if transposes > moves:
            node.output(0).replace(_emit(source, found, moves, list(node.output(0).get_shape())))
            gone += transposes - moves
    model.validate_nodes_and_infer_types()
    return gone


def _is_view(node: Node) -> bool:
    kind = node.get_type_name()
    if kind not in (*_RESHAPES, "Transpose"):
        return False
    ports = [node.input(0), node.output(0)]
    if not all(p.get_partial_shape().is_static and 0 not in p.get_shape() for p in ports):
        return False
    return kind != "Transpose" or _producer(node, 1).get_type_name() == "Constant"


def _producer(node: Node, port: int) -> Node:
    found: Node = node.input_value(port).get_node()
    return found


def _continues(node: Node) -> bool:
    """Whether the chain goes on: one reader, which is a view too."""
    readers = list(node.output(0).get_target_inputs())
    return len(readers) == 1 and readers[0].get_index() == 0 and _is_view(readers[0].get_node())


def _chain(last: Node) -> list[Node]:
    chain = [last]
    while True:
        previous = _producer(chain[0], 0)
        if not _is_view(previous) or not _continues(previous):
            return chain
        chain.insert(0, previous)


def _step(node: Node) -> tuple[str, tuple[int, ...]]:
    if node.get_type_name() != "Transpose":
        return "reshape", tuple(node.output(0).get_shape())
    constant: Any = _producer(node, 1)
    order = tuple(int(i) for i in constant.get_data().reshape(-1))
    return "transpose", order or tuple(reversed(range(len(node.output(0).get_shape()))))


def _emit(source: Any, found: Permutation, moves: bool, shape: list[int]) -> Any:
    if moves:
        source = ops.reshape(source, np.array(found.sizes, np.int64), False)
        source = ops.transpose(source, np.array(found.order, np.int64))
    return ops.reshape(source, np.array(shape, np.int64), False).output(0)
